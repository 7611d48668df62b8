"""What a person reads: the log's format on stderr, results on stdout."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timedelta

from config import Settings
from loyalty.counting import Document
from loyalty.history import COUNTS
from loyalty.mongo import Connection
from loyalty.recount import Change, Totals

_CHANGE = ("user", "from", "to")


def log_to_stderr() -> None:
    """Set up logging: for the journal if that is where stderr goes, for people otherwise."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JournalFormatter() if _under_journal() else _TerminalFormatter())
    # Other libraries only from WARNING on: at DEBUG the driver logs commands and documents.
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("loyalty").setLevel(logging.INFO)


class _TerminalFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        self.converter = time.gmtime


class _JournalFormatter(logging.Formatter):
    """The journal adds the time, and takes each line's priority from its start (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelno
        priority = 3 if level >= logging.ERROR else 4 if level >= logging.WARNING else 6
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def _under_journal() -> bool:
    try:
        stderr = os.fstat(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):  # closed, or no file
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


def fields(totals: Totals, took: timedelta) -> str:
    """Return the totals as key=value, for the log."""
    numbers = [f"{name}={getattr(totals, name)}" for name in ("users", *COUNTS)]
    exact = str(totals.exact).lower()
    numbers += [f"as_of={totals.as_of:%Y-%m-%dT%H:%M:%SZ}", f"exact={exact}"]
    numbers.append(f"seconds={took.total_seconds():.1f}")
    if totals.unknown_sample:
        numbers.append(f'unknown_sample="{", ".join(totals.unknown_sample)}"')
    return " ".join(numbers)


def print_totals(totals: Totals) -> None:
    """Print what a recount found."""
    unknown = f"{totals.unknown_customers:,} with {totals.orders_of_unknown_customers:,} orders"
    if totals.unknown_sample:
        unknown += f", such as {', '.join(totals.unknown_sample)}"
    exact = "one point in time" if totals.exact else "not one point in time: standalone server"
    changed = f"{totals.changed:,} ({totals.increased:,} up, {totals.decreased:,} down)"
    if same := totals.changed - totals.increased - totals.decreased:
        changed = changed.replace(")", f", {same:,} only in type)")
    _print_table(
        ("users", f"{totals.users:,}"),
        ("counted orders", f"{totals.counted_orders:,}"),
        ("changed", changed),
        ("unknown customers", unknown),
        ("orders without customer", f"{totals.orders_without_customer:,}"),
        ("as of", f"{_cell(totals.as_of)} UTC ({exact})"),
    )


def print_changes(changes: Sequence[Change]) -> None:
    """Print the largest changes first."""
    if changes:
        print("Largest changes")
        ranked = sorted(changes, reverse=True)
        _print_table(_CHANGE, *((c.user, c.before, f"{c.after:,}") for c in ranked))


def print_customer(customer: str, orders: dict[str, int], users: Sequence[Change]) -> None:
    """Print one customer: orders by status, and each user's points before and after."""
    print(f"{customer}: " + (", ".join(f"{n:,} {s}" for s, n in orders.items()) or "no orders"))
    _print_table(_CHANGE, *((c.user, c.before, f"{c.after:,}") for c in users))


def print_records(records: Sequence[Document]) -> None:
    """Print records of recounts, one a line."""
    if not records:
        return
    names = ("finished_at", "outcome", "changed", "counted_orders", "as_of", "exact", "error")
    rows = ([_cell(record[name]) for name in names] for record in records)
    _print_table([name.replace("_", " ") for name in names], *rows)


def print_age(age: timedelta | None, interval: timedelta) -> bool:
    """Print how old the points are and return whether that is fresh enough."""
    if age is None:
        print("No recount has succeeded yet")
        return False
    fresh = age <= 2 * interval
    old = timedelta(seconds=int(age.total_seconds()))
    print(
        f"The points are {old} old: {'fresh, at most' if fresh else 'STALE, more than'} "
        f"twice the interval of {interval}"
    )
    return fresh


def print_settings(settings: Settings, connection: Connection, problem: str | None) -> None:
    """Print what the service goes by, without credentials."""
    rows = [
        (f.name.replace("_", " "), _cell(getattr(settings, f.name)))
        for f in dataclasses.fields(settings)
        if f.repr
    ]
    exact = "yes" if connection.snapshots else "no: a standalone server"
    _print_table(
        ("hosts", settings.hosts),
        ("server version", connection.server_version),
        ("one point in time", exact),
        *rows,
        ("permissions", problem or "fine"),
    )


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case datetime():
            return f"{value:%Y-%m-%d %H:%M:%S}"
        case tuple():
            return ", ".join(value)
    return str(value) or "none"


def _print_table(*rows: Sequence[str]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  " + "  ".join(map(str.ljust, row, widths)).rstrip())
