"""What the server is asked: the aggregation that counts and compares, and the forms of ids."""

from __future__ import annotations

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


def pipeline(settings: Settings, customer: str | None = None) -> list[Document]:
    """Return the aggregation over the orders, of everyone or of one `customer`.

    Its rows are `{_id, n, c, u}`: n orders, c users. Users that are right already are summed up,
    with `_id` `{held: bool}`, whether they have points. All others have `_id` `{id: canonical id}`
    and `u`, one `{k: {_id}, p}` for each user: the own id and the stored points, as `{w: points}`
    where that is no integer.
    """
    orders: Document = {"status": {"$in": list(settings.order_statuses)}}
    users: list[Document] = [_user_row()]
    wanted: list[Document] = []
    points = {"$multiply": ["$n", settings.points_per_order]}
    # Right is: the set of stored points is the set of just the counted points.
    right: Any = {"$setEquals": ["$u.p", [points]]}
    if customer is not None:
        forms = {"$in": id_forms(customer)}
        orders = {**orders, "customer_id": forms}
        users.insert(0, {"$match": {"_id": forms}})
        right = False  # so that the points of the users come back, right or not
        wanted = [{"$match": {"_id": {"$in": canonical_ids(customer)}}}]
    return [
        {"$match": orders},
        # $match lets through an array that holds a counted status; as a part of the key it shows.
        # Both fields are in the index, so no order is fetched.
        {"$group": {"_id": {"c": "$customer_id", "s": "$status"}, "n": {"$sum": 1}}},
        {
            "$project": {
                "_id": canonical("$_id.c", NO_CUSTOMER),
                "n": {"$cond": [{"$isArray": "$_id.s"}, 0, "$n"]},
            }
        },
        {"$unionWith": {"coll": settings.users, "pipeline": users}},
        {"$group": {"_id": "$_id", "n": {"$sum": "$n"}, "u": {"$push": "$u"}}},
        *wanted,
        {
            "$group": {
                "_id": {"$cond": [right, {"held": {"$gt": ["$n", 0]}}, {"id": "$_id"}]},
                "n": {"$sum": "$n"},
                "c": {"$sum": {"$size": "$u"}},
                "u": {"$first": "$u"},
            }
        },
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
    stored = f"${POINTS}"
    is_integer = {"$in": [{"$type": stored}, ["int", "long"]]}
    points = {"$cond": [is_integer, stored, {"w": stored}]}
    return {"$project": {"_id": canonical("$_id", None), "u": {"k": {"_id": "$_id"}, "p": points}}}


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
