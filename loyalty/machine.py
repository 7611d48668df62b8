"""What a program reads: results as one JSON document; the README shows each."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from bson import Timestamp

from config import Settings
from loyalty.examine import PreflightReport
from loyalty.history import Heartbeat, is_fresh
from loyalty.mongo.connection import Connection
from loyalty.record import record_of
from loyalty.recount.customer_ids import Document
from loyalty.recount.statuses import OrderBreakdown, is_counted, shown_status
from loyalty.recount.tally import Change, Result


def print_json(document: Document) -> None:
    print(json.dumps(document, default=_plain))


def _plain(value: object) -> object:
    match value:
        case datetime():
            utc = value.astimezone(UTC)
            return utc.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        case timedelta():
            return value.total_seconds()
        case Timestamp():
            return {"t": value.time, "i": value.inc}
    return str(value)


def of_recount(result: Result) -> Document:
    """Return the record of a recount, and the number of users."""
    return {**record_of(result), "users": result.totals.users}


def of_dry_run(result: Result) -> Document:
    """Return what a recount would do; nothing has come of it."""
    nothing = ("outcome", "error", "failed_updates")
    return {
        **{name: value for name, value in of_recount(result).items() if name not in nothing},
        "refusal": result.refusal,
        "warning": result.warning,
        "unknown_sample": result.totals.unknown_sample,
        "largest_changes": _changes(sorted(result.totals.largest, reverse=True)),
    }


def _changes(changes: Sequence[Change]) -> list[Document]:
    return [{"user": c.user, "from": c.before, "to": c.after} for c in changes]


def of_customer(
    customer: str, orders: Sequence[OrderBreakdown], users: Sequence[Change]
) -> Document:
    rows = [row._asdict() for row in orders]
    return {"customer": customer, "orders": rows, "users": _changes(users)}


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


def of_check(
    settings: Settings, connection: Connection, problem: str | None, found: PreflightReport
) -> Document:
    data = dataclasses.asdict(found)
    data["statuses"] = [
        {"status": shown_status(status), "orders": n, "counts": is_counted(status, settings)}
        for status, n in found.statuses
    ]
    return {
        "problems": data.pop("problems"),
        "permissions": problem,
        "hosts": settings.hosts,
        "server": connection.server_version,
        "topology": connection.topology,
        "inexact": connection.snapshot_unsupported_reason or None,
        "settings": settings.format_value(),
        "data": data,
    }
