"""Shops with other names, nested fields, and settings at both ends of their ranges."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from boundaries import fixed_boundaries
from conftest import Command, examples, settings_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymongo import MongoClient
from pymongo.database import Database
from strategies import BOUNDARIES, SHOPS

from config import setting_specs
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.recount.index import inspect_plan
from loyalty.recount.index_build import create_index
from loyalty.recount.runner import RecountRequest, run_recount
from sandbox.mongod import Deployment
from sandbox.shop import Names, find_mismatches

Capture = pytest.CaptureFixture[str]

NAMES = Names("sales.all", "people", "sale.state", "sale.buyer.id", "loyalty.points")
SHAPE = {
    "ORDERS_COLLECTION": NAMES.orders,
    "USERS_COLLECTION": NAMES.users,
    "ORDER_STATUS_FIELD": NAMES.status,
    "ORDER_CUSTOMER_FIELD": NAMES.customer,
    "USER_POINTS_FIELD": NAMES.points,
}


def ship(shop: Database[Any], *customers: Any, status: Any = "Shipped") -> None:
    shop.orders.insert_many([{"customer_id": c, "status": status} for c in customers])


def reshape(database: Database[Any]) -> None:
    """Move everything of a shop with the default names to NAMES."""
    for default, other, fields in (
        ("orders", NAMES.orders, {"status": NAMES.status, "customer_id": NAMES.customer}),
        ("users", NAMES.users, {"loyalty_points": NAMES.points}),
    ):
        database[default].update_many({}, {"$rename": fields})
        database[default].aggregate([{"$out": other}])
        database[default].drop()


@pytest.fixture
def reshaped(deployment: Deployment) -> Iterator[Connection]:
    """A shop of that shape with the index, and nothing in it."""
    values = settings_for(deployment.uri_for(database=f"shop_{uuid4().hex[:12]}"), **SHAPE)
    with connect(values, writing=True) as connection:
        connection.orders.insert_one({})
        create_index(connection.orders, values)
        yield connection
        connection.client.drop_database(connection.users.database.name)


@settings(max_examples=examples(15, 200), suppress_health_check=list(HealthCheck))
@given(shop=SHOPS, cuts=st.lists(BOUNDARIES, max_size=4))
def test_users_of_another_shape_have_the_points_that_python_counts(
    reshaped: Connection, shop: tuple[list[Any], list[Any], list[Any]], cuts: list[Any]
) -> None:
    database = reshaped.users.database
    users, orders, _ = shop
    for name, documents in (("users", users), ("orders", orders)):
        database[{"users": NAMES.users, "orders": NAMES.orders}[name]].delete_many({})
        if documents:
            database[name].insert_many(documents)
    reshape(database)
    values = settings_for("mongodb://unused/", **SHAPE)
    request = RecountRequest(force=True, find_boundaries=fixed_boundaries(cuts))
    result = run_recount(reshaped, values, History(None, values), request)
    again = run_recount(reshaped, values, History(None, values), request)
    assert find_mismatches(database, names=NAMES) == []
    assert result.totals.users == len(users)
    assert result.failed_updates == 0
    assert again.totals.changed == 0


def test_the_index_is_used_for_nested_fields(reshaped: Connection) -> None:
    values = settings_for("mongodb://unused/", **SHAPE)
    plan = inspect_plan(reshaped.orders, values)
    assert plan.supports_partitions
    assert not plan.status_is_multikey
    assert not plan.needs_fetch
    reshaped.orders.insert_one({"sale": {"state": "Shipped", "buyer": [{"id": 1}]}})
    assert not inspect_plan(reshaped.orders, values).supports_partitions


def test_all_commands_work_in_a_shop_of_another_shape_by_settings_alone(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    """Two statuses, ids that are numbers, and every text in the shop's own names."""
    database.users.insert_many([{"_id": n, "name": f"n{n}"} for n in range(40)])
    ship(database, *[n % 30 for n in range(90)], None, 99)
    ship(database, *range(20), status="Delivered")
    ship(database, *range(10), status="Returned")
    reshape(database)
    shape = {**SHAPE, "ORDER_STATUSES": "Shipped,Delivered", "POINTS_PER_ORDER": "2"}
    shape |= {"RECOUNTS_COLLECTION": "sales.recounts", "CHANGES_COLLECTION": "sales.changes"}
    before = list(database.people.find({}, {"loyalty": 0}))

    assert command("--create-index", **shape) == 0
    assert "sale.state_1_sale.buyer.id_1" in capsys.readouterr().out
    assert command("--check-config", **shape) == 0
    out = re.sub(" {2,}", "  ", capsys.readouterr().out)
    for line in (
        "users  40",
        "Shipped  92, counted",
        "Delivered  20, counted",
        "no such user  1  1  99 (1)",
        "index sale.state, sale.buyer.id  usable",
    ):
        assert f"  {line}\n" in out
    assert command("--dry-run", **shape) == 1
    assert command("--once", **shape) == 0
    assert find_mismatches(database, ("Shipped", "Delivered"), 2, NAMES) == []
    assert list(database.people.find({}, {"loyalty": 0})) == before
    assert command("--dry-run", **shape) == 0
    assert command("--status", **shape) == 0
    capsys.readouterr()
    assert command("--dry-run", "--customer", "3", **shape) == 0
    out = capsys.readouterr().out
    assert re.search("sale.buyer.id +sale.state +orders +points", out)
    names = {"people", "sales.all", "sales.recounts", "sales.changes"}
    assert set(database.list_collection_names()) == names
    database["sales.all"].update_many({}, {"$set": {"sale.state": "shipped"}})
    assert command("--once", **shape) == 65
    refusal = capsys.readouterr().err
    assert "no order has status Shipped or Delivered; found: shipped (122)" in refusal


