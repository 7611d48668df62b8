"""USER_KEY_FIELD, ORDER_FILTER and DBRefs in indexes, plans and commands."""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import chain
from typing import Any

import pytest
from bson import DBRef, ObjectId
from conftest import Command, settings_for
from live_harness import live_service
from pymongo.database import Database
from test_recount import count_fetched_orders, explain, find_values

from loyalty.history import History
from loyalty.live.events import build_change_stream_pipeline
from loyalty.live.opening import find_live_updates_problem
from loyalty.mongo.connection import connect
from loyalty.recount.index import index_keys, inspect_plan
from loyalty.recount.index_build import create_index, create_user_index
from loyalty.recount.partitions import Partition, build_partitions, find_boundaries
from loyalty.recount.pipeline import Scope, build_pipeline
from loyalty.recount.runner import RecountRequest, run_recount
from sandbox.mongod import Deployment

Capture = pytest.CaptureFixture[str]

BY_NUMBER = {"USER_KEY_FIELD": "customer_no"}
BY_DBREF = {"ORDER_CUSTOMER_FIELD": "customer.$id"}
NOT_DELETED = {"ORDER_FILTER": '{"deleted": {"$ne": true}}'}
ALL_CONDITIONS = {
    "ORDER_FILTER": '{"deleted": {"$ne": true}, "store": "berlin", "at": {"$gte": 5}}',
    "ORDER_STATUSES": "Shipped,Delivered",
}


def ship(shop: Database[Any], *customers: Any, **fields: Any) -> None:
    shop.orders.insert_many([{"customer_id": c, "status": "Shipped", **fields} for c in customers])


def points(shop: Database[Any]) -> list[Any]:
    return [user.get("loyalty_points") for user in shop.users.find().sort("_id")]


# Pipelines and plans


def test_the_default_settings_add_no_stage_for_other_data_models() -> None:
    settings = settings_for("mongodb://x/")
    convert = {"input": "$_id", "to": "objectId"}
    text = {"$cond": [{"$eq": [{"$type": "$_id"}, "string"]}, "$_id", ""]}
    is_hex_length = {"$eq": [{"$strLenBytes": text}, 24]}
    no_customer = {"$cond": [{"$eq": ["$_id", ""]}, [], "$_id"]}
    orders, users = (
        {
            "$cond": [
                is_hex_length,
                {"$convert": {**convert, "onError": other, "onNull": missing}},
                {"$ifNull": [other, missing]},
            ]
        }
        for other, missing in ((no_customer, []), ("$_id", None))
    )
    user = {"_id": "$_id", "points": "$loyalty_points"}
    read_users = [{"$match": {}}, {"$replaceWith": {"_id": users, "user": user}}]
    pipeline = build_pipeline(settings, Scope(status_may_be_array=False))
    assert pipeline[:5] == [
        {"$match": {"status": {"$in": ["Shipped"]}}},
        {"$group": {"_id": "$customer_id", "orders": {"$sum": 1}}},
        {"$project": {"_id": orders, "orders": "$orders"}},
        {"$unionWith": {"coll": "users", "pipeline": read_users}},
        {"$group": {"_id": "$_id", "orders": {"$sum": "$orders"}, "users": {"$push": "$user"}}},
    ]
    assert [next(iter(stage)) for stage in pipeline[5:]] == ["$set", "$group"]
    totals = {"_id", "orders", "points", "users", "user_count", "users_with_points"}
    assert set(pipeline[6]["$group"]) == totals
    (insert,) = [
        event
        for event in build_change_stream_pipeline(settings)[0]["$match"]["$or"]
        if event["operationType"] == "insert"
    ]
    assert insert == {"operationType": "insert", "fullDocument.status": {"$in": ["Shipped"]}}
    assert index_keys(settings) == [("status", 1), ("customer_id", 1)]


CUSTOMERS = [*range(40), *(ObjectId() for _ in range(40)), *(f"user{n}" for n in range(40))]


