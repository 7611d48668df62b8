"""One count on a real server: each customer once, as of one point in time, whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from unittest import mock
from uuid import uuid4

import pytest
from bson import ObjectId
from conftest import settings_for
from pymongo import MongoClient
from pymongo.database import Database
from pymongo.errors import OperationFailure

from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.recount import counter as count_failures
from loyalty.recount.counter import Count, TooManyOddForms, pin_cluster_time
from loyalty.recount.index import create_index, inspect_plan
from loyalty.recount.pipeline import CustomerCount, UpToDate
from loyalty.recount.runner import run_recount
from sandbox.mongod import Deployment, wait_until
from sandbox.shop import disagreements

ADA, BOB, EVE = (ObjectId(f"{digit}{'ab' * 11}{digit}") for digit in "abc")


@pytest.fixture
def connection(deployment: Deployment) -> Iterator[Connection]:
    """A shop with the index, and nothing in it."""
    settings = settings_for(deployment.uri_for(database=f"shop_{uuid4().hex[:12]}"))
    with connect(settings, writing=True) as connection:
        connection.orders.insert_one({})
        create_index(connection.orders, settings)
        yield connection
        connection.client.drop_database(connection.users.database.name)


def ship(connection: Connection, *customers: Any) -> None:
    connection.orders.insert_many([{"customer_id": c, "status": "Shipped"} for c in customers])


def counted(connection: Connection, *edges: Any, **values: str) -> Any:
    """Return the customers' rows, and the sum over those who are right."""
    count = Count(connection, settings_for("mongodb://x/", **values), datetime.now(UTC))
    with mock.patch.object(count_failures, "edges", return_value=list(edges)):
        found = list(count.count_all())
    rows = [row for row in found if isinstance(row, CustomerCount)]
    keys = [str(row.customer) for row in rows]
    assert len(keys) == len(set(keys)), keys
    rights = [
        (r.orders, r.users, r.users_with_points_before) for r in found if isinstance(r, UpToDate)
    ]
    orders = {row.customer: (row.orders, len(row.users)) for row in rows}
    return orders, tuple(map(sum, zip(*rights, strict=True)))


CUTS: list[list[Any]] = [[], [ADA, BOB, EVE], [str(ADA).upper(), "a", "b", "c", EVE]]


@pytest.mark.parametrize("workers", ["1", "4"])
@pytest.mark.parametrize("edges", CUTS, ids=["one range", "ids", "capitals and texts"])
def test_a_customer_with_orders_in_capitals_comes_once_with_all_of_them(
    connection: Connection, edges: list[Any], workers: str
) -> None:
    connection.users.insert_many([{"_id": ADA}, {"_id": BOB, "loyalty_points": 1}, {"_id": EVE}])
    mixed = str(ADA)[:9].upper() + str(ADA)[9:]
    ship(connection, ADA, str(ADA), str(ADA).upper(), mixed, mixed, str(BOB))
    orders, right = counted(connection, *edges, COUNT_WORKERS=workers)
    assert orders == {ADA: (5, 1), EVE: (0, 1)}
    assert right == (1, 1, 1)


@pytest.mark.parametrize("edges", CUTS, ids=["one range", "ids", "capitals and texts"])
def test_of_those_who_seem_right_until_their_other_form_is_known_nothing_is_counted_twice(
    connection: Connection, edges: list[Any]
) -> None:
    two = [{"_id": own, "loyalty_points": 2} for own in (ADA, str(ADA).upper())]
    connection.users.insert_many([*two, {"_id": BOB, "loyalty_points": 1}])
    ship(connection, ADA, str(ADA), str(BOB), str(BOB).upper())
    orders, right = counted(connection, *edges)
    assert orders == {BOB: (2, 1)}
    assert right == (2, 2, 2)


