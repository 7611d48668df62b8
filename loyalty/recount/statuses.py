"""The statuses that orders have: which count, and what is said when none does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from config import Settings
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.recount.customer_ids import Document, format_value
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
    listed = ", ".join(f"{format_status(s)} ({n:,})" for s, n in known[:_SHOWN]) or "no orders"
    ours = {normalize(status) for status in settings.order_statuses}
    mistaken = any(isinstance(status, str) and normalize(status) in ours for status, _ in known)
    if known and all(status is None for status, _ in known):
        return f"no order has a field {settings.status_field}: is ORDER_STATUS_FIELD right?", True
    wanted = ", ".join(map(format_status, settings.order_statuses))
    reason = f"no order has status {wanted}; found: {listed}"
    return reason + ": correct ORDER_STATUSES." * mistaken, mistaken


def statuses(connection: Connection, settings: Settings) -> list[tuple[Any, int]]:
    """Return the statuses of the orders and how many have each, the most frequent first."""
    orders = connection.orders
    grouped: list[Document] = [
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


def format_status(status: Any) -> str:
    """Return a status for a person: quoted and escaped unless it is a plain, visible string."""
    if not isinstance(status, str):
        return format_value(status)
    is_plain = (
        status.isprintable()
        and status == status.strip() != ""
        and not status.replace(".", "").isdigit()  # "2" must differ from the number 2
    )
    return status if is_plain else ascii(status)


def normalize(status: str) -> str:
    return "".join(status.split()).casefold()
