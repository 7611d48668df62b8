"""What the commands share: tables, cells of tables, and JSON on stdout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from bson import Timestamp

from loyalty.parsers import format_duration
from loyalty.recount.customer_ids import Document


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


def format_cell(value: object) -> str:
    """Return a value as it stands in a table."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case datetime():
            return f"{value:%Y-%m-%d %H:%M:%S}"
        case timedelta():
            return format_duration(value)
        case tuple():
            return ", ".join(value)
    return str(value) or "none"


def counted(n: int, thing: str) -> str:
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def print_table(*rows: Sequence[str]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  " + "  ".join(map(str.ljust, row, widths)).rstrip())


def format_sample(sample: Sequence[str]) -> str:
    return f", such as {', '.join(sample)}" if sample else ""
