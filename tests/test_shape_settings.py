"""USER_KEY_FIELD, ORDER_FILTER and DBRefs: every user has the points that plain Python counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from boundaries import fixed_boundaries
from conftest import examples, settings_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_harness import live_service
from pymongo import MongoClient
from pymongo.database import Database
from strategies import (
    ANY_CASE_IDS,
    BOUNDARIES,
    CANONICAL_IDS,
    MISSING,
    OBJECT_IDS,
    POINTS,
    STATUSES,
    Document,
    present,
)

from config import Settings
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.recount.index import index_keys
from loyalty.recount.partitions import find_boundaries
from loyalty.recount.runner import RecountRequest, run_recount
from sandbox.mongod import Deployment
from sandbox.shop import Names, Predicate, find_mismatches

Capture = pytest.CaptureFixture[str]

NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)
DATES = [datetime(2025, 12, 31, 23, tzinfo=UTC), NEW_YEAR, datetime(2026, 5, 1, tzinfo=UTC)]


@dataclass(frozen=True)
class Filter:
    """A condition on orders: as a setting, and in plain Python; and the values to try."""

    text: str
    predicate: Predicate | None
    values: dict[str, list[Any]]


def _is_any(value: Any, wanted: Any) -> bool:
    """Return whether a value, or an element of an array, is `wanted`, also by type."""
    values = [value, *value] if isinstance(value, list) else [value]
    return any(type(v) is type(wanted) and v == wanted for v in values)


def _since_new_year(order: Document) -> bool:
    found = order.get("created")
    return isinstance(found, datetime) and found.replace(tzinfo=UTC) >= NEW_YEAR


DELETED = [MISSING, True, False, None, 1, "true"]
STORES = ["berlin", "berlin", "Berlin", "hamburg", MISSING, None, ["berlin", "x"]]
ITEMS = [MISSING, [{"state": "ok"}], [{"state": "bad"}, {"state": "ok"}], {"state": "ok"}, []]
FILTERS = [
    Filter("none", None, {}),
    Filter(
        '{"deleted": {"$ne": true}}',
        lambda order: not _is_any(order.get("deleted"), True),
        {"deleted": DELETED},
    ),
    Filter(
        '{"store": "berlin"}',
        lambda order: _is_any(order.get("store"), "berlin"),
        {"store": STORES},
    ),
    Filter(
        '{"store": {"$in": ["berlin", null]}, "created": {"$gte": {"$date": '
        '"2026-01-01T00:00:00Z"}}}',
        lambda order: (
            _since_new_year(order)
            and (_is_any(order.get("store"), "berlin") or order.get("store") is None)
        ),
        {"store": STORES, "created": [*DATES, MISSING, "2026-02-02"]},
    ),
    Filter(
        '{"deleted": {"$exists": false}, "store": {"$eq": "berlin"}}',
        lambda order: "deleted" not in order and _is_any(order.get("store"), "berlin"),
        {"deleted": DELETED, "store": STORES},
    ),
    Filter(
        '{"items.state": "ok"}',
        lambda order: any(
            item.get("state") == "ok"
            for item in (
                order["items"] if isinstance(order.get("items"), list) else [order.get("items")]
            )
            if isinstance(item, dict)
        ),
        {"items": ITEMS},
    ),
]
KEYS = ["_id", "customer_no", "account.number"]
CUSTOMER_FIELDS = ["customer_id", "buyer.ref.id", "customer.$id"]


@dataclass(frozen=True)
class Shape:
    """The settings of a shop, and its names."""

    names: Names
    filter: Filter
    statuses: tuple[str, ...] = ("Shipped",)

    @property
    def values(self) -> dict[str, str]:
        return {
            "USER_KEY_FIELD": self.names.key,
            "ORDER_CUSTOMER_FIELD": self.names.customer,
            "ORDER_STATUS_FIELD": self.names.status,
            "ORDER_STATUSES": ",".join(self.statuses),
            "ORDER_FILTER": self.filter.text,
        }

    def mismatches(self, database: Database[Any]) -> list[Any]:
        return find_mismatches(
            database, self.statuses, names=self.names, predicate=self.filter.predicate
        )


def nest(path: str, value: Any) -> Document:
    """Return a document with a value at a path; a DBRef where the path ends in $id."""
    if value is MISSING:
        return {}
    *outer, last = path.split(".")
    inner: Document = {"$ref": "users", "$id": value} if last == "$id" else {last: value}
    for name in reversed(outer):
        inner = {name: inner}
    return inner


def has_few_arrays(order: Document) -> bool:
    """Return whether an index can hold the order: it takes one array of each document."""
    return sum(isinstance(value, list) for value in order.values()) <= 1


def orders(shape: Shape, ids: st.SearchStrategy[Any]) -> st.SearchStrategy[Document]:
    customers = st.one_of(ids, ids, st.sampled_from([MISSING, None, "", [5]]))
    others = {name: st.sampled_from(values) for name, values in shape.filter.values.items()}
    return (
        st.builds(present, customer=customers, status=STATUSES, **others)
        .filter(has_few_arrays)
        .map(
            lambda order: {
                **{k: v for k, v in order.items() if k not in ("customer", "status")},
                **nest(shape.names.customer, order.get("customer", MISSING)),
                **nest(shape.names.status, order.get("status", MISSING)),
            }
        )
    )


@st.composite
def shops(draw: st.DrawFn) -> tuple[Shape, list[Document], list[Document], list[Document]]:
    """Return a shape, users, orders and further orders."""
    names = Names(
        key=draw(st.sampled_from(KEYS)),
        customer=draw(st.sampled_from(CUSTOMER_FIELDS)),
        status=draw(st.sampled_from(["status", "state.now"])),
    )
    statuses = draw(st.sampled_from([("Shipped",), ("Shipped", "Delivered")]))
    shape = Shape(names, draw(st.sampled_from(FILTERS)), statuses)
    ids = draw(st.sampled_from([CANONICAL_IDS, CANONICAL_IDS, ANY_CASE_IDS]))
    keys = ids
    if names.key != "_id":
        keys = st.one_of(ids, st.sampled_from([MISSING, None, "", [5], [], [str(OBJECT_IDS[0])]]))
    drawn = draw(st.lists(st.tuples(keys, POINTS), max_size=10))
    users = [
        {"_id": n, **nest(names.key, key), **present(loyalty_points=points)}
        for n, (key, points) in enumerate(drawn)
    ]
    found = draw(st.lists(orders(shape, ids), max_size=30))
    return shape, users, found, draw(st.lists(orders(shape, ids), min_size=1, max_size=8))


def insert_users(database: Database[Any], users: list[Document]) -> int:
    """Insert users, without those whose `_id` another one has; return how many there are."""
    for user in users:
        database.users.update_one({"_id": user["_id"]}, {"$setOnInsert": user}, upsert=True)
    return database.users.count_documents({})


USER_INDEXES: list[dict[str, Any] | None] = [None, {}, {"sparse": True}]


@contextmanager
def connect_to_shop(deployment: Deployment, shape: Shape) -> Iterator[tuple[Connection, Settings]]:
    uri = deployment.uri_for(database=f"shop_{uuid4().hex[:12]}")
    values = settings_for(uri, **shape.values)
    with connect(values, writing=True) as connection:
        try:
            yield connection, values
        finally:
            connection.client.drop_database(connection.users.database.name)


@settings(max_examples=examples(25, 600), suppress_health_check=list(HealthCheck))
@given(
    shop=shops(),
    cuts=st.none() | st.lists(BOUNDARIES, max_size=4),
    with_index=st.booleans(),
    user_index=st.sampled_from(USER_INDEXES),
)
def test_users_of_any_shape_have_the_points_that_python_counts(
    deployment: Deployment,
    shop: Any,
    cuts: list[Any] | None,
    user_index: dict[str, Any] | None,
    *,
    with_index: bool,
) -> None:
    shape, users, found, more = shop
    with connect_to_shop(deployment, shape) as (connection, values):
        database = connection.users.database
        number = insert_users(database, users)
        database.orders.insert_many([*found, *more])
        if with_index:
            connection.orders.create_index(index_keys(values))
        if user_index is not None and shape.names.key != "_id":
            connection.users.create_index(shape.names.key, **user_index)
        boundaries = partial(find_boundaries, size=2) if cuts is None else fixed_boundaries(cuts)
        request = RecountRequest(force=True, find_boundaries=boundaries)
        result = run_recount(connection, values, History(None, values), request)
        again = run_recount(connection, values, History(None, values), request)
        assert shape.mismatches(database) == []
        assert result.totals.users == again.totals.users == number
        assert again.totals.changed == 0
        assert result.totals.users_sharing_a_key == again.totals.users_sharing_a_key


EDIT_KINDS = st.sampled_from(["insert", "update", "update", "replace", "delete", "unset"])


@settings(max_examples=examples(8, 150), suppress_health_check=list(HealthCheck))
@given(shop=shops(), kinds=st.lists(EDIT_KINDS, min_size=8, max_size=8), with_index=st.booleans())
def test_in_a_shop_of_any_shape_live_updates_make_all_points_exact(
    deployment: Deployment,
    client: MongoClient[Any],
    pre_images: None,
    shop: Any,
    kinds: list[str],
    *,
    with_index: bool,
) -> None:
    shape, users, found, more = shop
    database = client[f"shop_{uuid4().hex[:12]}"]
    try:
        database.create_collection("orders", changeStreamPreAndPostImages={"enabled": True})
        # A user with a counted order, as without one the safety checks refuse the recount.
        insert_users(database, [*users[:9], {"_id": "ada", **nest(shape.names.key, "ada")}])
        counted = {**nest(shape.names.customer, "ada"), **nest(shape.names.status, "Shipped")}
        counted |= {"store": "berlin", "created": NEW_YEAR, "items": {"state": "ok"}}
        database.orders.insert_many(
            [{**order, "_id": n} for n, order in enumerate(found)] + [counted]
        )
        if with_index:
            database.orders.create_index(index_keys(settings_for("mongodb://x/", **shape.values)))
            if shape.names.key != "_id":
                database.users.create_index(shape.names.key)
        options = {**shape.values, "MAX_DECREASE_PERCENT": "100"}
        with live_service(deployment, database, **options) as harness:
            for n, (order, kind) in enumerate(zip(more, kinds, strict=False)):
                target = {"_id": n % max(1, len(found))}  # not the counted order
                if kind == "insert":
                    database.orders.insert_one(order)
                elif kind == "replace":
                    database.orders.replace_one(target, order, upsert=True)
                elif kind == "delete":
                    database.orders.delete_one(target)
                elif kind == "unset":
                    fields = dict.fromkeys([*shape.filter.values, "status"], "")
                    database.orders.update_one(target, {"$unset": fields})
                else:
                    stored = database.orders.find_one(target) or {}
                    if has_few_arrays({**stored, **order}):
                        database.orders.update_one(target, {"$set": order})
            # An id in mixed case stops live updates.
            harness.update_until(lambda: not shape.mismatches(database) or not harness.is_live)
            harness.recount()
            assert shape.mismatches(database) == []
    finally:
        client.drop_database(database.name)
