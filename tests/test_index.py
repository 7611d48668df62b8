"""The index on orders: which one is used, the hints about the others, and the creation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from bson import ObjectId
from conftest import Command, examples, settings_for
from hypothesis import given, settings
from hypothesis import strategies as st
from pymongo import MongoClient
from pymongo.collection import Collection
from pymongo.database import Database

from loyalty.mongo.values import SIMPLE_COLLATION
from loyalty.recount.index import OrdersPlan, inspect_plan
from sandbox.faults import SERVICE
from sandbox.mongod import Deployment, wait_until
from sandbox.service import Process

SETTINGS = settings_for("mongodb://x/")
KEYS = [("status", 1), ("customer_id", 1)]
GOOD = OrdersPlan(supports_partitions=True, status_is_multikey=False, needs_fetch=False)
CASE_INSENSITIVE = {"locale": "en", "strength": 2}

Start = Callable[..., Process]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def orders(database: Database[Any]) -> Collection[Any]:
    database.users.insert_many({"_id": n} for n in range(10))
    database.orders.insert_many(
        {"status": status, "customer_id": n % 10, "created": n, "total": n}
        for n in range(40)
        for status in ("Shipped", "Pending")
    )
    return database.orders


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        (KEYS, {}),
        (KEYS, {"name": "another name"}),
        (KEYS, {"partialFilterExpression": {"status": "Shipped"}}),
        ([("status", -1), ("customer_id", -1)], {}),
        ([("status", 1), ("customer_id", -1)], {}),
        ([("customer_id", 1), ("status", 1)], {}),
        ([*KEYS, ("created", 1)], {}),
    ],
)
def test_an_index_on_status_and_customer_is_used(
    orders: Collection[Any],
    command: Command,
    capsys: Capture,
    keys: list[tuple[str, int]],
    options: dict[str, Any],
) -> None:
    name = orders.create_index(keys, **options)
    plan = inspect_plan(orders, SETTINGS)
    assert (plan, plan.advice, plan.index_name) == (GOOD, "", name)
    assert command("--create-index") == 0
    assert f"has the index {name}\n" in capsys.readouterr().out
    assert set(orders.index_information()) == {"_id_", name}


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        ([("status", 1)], {}),
        ([("customer_id", 1)], {}),
        ([("status", 1), ("created", 1), ("customer_id", 1)], {}),
        ([("customer_id", 1), ("created", 1), ("status", 1)], {}),
        ([("status", 1), ("customer_id", "hashed")], {}),
        ([("$**", 1)], {}),
        (KEYS, {"sparse": True}),
        (KEYS, {"partialFilterExpression": {"status": "Pending"}}),
        (KEYS, {"partialFilterExpression": {"customer_id": {"$gte": ""}}}),
        (KEYS, {"partialFilterExpression": {"customer_id": {"$exists": True}}}),
        (KEYS, {"partialFilterExpression": {"total": {"$gt": 5}}}),
        (KEYS, {"collation": CASE_INSENSITIVE}),
    ],
)
def test_other_indexes_are_ignored_and_the_right_one_is_created(
    orders: Collection[Any], command: Command, keys: Any, options: dict[str, Any]
) -> None:
    orders.create_index(keys, **options)
    plan = inspect_plan(orders, SETTINGS)
    assert not plan.supports_partitions
    assert plan.advice.startswith("no usable index; create one")
    for _ in range(2):
        assert command("--create-index") == 0
        assert inspect_plan(orders, SETTINGS) == GOOD
        assert len(orders.index_information()) == 3


def test_a_partial_index_is_used_only_for_its_statuses(orders: Collection[Any]) -> None:
    orders.create_index(KEYS, partialFilterExpression={"status": "Shipped"})
    more = settings_for("mongodb://x/", ORDER_STATUSES="Shipped,Sent")
    assert inspect_plan(orders, SETTINGS) == GOOD
    assert not inspect_plan(orders, more).supports_partitions


def test_a_good_index_is_found_beside_worse_ones(orders: Collection[Any]) -> None:
    orders.create_index([("status", 1), ("created", 1), ("customer_id", 1)])
    orders.create_index([("customer_id", 1)])
    orders.create_index([("status", 1)])
    orders.create_index(KEYS)
    orders.create_index([("status", 1), ("total", 1), ("customer_id", 1)])
    assert inspect_plan(orders, SETTINGS) == GOOD


@pytest.mark.parametrize("name", ["status_1_customer_id_1", "another name"])
def test_create_index_reports_the_command_that_unhides_an_index(
    orders: Collection[Any], command: Command, capsys: Capture, name: str
) -> None:
    orders.create_index(KEYS, hidden=True, name=name)
    assert not inspect_plan(orders, SETTINGS).supports_partitions
    assert command("--create-index") == 78
    said = capsys.readouterr().err
    assert name in said
    assert "db.orders.unhideIndex(" in said
    orders.database.command("collMod", "orders", index={"name": name, "hidden": False})
    assert inspect_plan(orders, SETTINGS) == GOOD
    assert command("--create-index") == 0


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ({"status": "Shipped", "customer_id": [1]}, OrdersPlan(status_is_multikey=False)),
        ({"status": ["Shipped"], "customer_id": 1}, OrdersPlan(supports_partitions=True)),
    ],
)
def test_create_index_asks_for_a_new_index_in_place_of_a_multikey_one(
    orders: Collection[Any],
    command: Command,
    capsys: Capture,
    order: dict[str, Any],
    expected: OrdersPlan,
) -> None:
    orders.create_index(KEYS)
    found = orders.insert_one(order).inserted_id
    for _ in range(2):  # an index stays multikey
        plan = inspect_plan(orders, SETTINGS)
        assert plan == expected
        assert "status_1_customer_id_1 is multikey: an order holds, or once held" in plan.advice
        reads_orders = "so the server reads each order. Correct" in plan.advice
        assert reads_orders is expected.supports_partitions
        assert command("--create-index") == (0 if expected.supports_partitions else 78)
        said = capsys.readouterr().err
        assert ("drop the index, and create it again" in said) is not expected.supports_partitions
        orders.delete_one({"_id": found})
    orders.drop_index("status_1_customer_id_1")
    assert command("--create-index") == 0
    assert inspect_plan(orders, SETTINGS) == GOOD


def test_an_index_that_supports_partitions_is_better_than_a_multikey_one(
    orders: Collection[Any],
) -> None:
    # No index alone can evaluate this condition, so both plans read the orders.
    filtered = settings_for("mongodb://x/", ORDER_FILTER='{"total": {"$exists": false}}')
    found = orders.insert_one({"status": "Shipped", "customer_id": [1]}).inserted_id
    orders.create_index([*KEYS, ("total", 1)])  # multikey, also after the deletion
    orders.delete_one({"_id": found})
    assert not inspect_plan(orders, filtered).supports_partitions
    name = orders.create_index([("customer_id", 1), ("status", 1), ("total", 1)])
    plan = inspect_plan(orders, filtered)
    assert (plan.supports_partitions, plan.index_name) == (True, name)


def test_a_multikey_index_with_other_keys_is_no_reason_to_drop_one(
    orders: Collection[Any], command: Command
) -> None:
    orders.create_index("customer_id")
    found = orders.insert_one({"status": "Shipped", "customer_id": [1]}).inserted_id
    assert inspect_plan(orders, SETTINGS).advice.startswith("no usable index")
    orders.delete_one({"_id": found})
    assert command("--create-index") == 0
    assert inspect_plan(orders, SETTINGS) == GOOD


def test_a_view_uses_the_index_of_its_collection(
    orders: Collection[Any], command: Command, capsys: Capture
) -> None:
    database = orders.database
    view = database.create_collection("seen", viewOn="orders", pipeline=[])
    advice = f"{view.full_name} is a view: create the index on the collection that it reads"
    assert inspect_plan(view, SETTINGS).advice == advice
    orders.create_index(KEYS)
    assert inspect_plan(view, SETTINGS) == GOOD
    assert command("--create-index", ORDERS_COLLECTION="seen") == 78
    assert advice in capsys.readouterr().err
    assert command("--once", ORDERS_COLLECTION="seen") == 0
    assert database.users.count_documents({"loyalty_points": 4}) == 10


@pytest.mark.parametrize("collation", [None, CASE_INSENSITIVE, {"locale": "de"}])
def test_users_with_a_collation_are_counted_by_one_query(
    database: Database[Any], command: Command, collation: Any
) -> None:
    options = {"collation": collation} if collation else {}
    users = [{"_id": name} for name in ("ada", "bob", ObjectId(), 7)]
    database.create_collection("users", **options).insert_many(users)
    database.orders.insert_many({"status": "Shipped", "customer_id": u["_id"]} for u in users)
    database.orders.create_index(KEYS)
    plan = inspect_plan(database.orders, SETTINGS)
    assert plan.supports_partitions is (collation is None)
    assert ("each partition would read all users" in plan.advice) is (collation is not None)
    assert command("--create-index") == 0  # the index on orders is the recommended one
    assert command("--once") == 0
    assert database.users.count_documents({"loyalty_points": 1}) == 4


def test_clustered_users_are_counted_in_partitions(database: Database[Any]) -> None:
    if database.client.server_info()["versionArray"][:2] < [5, 3]:
        pytest.skip("clustered collections need MongoDB 5.3")
    database.create_collection("users", clusteredIndex={"key": {"_id": 1}, "unique": True})
    database.users.insert_one({"_id": 1})
    database.orders.create_index(KEYS)
    assert inspect_plan(database.orders, SETTINGS) == GOOD


@pytest.mark.parametrize("name", ["status_1_customer_id_1", "another"])
def test_create_index_waits_for_a_build_in_progress(
    orders: Collection[Any], deployment: Deployment, uri: str, service: Start, name: str
) -> None:
    with deployment.client() as client, deployment.client() as builder:
        failpoint = ("configureFailPoint", "hangAfterSettingUpIndexBuild")
        client.admin.command(*failpoint, mode="alwaysOn")
        try:
            create = builder[orders.database.name].orders.create_index
            build = threading.Thread(target=create, args=(KEYS,), kwargs={"name": name})
            build.start()
            wait_until("the build", lambda: builds(client, ANY_PROGRAM))
            waiting = service("--create-index", MONGODB_URI=uri)
            wait_until("the service to wait", lambda: builds(client, SERVICE))
        finally:
            client.admin.command(*failpoint, mode="off")
        assert waiting.wait() == 0
        build.join()
    assert f"has the index {name}" in waiting.output
    assert set(orders.index_information()) == {"_id_", name}


ANY_PROGRAM = {"$ne": ""}


def builds(client: MongoClient[Any], app_name: Any) -> bool:
    """Return whether a program with this name waits for the build of an index."""
    wanted = {"command.createIndexes": "orders", "active": True, "appName": app_name}
    return bool(list(client.admin.aggregate([{"$currentOp": {}}, {"$match": wanted}])))


# Parts of random indexes.

FIELDS = ["status", "customer_id", "created", "total"]
PATTERNS = st.lists(
    st.tuples(st.sampled_from(FIELDS), st.sampled_from([1, -1])),
    min_size=1,
    max_size=4,
    unique_by=lambda key: key[0],
)
OPTIONS = st.sampled_from(
    [
        {},
        {},
        {},
        {"hidden": True},
        {"sparse": True},
        {"partialFilterExpression": {"status": "Shipped"}},
        {"partialFilterExpression": {"total": {"$gte": 0}}},
        {"collation": CASE_INSENSITIVE},
    ]
)


@pytest.fixture(scope="module")
def mixed_orders(client: MongoClient[Any]) -> Iterator[Collection[Any]]:
    """Give 3,000 orders in 3 statuses of 20 customers, and the users."""
    database = client.random_indexes
    database.users.insert_many({"_id": n} for n in range(20))
    database.orders.insert_many(
        {
            "status": ("Shipped", "Pending", "Paid")[n % 3],
            "customer_id": n * 7 % 20,
            "created": n,
            "total": n % 50,
        }
        for n in range(3_000)
    )
    yield database.orders
    client.drop_database(database.name)


def keys_examined(orders: Collection[Any]) -> int:
    """Return how many index keys, and orders without one, the server reads for one customer."""
    command = {
        "aggregate": orders.name,
        "pipeline": [
            {"$match": {"status": {"$in": ["Shipped"]}, "customer_id": {"$in": [3, "3"]}}},
            {"$group": {"_id": "$customer_id", "orders": {"$sum": 1}}},
        ],
        "cursor": {},
        "collation": SIMPLE_COLLATION,
    }
    stats = orders.database.command("explain", command, verbosity="executionStats")
    stats = stats.get("executionStats") or stats["stages"][0]["$cursor"]["executionStats"]
    return int(max(stats["totalKeysExamined"], stats["totalDocsExamined"]))


@settings(max_examples=examples(15, 150))
@given(indexes=st.lists(st.tuples(PATTERNS, OPTIONS), min_size=1, max_size=3))
def test_an_accepted_index_reads_at_most_twice_the_necessary_keys(
    mixed_orders: Collection[Any], indexes: list[tuple[Any, Any]]
) -> None:
    mixed_orders.drop_indexes()
    mixed_orders.create_index(KEYS)
    right = keys_examined(mixed_orders)
    assert right <= 55
    mixed_orders.drop_indexes()
    for n, (keys, options) in enumerate(indexes):
        with_name = {"name": f"index {n}", **options}
        if not any(same_index(one, (keys, options)) for one in indexes[:n]):
            mixed_orders.create_index(keys, **with_name)
    if inspect_plan(mixed_orders, SETTINGS).supports_partitions:
        assert keys_examined(mixed_orders) <= 2 * right
    elif any(keys == KEYS and options == {} for keys, options in indexes):
        raise AssertionError("the right index is not taken")


def same_index(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """Return whether the server regards two indexes as equal except for their names."""
    kinds = [{k: v for k, v in options.items() if k != "hidden"} for _, options in (one, other)]
    return bool(one[0] == other[0]) and kinds[0] == kinds[1]


class OrdersWithoutBounds:
    """The orders on a server whose explanations lack the bounds of indexes."""

    def __init__(self, orders: Collection[Any]) -> None:
        self.name, self.full_name = orders.name, orders.full_name
        self._database = orders.database

    @property
    def database(self) -> Any:
        return self

    def list_collections(self, **options: Any) -> Any:
        return self._database.list_collections(**options)

    def command(self, *arguments: Any, **options: Any) -> Any:
        return without_bounds(self._database.command(*arguments, **options))


def without_bounds(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_bounds(v) for k, v in value.items() if k != "indexBounds"}
    return [without_bounds(part) for part in value] if isinstance(value, list) else value


def test_an_index_whose_bounds_are_not_explained_is_not_used(orders: Collection[Any]) -> None:
    orders.create_index(KEYS)
    stand_in: Any = OrdersWithoutBounds(orders)
    assert not inspect_plan(stand_in, SETTINGS).supports_partitions