def test_too_many_in_capitals_are_counted_in_one_piece(
    connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [ObjectId(f"{n:023x}a") for n in range(20)]
    connection.users.insert_many([{"_id": own} for own in ids])
    ship(connection, *(str(own).upper() for own in ids), *(str(own) for own in ids))
    settings = settings_for("mongodb://x/")
    with mock.patch.object(count_failures, "_ODD_CUSTOMERS", 10), caplog.at_level("INFO"):
        with pytest.raises(TooManyOddForms):
            counted(connection)
        result = run_recount(connection, settings, History(None))
    assert result.totals.counted_orders == 40
    assert "counting_in_one_piece" in caplog.text
    assert disagreements(connection.users.database) == []


def test_a_customer_id_that_is_an_array_is_counted_once(connection: Connection) -> None:
    """An index with arrays in it leads one order into several ranges, so it is not used so."""
    ship(connection, ["a", 5, ADA], [], str(ADA))
    connection.orders.insert_one({"customer_id": str(ADA), "status": ["Shipped"]})
    connection.users.insert_one({"_id": ADA})
    settings = settings_for("mongodb://x/")
    totals = run_recount(connection, settings, History(None)).totals
    assert (totals.counted_orders, totals.unknown_customers) == (3, 1)
    assert totals.orders_without_customer == 1
    assert disagreements(connection.users.database) == []


@pytest.mark.parametrize("late", [0, 15], ids=["in ranges", "with odd forms"])
def test_a_recount_longer_than_the_servers_snapshots_goes_on_at_a_new_time_and_says_so(
    late: int, caplog: pytest.LogCaptureFixture
) -> None:
    window = ["--setParameter", "minSnapshotHistoryWindowInSeconds=0"]
    with Deployment(options=window) as deployment, deployment.client() as client:
        settings = settings_for(deployment.uri, COUNT_WORKERS="1")
        shop = client.oms_db
        shop.users.insert_many([{"_id": n} for n in range(40)])
        shop.orders.insert_many([{"customer_id": n % 40, "status": "Shipped"} for n in range(399)])
        shop.users.insert_one({"_id": ADA})  # who is counted at the end, by herself
        shop.orders.insert_one({"customer_id": str(ADA).upper(), "status": "Shipped"})
        with connect(settings, writing=True) as connection:
            create_index(connection.orders, settings)
            result = slowly(connection, settings, client, late)
            assert disagreements(shop) == []
            assert not result.exact
            assert result.cluster_time is None
            assert result.totals.counted_orders == 400
            assert "counting_on done=" in caplog.text
            assert "counting_again" not in caplog.text


def slowly(connection: Connection, settings: Any, client: MongoClient[Any], late: int) -> Any:
    """Recount in twelve ranges; after some of them the server has forgotten how it was."""
    ask, asked = Count._aggregate, 0

    def ask_late(count: Count, scope: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked in (3, 7) or asked == late:
            discard_snapshots(client)
        return ask(count, scope)

    with (
        mock.patch.object(Count, "_aggregate", ask_late),
        mock.patch.object(count_failures, "edges", return_value=list(range(4, 40, 4))),
    ):
        return run_recount(connection, settings, History(None))


def discard_snapshots(client: MongoClient[Any]) -> None:
    """Write until the oldest snapshot that the server keeps is a new one."""
    before = client.admin.command("hello")["$clusterTime"]["clusterTime"]

    def too_old() -> bool:
        client.other.writes.insert_one({})
        concern = {"level": "snapshot", "atClusterTime": before}
        read = {"find": "users", "singleBatch": True, "limit": 1, "readConcern": concern}
        try:
            client.oms_db.command(read)
        except OperationFailure as error:
            return error.code == 239
        return False

    wait_until("a snapshot that is too old", too_old)


def test_a_server_that_ignores_a_snapshot_is_not_called_exact(connection: Connection) -> None:
    command = Database.command

    def deaf(database: Database[Any], asked: Any, *args: Any, **options: Any) -> Any:
        if "readConcern" in asked:
            asked = {key: value for key, value in asked.items() if key != "readConcern"}
        return command(database, asked, *args, **options)

    with mock.patch.object(Database, "command", deaf):
        assert pin_cluster_time(connection) is not None  # of no users, whenever that is
        connection.users.insert_one({})
        assert pin_cluster_time(connection) is None
    assert pin_cluster_time(connection) is not None


@pytest.mark.parametrize(
    "options", [{"hidden": True}, {"partialFilterExpression": {"status": "Shipped"}}]
)
def test_an_index_that_a_count_cannot_go_by_is_none(
    connection: Connection, options: dict[str, Any]
) -> None:
    settings = settings_for("mongodb://x/")
    assert inspect_plan(connection.orders, settings).supports_partitions
    connection.orders.drop_indexes()
    connection.orders.create_index([("status", 1), ("customer_id", 1)], **options)
    asked = settings_for("mongodb://x/", ORDER_STATUSES="Shipped,Sent")  # more than is in it
    assert not inspect_plan(connection.orders, asked).supports_partitions
    assert "none that serves a recount" in inspect_plan(connection.orders, asked).hint


def test_a_users_own_field_of_any_name_and_kind_is_no_obstacle(connection: Connection) -> None:
    fields = ("user", "key", "stored", "orders", "points", "odd")
    values: tuple[Any, ...] = ([], [1], {"_id": 7}, "text")
    connection.users.insert_many(
        {"_id": ObjectId(), **dict.fromkeys(fields, value)} for value in values
    )
    ship(connection, *(str(user["_id"]) for user in connection.users.find()))
    run_recount(connection, settings_for("mongodb://x/"), History(None))
    assert [user["loyalty_points"] for user in connection.users.find()] == [1] * len(values)


def test_the_first_order_that_counts_may_come_after_the_count(connection: Connection) -> None:
    def too_late(*_: Any, **__: Any) -> Iterator[CustomerCount | UpToDate]:
        ship(connection, ADA)
        return iter([])

    with mock.patch.object(Count, "count_all", too_late):
        assert run_recount(connection, settings_for("mongodb://x/"), History(None)).refusal is None
