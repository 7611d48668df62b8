"""The record of a recount: its fields, and the settings that it belongs to."""

from __future__ import annotations

import socket
from typing import Any

from config import VERSION, Settings
from loyalty.recount.customer_ids import Document
from loyalty.recount.tally import COUNTS, Result

TARGET_SETTINGS = ("orders", "users", "points_field")
"""The settings that tell two shops in one database apart."""
_COUNTED = ("order_statuses", "points_per_order", "status_field", "customer_field")


def recorded_settings(settings: Settings) -> Document:
    """Return the settings that say what is counted, and where."""
    values = {name: getattr(settings, name) for name in (*TARGET_SETTINGS, *_COUNTED)}
    return values | {"order_statuses": list(settings.order_statuses)}


def record_of(result: Result) -> dict[str, Any]:
    """Return the fields of a record that describe the recount; `--json` prints the same."""
    counts = {name: getattr(result.totals, name) for name in COUNTS}
    return {
        "started_at": result.started_at,
        "finished_at": result.finished_at,
        "seconds": result.seconds,
        "as_of": result.as_of,
        "cluster_time": result.cluster_time if result.exact else None,
        "exact": result.exact,
        "outcome": result.outcome,
        **counts,
        "changed": _written(result),
        "failed_updates": result.failed_updates,
        "error": result.error,
        "host": socket.gethostname(),
        "version": VERSION,
    }


def _written(result: Result) -> int | None:
    """Return how many users were written; None if an error ended the recount: not known then."""
    if result.outcome == "refused":
        return 0
    return None if result.error else result.totals.changed - result.failed_updates
