"""`--status`: the last recounts, live updates, and how old the points are."""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import takewhile

from config import Settings
from loyalty.commands.output import format_cell, pluralize, print_json, print_line, print_table
from loyalty.errors import Exit, MissingPrivilege
from loyalty.heartbeat import MAX_LIVE_AGE, Heartbeat
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.values import Document
from loyalty.parsers import format_duration
from loyalty.recount.change_log import LoggedRecount, find_unrecorded

MAX_RECORDS = 10
_UNSUCCESSFUL_OUTCOMES = ("refused", "failed")
_STALE = "The points are STALE until the next successful recount"


@dataclass(frozen=True)
class Status:
    """What is known about the points at the server's time `now`."""

    settings: Settings
    now: datetime
    records: Sequence[Document]
    """The newest first."""
    heartbeat: Heartbeat | None
    age: timedelta | None
    """Of the points; None if no recount has succeeded."""
    undo: Document | None
    """The record of an undo after the last success."""
    unrecorded: LoggedRecount | None
    """The newest recount, if it has no record: `_print_freshness` says why."""

    @property
    def is_heartbeat_alive(self) -> bool:
        return self.heartbeat is not None and self.heartbeat.is_alive(self.now)

    @property
    def is_interrupted(self) -> bool:
        """Whether the newest recount was interrupted, and some users lack its points."""
        return self.unrecorded is not None and self.unrecorded.is_silent(self.now)

    @property
    def max_age(self) -> timedelta:
        """The maximum age of fresh points."""
        limit = 2 * self.settings.recount_interval
        return min(limit, MAX_LIVE_AGE) if self.is_heartbeat_alive else limit

    @property
    def is_fresh(self) -> bool:
        is_recent = self.age is not None and self.age <= self.max_age
        return is_recent and self.undo is None and not self.is_interrupted


def run(args: argparse.Namespace, settings: Settings) -> Exit:
    """Print the status; FINDINGS if the points are not fresh."""
    with connect(settings, verify=False) as connection:
        status = _read_status(connection, settings)
    if args.json:
        print_json(_to_json(status))
    else:
        _print_records(status.records)
        _print_live_updates(status)
        _print_last_outcome(status.records)
        _print_freshness(status)
    return Exit.OK if status.is_fresh else Exit.FINDINGS


def _read_status(connection: Connection, settings: Settings) -> Status:
    """Read the records and the heartbeat. Raises ServiceError."""
    history = History(connection.recounts, settings)
    now = read_server_time(connection)
    heartbeat = history.find_heartbeat()
    unrecorded = None
    with suppress(MissingPrivilege):  # a monitoring user may read the records only
        unrecorded = find_unrecorded(connection, settings, history)
    age = history.compute_age(now)
    undo = history.find_undo_since_success()
    # Read last, so that there is a record if there is an age.
    records = history.find_newest(MAX_RECORDS)
    return Status(settings, now, records, heartbeat, age, undo, unrecorded)


def read_server_time(connection: Connection) -> datetime:
    """Return the server's time, as this machine's clock may be wrong. Raises ServiceError.

    If the server does not report its time, return that of this machine.
    """
    with map_driver_errors("hello", connection.hosts):
        hello = connection.client.admin.command("hello")
    time: datetime = hello.get("localTime", datetime.now(UTC))
    return time.replace(tzinfo=UTC)


def _to_json(status: Status) -> Document:
    heartbeat = status.heartbeat
    return {
        "fresh": status.is_fresh,
        "undone_recount": status.undo and status.undo["undone_recount"],
        "interrupted_recount": status.unrecorded and status.unrecorded.id,
        "age_seconds": status.age,
        "interval_seconds": status.settings.recount_interval,
        "live_updates": status.settings.live_updates,
        "heartbeat": heartbeat and {**asdict(heartbeat), "alive": status.is_heartbeat_alive},
        "recounts": [
            {name: value for name, value in record.items() if name != "recorded_by"}
            for record in status.records
        ],
    }


