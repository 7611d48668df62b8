"""The look at the data before the first write: whatever would make it a surprise.

A small shop is looked at whole. Of a large one there are estimates, from samples and from what the
index gives, and each look may take the server a few seconds and no more.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from config import Settings
from loyalty.errors import ServiceError
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.recount.counter import Count, Customers
from loyalty.recount.customer_ids import (
    NO_CUSTOMER,
    Document,
    canonical,
    canonicalize,
    format_value,
    indexable_variants,
)
from loyalty.recount.index import COLLATION, array_conditions, inspect_plan
from loyalty.recount.statuses import describe_uncounted, is_counted, statuses
from loyalty.recount.tally import Tally, no_matching_users

log = logging.getLogger("loyalty")

_LIMIT = timedelta(seconds=5)  # for one look
_SMALL = 100_000  # users, and orders, that are looked at whole
_USERS, _ORDERS = 1_000, 10_000  # of more than that, so many
_SHOWN = 10


@dataclass(slots=True)
class PreflightReport:
    """What was found; None is what nobody could tell within the time."""

    sampled: bool = False
    """Whether the numbers are estimates."""
    problems: list[str] = field(default_factory=list)
    """What has to be put right before the first recount."""
    users: int | None = None
    ids: dict[str, int] = field(default_factory=dict)
    """How many users there are by the type of their `_id`."""
    orders: int | None = None
    statuses: list[tuple[Any, int]] = field(default_factory=list)
    orders_without_customer: int | None = None
    """Like those of unknown customers, of orders that count."""
    orders_of_unknown_customers: int | None = None
    unknown_sample: list[str] = field(default_factory=list)
    users_with_points_before: int | None = None
    decreased: int | None = None
    index: str = ""


def run_preflight(connection: Connection, settings: Settings) -> PreflightReport:
    """Look at the data; what cannot be looked at is a warning."""
    found = PreflightReport()
    brief = dataclasses.replace(settings, count_timeout=min(_LIMIT, settings.count_timeout))
    for look in (_collections, _index, _users, _orders_by_status, _references, _points):
        try:
            look(connection, brief, found)
        except ServiceError as error:
            log.warning('not_examined error="%s"', error)
        if found.orders is None:  # nor would anything else be
            break
    return found


def _collections(connection: Connection, settings: Settings, found: PreflightReport) -> None:
    users, orders = connection.users, connection.orders
    with map_driver_errors("listCollections", users.database):
        # Of those that the database user may see, to list them takes no permission.
        there = users.database.list_collection_names(authorizedCollections=True)
        limit = {"maxTimeMS": settings.count_ms}
        found.users, found.orders = (c.estimated_document_count(**limit) for c in (users, orders))
    found.sampled = max(found.users, found.orders) > _SMALL
    others = ", ".join(sorted(there)[:_SHOWN]) or "none"
    found.problems += [
        f"there is no collection {collection.full_name}; found in this database: {others}"
        for collection in (users, orders)
        if collection.name not in there
    ]


def _index(connection: Connection, settings: Settings, found: PreflightReport) -> None:
    plan, orders = inspect_plan(connection.orders, settings), connection.orders
    found.index = plan.hint or "there, and all that a recount reads"
    if not plan.hint:
        return
    names = f"{settings.status_field} or {settings.customer_field}"
    users_with_points_after = {
        "$or": array_conditions(settings.status_field) + array_conditions(settings.customer_field)
    }
    with map_driver_errors("count", orders):
        n = orders.count_documents(users_with_points_after, maxTimeMS=settings.count_ms)
    if n:
        state = "there, but" if plan.index_name else "not there, and would be"
        hold = "1 order holds" if n == 1 else f"{n:,} orders hold"
        why = f"{hold} an array in {names}, so that every order is fetched"
        found.index = f"{state} of little use: {why}"


def _users(connection: Connection, settings: Settings, found: PreflightReport) -> None:
    points = f"${settings.points_field}"
    holds = {"$and": [{"$isNumber": points}, {"$gt": [points, 0]}]}
    group = {
        "_id": {"$type": "$_id"},
        "n": {"$sum": 1},
        "holders": {"$sum": {"$cond": [holds, 1, 0]}},
    }
    sample: list[Document] = [{"$sample": {"size": _USERS}}] if found.sampled else []
    asked: list[Document] = [*sample, {"$group": group}, {"$sort": {"n": -1}}]
    users = connection.users
    with map_driver_errors("find", users):
        rows = list(users.aggregate(asked, maxTimeMS=settings.count_ms))
    seen = sum(row["n"] for row in rows)
    found.ids = {row["_id"]: _scaled(row["n"], seen, found.users) for row in rows}
    found.users_with_points_before = _scaled(sum(row["holders"] for row in rows), seen, found.users)


def _orders_by_status(connection: Connection, settings: Settings, found: PreflightReport) -> None:
    known = statuses(connection, settings, sample=_ORDERS if found.sampled else 0)
    seen = sum(n for _, n in known)
    found.statuses = [(status, _scaled(n, seen, found.orders)) for status, n in known]
    if any(is_counted(status, settings) for status, _ in known):
        return
    orders = connection.orders
    one = {settings.status_field: {"$in": list(settings.order_statuses)}}
    with map_driver_errors("find", orders):
        rare = orders.find(one, {"_id": 1}, collation=COLLATION, max_time_ms=settings.count_ms)
        if found.sampled and list(rare.limit(1)):
            return
    found.problems += [describe_uncounted(known, settings)[0]] if known else []


def _references(connection: Connection, settings: Settings, found: PreflightReport) -> None:
    """Look up the users that a sample of counted orders refers to; `_points` does it for all."""
    if not found.sampled:
        return
    text: Document = {"$toString": "$own"}
    forms = {
        "$cond": [
            {"$eq": [{"$type": "$own"}, "objectId"]},
            ["$own", text, {"$toUpper": text}],
            ["$own"],
        ]
    }
    orders = connection.orders
    users_of_forms = {"from": settings.users, "localField": "forms", "foreignField": "_id"}
    looked_up: list[Document] = [
        {"$sample": {"size": _ORDERS}},
        {"$match": {settings.status_field: {"$in": list(settings.order_statuses)}}},
        {"$limit": _USERS},
        {"$project": {"own": canonical(f"${settings.customer_field}", NO_CUSTOMER)}},
        {"$set": {"forms": forms}},
        {"$lookup": {**users_of_forms, "as": "users"}},
        {"$project": {"own": 1, "known": {"$ne": ["$users", []]}}},
    ]
    with map_driver_errors("aggregate", orders):
        asked = orders.aggregate(looked_up, collation=COLLATION, maxTimeMS=settings.count_ms)
        rows = list(asked)
    counted = sum(n for status, n in found.statuses if is_counted(status, settings))
    nobody = [row["own"] for row in rows if row["own"] == NO_CUSTOMER]
    unknown = [row["own"] for row in rows if not row["known"] and row["own"] != NO_CUSTOMER]
    _note_references(settings, found, len(nobody), len(unknown), of=len(rows), counted=counted)
    found.unknown_sample = [format_value(own) for own in unknown[:5]]


def _points(connection: Connection, settings: Settings, found: PreflightReport) -> None:
    """Count, for all users or a sample of them, and compare with the points that they hold."""
    recount = Tally(settings, lambda _key, _points: None)
    count = Count(connection, settings, datetime.now(UTC))
    if not found.sampled:
        rows = count.count_all(single_query=True)
    elif inspect_plan(connection.orders, settings).supports_partitions:
        rows = count.count_customers(_some_customers(connection, settings), include_up_to_date=True)
    else:
        return  # each customer would be a look at all orders
    for row in rows:
        recount.pop_pending(row)
    totals = recount.totals
    if not found.sampled:
        found.unknown_sample = totals.unknown_sample
        nobody, unknown = totals.orders_without_customer, totals.orders_of_unknown_customers
        counted = totals.counted_orders
        _note_references(settings, found, nobody, unknown, of=counted, counted=counted)
    found.decreased = _scaled(totals.decreased, totals.users, found.users)
    refusal = recount.refusal()
    if refusal and not refusal.startswith(tuple(found.problems)):  # nor twice
        whom = " (going by a sample of users)" if found.sampled else ""
        found.problems.append(f"the guard would refuse the recount{whom}: {refusal}")


def _some_customers(connection: Connection, settings: Settings) -> Customers:
    users = connection.users
    sample: list[Document] = [{"$sample": {"size": _USERS}}, {"$project": {"_id": 1}}]
    with map_driver_errors("find", users):
        ids = [u["_id"] for u in users.aggregate(sample, maxTimeMS=settings.count_ms)]
    return [(own, indexable_variants(own)) for own in map(canonicalize, ids)]


def _note_references(
    settings: Settings, found: PreflightReport, nobody: int, unknown: int, *, of: int, counted: int
) -> None:
    """Note how many counted orders have no customer, or an unknown one, going by some `of` them."""
    found.orders_without_customer = _scaled(nobody, of, counted)
    found.orders_of_unknown_customers = _scaled(unknown, of, counted)
    if of and nobody + unknown == of and found.users:
        found.problems.append(no_matching_users(settings))


def _scaled(n: int, of: int, total: int | None) -> int:
    return round(n * (total or 0) / of) if of else 0
