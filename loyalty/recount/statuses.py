"""Queries about the statuses that orders have."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pymongo.collection import Collection

from config import Settings
from loyalty.concurrency import ProgressCallback
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.values import SIMPLE_COLLATION, Document
from loyalty.recount.customer_ids import NO_CUSTOMER, all_forms, canonical_expr
from loyalty.recount.order_filter import counted_orders, other_conditions
from loyalty.recount.points import points_expr
from loyalty.recount.safety import (
    SafetyReport,
    StatusCounts,
    check_collections,
    check_statuses,
    describe_swapped_collections,
)

MAX_STATUSES = 1_000


class CustomerOrders(NamedTuple):
    """How many orders of a customer have one form of the id and one status.

    `points` is what they earn if they count.
    """

    form: Any
    status: Any
    number: int
    points: int
    matches_filter: bool
    """Whether they match ORDER_FILTER."""


def count_statuses(connection: Connection, settings: Settings) -> StatusCounts:
    """Return the 1,000 most frequent statuses with the number of orders, the most frequent first.

    Only orders that match ORDER_FILTER are counted. Raises ServiceError.
    """
    orders = connection.orders
    stages: list[Document] = [
        {"$match": other_conditions(settings)},
        {"$group": {"_id": f"${settings.status_field}", "n": {"$sum": 1}}},
        {"$sort": {"n": -1, "_id": 1}},
        {"$limit": MAX_STATUSES},
    ]
    return [(row["_id"], row["n"]) for row in _aggregate(orders, stages, settings)]


def find_missing_collections(connection: Connection) -> str | None:
    """Return the refusal if orders or users is missing. Raises ServiceError."""
    database = connection.users.database
    with map_driver_errors("listCollections", database.name):
        # Only those that the database user may see: this takes no privilege.
        existing = sorted(database.list_collection_names(authorizedCollections=True))
    missing = [
        collection.full_name
        for collection in (connection.orders, connection.users)
        if collection.name not in existing
    ]
    return check_collections(missing, existing)


def check_uncounted(
    connection: Connection, settings: Settings, on_progress: ProgressCallback
) -> SafetyReport:
    """Check a recount that counted no order or no user. Raises ServiceError."""
    on_progress("")
    if refusal := find_missing_collections(connection):
        return SafetyReport(refusals=[refusal])
    report = check_statuses(count_statuses(connection, settings), settings)
    on_progress("")
    in_users: list[Document] = [{"$match": counted_orders(settings)}, {"$limit": 1}]
    if _aggregate(connection.users, in_users, settings):
        report.refusals.append(describe_swapped_collections(settings))
    return report


def count_customer_orders(
    connection: Connection, settings: Settings, customer: Any
) -> list[CustomerOrders]:
    """Return all orders of a customer, also those that do not count. Raises ServiceError.

    `customer` is a canonical id; "" stands for the orders without customer.
    """
    orders, status = connection.orders, settings.status_field
    is_none = customer == ""
    forms = ["", None, []] if is_none else all_forms(customer)
    group_key = NO_CUSTOMER if is_none else customer
    match: dict[str, Any] = {settings.customer_field: {"$in": forms}}
    # The server reads each status once from the index (DISTINCT_SCAN).
    stages: list[Document] = [{"$group": {"_id": f"${status}"}}, {"$limit": MAX_STATUSES}]
    known = [row["_id"] for row in _aggregate(orders, stages, settings)]
    # If a parent field is an array, $group reads an array of statuses, which $in cannot find.
    has_arrays = "." in status and any(isinstance(value, list) for value in known)
    if len(known) < MAX_STATUSES and not has_arrays:
        # For the index, which usually begins with the status. Null finds orders without a status.
        match[status] = {"$in": [*known, None]}
    # One row for null and missing, which are both shown as null.
    key = {
        "form": {"$ifNull": [f"${settings.customer_field}", None]},
        "status": {"$ifNull": [f"${status}", None]},
    }
    is_customer_expr = {"$eq": [canonical_expr("$_id.form", NO_CUSTOMER), {"$literal": group_key}]}
    count: list[Document] = [
        {"$group": {"_id": key, "orders": {"$sum": 1}}},
        {"$match": {"$expr": is_customer_expr}},
        {"$set": {"points": points_expr(settings)}},
        {"$sort": {"orders": -1, "_id": 1}},
    ]
    condition = other_conditions(settings)
    parts = {
        "matching": [{"$match": condition}, *count],
        "other": [{"$match": {"$nor": [condition]}}, *count],
    }
    (found,) = _aggregate(orders, [{"$match": match}, {"$facet": parts}], settings)
    return [
        CustomerOrders(
            form=row["_id"]["form"],
            status=row["_id"]["status"],
            number=row["orders"],
            points=row["points"],
            matches_filter=name == "matching",
        )
        for name in parts
        for row in found[name]
    ]


def _aggregate(
    collection: Collection[Any], stages: Sequence[Document], settings: Settings
) -> list[Document]:
    with map_driver_errors("find", collection):
        rows = collection.aggregate(
            stages, collation=SIMPLE_COLLATION, allowDiskUse=True, maxTimeMS=settings.count_ms
        )
        return list(rows)