@pytest.mark.parametrize(
    ("values", "index"),
    [
        (BY_NUMBER, ["status", "customer_id"]),
        (BY_DBREF, ["status", "customer.$id"]),
        (NOT_DELETED, ["status", "customer_id", "deleted"]),
        (ALL_CONDITIONS, ["store", "status", "customer_id", "deleted", "at"]),
        ({**BY_NUMBER, **BY_DBREF, **ALL_CONDITIONS}, None),
    ],
)
def test_with_the_indexes_no_partition_fetches_an_order_or_reads_all_users(
    uri: str, values: dict[str, str], index: list[str] | None
) -> None:
    settings = settings_for(uri, **values)
    with connect(settings, writing=True) as connection:
        connection.users.insert_many(
            [{"_id": customer, "customer_no": customer} for customer in CUSTOMERS]
        )
        fields = {"status": "Shipped", "store": "berlin", "at": 7}
        connection.orders.insert_many(
            [
                {"customer_id": c, "customer": DBRef("users", c), **fields, "deleted": deleted}
                for c in CUSTOMERS
                for deleted in (True, False)
            ]
        )
        create_index(connection.orders, settings)
        if settings.user_key_field != "_id":
            assert not inspect_plan(connection.orders, settings).supports_partitions
            create_user_index(connection.users, settings)
        plan = inspect_plan(connection.orders, settings)
        assert (plan.supports_partitions, plan.needs_fetch, plan.advice) == (True, False, "")
        keys = list(connection.orders.index_information()[plan.index_name]["key"])
        assert index is None or [name for name, _ in keys] == index
        find = partial(find_boundaries, connection.users, settings.user_key_field, size=15)
        cut = list(build_partitions(find))
        assert len(cut) > 6
        for partition in cut:
            pipeline = build_pipeline(settings, Scope(partition, status_may_be_array=False))
            assert count_fetched_orders(connection, pipeline) == 0
            stages = find_values(explain(connection, pipeline), "stage")
            assert "IXSCAN" in stages
            assert "COLLSCAN" not in stages
            examined = find_values(explain(connection, pipeline), "docsExamined")
            assert max(map(int, examined), default=0) <= 2 * 40
        scope = Scope(Partition([[{"$in": [3]}]]), customers=[3], status_may_be_array=False)
        one = build_pipeline(settings, scope)
        assert "COLLSCAN" not in find_values(explain(connection, one), "stage")
        run_recount(connection, settings, History(None, settings), RecountRequest(force=True))
        is_filtered = bool(settings.order_filter)
        expected = 1 if is_filtered else 2
        assert {u["loyalty_points"] for u in connection.users.find()} == {expected}


def test_create_index_adds_the_filter_fields_although_another_index_is_usable(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    ship(database, *range(30), deleted=False)
    settings = settings_for("mongodb://x/", **NOT_DELETED)
    database.orders.create_index([("status", 1), ("customer_id", 1)])
    plan = inspect_plan(database.orders, settings)
    assert (plan.supports_partitions, plan.needs_fetch) == (True, True)
    assert "lacks deleted of ORDER_FILTER. Create a better index with --create-index" in plan.advice
    for _ in range(2):
        assert command("--create-index", **NOT_DELETED) == 0
        assert "status_1_customer_id_1_deleted_1" in capsys.readouterr().out
    plan = inspect_plan(database.orders, settings)
    assert (plan.needs_fetch, plan.advice) == (False, "")
    assert len(database.orders.index_information()) == 3


def test_a_condition_that_needs_the_order_itself_is_reported(
    database: Database[Any], command: Command
) -> None:
    ship(database, *range(30))
    values = {"ORDER_FILTER": '{"deleted": {"$exists": false}}'}
    assert command("--create-index", **values) == 0
    plan = inspect_plan(database.orders, settings_for("mongodb://x/", **values))
    assert (plan.supports_partitions, plan.needs_fetch) == (True, True)
    assert "because no index alone can evaluate a condition in ORDER_FILTER" in plan.advice


# The index on users


@pytest.mark.parametrize(
    ("options", "is_used"),
    [
        (None, False),
        ({}, True),
        ({"unique": True, "sparse": True}, True),
        ({"partialFilterExpression": {"customer_no": {"$exists": True}}}, True),
        ({"partialFilterExpression": {"active": True}}, False),
        ({"collation": {"locale": "en", "strength": 2}}, False),
        ({"hidden": True}, False),
    ],
)
def test_any_index_with_all_keys_of_the_users_is_used(
    database: Database[Any], command: Command, options: dict[str, Any] | None, *, is_used: bool
) -> None:
    database.users.insert_many([{"_id": n, "customer_no": f"c{n}"} for n in range(9)])
    database.users.insert_many([{"_id": n} for n in range(10, 15)])
    ship(database, *(f"c{n}" for n in range(9)))
    if options is not None:
        database.users.create_index("customer_no", **options)
    settings = settings_for("mongodb://x/", **BY_NUMBER)
    database.orders.create_index(index_keys(settings))
    plan = inspect_plan(database.orders, settings)
    assert plan.supports_partitions is is_used
    assert ("create it with --create-index" in plan.advice) is not is_used
    if options and "hidden" in options:
        assert command("--create-index", **BY_NUMBER) == 78
        return
    assert command("--create-index", **BY_NUMBER) == 0
    assert inspect_plan(database.orders, settings).supports_partitions
    assert command("--once", **BY_NUMBER) == 0
    assert points(database) == [1] * 9 + [0] * 5


def test_an_array_in_the_key_causes_a_single_query(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_many([{"_id": 1, "customer_no": [5, 7]}, {"_id": 2, "customer_no": 5}])
    database.users.insert_one({"_id": 5})
    ship(database, 5, 7)
    database.users.create_index("customer_no")
    assert command("--create-index", **BY_NUMBER) == 78
    text = capsys.readouterr().err
    assert re.search("customer_no_1 on .* is multikey: a user holds", text)
    ship(database, [5, 7])
    assert command("--once", **BY_NUMBER) == 0
    assert points(database) == [0, 1, 0]
    capsys.readouterr()
    assert command("--once", "--customer", "5", **BY_NUMBER) == 0
    assert points(database) == [0, 1, 0]


SHARED_ID = ObjectId("ab" * 12)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (None, ["c010", "c020"]),
        (0, [0, "c010", "c020"]),
        ("", ["", "c009", "c019", "c029"]),
        ("n/a", ["c010", "c020", "n/a"]),
        (SHARED_ID, ["c010", "c020", SHARED_ID]),
    ],
)
def test_a_key_that_fills_a_partition_is_one_boundary(
    database: Database[Any], key: Any, expected: list[Any]
) -> None:
    users: list[dict[str, Any]] = [{"customer_no": key} for _ in range(50)]
    users += [{} for _ in range(50)]
    users += [{"customer_no": f"c{n:03}"} for n in range(30)]
    database.users.insert_many(users)
    database.users.create_index("customer_no")
    types = ("number", "string", "objectid")
    found = [find_boundaries(database.users, "customer_no", name, size=10) for name in types]
    assert list(chain(*found)) == expected


