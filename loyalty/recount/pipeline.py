"""The aggregation that counts and compares: what the server is asked, and the reading of its rows.

`pipeline` and `rows` belong together; a round trip through a real server tests them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from config import Settings
from loyalty.recount.customer_ids import (
    NO_CUSTOMER,
    Document,
    canonical,
    decode_documents,
    get_value,
)
from loyalty.recount.partitions import Range


@dataclass(frozen=True, slots=True)
class User:
    """A user as stored: `key` is `{_id: …}`, which finds it again whatever Python makes of it."""

    key: Document
    points: Any


@dataclass(frozen=True, slots=True)
class CustomerCount:
    """A customer: the counted orders under all forms of the id, and the users it refers to."""

    customer: Any
    orders: int
    users: Sequence[User]


@dataclass(frozen=True, slots=True)
class UpToDate:
    """All customers whose users hold the right points already: how many there are, in sum."""

    orders: int
    users: int
    users_with_points_before: int


@dataclass(frozen=True, slots=True)
class OddForm:
    """The text of an ObjectId in capitals or mixed case, as some order or user has it."""

    text: str


@dataclass(frozen=True)
class Scope:
    """Whom an aggregation is about: the ids in `range`; of those, `customers` if there are any.

    `apart`, for a range of texts: odd forms come as rows of their own, since their customer may be
    in another range.
    `with_right`: rows also of the customers who are right.
    """

    range: Range = Range([[]])  # noqa: RUF009 -- it is immutable
    apart: bool = False
    customers: Sequence[Any] = ()
    include_up_to_date: bool = False


def pipeline(settings: Settings, scope: Scope, *, arrays: bool) -> list[Document]:
    """Return the aggregation over the orders; `arrays`: some status may be an array."""
    counted: list[Document] = []
    for interval in scope.range.intervals:
        orders = _orders(settings, scope, interval, arrays=arrays)
        # The first scan is the aggregation's own, all others are added to it.
        counted += [_union(settings.orders, orders)] if counted else orders
    for interval in scope.range.intervals:
        counted.append(_union(settings.users, _users(settings, scope, interval)))
    counted.append(
        {"$group": {"_id": "$_id", "orders": {"$sum": "$orders"}, "users": {"$push": "$user"}}}
    )
    if scope.customers:
        counted.append({"$match": {"_id": {"$in": list(scope.customers)}}})
    key = {"right": "$right", "customer": {"$cond": ["$right", None, "$_id"]}}
    if scope.apart:
        key["odd"] = "$_id.odd"
    compared: list[Document] = [
        {
            "$set": {
                "right": {"$literal": False}
                if scope.include_up_to_date
                else _is_up_to_date(settings)
            }
        },
        {
            "$group": {  # of those who are right, only sums come back
                "_id": key,
                "orders": {"$sum": "$orders"},
                "users": {"$first": "$users"},
                "number": {"$sum": {"$size": "$users"}},
                "holders": {"$sum": {"$cond": [{"$gt": ["$orders", 0]}, {"$size": "$users"}, 0]}},
            }
        },
    ]
    if scope.apart:  # documents before ObjectIds, and so odd forms before all customers
        compared.append({"$sort": {"_id.customer": 1}})
    # A document for each value, so that one which Python cannot hold does not spoil the other; only
    # now, as it is work for every user that is still there.
    wrapped = {"key": {"_id": "$$this._id"}, "stored": {"points": "$$this.points"}}
    compared.append({"$set": {"users": {"$map": {"input": "$users", "in": wrapped}}}})
    return counted + compared


def _union(collection: str, change_stream_pipeline: list[Document]) -> Document:
    return {"$unionWith": {"coll": collection, "pipeline": change_stream_pipeline}}


def _orders(
    settings: Settings, scope: Scope, interval: Sequence[Document], *, arrays: bool
) -> list[Document]:
    status, customer = settings.status_field, settings.customer_field
    counted: Any = 1
    if arrays:  # $match lets an array through that holds a counted status
        counted = {"$cond": [{"$eq": [{"$type": f"${status}"}, "array"]}, 0, 1]}
    wanted = {status: {"$in": list(settings.order_statuses)}, **_matching(customer, interval)}
    return [
        {"$match": wanted},
        {"$group": {"_id": f"${customer}", "orders": {"$sum": counted}}},
        {"$project": {"_id": _customer(scope, NO_CUSTOMER), "orders": 1}},
    ]


def _users(settings: Settings, scope: Scope, interval: Sequence[Document]) -> list[Document]:
    user = {"_id": "$_id", "points": f"${settings.points_field}"}
    return [
        {"$match": _matching("_id", interval)},
        # Not $project, which would go into a user's own field `user`, were it an array.
        {"$replaceWith": {"_id": _customer(scope, None), "user": user}},
    ]


def _matching(field: str, operators: Sequence[Document]) -> Document:
    return {"$and": [{field: operator} for operator in operators]} if operators else {}


def _customer(scope: Scope, nothing: Any) -> Document:
    """Return the key that orders and users meet under; of an odd form that is apart, `{odd}`."""
    plain = canonical("$_id", nothing)
    if not scope.apart:
        return plain
    is_odd = {
        "$and": [
            {"$eq": [{"$type": "$_id"}, "string"]},
            {"$eq": [{"$type": "$$customer"}, "objectId"]},
            {"$ne": [{"$toString": "$$customer"}, "$_id"]},
        ]
    }
    key = {"$cond": [is_odd, {"odd": "$_id"}, "$$customer"]}
    return {"$let": {"vars": {"customer": plain}, "in": key}}


def _is_up_to_date(settings: Settings) -> Document:
    points = {"$multiply": ["$orders", settings.points_per_order]}
    is_right = {
        "$and": [
            {"$in": [{"$type": "$$this.points"}, ["int", "long"]]},
            {"$eq": ["$$this.points", points]},
        ]
    }
    return {
        "$and": [
            {"$ne": ["$users", []]},
            {"$allElementsTrue": [{"$map": {"input": "$users", "in": is_right}}]},
            {"$eq": [{"$type": "$_id.odd"}, "missing"]},
        ]
    }


def rows(answer: bytes) -> Iterator[CustomerCount | UpToDate | OddForm]:
    """Read an answer of the server to a `pipeline`."""
    for document in decode_documents(answer):
        key, orders = document["_id"], document["orders"]
        customer, odd = get_value(key, "customer"), get_value(key, "odd")
        if get_value(key, "right") is True:
            yield UpToDate(orders, document["number"], document["holders"])
        elif isinstance(odd, str):
            yield OddForm(odd)
        else:
            users = [
                User(user["key"], get_value(user["stored"], "points")) for user in document["users"]
            ]
            yield CustomerCount(customer, orders, users)
