"""`--status`: the last recounts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from config import Settings
from loyalty.commands.output import format_cell, print_json, print_table
from loyalty.errors import Exit
from loyalty.history import Heartbeat, History, is_fresh
from loyalty.mongo.connection import connect
from loyalty.parsers import format_duration
from loyalty.recount.customer_ids import Document
from loyalty.service import status_of_live


def run(args: argparse.Namespace, settings: Settings) -> int:
    with connect(settings, writing=False) as connection:
        history, now = History(connection.recounts), datetime.now(UTC)
        records, heartbeat, age = history.newest(10), history.heartbeat(), history.age(now)
    if args.json:
        print_json(of_status(records, heartbeat, age, now, settings))
    else:
        print_records(records)
        print_live(heartbeat, now, wanted=settings.live_updates)
        print_age(age, settings.recount_interval)
    return Exit.OK if is_fresh(age, settings.recount_interval) else Exit.FINDINGS


def print_records(records: Sequence[Document]) -> None:
    """Print records of recounts, one a line; times are UTC."""
    if not records:
        return
    names = ("finished_at", "outcome", "changed", "counted_orders", "as_of", "exact", "error")
    rows = ([format_cell(record.get(name)) for name in names] for record in records)
    times = {"finished_at": "finished (UTC)", "as_of": "as of (UTC)"}
    print_table([times.get(name, name.replace("_", " ")) for name in names], *rows)
    print("  As of: what most servers had confirmed, on idle ones a few seconds before the start.")


def print_age(age: timedelta | None, interval: timedelta) -> None:
    """Print how old the points are, and whether that is fresh enough."""
    if age is None:
        print("No recount has succeeded yet")
        return
    fresh = is_fresh(age, interval)
    old = timedelta(seconds=int(age.total_seconds()))
    print(
        f"The points are {format_duration(old)} old: "
        f"{'fresh, at most' if fresh else 'STALE, more than'} "
        f"twice the interval of {format_duration(interval)}"
    )


def print_live(heartbeat: Heartbeat | None, now: datetime, *, wanted: bool) -> None:
    """Print whether live updates are at work; nothing if they are neither that nor wanted."""
    if heartbeat is not None and heartbeat.is_alive(now):
        print(f"Live: {status_of_live(heartbeat)[5:]}")
    elif wanted:
        last = (
            f"the last heartbeat was {format_duration(now - heartbeat.at)} ago" if heartbeat else ""
        )
        print(f"NOT live: {last or 'there is no heartbeat'}")


def of_status(
    records: Sequence[Document],
    heartbeat: Heartbeat | None,
    age: timedelta | None,
    now: datetime,
    settings: Settings,
) -> Document:
    return {
        "fresh": is_fresh(age, settings.recount_interval),
        "age_seconds": age,
        "interval_seconds": settings.recount_interval,
        "live_updates": settings.live_updates,
        "heartbeat": heartbeat
        and {**dataclasses.asdict(heartbeat), "alive": heartbeat.is_alive(now)},
        "recounts": [{n: v for n, v in r.items() if n != "recorded_by"} for r in records],
    }