def test_users_who_share_a_key_get_the_points_of_all_its_orders_with_a_warning(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    numbers = [1, 1, 1, 2, 3.0, 3, "4", None, None, "", ""]
    database.users.insert_many([{"_id": n, "customer_no": v} for n, v in enumerate(numbers)])
    database.users.insert_many([{"_id": 100 + n} for n in range(3)])
    ship(database, 1, 1, 2, 3, None, "")
    for _ in range(2):  # users to update, and users who are up to date
        assert command("--once", **BY_NUMBER) == 0
        warning = 'safety_warning text="5 users have the same customer_no as another user'
        assert warning in capsys.readouterr().err
        assert points(database) == [2, 2, 2, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert command("--dry-run", **BY_NUMBER) == 0
    assert "5 users have the same customer_no" in capsys.readouterr().out


def test_hex_strings_and_object_ids_are_one_key(database: Database[Any], command: Command) -> None:
    ada, bob = ObjectId("ab" * 12), ObjectId("cd" * 12)
    database.users.insert_many(
        [{"_id": 1, "customer_no": str(ada)}, {"_id": 2, "customer_no": bob}]
    )
    ship(database, ada, str(ada), str(ada).upper(), str(bob), str(bob).title())
    assert command("--create-index", **BY_NUMBER) == 0
    assert command("--once", **BY_NUMBER) == 0
    assert points(database) == [3, 2]


# Commands


def test_undo_restores_the_users_of_a_recount_by_another_key(
    database: Database[Any], command: Command
) -> None:
    database.users.insert_many([{"_id": n, "customer_no": 10 - n} for n in range(10)])
    database.users.update_many({"_id": {"$gt": 5}}, {"$set": {"loyalty_points": 9}})
    ship(database, *range(1, 11))
    before = list(database.users.find().sort("_id"))
    assert command("--once", **BY_NUMBER) == 0
    assert points(database) == [1] * 10
    assert command("--undo", "last", **BY_NUMBER) == 0
    assert list(database.users.find().sort("_id")) == before


def test_a_customer_is_found_by_the_key_and_excluded_orders_are_shown(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_many([{"_id": "u1", "customer_no": 17}, {"_id": 17, "customer_no": 1}])
    ship(database, 17, 17, deleted=False)
    ship(database, 17, deleted=True)
    database.orders.insert_one({"customer_id": 17, "status": "Pending"})
    values = {**BY_NUMBER, **NOT_DELETED}
    assert command("--once", **values) == 0
    capsys.readouterr()
    assert command("--dry-run", "--customer", "17", **values) == 0
    out = re.sub(" {2,}", "  ", capsys.readouterr().out)
    assert "  17  Shipped  2  2\n" in out
    assert "  17  Shipped  1  0  does not match ORDER_FILTER\n" in out
    assert "  17  Pending  1  0  only Shipped counts\n" in out
    assert re.search("'u1'  none  2|u1.*2\n", out)
    assert command("--dry-run", "--customer", "18", "--customer", " 1 ", **values) == 1
    out = capsys.readouterr().out
    assert "no user has this customer_no" in out
    assert "users with a similar id: 1\n" in out


@pytest.mark.parametrize("values", [BY_DBREF, {"ORDER_CUSTOMER_FIELD": "customer.ref.$id"}])
def test_a_dbref_is_counted_and_shown_and_has_live_updates(
    database: Database[Any],
    deployment: Deployment,
    command: Command,
    capsys: Capture,
    values: dict[str, str],
) -> None:
    ada, bob = ObjectId(), ObjectId()

    def order(user: ObjectId) -> dict[str, Any]:
        ref = DBRef("users", user)
        is_nested = "ref" in values["ORDER_CUSTOMER_FIELD"]
        return {"customer": {"ref": ref} if is_nested else ref, "status": "Shipped"}

    database.users.insert_many([{"_id": ada}, {"_id": bob}])
    database.orders.insert_many([order(ada), order(ada), order(bob)])
    assert command("--create-index", **values) == 0
    assert command("--check-config", **values) == 0
    assert command("--once", "--customer", str(ada), **values) == 0
    assert points(database) == [2, None]
    with live_service(deployment, database, None, **values) as harness:
        assert points(database) == [2, 1]
        database.orders.insert_one(order(bob))
        database.orders.update_one(order(ada), {"$set": {"status": "Returned"}})
        harness.update_until(lambda: points(database) == [1, 2])
        assert harness.is_live


def test_the_filter_and_the_key_are_in_the_settings_of_the_record(
    database: Database[Any], command: Command
) -> None:
    database.users.insert_one({"customer_no": 1})
    ship(database, 1, store="berlin", at=5)
    values = {**BY_NUMBER, **ALL_CONDITIONS}
    assert command("--once", **values) == 0
    (record,) = database.loyalty_recounts.find()
    assert record["settings"]["user_key_field"] == "customer_no"
    stored = json.loads(record["settings"]["order_filter"])
    assert stored == json.loads(ALL_CONDITIONS["ORDER_FILTER"])


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"$gtt": 1}}',
        '{"a": {"$where": "true"}}',
        '{"a": {"$in": 5}}',
        '{"a": {"$near": [1, 2]}}',
        '{"a": {"$regex": "("}}',
        '{"a": {"$elemMatch": {"$bad": 1}}}',
    ],
)
@pytest.mark.parametrize("argument", ["--once", "--dry-run", "--check-config"])
def test_a_filter_that_the_server_rejects_ends_with_78(
    database: Database[Any], command: Command, capsys: Capture, text: str, argument: str
) -> None:
    database.users.insert_one({"_id": 1, "loyalty_points": 3})
    ship(database, 1)
    assert command(argument, ORDER_FILTER=text) == 78
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if " ERROR " in line or " WARN" in line]
    assert len(lines) == 1
    assert "is ORDER_FILTER right?" in lines[0]
    assert captured.out == ""
    assert points(database) == [3]


def test_a_filter_that_matches_no_order_causes_a_warning_and_takes_no_points(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_many([{"_id": n, "loyalty_points": 1} for n in range(20)])
    ship(database, *range(20))
    values = {"ORDER_FILTER": '{"store": "Berlin"}'}
    assert command("--once", **values) == 65
    assert command("--dry-run", **values) == 1
    assert "no order matches ORDER_FILTER" in capsys.readouterr().out
    assert points(database) == [1] * 20


def test_live_updates_of_many_users_need_the_index_on_the_key(
    database: Database[Any], uri: str, low_limit: int
) -> None:
    database.users.insert_many([{"customer_no": n} for n in range(low_limit + 1)])
    settings = settings_for(uri, **BY_NUMBER)
    with connect(settings, writing=True) as connection:
        ship(database, 1)
        create_index(connection.orders, settings)
        problem = find_live_updates_problem(connection, settings) or ""
        assert "has no index on customer_no; create it with --create-index" in problem
        create_user_index(connection.users, settings)
        assert find_live_updates_problem(connection, settings) is None
