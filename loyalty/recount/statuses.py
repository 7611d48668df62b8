"""The statuses that orders have: which count, and what is said when none does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from config import Settings
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.recount.customer_ids import NO_CUSTOMER, Document, canonical, format_value
from loyalty.recount.index import COLLATION

log = logging.getLogger("loyalty")

MAX_STATUSES = 1_000
_SHOWN = 10


def check_statuses(connection: Connection, settings: Settings) -> str | None:
    """Say what statuses there are though no order was counted; return why that is a mistake."""
    known = statuses(connection, settings)
    if any(is_counted(status, settings) for status, _ in known):
        return None  # the first of them has come after the count
    reason, mistaken = describe_uncounted(known, settings)
    users = connection.users
    counted = {settings.status_field: {"$in": list(settings.order_statuses)}}
    with map_driver_errors("find", users):
        swapped = users.find_one(counted, {"_id": 1}, max_time_ms=settings.count_ms)
    if swapped:
        swap = "are ORDERS_COLLECTION and USERS_COLLECTION swapped?"
        reason = f"{reason}; but {users.full_name} holds such: {swap}"
    if mistaken or swapped:
        return f"{reason} Or let one recount through with --once --force"
    log.warning("no_counted_order %s", reason)
    return None


def describe_uncounted(known: Sequence[tuple[Any, int]], settings: Settings) -> tuple[str, bool]:
    """Return what statuses there are instead of ours, and whether that is plainly a mistake.

    It is one if some status differs from a counted one only in case or blanks, or none has any.
    """
    listed = ", ".join(f"{shown_status(s)} ({n:,})" for s, n in known[:_SHOWN]) or "no orders"
    ours = {normalize(status) for status in settings.order_statuses}
    mistaken = any(isinstance(status, str) and normalize(status) in ours for status, _ in known)
    if known and all(status is None for status, _ in known):
        return f"no order has a field {settings.status_field}: is ORDER_STATUS_FIELD right?", True
    reason = f"no order has status {', '.join(settings.order_statuses)}; found: {listed}"
    return reason + ": correct ORDER_STATUSES." * mistaken, mistaken


def statuses(
    connection: Connection, settings: Settings, *, sample: int = 0
) -> list[tuple[Any, int]]:
    """Return the statuses of the orders and how many have each, the most frequent first."""
    orders = connection.orders
    grouped: list[Document] = [{"$sample": {"size": sample}}] if sample else []
    grouped += [
        {"$group": {"_id": f"${settings.status_field}", "n": {"$sum": 1}}},
        {"$sort": {"n": -1, "_id": 1}},
        {"$limit": MAX_STATUSES},
    ]
    with map_driver_errors("find", orders):
        found = orders.aggregate(
            grouped, collation=COLLATION, allowDiskUse=True, maxTimeMS=settings.count_ms
        )
        return [(row["_id"], row["n"]) for row in found]


def is_counted(status: Any, settings: Settings) -> bool:
    """Return whether orders with this status earn points."""
    return isinstance(status, str) and status in settings.order_statuses


def shown_status(status: Any) -> str:
    """Return a status for a person, in quotes where that makes a difference."""
    plain = isinstance(status, str) and status == status.strip() != ""
    return str(status) if plain else format_value(status)


def normalize(status: str) -> str:
    return "".join(status.split()).casefold()


def orders_of(
    connection: Connection, settings: Settings, customer: Any, forms: Sequence[Any]
) -> list[tuple[Any, Any, int]]:
    """Return a customer's orders by the form of the id and the status: how many there are.

    `forms` find all orders of the canonical id, and may find others.
    """
    orders, status = connection.orders, settings.status_field
    key = {"form": f"${settings.customer_field}", "status": f"${status}"}
    with map_driver_errors("find", orders):
        # To name every status makes the index's second field reachable; null is none, too.
        every = {"$in": [*orders.distinct(status, collation=COLLATION), None]}
        grouped: list[Document] = [
            {"$match": {status: every, settings.customer_field: {"$in": list(forms)}}},
            {"$group": {"_id": key, "n": {"$sum": 1}}},
            {
                "$match": {
                    "$expr": {"$eq": [canonical("$_id.form", NO_CUSTOMER), {"$literal": customer}]}
                }
            },
            {"$sort": {"n": -1, "_id": 1}},
        ]
        found = orders.aggregate(grouped, collation=COLLATION, maxTimeMS=settings.count_ms)
        return [(row["_id"]["form"], row["_id"].get("status"), row["n"]) for row in found]


class OrderBreakdown(NamedTuple):
    """A customer's orders by the form of the id and the status; `why` there are no points."""

    id: str
    status: str
    orders: int
    points: int
    why: str


def explained(
    settings: Settings, orders: Sequence[tuple[Any, Any, int]], *, user_exists: bool
) -> list[OrderBreakdown]:
    """Say of a customer's orders what they earn; `of_a_user`: whether the id refers to one."""
    rows = []
    for form, status, n in orders:
        points, why = 0, ""
        if not is_counted(status, settings):
            why = f"only {' and '.join(settings.order_statuses)} counts"
        elif not user_exists:
            why = f"no user has the _id {format_value(form)}"
        else:
            points = n * settings.points_per_order
        rows.append(OrderBreakdown(format_value(form), shown_status(status), n, points, why))
    return rows
