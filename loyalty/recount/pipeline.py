"""The aggregation that counts and compares, and the parser of its rows.

`build_pipeline` and `parse_rows` belong together; tests run them through a real server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from config import Settings
from loyalty.mongo.values import Document, decode_documents
from loyalty.recount.customer_ids import NO_CUSTOMER, canonical_expr, is_non_canonical_expr
from loyalty.recount.order_filter import counted_orders
from loyalty.recount.partitions import EVERYTHING, Partition
from loyalty.recount.points import points_expr
from loyalty.recount.tally import CustomerCount, UpToDate, User

# The group key of all non-canonical ids. A `_id` is never an array, and partitions are not used if
# a customer id may be one.
_NON_CANONICAL = ["non_canonical"]
# In the group key of users with a null, empty or array key. It is random, so that no stored
# customer id equals it.
_NO_KEY = os.urandom(16)


class NonCanonicalIdFound(Exception):
    """A partition holds a hex id in upper or mixed case: its customer may be in another one."""


@dataclass(frozen=True)
class Scope:
    """What one aggregation covers: the ids in `partition`; of them only `customers`, if given.

    `include_up_to_date`: rows also for customers whose users are up to date.
    """

    partition: Partition = EVERYTHING
    customers: Sequence[Any] = ()
    include_up_to_date: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether all forms of an id are in this scope."""
        return self.partition is EVERYTHING or bool(self.customers)


def build_pipeline(
    settings: Settings, scope: Scope, *, status_may_be_array: bool
) -> list[Document]:
    """Return the aggregation over the orders collection."""
    stages: list[Document] = []
    for bounds in scope.partition.intervals:
        orders = _count_orders(settings, scope, bounds, status_may_be_array=status_may_be_array)
        # The first scan belongs to the aggregation itself, the others are added to it.
        stages += [_union_with(settings.orders, orders)] if stages else orders
    for bounds in scope.partition.intervals:
        stages.append(_union_with(settings.users, _read_users(settings, scope, bounds)))
    stages.append(
        {"$group": {"_id": "$_id", "orders": {"$sum": "$orders"}, "users": {"$push": "$user"}}}
    )
    if scope.customers:
        stages.append({"$match": {"_id": {"$in": list(scope.customers)}}})
    up_to_date: Document = {"$literal": False}
    if not scope.include_up_to_date:
        up_to_date = _up_to_date_expr(settings)
    customer = {"$cond": ["$up_to_date", None, "$_id"]}
    user_count = {"$size": "$users"}
    points = points_expr("$orders", settings)
    totals: dict[str, Any] = {
        "orders": {"$sum": "$orders"},
        "users": {"$first": "$users"},
        "user_count": {"$sum": user_count},
        "users_with_points": {"$sum": {"$cond": [{"$gt": [points, 0]}, user_count, 0]}},
    }
    if settings.user_key_field != "_id":
        totals["sharing_a_key"] = {"$sum": {"$cond": [{"$gt": [user_count, 1]}, user_count, 0]}}
    return [
        *stages,
        {"$set": {"up_to_date": up_to_date}},
        # One row for all customers who are up to date.
        {"$group": {"_id": {"up_to_date": "$up_to_date", "customer": customer}, **totals}},
    ]


def _union_with(collection: str, stages: list[Document]) -> Document:
    return {"$unionWith": {"coll": collection, "pipeline": stages}}


def _count_orders(
    settings: Settings, scope: Scope, bounds: Sequence[Document], *, status_may_be_array: bool
) -> list[Document]:
    counted: Any = 1
    if status_may_be_array:  # $match accepts an array that contains a counted status
        counted = {"$cond": [{"$isArray": f"${settings.status_field}"}, 0, 1]}
    customer = settings.customer_field
    return [
        {"$match": {**counted_orders(settings), **_match(customer, bounds)}},
        {"$group": {"_id": f"${customer}", "orders": {"$sum": counted}}},
        {"$project": {"_id": _group_key(settings, scope, "$_id", NO_CUSTOMER), "orders": 1}},
    ]


