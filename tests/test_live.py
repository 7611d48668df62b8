"""Live updates: a moment after the orders change the points are right, or older right ones."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock
from uuid import uuid4

import pytest
from bson import ObjectId, Regex
from conftest import MEMORY, Command, examples, settings_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_stage import Stage, live, make_index, points
from pymongo import MongoClient
from pymongo.database import Database

from loyalty import service
from loyalty.errors import DatabaseUnavailable, ResyncRequired
from loyalty.history import HEARTBEAT, Heartbeat, History
from loyalty.live import events
from loyalty.live.watcher import ChangeStreamWatcher
from loyalty.mongo.connection import connect
from loyalty.recount import counter as count_failures
from loyalty.recount import index
from loyalty.recount import runner as run_recount
from loyalty.recount.counter import pin_cluster_time
from sandbox import faults
from sandbox.mongod import Deployment, wait_until
from sandbox.shop import count, disagreements, key

IDS = [ObjectId(f"{n:x}".rjust(2, "b") * 12) for n in (0xAB, 0xCD, 0xFE)]
USERS = [IDS[0], str(IDS[0]).upper(), IDS[1], str(IDS[2]), str(IDS[2]).title(), 5, "5", {"a": 1}]


def customer_forms() -> st.SearchStrategy[Any]:
    texts = st.sampled_from(IDS).flatmap(
        lambda own: st.sampled_from(
            [own, str(own), str(own).upper(), str(own).title(), str(own)[:9].upper() + str(own)[9:]]
        )
    )
    others = [None, "", 5, 5.0, "5", "ada", {"a": 1}, [1], {"$gt": 1}, Regex("^b")]
    return st.one_of(texts, texts, st.sampled_from(others))


KINDS = ["insert", "update", "replace", "delete", "reassign", "many", "transaction"]
STATUSES = st.sampled_from(["Shipped", "Shipped", "Paid", "Returned", None])
EDITS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 30), customer_forms(), STATUSES),
    min_size=1,
    max_size=12,
)
# What the full recount knows: the odd ids by an index, or not, or it has no index.
KNOWN = st.sampled_from(["odd ids", "too many odd ids", "no index"])


def edit(shop: Database[Any], kind: str, number: int, customer: Any, status: Any) -> None:
    orders = shop.orders
    order = {"customer_id": customer, "status": status}
    chosen = orders.find_one({}, {"_id": 1}, skip=number % max(orders.count_documents({}), 1))
    one = {"_id": chosen["_id"] if chosen else None}
    if kind == "insert":
        orders.insert_one(order)
    elif kind == "update":
        orders.update_one(one, {"$set": {"status": status}})
    elif kind == "replace":
        orders.replace_one(one, order)
    elif kind == "delete":
        orders.delete_one(one)
    elif kind == "reassign":
        orders.update_one(one, [{"$set": {"customer_id": {"$literal": customer}}}])
    elif kind == "many":
        orders.update_many({"customer_id": {"$eq": customer}}, {"$set": {"status": status}})
    else:
        with shop.client.start_session() as session, session.start_transaction():
            orders.insert_one(order, session=session)
            orders.update_one(one, {"$unset": {"status": 1}}, session=session)


@contextmanager
def dirty(
    client: MongoClient[Any], deployment: Deployment, known: str, *, pre_images: bool
) -> Iterator[Stage]:
    """A small shop with every form of ids, and live updates of it."""
    shop = client[f"live_{uuid4().hex[:12]}"]
    shop.create_collection("orders", changeStreamPreAndPostImages={"enabled": pre_images})
    shop.users.insert_many([{"_id": own} for own in USERS])
    shop.orders.insert_many(
        {"customer_id": own, "status": "Shipped" if n % 2 else "Paid"}
        for n, own in enumerate(USERS)
    )
    # Counted under odd forms of the ids, which only the recount of everyone comes upon.
    odd = [str(IDS[0]).title(), str(IDS[1])[:9].upper() + str(IDS[1])[9:]]
    shop.orders.insert_many({"customer_id": form, "status": "Shipped"} for form in odd)
    with ExitStack() as stack:
        stack.callback(client.drop_database, shop.name)
        if known != "no index":
            make_index(shop)
        if known == "too many odd ids":
            stack.enter_context(mock.patch.object(count_failures, "_ODD_CUSTOMERS", 0))
        yield stack.enter_context(live(deployment, shop))


@given(edits=EDITS, known=KNOWN)
@settings(max_examples=examples(8, 150), suppress_health_check=[HealthCheck.too_slow])
def test_a_moment_after_any_edits_everyone_is_right(
    client: MongoClient[Any], deployment: Deployment, known: str, edits: list[Any]
) -> None:
    with dirty(client, deployment, known, pre_images=True) as stage:
        for one in edits:
            edit(stage.shop, *one)
        stage.settle()
        assert stage.is_live


@given(edits=EDITS, known=KNOWN)
@settings(max_examples=examples(8, 150), suppress_health_check=[HealthCheck.too_slow])
def test_without_pre_images_points_are_older_right_ones_until_everyone_is_recounted(
    client: MongoClient[Any], deployment: Deployment, known: str, edits: list[Any]
) -> None:
    with dirty(client, deployment, known, pre_images=False) as stage:
        been_right = [count(stage.shop)]
        for n, one in enumerate(edits):
            edit(stage.shop, *one)
            been_right.append(count(stage.shop))
            if n % 3 == 0 or n == len(edits) - 1:
                stage.update()
                for user in stage.shop.users.find():
                    own = key(user["_id"])
                    assert user["loyalty_points"] in {right[own] for right in been_right}
        assert stage.is_live
        stage.recount()
        assert disagreements(stage.shop) == []


@pytest.fixture
def small(deployment: Deployment, database: Database[Any]) -> Iterator[Stage]:
    """Three users with an order each, the index, and live updates."""
    database.users.insert_many([{"_id": own} for own in IDS])
    database.orders.insert_many([ship(own) for own in IDS])
    make_index(database)
    with live(deployment, database) as stage:
        yield stage


def ship(customer: Any) -> dict[str, Any]:
    return {"customer_id": str(customer), "status": "Shipped"}


def test_a_write_between_the_pinned_time_and_the_opening_of_the_stream_is_marked(
    uri: str, database: Database[Any]
) -> None:
    settings = settings_for(uri)
    database.users.insert_one({"_id": 1})
    with connect(settings, writing=True) as connection:
        pinned = pin_cluster_time(connection)
        assert pinned
        database.orders.insert_one(ship(IDS[0]))
        stream = ChangeStreamWatcher(connection, settings, pinned)
        marks = stream.pop_pending(10)
        stream.close()
    assert marks
    assert [*marks.customers.values()] == [str(IDS[0])]
    assert marks.time > pinned


def test_what_changes_while_everyone_is_recounted_is_right_after_it(small: Stage) -> None:
    shipped: list[str] = []

    def on_progress(_: str) -> None:  # it has an answer, read at the pinned time
        if not shipped:
            shipped.append(str(small.shop.orders.insert_one(ship(IDS[0])).inserted_id))

    small.service.recount(on_progress)
    assert points(small.shop) == [1, 1, 1]
    small.settle()
    assert points(small.shop) == [2, 1, 1]


def test_a_full_recount_is_never_about_an_older_time_than_a_live_update(small: Stage) -> None:
    small.shop.orders.insert_one(ship(IDS[0]))
    small.settle()
    times = []

    def spy(*given: Any, **named: Any) -> Any:
        times.append(given[3].at)
        return run_recount.run_recount(*given, **named)

    newest = small.service._newest
    with mock.patch.object(service, "run_recount", spy):
        small.recount()
    assert times == [newest]
    assert newest.time > 0


def test_without_a_full_recount_that_succeeded_nothing_is_updated(small: Stage) -> None:
    small.shop.orders.insert_one(ship(IDS[0]))
    with (
        mock.patch.object(service, "run_recount", side_effect=DatabaseUnavailable("gone")),
        pytest.raises(DatabaseUnavailable),
    ):
        small.recount()
    small.update(0.3)
    assert points(small.shop) == [1, 1, 1]
    small.recount()
    assert points(small.shop) == [2, 1, 1]
    small.shop.orders.insert_one(ship(IDS[0]))
    small.settle()


def test_marks_are_not_lost_when_a_live_update_fails(small: Stage) -> None:
    small.shop.orders.insert_one(ship(IDS[0]))
    broken = mock.patch.object(service, "run_recount", side_effect=KeyError("a bug"))
    with broken, pytest.raises(KeyError):
        small.update_until(lambda: False)
    assert not small.is_live
    small.recount()
    assert points(small.shop) == [2, 1, 1]


def test_a_user_who_refuses_a_live_update_is_said_and_not_called_updated(
    small: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    allowed = {"$or": [{"_id": {"$ne": IDS[0]}}, {"loyalty_points": {"$lte": 1}}]}
    small.shop.command("collMod", "users", validator=allowed)
    small.shop.orders.insert_many([ship(IDS[0]), ship(IDS[1])])
    small.update_until(lambda: points(small.shop) == [1, 2, 1])
    assert "incomplete refused: " in caplog.text
    assert small.service._live
    assert small.service._live.customers_updated == 1


def test_a_large_collection_without_the_index_is_not_updated_live_but_warned_of_once(
    small: Stage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "LARGE_COLLECTION_ORDERS", 2)
    small.service._stop_watching()
    small.shop.orders.drop_indexes()
    for _ in range(2):
        small.recount()
        assert not small.is_live
    assert "".join(caplog.messages).count("not_live") == 1
    assert "--create-index" in "".join(caplog.messages)
    make_index(small.shop)
    small.recount()
    assert small.is_live


# --- the guard


@pytest.mark.size(3_000, deep=100_000)
def test_a_status_renamed_by_one_command_leaves_the_points_and_is_said(
    deployment: Deployment, database: Database[Any], size: int, caplog: pytest.LogCaptureFixture
) -> None:
    users = size // 5
    database.users.insert_many({"_id": n} for n in range(users))
    database.orders.insert_many(
        {"_id": n, "customer_id": n % users, "status": "Shipped"} for n in range(size)
    )
    make_index(database)
    with live(deployment, database) as stage:
        database.orders.update_many({}, {"$set": {"status": "SHIPPED"}})
        with pytest.raises(DatabaseUnavailable, match="take points from many users"):
            stage.update_until(lambda: False)
        assert stage.recount().startswith("refused")
        assert "SHIPPED" in caplog.text
        assert "held live updates would take points" in caplog.text
        kept = [number for number in points(database) if number == 5]
        assert len(kept) > 0.8 * users
        # Renamed back, everything is as before with the next recount.
        database.orders.update_many({}, {"$set": {"status": "Shipped"}})
        stage.recount()
        assert disagreements(database) == []


def test_a_status_renamed_piecemeal_is_ended_by_the_guard(
    deployment: Deployment,
    database: Database[Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service, "_QUIET", 0.1)
    users = 200
    database.users.insert_many({"_id": n} for n in range(users))
    database.orders.insert_many(
        {"_id": n, "customer_id": n, "status": "Shipped"} for n in range(users)
    )
    make_index(database)
    with live(deployment, database) as stage:
        for start in range(0, users, 10):
            piece = {"_id": {"$gte": start, "$lt": start + 10}}
            database.orders.update_many(piece, {"$set": {"status": "SHIPPED"}})
            try:
                for _ in range(6):
                    stage.update()
            except DatabaseUnavailable:  # it is over, it seems: everyone is recounted
                stage.recount()
        assert "again: until the next recount" in caplog.text
        assert stage.recount().startswith("refused")
        assert points(database).count(1) > 0.5 * users


def test_points_that_are_held_back_have_no_heartbeat(
    deployment: Deployment, database: Database[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "HEARTBEAT", timedelta(0))
    beats: list[Heartbeat] = []
    monkeypatch.setattr(History, "write_heartbeat", lambda _, heartbeat: beats.append(heartbeat))
    database.users.insert_many({"_id": n} for n in range(50))
    database.orders.insert_many({"customer_id": n, "status": "Shipped"} for n in range(50))
    with live(deployment, database) as stage:
        live_updates = stage.service._live
        assert live_updates
        stage.update()
        assert beats
        database.orders.update_many({}, {"$set": {"status": "Sent"}})
        while not live_updates.paused:
            before = len(beats)
            stage.update()
        stage.update()
        assert len(beats) == before


def test_with_the_guard_turned_off_nothing_is_held_back(
    deployment: Deployment, database: Database[Any]
) -> None:
    database.users.insert_many({"_id": n} for n in range(50))
    database.orders.insert_many({"customer_id": n, "status": "Shipped"} for n in range(50))
    with live(deployment, database, MAX_DECREASE_PERCENT="100") as stage:
        database.orders.update_many({}, {"$set": {"status": "Returned"}})
        stage.settle()
        assert stage.is_live


# --- the stream


@pytest.mark.parametrize("code", [280, 286, 10334])
def test_a_stream_whose_history_is_lost_is_a_full_recount_and_another_stream(
    small: Stage, deployment: Deployment, code: int
) -> None:
    with (
        faults.failing(deployment.servers[0], "getMore", 1, errorCode=code),
        pytest.raises(ResyncRequired, match=f"code {code}"),
    ):
        small.update_until(lambda: False)
    small.shop.orders.insert_one(ship(IDS[0]))
    small.update(0.1)
    assert points(small.shop) == [1, 1, 1]
    small.recount()
    assert points(small.shop) == [2, 1, 1]
    small.shop.orders.insert_one(ship(IDS[1]))
    small.settle()


def test_an_oplog_that_loses_history_is_a_full_recount_and_another_stream() -> None:
    # A checkpoint a second: what is older than the last one can be forgotten.
    small_log = Deployment(oplog_mb=1, options=["--syncdelay", "1"], parent=MEMORY)
    with small_log as deployment, deployment.client() as client:
        shop, oplog = client["shop"], client.local["oplog.rs"]
        shop.users.insert_one({"_id": IDS[0]})
        make_index(shop)
        with live(deployment, shop) as stage:
            stream = stage.service._live
            assert stream
            with stream._lock:  # it is kept from reading on
                last = shop.orders.insert_one(ship(IDS[0])).inserted_id

                def lost() -> bool:
                    shop.noise.insert_one({"text": "x" * 500_000})
                    return not oplog.find_one({"o._id": last})

                wait_until("a lost order", lost)
            with pytest.raises(ResyncRequired, match=r"code (286|136)"):
                stage.update_until(lambda: False)
            stage.recount()
            assert disagreements(shop) == []
            shop.orders.insert_one(ship(IDS[0]))
            stage.settle()


def test_a_stream_whose_cursor_dies_again_and_again_asks_a_few_times_a_second(
    small: Stage, deployment: Deployment
) -> None:
    with faults.failing(deployment.servers[0], "getMore", 10_000, errorCode=43):
        before = asked(small.shop)
        small.update(2)
        assert asked(small.shop) - before < 20
    small.shop.orders.insert_one(ship(IDS[0]))
    small.settle()
    assert small.is_live


def asked(shop: Database[Any]) -> int:
    """Return how many answers of cursors, and aggregations, the server has been asked for."""
    commands = shop.client.admin.command("serverStatus")["metrics"]["commands"]
    return sum(commands[name]["total"] for name in ("getMore", "aggregate"))


def test_a_silent_stream_is_given_up(
    small: Stage, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loyalty.live.watcher.STALL_TIMEOUT_SECONDS", 0.2)
    with (
        faults.slowed(deployment.servers[0], "getMore", 3000),
        pytest.raises(DatabaseUnavailable, match="silent"),
    ):
        small.update_until(lambda: False)
    assert not small.is_live


def test_more_changes_than_can_wait_are_a_full_recount(
    small: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loyalty.live.watcher.MAX_PENDING", 50)
    small.shop.orders.insert_many([ship(ObjectId()) for _ in range(100)])
    with pytest.raises(DatabaseUnavailable, match="more than 50 changes"):
        small.update_until(lambda: False)
    small.shop.orders.insert_one(ship(IDS[0]))
    small.recount()
    assert points(small.shop) == [2, 1, 1]


def test_the_stream_lets_through_only_what_may_change_a_count_and_only_ids(
    database: Database[Any],
) -> None:
    settings = settings_for("mongodb://localhost", ORDER_STATUS_FIELD="a.status")
    orders = database.orders
    orders.insert_one({"_id": 0})
    with orders.watch(events.change_stream_pipeline(settings), max_await_time_ms=200) as stream:
        orders.insert_one({"_id": 1, "a": {"status": "Paid"}})  # not counted
        orders.update_one({"_id": 1}, {"$set": {"a.note": "x", "total": 5, "ab": {"status": 1}}})
        orders.insert_one({"_id": 2, "a": {"status": "Shipped"}, "customer_id": 7, "total": 5})
        orders.update_one({"_id": 1}, {"$set": {"a": {"status": "Shipped"}}})
        orders.update_one({"_id": 1}, {"$unset": {"customer_id": 1}})  # it has none
        orders.update_one({"_id": 2}, {"$unset": {"customer_id": 1}})
        orders.delete_one({"_id": 0})
        seen = []
        while event := stream.try_next():
            seen.append((event["operationType"], event["documentKey"]["_id"]))
            assert "total" not in event.get("fullDocument", {})
            assert "updateDescription" not in event
    assert seen == [("insert", 2), ("update", 1), ("update", 2), ("delete", 0)]


# --- how it is doing


def test_the_heartbeat_comes_at_most_every_so_often_and_says_how_it_is_doing(
    small: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert timedelta(seconds=10) == HEARTBEAT
    monkeypatch.setattr(service, "HEARTBEAT", timedelta(seconds=0.4))
    beats: list[Heartbeat] = []
    monkeypatch.setattr(History, "write_heartbeat", lambda _, heartbeat: beats.append(heartbeat))
    started = time.monotonic()
    small.shop.orders.insert_one(ship(IDS[0]))
    small.update_until(lambda: len(beats) == 3)
    assert time.monotonic() - started > 2 * 0.4
    last = beats[-1]
    assert last.last_event
    assert last.last_update
    assert last.live_since <= last.last_update <= last.at
    assert (last.customers_updated, last.waiting) == (1, 0)


def test_the_heartbeat_is_one_document_that_status_reads(
    small: Stage, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    small.update()
    found = small.shop.loyalty_recounts.find_one({"outcome": "live"}, {"_id": 0})
    assert found
    assert {*found} == {
        *("recorded_by", "outcome", "finished_at", "live_since", "last_event", "last_update"),
        *("customers_updated", "waiting", "at"),
    }
    small.service._beat_at = 0.0
    small.update()
    assert small.shop.loyalty_recounts.count_documents({"outcome": "live"}) == 1
    assert command("--status", LIVE_UPDATES="yes") == 0
    assert "Live: since" in capsys.readouterr().out
    old = {"at": datetime.now(UTC) - timedelta(minutes=5)}
    small.shop.loyalty_recounts.update_one({"outcome": "live"}, {"$set": old})
    command("--status", LIVE_UPDATES="yes")
    assert "NOT live: the last heartbeat was 5m ago" in capsys.readouterr().out
    command("--status")
    assert "live" not in capsys.readouterr().out.lower()
    small.shop.loyalty_recounts.delete_many({"outcome": "live"})
    command("--status", LIVE_UPDATES="yes")
    assert "NOT live: there is no heartbeat" in capsys.readouterr().out


def test_check_config_says_whether_it_will_work_and_whether_pre_images_are_on(
    small: Stage,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert command("--check-config") == 0
    assert "live updates" not in capsys.readouterr().out
    assert command("--check-config", LIVE_UPDATES="yes") == 0
    said = capsys.readouterr().out
    assert re.search("live updates +will work\n", said)
    found = re.search(r"pre-images +off: .* switch them on: db.runCommand\((.*)\)", said)
    assert found
    # The command as it stands there, for the shell, is this one.
    assert found[1] == "{collMod: 'orders', changeStreamPreAndPostImages: {enabled: true}}"
    small.shop.command("collMod", "orders", changeStreamPreAndPostImages={"enabled": True})
    command("--check-config", LIVE_UPDATES="yes")
    assert re.search("pre-images +on\n", capsys.readouterr().out)
    monkeypatch.setattr(index, "LARGE_COLLECTION_ORDERS", 2)
    small.shop.orders.drop_indexes()
    assert command("--check-config", LIVE_UPDATES="yes") == 1
    assert "will NOT work: each update would read all orders" in capsys.readouterr().out
