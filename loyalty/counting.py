"""What the server is asked: the aggregation that counts and compares, and the forms of ids."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Mapping
from itertools import product
from typing import Any

import bson
from bson import ObjectId

from config import Settings

Document = Mapping[str, Any]

POINTS = "loyalty_points"
INDEX = [("status", 1), ("customer_id", 1)]
COLLATION = {"locale": "simple"}  # whatever the collections' own: exactly `Shipped`

NO_CUSTOMER: list[Any] = []
"""The key of the orders without customer: a user's _id is never an array."""

USER = 2**50
"""Stands for a user among points: more than all points of a customer, so that one is not two."""

_STORED = f"${POINTS}"
# Few enough that the sum over all users is an integer too.
_IS_PLAUSIBLE: Document = {
    "$and": [
        {"$in": [{"$type": _STORED}, ["int", "long"]]},
        {"$gte": [_STORED, 0]},
        {"$lt": [_STORED, 2**40]},
    ]
}
_SUM: Document = {"$sum": "$v"}  # of the numbers
_RIGHT: Document = {
    "$or": [
        # One user, with the canonical id: what the orders earn, less USER and the points.
        {"$and": [{"$eq": [_SUM, -USER]}, {"$eq": ["$v.p", []]}]},
        # One user, with another form of it, and so no USER in the sum.
        {"$eq": ["$v.p", [_SUM]]},
    ]
}
_HOLDS: Document = {"$and": [{"$isNumber": _STORED}, {"$gt": [_STORED, 0]}]}
_SUMS: list[Document] = [
    {
        "$group": {
            "_id": None,
            "users": {"$sum": 1},
            "holders": {"$sum": {"$cond": [_HOLDS, 1, 0]}},
            "points": {"$sum": {"$cond": [_IS_PLAUSIBLE, _STORED, 0]}},
        }
    },
    {"$project": {"_id": NO_CUSTOMER, "v": "$$ROOT"}},
]


def pipeline(settings: Settings, customer: str | None = None) -> list[Document]:
    """Return the aggregation over the orders, of everyone or of one `customer`.

    Its rows are `{k: {_id: canonical id}, v}`, of the customers who are not one user with the right
    points. v holds the points that the orders earn, a number for each form of the id in them, and
    the users. One whose _id is the canonical id is `-USER - points` if those are plausible, and NaN
    if there are none; any other is `{k: {_id}, p}`, p being the points, as `{w: points}` if
    implausible. Everyone's v of NO_CUSTOMER also holds `{users, holders, points}`, the sums over
    all users.
    """
    orders: Document = {"status": {"$in": list(settings.order_statuses)}}
    users: list[Document] = [_user_row()]
    wanted: list[Document] = [{"$match": {"$expr": {"$not": [_RIGHT]}}}]
    # Before the long $group: a snapshot is kept for five minutes only.
    sums: list[Document] = [{"$unionWith": {"coll": settings.users, "pipeline": _SUMS}}]
    if customer is not None:
        forms = {"$in": id_forms(customer)}
        orders = {**orders, "customer_id": forms}
        users.insert(0, {"$match": {"_id": forms}})
        wanted = [{"$match": {"_id": {"$in": canonical_ids(customer)}}}]
        sums = []
    # $match lets an array through that holds a counted status. Both fields are in the index, so
    # without arrays no order is fetched. ($type keeps MongoDB 6.0 from the engine that is slow with
    # many groups.)
    is_array = {"$eq": [{"$type": "$status"}, "array"]}
    earned = {"$sum": {"$cond": [is_array, 0, settings.points_per_order]}}
    return [
        {"$match": orders},
        {"$group": {"_id": "$customer_id", "v": earned}},
        {"$project": {"_id": canonical("$_id", NO_CUSTOMER), "v": 1}},
        {"$unionWith": {"coll": settings.users, "pipeline": users}},
        *sums,
        # One accumulator, mostly of numbers: beyond 100 MB the server turns to its disk.
        {"$group": {"_id": "$_id", "v": {"$push": "$v"}}},
        *wanted,
        {"$project": {"_id": 0, "k": {"_id": "$_id"}, "v": 1}},
    ]


def customer_orders(customer: str, statuses: list[Any]) -> list[Document]:
    """Return the aggregation over the orders that counts a customer's, by status.

    `statuses` names every status there is, which makes the index's second field reachable.
    """
    ids = canonical_ids(customer)
    return [
        {"$match": {"status": {"$in": statuses}, "customer_id": {"$in": id_forms(customer)}}},
        {"$group": {"_id": {"c": "$customer_id", "s": "$status"}, "n": {"$sum": 1}}},
        {"$match": {"$expr": {"$in": [canonical("$_id.c", NO_CUSTOMER), {"$literal": ids}]}}},
        {"$group": {"_id": "$_id.s", "n": {"$sum": "$n"}}},
        {"$sort": {"n": -1, "_id": 1}},
    ]


def _user_row() -> Document:
    own = canonical("$_id", None)
    row = {"k": {"_id": "$_id"}, "p": {"$cond": [_IS_PLAUSIBLE, _STORED, {"w": _STORED}]}}
    branches = [
        {"case": {"$ne": ["$_id", own]}, "then": row},
        {"case": _IS_PLAUSIBLE, "then": {"$subtract": [-USER, _STORED]}},
        {"case": {"$lte": [_STORED, None]}, "then": math.nan},  # null or missing
    ]
    return {"$project": {"_id": own, "v": {"$switch": {"branches": branches, "default": row}}}}


def canonical(value: str, nothing: Any) -> Document:
    """Make a hex string its ObjectId; null, and "" if `nothing` is not null, `nothing`."""
    other: Any = value
    if nothing is not None:
        other = {"$cond": [{"$eq": [value, ""]}, nothing, value]}
    return {"$convert": {"input": value, "to": "objectId", "onError": other, "onNull": nothing}}


def canonical_ids(text: str) -> list[Any]:
    """Return what an id given as text may be once it is canonical."""
    ids = [form for form in id_forms(text) if not isinstance(form, bson.Regex)]
    return ids[1:] if ObjectId.is_valid(text) else ids


def id_forms(text: str) -> list[Any]:
    """Return what an id given as text may be in the database: text, number, UUID, ObjectId.

    24 hex digits may be stored in any mix of cases. An index finds those by their prefixes up to
    the ninth letter, 256 at most; more than one customer may share them.
    """
    forms: list[Any] = [text]
    if re.fullmatch(r"-?[0-9]{1,18}", text):
        forms.append(int(text))
    elif re.fullmatch(r"-?[0-9]+\.[0-9]+", text):
        forms.append(float(text))
    elif re.fullmatch(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", text):
        forms.append(bson.Binary.from_uuid(uuid.UUID(text)))
    if ObjectId.is_valid(text):
        letters = [match.start() for match in re.finditer("[a-fA-F]", text)]
        prefix = text[: letters[8]] if len(letters) > 8 else text
        cases = product(*(sorted({digit.lower(), digit.upper()}) for digit in prefix))
        forms += [ObjectId(text), *(bson.Regex("^" + "".join(case)) for case in cases)]
    return forms
