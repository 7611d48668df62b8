"""Which orders are counted: the one filter that every query, event and plan uses."""

from __future__ import annotations

from typing import Any

from bson import Regex

from config import Settings

COLLATION = {"locale": "simple"}
"""Overrides a collection's own collation: only exactly `Shipped` is `Shipped`."""


def counted_orders(settings: Settings, prefix: str = "") -> dict[str, Any]:
    """Return the filter for counted orders; `prefix` leads to the order, as in "fullDocument."."""
    return {
        f"{prefix}{settings.status_field}": {"$in": list(settings.order_statuses)},
        **{f"{prefix}{name}": condition for name, condition in settings.order_filter.items()},
    }


def equality_fields(settings: Settings) -> list[str]:
    """Return the fields for which ORDER_FILTER names one value: an index should begin with them."""
    return [name for name, condition in settings.order_filter.items() if _is_equality(condition)]


def _is_equality(condition: Any) -> bool:
    if isinstance(condition, dict) and set(condition) == {"$eq"}:
        condition = condition["$eq"]
    elif isinstance(condition, dict) and any(name.startswith("$") for name in condition):
        return False
    # Null also finds missing fields, and an array its elements: neither has one place in an index.
    return condition is not None and not isinstance(condition, list | Regex)


def is_counted(status: Any, settings: Settings) -> bool:
    """Return whether orders with this status are counted."""
    return isinstance(status, str) and status in settings.order_statuses
