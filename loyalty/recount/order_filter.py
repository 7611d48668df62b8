"""The condition for counted orders. Queries, events and indexes take it from here."""

from typing import Any

from bson import Regex

from config import Settings


def counted_orders(settings: Settings, prefix: str = "") -> dict[str, Any]:
    """Return the filter for counted orders; `prefix` is the path of the order: "fullDocument."."""
    conditions = {
        settings.status_field: {"$in": list(settings.order_statuses)},
        **other_conditions(settings),
    }
    return {f"{prefix}{name}": condition for name, condition in conditions.items()}


def other_conditions(settings: Settings) -> dict[str, Any]:
    """Return the conditions of a counted order besides the status, by field: ORDER_FILTER."""
    return dict(settings.order_filter)


def equality_fields(settings: Settings) -> list[str]:
    """Return the fields for which a condition names one value: an index should begin with them."""
    conditions = other_conditions(settings)
    return [name for name, condition in conditions.items() if _is_equality(condition)]


def _is_equality(condition: Any) -> bool:
    if isinstance(condition, dict) and set(condition) == {"$eq"}:
        condition = condition["$eq"]
    elif isinstance(condition, dict) and any(name.startswith("$") for name in condition):
        return False
    # Null also matches missing fields, and an array also matches arrays that contain it: neither is
    # one value of an index.
    return condition is not None and not isinstance(condition, list | Regex)


def is_counted(status: Any, settings: Settings) -> bool:
    """Return whether orders with this status are counted."""
    return isinstance(status, str) and status in settings.order_statuses
