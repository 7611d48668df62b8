"""Which orders are counted: the one filter that every query, event and plan uses."""

from __future__ import annotations

from typing import Any

from config import Settings

COLLATION = {"locale": "simple"}
"""Overrides a collection's own collation: only exactly `Shipped` is `Shipped`."""


def counted_orders(settings: Settings, prefix: str = "") -> dict[str, Any]:
    """Return the filter for counted orders; `prefix` leads to the order, as in "fullDocument."."""
    return {f"{prefix}{settings.status_field}": {"$in": list(settings.order_statuses)}}


def is_counted(status: Any, settings: Settings) -> bool:
    """Return whether orders with this status are counted."""
    return isinstance(status, str) and status in settings.order_statuses