def test_a_user_without_a_document_around_the_points_is_a_failed_update(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_many(
        [{"_id": 1, "loyalty": "gold"}, {"_id": 2}, {"_id": 3, "loyalty": {}}]
    )
    ship(database, 1, 2, 3)
    assert command("--once", USER_POINTS_FIELD="loyalty.points") == 1
    assert "PathNotViable" in capsys.readouterr().err
    mismatches = find_mismatches(database, names=Names(points="loyalty.points"))
    assert [mismatch.user for mismatch in mismatches] == [1]
    assert database.users.find_one({"_id": 1}) == {"_id": 1, "loyalty": "gold"}


def test_a_quoted_status_that_ends_with_a_space_is_counted(
    database: Database[Any], command: Command
) -> None:
    database.users.insert_one({"_id": 1})
    ship(database, 1, 1, 1, status="shipped ")
    assert command("--once", ORDER_STATUSES="\"'shipped ',Delivered\"") == 0
    assert database.users.find_one() == {"_id": 1, "loyalty_points": 3}


ENDS = {
    "POINTS_PER_ORDER": ("1", "1000000"),
    "RECOUNT_INTERVAL": ("1s", "366d"),
    "COUNT_TIMEOUT": ("1s", "24d"),
    "COUNT_WORKERS": ("1", "16"),
    "MAX_DECREASE_PERCENT": ("0", "100"),
    "BATCH_SIZE": ("1", "100000"),
    "RETENTION": ("2s", "3650d"),
    "LOG_LEVEL": ("DEBUG", "ERROR"),
    "MONGODB_DATABASE": ("a", "a" * 63),
    "USER_POINTS_FIELD": ("p", ".".join("p" * 50)),
    "ORDER_STATUSES": ("Shipped", ",".join(["Shipped", *(f"status {n}" for n in range(500))])),
}


@pytest.mark.parametrize("end", [0, 1])
def test_every_setting_works_at_both_ends_of_its_range(
    deployment: Deployment, client: MongoClient[Any], end: int
) -> None:
    values = {name: ends[end] for name, ends in ENDS.items()}
    shop = client[values["MONGODB_DATABASE"]]
    try:
        shop.users.insert_many([{"_id": n} for n in range(3)])
        ship(shop, 0, 1, 1)
        loaded = settings_for(deployment.uri, **values)
        with connect(loaded, writing=True) as connection:
            create_index(connection.orders, loaded)
            run_recount(connection, loaded, History(connection.recounts, loaded))
        names = Names(points=loaded.points_field)
        assert find_mismatches(shop, ("Shipped",), loaded.points_per_order, names) == []
    finally:
        client.drop_database(shop.name)


def test_the_tested_ranges_are_those_of_the_settings() -> None:
    numbers = {s.name for s in setting_specs().values() if re.fullmatch(r"\d+[a-z]?", s.default)}
    assert numbers <= ENDS.keys()
    assert timedelta(days=24) == settings_for("mongodb://h", COUNT_TIMEOUT="24d").count_timeout