def _read_users(settings: Settings, scope: Scope, bounds: Sequence[Document]) -> list[Document]:
    user: Document = {"_id": "$_id", "points": f"${settings.points_field}"}
    if "." in settings.points_field:
        user = {**user, "created_path": _created_path(settings.points_field)}
    key = settings.user_key_field
    group_key = _group_key(settings, scope, f"${key}", None)
    if key != "_id":
        group_key = _separate_users_without_key(group_key)
    return [
        {"$match": _match(key, bounds)},
        # $project would treat an existing array `user` as a path.
        {"$replaceWith": {"_id": group_key, "user": user}},
    ]


def _separate_users_without_key(group_key: Document) -> Document:
    """Return the group key of a user: `group_key`, or a unique one if that is null, "" or an array.

    A million users without the field, in one group, would exceed the 16 MB of a document.
    """
    no_key = {"no_key": {"$literal": _NO_KEY}, "user": "$_id"}
    has_no_key_expr = {"$or": [{"$in": ["$$key", [None, ""]]}, {"$isArray": "$$key"}]}
    key_expr = {"$cond": [has_no_key_expr, no_key, "$$key"]}
    return {"$let": {"vars": {"key": group_key}, "in": key_expr}}


def _created_path(points_field: str) -> Document:
    """Return the expression for the outermost missing document around a nested field, or null."""
    parts = points_field.split(".")
    parents = [".".join(parts[:n]) for n in range(1, len(parts))]
    branches = [
        {"case": {"$eq": [{"$type": f"${path}"}, "missing"]}, "then": path} for path in parents
    ]
    return {"$switch": {"branches": branches, "default": None}}


def _match(field: str, bounds: Sequence[Document]) -> Document:
    return {"$and": [{field: operator} for operator in bounds]} if bounds else {}


def _group_key(settings: Settings, scope: Scope, value: str, if_missing: Any) -> Document:
    """Return the expression for the key that orders and users of one customer share."""
    mostly_hex = settings.user_key_field == "_id"
    canonical = canonical_expr(value, if_missing, mostly_hex=mostly_hex)
    if scope.is_complete:
        return canonical
    non_canonical = is_non_canonical_expr(value, "$$customer")
    key = {"$cond": [non_canonical, _NON_CANONICAL, "$$customer"]}
    return {"$let": {"vars": {"customer": canonical}, "in": key}}


def _up_to_date_expr(settings: Settings) -> Document:
    is_equal_expr = {
        "$and": [
            {"$in": [{"$type": "$$this.points"}, ["int", "long"]]},
            {"$eq": ["$$this.points", points_expr("$orders", settings)]},
        ]
    }
    return {
        "$and": [
            {"$ne": ["$users", []]},
            {"$allElementsTrue": [{"$map": {"input": "$users", "in": is_equal_expr}}]},
            {"$ne": ["$_id", _NON_CANONICAL]},
        ]
    }


def parse_rows(batch: bytes, scope: Scope) -> Iterator[CustomerCount | UpToDate]:
    """Parse a raw batch of the results for `scope`. Raises NonCanonicalIdFound."""
    for row in decode_documents(batch):
        if row["_id"]["up_to_date"]:
            yield UpToDate(
                orders=row["orders"],
                users=row["user_count"],
                users_with_points=row["users_with_points"],
                users_sharing_a_key=row.get("sharing_a_key", 0),
            )
            continue
        customer = row["_id"].get("customer")
        if customer == _NON_CANONICAL and not scope.is_complete:
            raise NonCanonicalIdFound
        users = [
            User(u["_id"], u.get("points"), "points" in u, u.get("created_path"))
            for u in row["users"]
        ]
        yield CustomerCount(customer, row["orders"], users)
