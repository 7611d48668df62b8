"""`--status`: the last recounts, live updates, and how old the points are."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from contextlib import suppress
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
from loyalty.recount.undo import find_interrupted

MAX_RECORDS = 10
MAX_WRITE_TIME = timedelta(minutes=10)
"""A recount that has no record after this time was interrupted."""
_NO_SUCCESS = ("refused", "failed")


def run(args: argparse.Namespace, settings: Settings) -> Exit:
    with connect(settings, verify=False) as connection:
        history, now = History(connection.recounts, settings), _read_server_time(connection)
        records, heartbeat = history.newest(MAX_RECORDS), history.heartbeat()
        age, undo = history.age(now, heartbeat), history.undo_since_success()
        interrupted = None
        with suppress(NoPermission):  # a monitoring user may read the records only
            interrupted = find_interrupted(connection, settings, history)
    is_live = settings.live_updates and heartbeat is not None and heartbeat.is_alive(now)
    is_fresh = age is not None and age <= max_age(settings.recount_interval, is_live=is_live)
    is_fresh = is_fresh and undo is None
    is_mixture = interrupted is not None and now - interrupted.at > MAX_WRITE_TIME
    is_fresh = is_fresh and not is_mixture
    if args.json:
        print_json(
            {
                "fresh": is_fresh,
                "undone_recount": undo and undo["undone_recount"],
                "interrupted_recount": interrupted and interrupted.id,
                "age_seconds": age,
                "interval_seconds": settings.recount_interval,
                "live_updates": settings.live_updates,
                "heartbeat": heartbeat
                and {**dataclasses.asdict(heartbeat), "alive": heartbeat.is_alive(now)},
                "recounts": [{n: v for n, v in r.items() if n != "recorded_by"} for r in records],
            }
        )
    else:
        _print_records(records)
        _print_live_updates(heartbeat, now, wanted=settings.live_updates)
        _print_last_outcome(records)
        if interrupted is not None:
            print_line(
                f"Recount {interrupted.id} of {format_cell(interrupted.at)} UTC has no record: it "
                "is writing, or it was interrupted and has written some users. The next successful "
                f"recount makes all points exact; --undo {interrupted.id} restores them"
            )
        if is_mixture:
            print_line("The points are STALE until the next successful recount")
        else:
            _print_age(records, undo, age, settings.recount_interval, is_live=is_live)
    return Exit.OK if is_fresh else Exit.FINDINGS


def _read_server_time(connection: Connection) -> datetime:
    """Return the server's time: this machine's clock may be wrong. Raises ServiceError."""
    with map_driver_errors("hello", connection.hosts):
        time: datetime = connection.client.admin.command("hello")["localTime"]
    return time.replace(tzinfo=UTC)


def _print_records(records: Sequence[Document]) -> None:
    """Print one line for each record, the newest first."""
    if not records:
        return
    columns = {
        "finished (UTC)": "finished_at",
        "outcome": "outcome",
        "users written": "changed",
        "failed updates": "failed_updates",
        "counted orders": "counted_orders",
        "as of (UTC)": "as_of",
        "exact": "exact",
        "host": "host",
        "recount": "_id",
        "error": "error",
    }
    rows = ([format_cell(record.get(name)) for name in columns.values()] for record in records)
    print_table(list(columns), *rows)
    print_line("  As of: the time of the snapshot; on an idle server, seconds before the start.")


def _print_last_outcome(records: Sequence[Document]) -> None:
    """Print how the last recounts ended, unless the last one succeeded."""
    if not records or (last := records[0])["outcome"] in ("succeeded", "undone"):
        return
    if last["outcome"] == "incomplete":
        failed = pluralize(last["failed_updates"], "failed update")
        print_line(f"The last recount was incomplete: {failed}")
        return
    number = len(list(takewhile(lambda record: record["outcome"] in _NO_SUCCESS, records)))
    ended = "failed" if last["outcome"] == "failed" else "was refused by the safety check"
    if number > 1:
        number_text = f"{number} or more" if number == MAX_RECORDS else str(number)
        print_line(f"The last {number_text} recounts did not succeed")
    print_line(f"The last recount {ended}" + (f": {last['error']}" if last["error"] else ""))


def _print_age(
    records: Sequence[Document],
    undo: Document | None,
    age: timedelta | None,
    interval: timedelta,
    *,
    is_live: bool,
) -> None:
    """Print how old the points are, and whether that is fresh."""
    if undo is not None:
        print_line(
            f"Recount {undo['undone_recount']} was undone, {pluralize(undo['changed'], 'user')} "
            "restored. The points are STALE until the next recount"
        )
        return
    if age is None:
        print_line("No recount has succeeded yet")
        return
    limit = max_age(interval, is_live=is_live)
    source = "the limit with live updates" if is_live else "twice RECOUNT_INTERVAL"
    limit_text = f"{format_duration(limit)} ({source})"
    verdict = f"fresh, not older than {limit_text}"
    if age > limit:
        verdict = f"STALE, older than {limit_text}"
        if is_live:
            verdict += (
                ". Either the replica set acknowledges no write by a majority, or orders change "
                "faster than they are counted"
            )
    elif records[0]["outcome"] in _NO_SUCCESS:
        verdict = f"still {verdict}, from an earlier recount"
    whole_seconds = timedelta(seconds=int(age.total_seconds()))
    print_line(f"The points are {format_duration(whole_seconds)} old: {verdict}")


def _print_live_updates(heartbeat: Heartbeat | None, now: datetime, *, wanted: bool) -> None:
    """Print whether live updates are running; nothing if they are neither running nor wanted."""
    if heartbeat is not None and heartbeat.is_alive(now):
        print_line(
            f"Live updates: running since {format_cell(heartbeat.live_since)} UTC, "
            f"as of {format_cell(heartbeat.as_of)} UTC, "
            f"{pluralize(heartbeat.users_updated, 'update')}, "
            f"{pluralize(heartbeat.waiting, 'pending change')}"
        )
    elif wanted:
        last = "there is no heartbeat"
        if heartbeat is not None:
            last = f"the last heartbeat was {format_duration(now - heartbeat.at)} ago"
        print_line(f"Live updates: NOT running, {last}")
