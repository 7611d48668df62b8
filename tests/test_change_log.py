"""The change log holds each user's points before and after a full recount."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from bson import ObjectId
from conftest import settings_for
from pymongo.collection import Collection

from loyalty.errors import DatabaseUnavailable, RecountRefused
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.mongo.privileges import OWNER_FILTER
from loyalty.recount.change_log import find_changes, find_recount, find_user_changes
from loyalty.recount.result import Result
from loyalty.recount.runner import FULL_RECOUNT, RecountRequest, run_recount
from sandbox import faults
from sandbox.mongod import Deployment
from sandbox.shop import find_mismatches

Document = dict[str, Any]


@pytest.fixture
def connection(deployment: Deployment) -> Iterator[Connection]:
    uri = deployment.uri_for(database=f"shop_{uuid4().hex[:12]}")
    # After an error of a shutdown, the driver waits for the server's next heartbeat.
    settings = settings_for(f"{uri}&heartbeatFrequencyMS=500")
    with connect(settings, writing=True) as connection:
        yield connection
        connection.client.drop_database(connection.users.database.name)


def fill(connection: Connection, *users: Document) -> None:
    """Insert users with one counted order each."""
    connection.users.insert_many(users)
    orders = [{"customer_id": user["_id"], "status": "Shipped"} for user in users]
    connection.orders.insert_many(orders)


def recount(
    connection: Connection, request: RecountRequest = FULL_RECOUNT, **values: str
) -> Result:
    settings = settings_for("mongodb://unused/", **values)
    return run_recount(connection, settings, History(connection.recounts, settings), request)


def log_collection(connection: Connection) -> Collection[Any]:
    assert connection.changes is not None
    return connection.changes


def read_changes(connection: Connection) -> list[Document]:
    documents = log_collection(connection).find().sort("_id")
    changes = [change for document in documents for change in document["changes"]]
    return sorted(changes, key=lambda change: str(change["user"]))


def test_a_document_for_each_batch_has_the_points_before_and_after(connection: Connection) -> None:
    fill(connection, *({"_id": n, "loyalty_points": n} for n in range(10)))
    result = recount(connection, BATCH_SIZE="4", RETENTION="7d")
    documents = list(log_collection(connection).find())
    assert sorted(len(document["changes"]) for document in documents) == [1, 4, 4]
    for document in documents:
        del document["_id"], document["changes"]
        assert document == {
            **OWNER_FILTER,
            "recount": result.id,
            "users": "users",
            "points_field": "loyalty_points",
            "at": document["at"],
            "cluster_time": result.count.cluster_time,
            "expires_at": document["at"] + timedelta(days=7),
        }
        assert abs(document["at"] - result.started_at) < timedelta(milliseconds=1)
    assert connection.recounts is not None
    assert connection.recounts.find_one({}, {"_id": 1}) == {"_id": result.id}
    expected = [{"user": n, "before": n, "after": 1} for n in range(10) if n != 1]
    assert read_changes(connection) == expected


OLD_VALUES: list[Any] = [None, "3", 1.0, 2.5, True, [1], {"w": 1}, b"5", ObjectId()]


@pytest.mark.parametrize("before", OLD_VALUES, ids=lambda value: type(value).__name__)
def test_values_of_each_type_are_logged_unchanged(connection: Connection, before: Any) -> None:
    fill(connection, {"_id": 1, "loyalty_points": before})
    recount(connection)
    (change,) = read_changes(connection)
    assert change == {"user": 1, "before": before, "after": 1}
    assert type(change["before"]) is type(before)


def test_before_is_missing_where_the_user_had_no_points_field(connection: Connection) -> None:
    fill(connection, {"_id": 1}, {"_id": 2, "loyalty_points": None})
    recount(connection)
    assert read_changes(connection) == [
        {"user": 1, "after": 1},
        {"user": 2, "before": None, "after": 1},
    ]


@pytest.mark.parametrize(
    ("user", "change"),
    [
        ({}, {"created": "a"}),
        ({"a": {}}, {"created": "a.b"}),
        ({"a": {"b": {}}}, {}),
        ({"a": {"b": {"points": 7, "tier": "gold"}}}, {"before": 7}),
        ({"a": {"b": {"points": None}}}, {"before": None}),
        ({"a": {"x": 1}}, {"created": "a.b"}),
    ],
)
def test_created_is_the_outermost_document_that_the_update_creates(
    connection: Connection, user: Document, change: Document
) -> None:
    fill(connection, {"_id": 1, **user})
    recount(connection, USER_POINTS_FIELD="a.b.points")
    assert read_changes(connection) == [{"user": 1, "after": 1, **change}]
    stored = connection.users.find_one() or {}
    assert stored["a"]["b"]["points"] == 1


def test_a_recount_that_changes_nothing_logs_nothing(connection: Connection) -> None:
    fill(connection, {"_id": 1, "loyalty_points": 1})
    recount(connection)
    assert log_collection(connection).count_documents({}) == 0
    names = connection.users.database.list_collection_names()
    assert log_collection(connection).name not in names


def test_users_who_are_up_to_date_are_not_logged(connection: Connection) -> None:
    fill(connection, {"_id": 1, "loyalty_points": 1}, {"_id": 2})
    recount(connection)
    assert read_changes(connection) == [{"user": 2, "after": 1}]


def test_without_a_collection_of_changes_nothing_is_logged(connection: Connection) -> None:
    fill(connection, {"_id": 1})
    result = recount(replace(connection, changes=None))
    assert result.written == 1
    assert find_mismatches(connection.users.database) == []
    assert log_collection(connection).count_documents({}) == 0


@pytest.mark.parametrize(
    "request_",
    [RecountRequest(write=False), RecountRequest(customers=[(1, [1])])],
    ids=["dry run", "some customers"],
)
def test_only_full_recounts_that_write_are_logged(
    connection: Connection, request_: RecountRequest
) -> None:
    fill(connection, {"_id": 1})
    assert recount(connection, request_).totals.changed == 1
    assert log_collection(connection).count_documents({}) == 0


def test_a_refused_recount_logs_nothing(connection: Connection) -> None:
    connection.users.insert_many([{"_id": n, "loyalty_points": 5} for n in range(20)])
    with pytest.raises(RecountRefused):
        recount(connection)
    assert log_collection(connection).count_documents({}) == 0


def test_a_change_is_logged_before_it_is_made(
    connection: Connection, deployment: Deployment
) -> None:
    users: list[Document] = [{"_id": n, "loyalty_points": 7} for n in range(5)]
    fill(connection, *users)
    with (
        faults.fail_command(deployment.servers[0], "update", 99, errorCode=11600),
        pytest.raises(DatabaseUnavailable),
    ):
        recount(connection)
    assert list(connection.users.find()) == users
    assert read_changes(connection) == [{"user": n, "before": 7, "after": 1} for n in range(5)]


def test_a_change_that_cannot_be_logged_is_not_made(
    connection: Connection, deployment: Deployment
) -> None:
    users: list[Document] = [{"_id": n, "loyalty_points": 7} for n in range(5)]
    fill(connection, *users)
    with (
        faults.fail_command(deployment.servers[0], "insert", 2, errorCode=11600),
        pytest.raises(DatabaseUnavailable),
    ):
        recount(connection)
    assert list(connection.users.find()) == users
    assert log_collection(connection).count_documents({}) == 0


def test_a_batch_of_large_old_values_fits_into_the_log(connection: Connection) -> None:
    large = "x" * 1_000_000
    fill(connection, *({"_id": n, "loyalty_points": large} for n in range(30)))
    recount(connection, RecountRequest(force=True), BATCH_SIZE="100000")
    assert find_mismatches(connection.users.database) == []
    assert len(read_changes(connection)) == 30


def test_the_recounts_and_changes_of_a_log_are_found(connection: Connection) -> None:
    fill(connection, {"_id": 1}, {"_id": 2, "loyalty_points": 1})
    changes = log_collection(connection)
    # Somebody else's document, which must not be found.
    changes.insert_one({"recount": ObjectId(), "users": "users", "changes": [{"user": 1}]})
    first = recount(connection)
    connection.orders.insert_one({"customer_id": 1, "status": "Shipped"})
    second = recount(connection)

    newest = find_recount(changes, {})
    assert newest is not None
    assert (newest.id, newest.users, newest.points_field) == (second.id, "users", "loyalty_points")
    oldest = find_recount(changes, {"recount": first.id})
    assert oldest is not None
    assert oldest.id == first.id
    assert find_recount(changes, {"recount": ObjectId()}) is None

    assert list(find_changes(changes, first.id)) == [[{"user": 1, "after": 1}]]
    target = {"users": "users", "points_field": "loyalty_points"}
    found = find_user_changes(changes, target, [1, 2])
    assert [(row["recount"], row["change"]) for row in found] == [
        (second.id, {"user": 1, "before": 1, "after": 2}),
        (first.id, {"user": 1, "after": 1}),
    ]
    assert find_user_changes(changes, {**target, "users": "people"}, [1]) == []
