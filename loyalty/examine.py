"""The look at the data before the first write: whatever would make it a surprise."""

from __future__ import annotations

import logging
from typing import Any

from config import Settings
from loyalty.counting import Customers
from loyalty.ids import NO_CUSTOMER, Document, canonical, shown
from loyalty.index import COLLATION
from loyalty.mongo import Connection
from loyalty.sorting import sorted_errors

log = logging.getLogger("loyalty")

_STATUSES = 10  # shown at most


def mistaken_status(connection: Connection, settings: Settings) -> str | None:
    """Say what statuses there are though no order was counted; return why that is a mistake.

    It is one if some status differs from a counted one only in case or blanks.
    """
    found = statuses(connection, settings)
    listed = ", ".join(f"{shown_status(status)} ({n:,})" for status, n in found) or "no orders"
    wanted = ", ".join(settings.order_statuses)
    reason = f"no order has status {wanted}; found: {listed}"
    ours = {_folded(status) for status in settings.order_statuses}
    if any(isinstance(status, str) and _folded(status) in ours for status, _ in found):
        return f"{reason}: correct ORDER_STATUSES, or let one recount through with --once --force"
    log.warning("no_counted_order %s", reason)
    return None


def statuses(connection: Connection, settings: Settings) -> list[tuple[Any, int]]:
    """Return the most frequent statuses of the orders, and how many have each."""
    orders = connection.orders
    grouped: list[Document] = [
        {"$group": {"_id": f"${settings.status_field}", "n": {"$sum": 1}}},
        {"$sort": {"n": -1, "_id": 1}},
        {"$limit": _STATUSES},
    ]
    with sorted_errors("find in", orders.full_name):
        found = orders.aggregate(grouped, collation=COLLATION, allowDiskUse=True)
        return [(row["_id"], row["n"]) for row in found]


def shown_status(status: Any) -> str:
    """Return a status for a person, in quotes where that makes a difference."""
    plain = isinstance(status, str) and status == status.strip() != ""
    return str(status) if plain else shown(status)


def _folded(status: str) -> str:
    return "".join(status.split()).casefold()


def orders_by_status(
    connection: Connection, settings: Settings, customers: Customers
) -> dict[str, int]:
    """Return how many orders customers have in each status."""
    orders, status = connection.orders, settings.status_field
    forms = [form for _, each in customers for form in each]
    key = {"c": f"${settings.customer_field}", "s": f"${status}"}
    is_theirs = {
        "$in": [canonical("$_id.c", NO_CUSTOMER), {"$literal": [own for own, _ in customers]}]
    }
    with sorted_errors("find in", orders.full_name):
        # To name every status makes the index's second field reachable.
        every = {"$in": orders.distinct(status)}
        counted: list[Document] = [
            {"$match": {status: every, settings.customer_field: {"$in": forms}}},
            {"$group": {"_id": key, "n": {"$sum": 1}}},
            {"$match": {"$expr": is_theirs}},
            {"$group": {"_id": "$_id.s", "n": {"$sum": "$n"}}},
            {"$sort": {"n": -1, "_id": 1}},
        ]
        return {str(row["_id"]): row["n"] for row in orders.aggregate(counted, collation=COLLATION)}
