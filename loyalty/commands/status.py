"""`--status`: the last recounts, live updates, and how old the points are."""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from itertools import takewhile

from config import Settings
from loyalty.commands.output import format_cell, pluralize, print_json, print_line, print_table
from loyalty.errors import Exit, NoPermission
from loyalty.heartbeat import Heartbeat, max_age
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.values import Document
from loyalty.parsers import format_duration
from loyalty.recount.change_log import LoggedRecount, find_unrecorded

MAX_RECORDS = 10
_UNSUCCESSFUL_OUTCOMES = ("refused", "failed")


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
    """The newest recount, if it has no record: it is writing, or was interrupted."""

    @property
    def has_live_updates(self) -> bool:
        return self.heartbeat is not None and self.heartbeat.is_alive(self.now)

    @property
    def is_interrupted(self) -> bool:
        """Whether the newest recount was interrupted, and some users lack its points."""
        return self.unrecorded is not None and self.unrecorded.is_silent(self.now)

    @property
    def is_live(self) -> bool:
        return self.settings.live_updates and self.has_live_updates

    @property
    def max_age(self) -> timedelta:
        return max_age(self.settings.recount_interval, is_live=self.is_live)

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
    with suppress(NoPermission):  # a monitoring user may read the records only
        unrecorded = find_unrecorded(connection, settings, history)
    age = history.compute_age(now, heartbeat)
    undo = history.find_undo_since_success()
    # Last: where there is an age, the record that it is taken from is among these.
    records = history.find_newest(MAX_RECORDS)
    return Status(settings, now, records, heartbeat, age, undo, unrecorded)


def read_server_time(connection: Connection) -> datetime:
    """Return the server's time, as this machine's clock may be wrong. Raises ServiceError."""
    with map_driver_errors("hello", connection.hosts):
        hello = connection.client.admin.command("hello")
    local_time: datetime = hello["localTime"]
    return local_time.replace(tzinfo=UTC)


def _to_json(status: Status) -> Document:
    heartbeat = status.heartbeat
    return {
        "fresh": status.is_fresh,
        "undone_recount": status.undo and status.undo["undone_recount"],
        "interrupted_recount": status.unrecorded and status.unrecorded.id,
        "age_seconds": status.age,
        "interval_seconds": status.settings.recount_interval,
        "live_updates": status.settings.live_updates,
        "heartbeat": heartbeat and {**asdict(heartbeat), "alive": status.has_live_updates},
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
    number = len(
        list(takewhile(lambda record: record["outcome"] in _UNSUCCESSFUL_OUTCOMES, records))
    )
    ended = "failed" if last["outcome"] == "failed" else "was refused by the safety checks"
    if number > 1:
        number_text = f"{number} or more" if number == MAX_RECORDS else str(number)
        print_line(f"The last {number_text} recounts did not succeed")
    print_line(f"The last recount {ended}" + (f": {last['error']}" if last["error"] else ""))


def _print_freshness(status: Status) -> None:
    """Print whether the points are fresh, and why not."""
    if (recount := status.unrecorded) is not None:
        print_line(
            f"Recount {recount.id} of {format_cell(recount.at)} UTC has no record: it is still "
            "writing, it was interrupted after it had written some users, or its record could not "
            "be written (record_write_failed in the log). The next successful recount makes all "
            f"points exact; --undo {recount.id} restores the points that users had before it"
        )
    if status.is_interrupted:
        print_line("The points are STALE until the next successful recount")
    elif (undo := status.undo) is not None:
        recount_id = undo["undone_recount"]
        text = f"The undo of recount {recount_id} has not finished: repeat --undo {recount_id}"
        if undo["outcome"] == "undone":
            restored = pluralize(undo["changed"], "user")
            text = f"Recount {recount_id} was undone: {restored} restored"
        print_line(f"{text}. The points are STALE until the next successful recount")
    elif status.age is None:
        print_line("No recount has succeeded yet")
    else:
        _print_age(status, status.age)


def _print_age(status: Status, age: timedelta) -> None:
    source = "the limit with live updates" if status.is_live else "twice RECOUNT_INTERVAL"
    limit = f"{format_duration(status.max_age)} ({source})"
    verdict = f"fresh, not older than {limit}"
    if not status.is_fresh:
        verdict = f"STALE, older than {limit}"
        if status.is_live:
            verdict += (
                ". Either the replica set acknowledges no write by a majority, or orders change "
                "faster than they are counted"
            )
    elif status.records[0]["outcome"] in _UNSUCCESSFUL_OUTCOMES:
        verdict = f"still {verdict}, from an earlier recount"
    whole_seconds = timedelta(seconds=int(age.total_seconds()))
    print_line(f"The points are {format_duration(whole_seconds)} old: {verdict}")


def _print_live_updates(status: Status) -> None:
    """Print whether live updates are running; nothing if they are neither running nor wanted."""
    heartbeat = status.heartbeat
    if heartbeat is not None and status.has_live_updates:
        print_line(
            f"Live updates: running since {format_cell(heartbeat.live_since)} UTC, "
            f"as of {format_cell(heartbeat.as_of)} UTC, "
            f"{pluralize(heartbeat.users_updated, 'user')} updated, "
            f"{pluralize(heartbeat.waiting, 'pending change')}"
        )
    elif status.settings.live_updates:
        last = "there is no heartbeat"
        if heartbeat is not None:
            last = f"the last heartbeat was {format_duration(status.now - heartbeat.at)} ago"
        print_line(f"Live updates: NOT running, {last}")
