"""Undo: every user is bit for bit as before the recount, or is listed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import bson
import pytest
from bson import Decimal128, Int64, ObjectId
from bson.raw_bson import RawBSONDocument
from conftest import examples, settings_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import Settings
from loyalty.errors import RecountNotFound
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.recount.change_log import MISSING, find_unrecorded, find_user_changes, resolve_recount
from loyalty.recount.runner import RecountRequest, run_recount
from loyalty.recount.undo import LoggedUser, UndoResult, undo_recount
from sandbox import faults
from sandbox.mongod import Deployment

Document = dict[str, Any]
FIELDS = ["loyalty_points", "loyalty.points", "a.b.points"]

POINTS = st.sampled_from(
    [MISSING, None, 0, 1, 2, 3, 7, -1, Int64(3), 2.0, 1.5, float("nan"), "2", "x", True]
    + [Decimal128("2"), Decimal128("2.00"), [1], {}, {"tier": "gold"}, b"x", ObjectId("5" * 24)]
)


def user_with(path: str, value: Any, number: int, parents: int) -> Document:
    """Return a user with `value` at `path`; without it, with so many of the documents around it."""
    user: Document = {"_id": number, "name": "ada"}
    *outer, last = path.split(".")
    inner = user
    for name in outer if value is not MISSING else outer[:parents]:
        inner = inner.setdefault(name, {"other": 1} if number % 2 else {})
    if value is not MISSING:
        inner[last] = value
    user["tail"] = number
    return user


@pytest.fixture(params=FIELDS)
def shop(deployment: Deployment, request: pytest.FixtureRequest) -> Iterator[Any]:
    shop_settings = settings_for(
        deployment.uri_for(database=f"undo_{uuid4().hex[:12]}"),
        USER_POINTS_FIELD=request.param,
        BATCH_SIZE="3",
    )
    with connect(shop_settings, writing=True) as connection:
        yield connection, shop_settings
        connection.client.drop_database(connection.users.database.name)


def empty(connection: Connection) -> None:
    for name in ("users", "orders", "loyalty_recounts", "loyalty_changes"):
        connection.users.database[name].delete_many({})


def read_users(connection: Connection) -> dict[Any, bytes]:
    raw = connection.users.with_options(codec_options=bson.CodecOptions(RawBSONDocument))
    return {user["_id"]: bytes(user.raw) for user in raw.find()}


def recount(connection: Connection, shop_settings: Settings) -> ObjectId:
    history = History(connection.recounts, shop_settings)
    return run_recount(connection, shop_settings, history, RecountRequest(force=True)).id


def undo(
    connection: Connection, shop_settings: Settings, recount_id: Any = "last", *, write: bool = True
) -> tuple[UndoResult, list[LoggedUser]]:
    logged = resolve_recount(
        connection, shop_settings, History(connection.recounts, shop_settings), str(recount_id)
    )
    listed: list[LoggedUser] = []
    result = undo_recount(connection, logged, write=write, on_not_restored=listed.append)
    return result, listed


def ship(connection: Connection, *customers: Any) -> None:
    if customers:
        connection.orders.insert_many([{"customer_id": c, "status": "Shipped"} for c in customers])


@settings(
    max_examples=examples(12, 200),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    points=st.lists(st.tuples(POINTS, st.integers(0, 2)), min_size=1, max_size=10),
    first=st.lists(st.integers(0, 9), max_size=15),
    second=st.lists(st.integers(0, 9), max_size=15),
    interference=st.dictionaries(st.integers(0, 9), st.sampled_from(["delete", 77, "points"])),
)
def test_undo_restores_every_user_bit_for_bit_or_lists_the_user(
    shop: tuple[Connection, Settings],
    points: list[tuple[Any, int]],
    first: list[int],
    second: list[int],
    interference: dict[int, Any],
) -> None:
    connection, shop_settings = shop
    empty(connection)
    connection.users.insert_many(
        [user_with(shop_settings.points_field, value, n, p) for n, (value, p) in enumerate(points)]
    )
    ship(connection, *first)
    recount(connection, shop_settings)
    before = read_users(connection)
    ship(connection, *second)
    last = recount(connection, shop_settings)
    written = read_users(connection)
    changed = {user for user in before if before[user] != written[user]}
    if not changed:
        return

    for user_id, kind in interference.items():
        if kind == "delete":
            connection.users.delete_one({"_id": user_id})
        else:
            connection.users.update_one(
                {"_id": user_id}, {"$set": {shop_settings.points_field: kind}}
            )
    disturbed = read_users(connection)
    planned, planned_list = undo(connection, shop_settings, last, write=False)
    assert read_users(connection) == disturbed
    result, listed = undo(connection, shop_settings, last)

    assert (planned.restored, len(planned_list)) == (result.restored, len(listed))
    after = read_users(connection)
    not_restored = {user.change["user"] for user in listed}
    for user_id in changed:
        if user_id in interference:
            assert user_id in not_restored
            assert after.get(user_id) == disturbed.get(user_id)
        else:
            assert user_id not in not_restored
            assert after[user_id] == before[user_id]
    assert result.restored == len(changed - set(interference))
    for user_id in before.keys() - changed:
        assert after.get(user_id) == disturbed.get(user_id)
    # Once more changes nothing.
    assert undo(connection, shop_settings, last)[0].restored == 0
    assert read_users(connection) == after


@settings(
    max_examples=examples(12, 200),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(points=st.lists(st.tuples(POINTS, st.integers(0, 2)), min_size=1, max_size=10))
def test_the_first_recount_can_be_undone_for_points_of_any_type(
    shop: tuple[Connection, Settings], points: list[tuple[Any, int]]
) -> None:
    connection, shop_settings = shop
    empty(connection)
    connection.users.insert_many(
        [user_with(shop_settings.points_field, value, n, p) for n, (value, p) in enumerate(points)]
    )
    ship(connection, *range(0, len(points), 2))
    before = read_users(connection)
    last = recount(connection, shop_settings)
    if read_users(connection) != before:
        undo(connection, shop_settings, last)
    assert read_users(connection) == before


@pytest.mark.parametrize("shop", ["loyalty.points"], indirect=True)
def test_a_document_that_the_update_created_is_removed_unless_it_was_extended(
    shop: tuple[Connection, Settings],
) -> None:
    connection, shop_settings = shop
    connection.users.insert_many([{"_id": 1}, {"_id": 2}])
    ship(connection, 1, 2)
    recount(connection, shop_settings)
    connection.users.update_one({"_id": 2}, {"$set": {"loyalty.tier": "gold"}})
    undo(connection, shop_settings)
    assert list(connection.users.find()) == [{"_id": 1}, {"_id": 2, "loyalty": {"tier": "gold"}}]


@pytest.mark.parametrize("shop", ["loyalty_points"], indirect=True)
def test_last_is_the_newest_recount_that_changed_something_and_is_not_undone(
    shop: tuple[Connection, Settings],
) -> None:
    connection, shop_settings = shop
    history = History(connection.recounts, shop_settings)
    connection.users.insert_one({"_id": 1})
    ids = []
    for _ in range(2):
        ship(connection, 1)
        ids.append(recount(connection, shop_settings))
    recount(connection, shop_settings)  # changes nothing, so there is nothing to undo
    assert history.find_recounts_without_effect() == []
    assert resolve_recount(connection, shop_settings, history, "last").id == ids[1]
    assert connection.recounts is not None
    connection.recounts.insert_one(
        {"recorded_by": "loyalty-microservice", "outcome": "undone", "undone_recount": ids[1]}
    )
    assert resolve_recount(connection, shop_settings, history, "last").id == ids[0]
    assert resolve_recount(connection, shop_settings, history, str(ids[1])).id == ids[1]


@pytest.mark.parametrize("shop", ["loyalty_points"], indirect=True)
def test_last_skips_recounts_in_which_every_update_failed(
    shop: tuple[Connection, Settings],
) -> None:
    connection, shop_settings = shop
    connection.users.insert_many([{"_id": n, "locked": n == 3} for n in range(6)])
    ship(connection, *range(6))
    rule = {"$or": [{"locked": False}, {"loyalty_points": {"$exists": False}}]}
    connection.users.database.command("collMod", "users", validator=rule)
    effective = recount(connection, shop_settings)
    for _ in range(2):  # the locked user is logged again, and not written
        recount(connection, shop_settings)
    logged = resolve_recount(
        connection, shop_settings, History(connection.recounts, shop_settings), "last"
    )
    assert logged.id == effective
    assert undo(connection, shop_settings)[0].restored == 5
    assert connection.users.count_documents({"loyalty_points": {"$exists": True}}) == 0


@pytest.mark.parametrize("shop", ["loyalty_points"], indirect=True)
def test_last_can_be_a_failed_recount_of_which_no_update_was_acknowledged(
    shop: tuple[Connection, Settings],
) -> None:
    """Its connection was lost at the first batch, and other batches were written meanwhile."""
    connection, shop_settings = shop
    connection.users.insert_one({"_id": 1})
    for _ in range(2):
        ship(connection, 1)
        last = recount(connection, shop_settings)
    assert connection.recounts is not None
    failed = {"$set": {"outcome": "failed", "changed": 0}}
    connection.recounts.update_one({"_id": last}, failed)
    assert undo(connection, shop_settings)[0].restored == 1
    assert list(connection.users.find()) == [{"_id": 1, "loyalty_points": 1}]


@pytest.mark.parametrize("shop", ["loyalty_points"], indirect=True)
def test_a_recount_without_a_record_is_writing_or_was_interrupted(
    shop: tuple[Connection, Settings],
) -> None:
    connection, shop_settings = shop
    connection.users.insert_one({"_id": 1})
    ship(connection, 1)
    history = History(connection.recounts, shop_settings)
    assert find_unrecorded(connection, shop_settings, history) is None
    last = recount(connection, shop_settings)
    assert find_unrecorded(connection, shop_settings, history) is None
    assert connection.recounts is not None
    connection.recounts.delete_one({"_id": last})
    found = find_unrecorded(connection, shop_settings, history)
    assert found is not None
    assert found.id == last
    recount(connection, shop_settings)  # changes nothing, but shows that all points are right
    assert find_unrecorded(connection, shop_settings, history) is None


@pytest.mark.parametrize("shop", ["loyalty_points"], indirect=True)
@pytest.mark.parametrize("text", ["last", "5" * 24])
def test_a_recount_that_is_not_in_the_change_log_is_named(
    shop: tuple[Connection, Settings], text: str
) -> None:
    connection, shop_settings = shop
    with pytest.raises(RecountNotFound, match="is not undone" if text == "last" else text):
        resolve_recount(
            connection, shop_settings, History(connection.recounts, shop_settings), text
        )


@pytest.mark.parametrize("shop", ["loyalty_points"], indirect=True)
def test_a_recount_into_the_wrong_field_is_undone_in_that_field(
    shop: tuple[Connection, Settings], deployment: Deployment
) -> None:
    connection, right = shop
    wrong = settings_for(deployment.uri, USER_POINTS_FIELD="age")
    connection.users.insert_many([{"_id": n, "age": 40 + n} for n in range(5)])
    ship(connection, 1, 2)
    before = read_users(connection)
    mistake = recount(connection, wrong)
    recount(connection, right)
    right_points = {user["_id"]: user["loyalty_points"] for user in connection.users.find()}
    undo(connection, right, mistake)
    assert {user["_id"]: user["age"] for user in connection.users.find()} == {
        n: 40 + n for n in range(5)
    }
    assert {u["_id"]: u["loyalty_points"] for u in connection.users.find()} == right_points
    undo(connection, right)
    assert read_users(connection) == before


@pytest.mark.parametrize("shop", ["loyalty_points"], indirect=True)
def test_a_user_whose_restoring_fails_is_listed_and_all_others_are_restored(
    shop: tuple[Connection, Settings],
) -> None:
    connection, shop_settings = shop
    connection.users.insert_many([{"_id": n, "loyalty_points": 9} for n in range(8)])
    recount(connection, shop_settings)
    rule = {"$or": [{"_id": {"$ne": 3}}, {"loyalty_points": {"$lt": 9}}]}
    connection.users.database.command("collMod", "users", validator=rule)
    result, listed = undo(connection, shop_settings)
    assert [(user.change["user"], user.stored) for user in listed] == [(3, 0)]
    assert result.not_restored == {"update failed": 1}
    assert result.restored == 7
    assert connection.users.count_documents({"loyalty_points": 9}) == 7


@pytest.mark.parametrize("shop", ["loyalty_points"], indirect=True)
def test_users_whose_update_was_not_acknowledged_are_counted_as_restored(
    shop: tuple[Connection, Settings], deployment: Deployment
) -> None:
    connection, shop_settings = shop
    connection.users.insert_many([{"_id": n, "loyalty_points": 9} for n in range(5)])
    recount(connection, shop_settings)
    error = {"code": 64, "errmsg": "waiting for replication timed out"}
    with faults.fail_command(deployment.servers[0], "update", 1, writeConcernError=error):
        result, _ = undo(connection, shop_settings)
    assert (result.restored, result.unchanged) == (5, 0)
    assert connection.users.count_documents({"loyalty_points": 9}) == 5


@pytest.mark.parametrize("shop", ["loyalty_points"], indirect=True)
def test_an_array_that_contains_the_points_of_the_recount_is_not_overwritten(
    shop: tuple[Connection, Settings],
) -> None:
    connection, shop_settings = shop
    connection.users.insert_many([{"_id": n} for n in range(2)])
    ship(connection, 0, 1)
    recount(connection, shop_settings)
    connection.users.update_one({"_id": 1}, {"$set": {"loyalty_points": [1]}})
    result, listed = undo(connection, shop_settings)
    assert (result.restored, [user.stored for user in listed]) == (1, [[1]])
    assert list(connection.users.find()) == [{"_id": 0}, {"_id": 1, "loyalty_points": [1]}]


@pytest.mark.parametrize("shop", ["loyalty.points"], indirect=True)
def test_an_array_that_contains_the_created_document_is_not_removed(
    shop: tuple[Connection, Settings],
) -> None:
    connection, shop_settings = shop
    connection.users.insert_many([{"_id": n} for n in range(2)])
    ship(connection, 0, 1)
    recount(connection, shop_settings)
    connection.users.update_one({"_id": 1}, {"$set": {"loyalty": [{"points": 1}]}})
    result, _ = undo(connection, shop_settings)
    assert (result.restored, result.unchanged) == (1, 1)
    assert list(connection.users.find()) == [{"_id": 0}, {"_id": 1, "loyalty": [{"points": 1}]}]


@pytest.mark.parametrize("shop", ["loyalty_points"], indirect=True)
def test_points_that_are_not_utf_8_are_not_overwritten(shop: tuple[Connection, Settings]) -> None:
    connection, shop_settings = shop
    connection.users.insert_one({"_id": 1, "loyalty_points": 9})
    recount(connection, shop_settings)
    user = bson.encode({"_id": 1, "loyalty_points": "5?"}).replace(b"5?", b"5\xfe")
    connection.users.delete_one({"_id": 1})
    connection.users.insert_one(RawBSONDocument(user))
    result, listed = undo(connection, shop_settings)
    assert (result.restored, [user.stored for user in listed]) == (0, ["5\udcfe"])


@pytest.mark.parametrize("shop", ["loyalty_points"], indirect=True)
def test_the_changes_of_one_user_are_found_with_their_recounts(
    shop: tuple[Connection, Settings],
) -> None:
    connection, shop_settings = shop
    connection.users.insert_many([{"_id": n} for n in range(7)])
    ids: list[ObjectId] = []
    for _ in range(3):
        ship(connection, 4)
        ids.append(recount(connection, shop_settings))
    assert connection.changes is not None
    target = {"users": "users", "points_field": "loyalty_points"}
    found = find_user_changes(connection.changes, target, [4])
    assert [(row["recount"], row["change"]) for row in found] == [
        (ids[2], {"user": 4, "before": 2, "after": 3}),
        (ids[1], {"user": 4, "before": 1, "after": 2}),
        (ids[0], {"user": 4, "after": 1}),
    ]