def _print_records(records: Sequence[Document]) -> None:
    """Print one line for each record, the newest first, in at most 100 columns."""
    if not records:
        return
    columns = {
        "finished (UTC)": "finished_at",
        "outcome": "outcome",
        "written": "changed",
        "failed": "failed_updates",
        "orders": "counted_orders",
        "recount": "_id",
        "host": "host",
    }
    rows = ([format_cell(record.get(name)) for name in columns.values()] for record in records)
    print_table(list(columns), *rows)
    print_line("  written, failed: users; orders: counted orders; --json prints all fields")


def _print_last_outcome(records: Sequence[Document]) -> None:
    """Print how the last recounts ended, unless the last one succeeded."""
    if not records or (last := records[0])["outcome"] in ("succeeded", "undone"):
        return
    if last["outcome"] == "incomplete":
        failed = pluralize(last["failed_updates"], "failed update")
        print_line(f"The last recount was incomplete: {failed}")
        return
    unsuccessful = list(takewhile(lambda r: r["outcome"] in _UNSUCCESSFUL_OUTCOMES, records))
    if (number := len(unsuccessful)) > 1:
        or_more = " or more" if number == MAX_RECORDS else ""
        print_line(f"The last {number}{or_more} recounts did not succeed")
    ended = "failed" if last["outcome"] == "failed" else "was refused by the safety checks"
    print_line(f"The last recount {ended}: {last['error']}")


def _print_freshness(status: Status) -> None:
    """Print whether the points are fresh, and why not."""
    if (recount := status.unrecorded) is not None:
        print_line(
            f"Recount {recount.id} of {format_cell(recount.at)} UTC has no record: it is still "
            "writing, was interrupted, or could not write its record (record_write_failed in the "
            "log). The next successful recount makes all points exact; "
            f"--undo {recount.id} restores the points that users had before that recount"
        )
    if status.is_interrupted:
        print_line(_STALE)
    elif status.undo is not None:
        print_line(f"{_describe_undo(status.undo)}. {_STALE}")
    elif status.age is None:
        print_line("No recount has succeeded yet")
    else:
        _print_age(status, status.age)


def _describe_undo(undo: Document) -> str:
    recount = undo["undone_recount"]
    if undo["outcome"] == "undone":
        return f"Recount {recount} was undone: {pluralize(undo['changed'], 'user')} restored"
    return f"The undo of recount {recount} has not finished: repeat --undo {recount}"


def _print_age(status: Status, age: timedelta) -> None:
    is_live = status.is_heartbeat_alive
    source = "the limit with live updates" if is_live else "twice RECOUNT_INTERVAL"
    limit = f"{format_duration(status.max_age)} ({source})"
    verdict = f"fresh, not older than {limit}"
    if not status.is_fresh:
        verdict = f"STALE, older than {limit}"
        if is_live:
            verdict += (
                ". Either a full recount is running, or the replica set acknowledges no write by a "
                "majority, or orders change faster than they are counted"
            )
    elif status.records[0]["outcome"] in _UNSUCCESSFUL_OUTCOMES:
        verdict = f"still {verdict}, from an earlier recount"
    print_line(f"The points are {format_duration(age)} old: {verdict}")


def _print_live_updates(status: Status) -> None:
    """Print whether live updates are running; nothing if they are off, and not running."""
    heartbeat = status.heartbeat
    last = "there is no heartbeat"
    if heartbeat is not None:
        age = max(timedelta(0), status.now - heartbeat.at)  # members have clocks of their own
        last = f"the last heartbeat was {format_duration(age)} ago"
    if heartbeat is not None and status.is_heartbeat_alive:
        print_line(
            f"Live updates: running since {format_cell(heartbeat.live_since)} UTC, "
            f"as of {format_cell(heartbeat.as_of)} UTC, "
            f"{pluralize(heartbeat.users_updated, 'user')} updated, "
            f"{pluralize(heartbeat.waiting, 'pending change')}; {last}"
        )
    elif status.settings.live_updates:
        print_line(f"Live updates: NOT running, {last}")
