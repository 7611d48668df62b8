"""Live updates: the points follow the orders, or are those of an earlier moment."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Any
from unittest import mock
from uuid import uuid4

import pytest
from bson import ObjectId, Regex, Timestamp
from conftest import MEMORY, ROOT, Command, examples, settings_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_harness import LiveHarness, live_service, make_index, points
from pymongo import MongoClient, monitoring
from pymongo.database import Database

from loyalty import service
from loyalty.concurrency import ignore_progress
from loyalty.errors import ClientUnusable, ConfigurationError, DatabaseUnavailable, ResyncRequired
from loyalty.heartbeat import HEARTBEAT_INTERVAL
from loyalty.history import History
from loyalty.live import events, updater
from loyalty.live.lookup import find_customers
from loyalty.live.state import TRANSITIONS, LiveState
from loyalty.live.watcher import ChangeStreamWatcher, LiveLimits
from loyalty.mongo.connection import connect
from loyalty.recount import runner
from loyalty.retry import RetryPolicy
from loyalty.service import REFUSED_RETRY_SECONDS, Service
from sandbox import faults
from sandbox.mongod import DEADLINE_SECONDS, Deployment, wait_until
from sandbox.shop import canonical_key, count_points, find_mismatches


class CommandRecorder(monitoring.CommandListener):
    """Notes the commands of the main thread, in their order, while `is_on`."""

    def __init__(self) -> None:
        self.is_on = False
        self.names: list[str] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if self.is_on and threading.current_thread() is threading.main_thread():
            self.names.append(event.command_name)

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None: ...

    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


COMMANDS = CommandRecorder()
monitoring.register(COMMANDS)  # for clients made from now on

IDS = [ObjectId(f"{n:x}".rjust(2, "b") * 12) for n in (0xAB, 0xCD, 0xFE)]
USERS = [IDS[0], str(IDS[0]).upper(), IDS[1], str(IDS[2]), 5, "5", {"a": 1}]
MIXED_CASE = str(IDS[1])[:9].upper() + str(IDS[1])[9:]


def customer_ids() -> st.SearchStrategy[Any]:
    hex_ids = st.sampled_from([v for i in IDS for v in (i, str(i), str(i).upper())])
    others = [None, "", 5, 5.0, "5", "ada", {"a": 1}, [1], {"$gt": 1}, Regex("^b")]
    return st.one_of(hex_ids, hex_ids, st.sampled_from(others))


KINDS = ["insert", "update", "replace", "delete", "reassign", "many", "transaction"]
STATUSES = st.sampled_from(["Shipped", "Shipped", "Paid", "Returned", None])
EDITS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 30), customer_ids(), STATUSES),
    min_size=1,
    max_size=12,
)


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
def shop_with_all_ids(
    client: MongoClient[Any], deployment: Deployment, *, with_index: bool, pre_images: bool
) -> Iterator[LiveHarness]:
    """Make a small shop with all kinds of ids, and do live updates of it."""
    shop = client[f"live_{uuid4().hex[:12]}"]
    images: dict[str, Any] = {}
    if pre_images:  # an unknown option for MongoDB 5.0
        images["changeStreamPreAndPostImages"] = {"enabled": True}
    shop.create_collection("orders", **images)
    shop.users.insert_many([{"_id": user_id} for user_id in USERS])
    shop.orders.insert_many(
        {"customer_id": user_id, "status": "Shipped" if n % 2 else "Paid"}
        for n, user_id in enumerate(USERS)
    )
    with ExitStack() as stack:
        stack.callback(client.drop_database, shop.name)
        if with_index:
            make_index(shop)
        yield stack.enter_context(live_service(deployment, shop))


@pytest.mark.usefixtures("pre_images")
@given(edits=EDITS, with_index=st.booleans())
@settings(max_examples=examples(8, 150), suppress_health_check=[HealthCheck.too_slow])
def test_after_any_edits_live_updates_make_all_points_exact(
    client: MongoClient[Any], deployment: Deployment, edits: list[Any], *, with_index: bool
) -> None:
    options = {"with_index": with_index, "pre_images": True}
    with shop_with_all_ids(client, deployment, **options) as harness:
        for one in edits:
            edit(harness.shop, *one)
        harness.update_until_exact()
        assert harness.is_live


@given(edits=EDITS, with_index=st.booleans())
@settings(max_examples=examples(8, 150), suppress_health_check=[HealthCheck.too_slow])
def test_without_pre_images_points_may_be_older_until_the_full_recount(
    client: MongoClient[Any], deployment: Deployment, edits: list[Any], *, with_index: bool
) -> None:
    options = {"with_index": with_index, "pre_images": False}
    with shop_with_all_ids(client, deployment, **options) as harness:
        correct_until_now = [count_points(harness.shop)]
        for n, one in enumerate(edits):
            edit(harness.shop, *one)
            correct_until_now.append(count_points(harness.shop))
            if n % 3 == 0 or n == len(edits) - 1:
                harness.update()
                for user in harness.shop.users.find():
                    user_key = canonical_key(user["_id"])
                    correct = {points_of[user_key] for points_of in correct_until_now}
                    assert user["loyalty_points"] in correct
        assert harness.is_live
        harness.recount()
        assert find_mismatches(harness.shop) == []


@pytest.fixture
def small_shop(database: Database[Any]) -> Database[Any]:
    """Three users with an order each, and the index."""
    database.users.insert_many([{"_id": user_id} for user_id in IDS])
    database.orders.insert_many([shipped(user_id) for user_id in IDS])
    make_index(database)
    return database


@pytest.fixture
def small(deployment: Deployment, small_shop: Database[Any]) -> Iterator[LiveHarness]:
    """Live updates of the small shop."""
    with live_service(deployment, small_shop) as harness:
        yield harness


def shipped(customer: Any) -> dict[str, Any]:
    return {"customer_id": str(customer), "status": "Shipped"}


@pytest.fixture(autouse=True)
def log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "loyalty")


@pytest.mark.parametrize(("snapshot_is_older", "expected"), [(1, [IDS[0]]), (0, [])])
def test_exactly_the_writes_after_the_snapshot_are_pending(
    uri: str, database: Database[Any], snapshot_is_older: int, expected: list[Any]
) -> None:
    settings = settings_for(uri)
    with database.client.start_session() as session:
        database.orders.insert_one(shipped(IDS[0]), session=session)
        written_at = session.operation_time
    assert written_at
    snapshot = Timestamp(written_at.time, written_at.inc - snapshot_is_older)
    with connect(settings, writing=True) as connection:
        watcher = ChangeStreamWatcher(connection, settings, snapshot, LiveLimits())
        if expected:
            wait_until("the age of a pending change", lambda: watcher.lag_seconds() > 0.1)
        changes = watcher.pop_pending(2 if expected else 0.5)
        assert watcher.lag_seconds() == 0
        watcher.close()
    assert [*changes.customers.values()] == expected
    if expected:
        assert changes.cluster_time == written_at


def test_the_next_live_update_counts_changes_during_a_full_recount(small: LiveHarness) -> None:
    is_first = Lock()  # two threads count partitions, and report at the same time

    def on_progress(_: str) -> None:  # called after the first answer, read at the snapshot
        if is_first.acquire(blocking=False):
            small.shop.orders.insert_one(shipped(IDS[0]))

    small.service.recount(on_progress)
    assert points(small.shop) == [1, 1, 1]
    small.update_until_exact()
    assert points(small.shop) == [2, 1, 1]


def test_a_full_recount_never_reads_before_the_last_live_update(small: LiveHarness) -> None:
    small.shop.orders.insert_one(shipped(IDS[0]))
    small.update_until_exact()
    requested = []

    def record_request(*given: Any, **named: Any) -> Any:
        requested.append(given[3].not_before)
        return runner.run_recount(*given, **named)

    newest = small.service.updater.newest_read
    with mock.patch.object(service, "run_recount", record_request):
        small.recount()
    assert requested == [newest]
    assert newest.time > 0


def test_a_full_recount_never_reads_before_a_live_update_that_was_refused(
    deployment: Deployment, database: Database[Any]
) -> None:
    database.users.insert_many({"_id": n} for n in range(50))
    database.orders.insert_many({"customer_id": n, "status": "Shipped"} for n in range(50))
    options = {"limits": LiveLimits(quiet_seconds=1_000)}
    with live_service(deployment, database, options) as harness:
        with database.client.start_session() as session:
            database.orders.update_many({}, {"$set": {"status": "Sent"}}, session=session)
            changed_at = session.operation_time
        harness.update_until(lambda: harness.state is LiveState.PAUSED)
        assert changed_at
        assert harness.service.updater.newest_read >= changed_at


@pytest.fixture
def short_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a count that fails be repeated for 1 s only."""
    policy = RetryPolicy(timeout_seconds=1, initial_seconds=0.1, max_seconds=1)

    def recount(connection: Any, told: Any, history: Any, request: Any, on_progress: Any) -> Any:
        request = replace(request, retry_policy=policy)
        return runner.run_recount(connection, told, history, request, on_progress)

    for module in (service, updater):
        monkeypatch.setattr(module, "run_recount", recount)


@pytest.mark.parametrize(
    ("code", "kind", "is_live"),
    [(8, DatabaseUnavailable, True), (286, ResyncRequired, True), (286, ResyncRequired, False)],
)
def test_live_updates_stop_until_a_full_recount_succeeds(
    small: LiveHarness,
    deployment: Deployment,
    short_retry: None,
    code: int,
    kind: type[Exception],
    *,
    is_live: bool,
) -> None:
    small.shop.orders.insert_one(shipped(IDS[0]))
    if not is_live:
        small.service.disconnect()
        small.service.connect()
    with (
        faults.fail_command(deployment.servers[0], "aggregate", 100, errorCode=code),
        pytest.raises(kind),
    ):
        small.recount()
    small.update(0.3)
    assert points(small.shop) == [1, 1, 1]
    assert small.service.state.live is None
    small.recount()
    assert points(small.shop) == [2, 1, 1]
    small.shop.orders.insert_one(shipped(IDS[0]))
    small.update_until_exact()


def test_pending_changes_are_not_lost_when_a_live_update_fails(
    small: LiveHarness, deployment: Deployment, short_retry: None
) -> None:
    small.shop.orders.insert_one(shipped(IDS[0]))
    with (
        faults.fail_command(deployment.servers[0], "aggregate", 100, errorCode=8),
        pytest.raises(DatabaseUnavailable),
    ):
        small.update_until(lambda: False)
    assert not small.is_live
    small.recount()
    assert points(small.shop) == [2, 1, 1]


def test_a_failed_update_causes_a_warning_and_is_not_counted(
    small: LiveHarness, caplog: pytest.LogCaptureFixture
) -> None:
    allowed = {"$or": [{"_id": {"$ne": IDS[0]}}, {"loyalty_points": {"$lte": 1}}]}
    small.shop.command("collMod", "users", validator=allowed)
    small.shop.orders.insert_many([shipped(IDS[0]), shipped(IDS[1])])
    small.update_until(lambda: points(small.shop) == [1, 2, 1])
    assert "incomplete" in caplog.text
    assert small.service.state.live
    assert small.service.state.live.users_updated == 1


@pytest.mark.parametrize("is_insert", [True, False])
def test_one_changed_order_takes_three_commands_after_its_event(
    small: LiveHarness, *, is_insert: bool
) -> None:
    """With the reply that reports the event, that is three and a half round trips."""
    small.update()  # the first one also writes the heartbeat
    writer = small.shop.client
    if is_insert:
        writer[small.shop.name].orders.insert_one(shipped(IDS[0]))
    else:
        writer[small.shop.name].orders.update_one({}, {"$set": {"status": "Paid"}})
    COMMANDS.names.clear()
    COMMANDS.is_on = True
    try:
        small.update(5)
    finally:
        COMMANDS.is_on = False
    assert COMMANDS.names == ["find", "aggregate", "update"]
    assert find_mismatches(small.shop) == []


def test_only_a_change_after_a_recent_update_waits_for_the_minimum_interval(
    deployment: Deployment, small_shop: Database[Any]
) -> None:
    seconds = 4.0  # a slow machine needs less than half of it for an update
    options = {"limits": LiveLimits(min_interval_seconds=seconds)}
    with live_service(deployment, small_shop, options) as harness:
        durations = []
        for _ in range(2):
            small_shop.orders.insert_one(shipped(IDS[0]))
            started_at = time.monotonic()
            harness.update(2 * seconds)
            durations.append(time.monotonic() - started_at)
            assert find_mismatches(small_shop) == []
    first, second = durations
    assert first < seconds / 2
    assert second > seconds / 2


def test_a_large_shop_without_the_index_has_no_live_updates(
    deployment: Deployment,
    small_shop: Database[Any],
    low_limit: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    small_shop.orders.insert_many({"status": "Paid"} for _ in range(low_limit + 1))
    small_shop.orders.drop_indexes()
    with live_service(deployment, small_shop) as harness:
        harness.recount()
        assert not harness.is_live
        warnings = [m for m in caplog.messages if m.startswith("live_updates_unavailable")]
        assert len(warnings) == 1
        assert "--create-index" in warnings[0]
        make_index(small_shop)
        harness.recount()
        assert harness.is_live


def test_live_updates_run_only_while_the_index_exists(
    deployment: Deployment,
    small_shop: Database[Any],
    low_limit: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    small_shop.orders.insert_many({"status": "Paid"} for _ in range(low_limit + 1))
    options = {"heartbeat_interval": timedelta(0)}
    with live_service(deployment, small_shop, options) as harness:
        harness.update()
        assert harness.is_live
        small_shop.orders.drop_indexes()
        small_shop.orders.insert_one(shipped(IDS[0]))
        harness.update_until(lambda: not harness.is_live)
        assert points(small_shop) == [2, 1, 1]
        warnings = [m for m in caplog.messages if m.startswith("live_updates_unavailable")]
        assert len(warnings) == 1
        assert "--create-index" in warnings[0]
        make_index(small_shop)
        harness.recount()
        assert harness.is_live


def test_a_transient_error_of_explain_does_not_end_live_updates(
    deployment: Deployment, small_shop: Database[Any], low_limit: int
) -> None:
    small_shop.orders.insert_many({"status": "Paid"} for _ in range(low_limit + 1))
    options = {"heartbeat_interval": timedelta(0)}
    server, interrupted = deployment.servers[0], 11601
    with ExitStack() as stack:
        # The first error is that of the check when the service connects.
        with faults.fail_command(server, "explain", 2, errorCode=interrupted):
            harness = stack.enter_context(live_service(deployment, small_shop, options))
        assert harness.is_live
        with faults.fail_command(server, "explain", 1, errorCode=interrupted):
            harness.update()
        harness.update()
        assert harness.is_live
        assert small_shop.loyalty_recounts.count_documents({"outcome": "succeeded"}) == 1


def test_a_recount_after_a_restore_may_read_before_the_last_one(
    small: LiveHarness, deployment: Deployment
) -> None:
    small.service.updater.newest_read = Timestamp(2**32 - 2, 1)
    with (
        faults.fail_command(deployment.servers[0], "find", 1, errorCode=205),
        pytest.raises(ClientUnusable),
    ):
        small.recount()
    small.shop.orders.insert_one(shipped(IDS[0]))
    small.recount()
    assert small.is_live
    assert points(small.shop) == [2, 1, 1]


def test_a_lookup_on_a_dead_connection_is_repeated(
    small: LiveHarness, deployment: Deployment, uri: str
) -> None:
    settings = settings_for(uri)
    order = small.shop.orders.find_one({"customer_id": str(IDS[1])})
    assert order
    blocking = {"blockConnection": True, "blockTimeMS": 3_000}
    with connect(settings) as connection:
        COMMANDS.names.clear()
        COMMANDS.is_on = True
        try:
            with faults.fail_command(deployment.servers[0], "find", 1, **blocking):
                orders, never = [order["_id"]], events.NEVER
                found, _ = find_customers(connection, settings, orders, never, timeout_seconds=1)
        finally:
            COMMANDS.is_on = False
    assert COMMANDS.names.count("find") > 1
    assert found == [str(IDS[1])]


def test_a_lookup_of_large_order_ids_is_split(small: LiveHarness, uri: str) -> None:
    ids = [f"{n:020000}" for n in range(1_000)]
    small.shop.orders.insert_one({"_id": ids[-1], **shipped(IDS[2])})
    settings = settings_for(uri)
    with connect(settings) as connection:
        found, _ = find_customers(connection, settings, ids, events.NEVER)
    assert found == [str(IDS[2])]


@pytest.mark.usefixtures("pre_images")
def test_each_opening_of_the_stream_warns_that_pre_images_are_off(
    deployment: Deployment, small_shop: Database[Any], caplog: pytest.LogCaptureFixture
) -> None:
    def warnings() -> int:
        return sum(message.startswith("pre_images_off") for message in caplog.messages)

    small_shop.command("collMod", "orders", changeStreamPreAndPostImages={"enabled": True})
    with live_service(deployment, small_shop) as harness:
        assert warnings() == 0
        orders = list(small_shop.orders.find())
        small_shop.orders.drop()
        small_shop.orders.insert_many(orders)  # as after a restore without the option
        harness.update_until(lambda: warnings() == 1)
        harness.update_until_exact()


@pytest.mark.parametrize("connections", [1, 2])
def test_live_updates_work_with_any_pool_size_of_the_uri(
    deployment: Deployment, small_shop: Database[Any], connections: int
) -> None:
    uri = deployment.uri_for(database=small_shop.name)
    uri += f"{'&' if '?' in uri else '?'}maxPoolSize={connections}"
    with live_service(deployment, small_shop, MONGODB_URI=uri) as harness:
        small_shop.orders.insert_one(shipped(IDS[0]))
        small_shop.orders.update_one({"customer_id": str(IDS[1])}, {"$set": {"status": "Paid"}})
        harness.update_until_exact()
        assert harness.is_live


# --- ids in upper and mixed case


def test_a_burst_of_upper_case_ids_is_exact_by_live_updates(
    deployment: Deployment, database: Database[Any]
) -> None:
    user_ids = [ObjectId(f"ab{n:022x}") for n in range(5_000)]
    database.users.insert_many({"_id": str(user_id).upper()} for user_id in user_ids)
    make_index(database)
    with live_service(deployment, database) as harness:
        database.orders.insert_many(
            {"customer_id": str(user_id).upper(), "status": "Shipped"} for user_id in user_ids
        )
        harness.update_until(lambda: not database.users.find_one({"loyalty_points": {"$ne": 1}}))
        assert harness.is_live


@pytest.mark.parametrize("collection", ["orders", "users"])
def test_an_id_in_mixed_case_stops_live_updates_with_one_warning(
    deployment: Deployment,
    small_shop: Database[Any],
    caplog: pytest.LogCaptureFixture,
    collection: str,
) -> None:
    document: Any = {"_id": MIXED_CASE} if collection == "users" else shipped(MIXED_CASE)
    small_shop[collection].insert_one(document)
    with live_service(deployment, small_shop) as harness:
        harness.recount()
        assert not harness.is_live
        assert find_mismatches(small_shop) == []
        warnings = [m for m in caplog.messages if m.startswith("live_updates_unavailable")]
        assert len(warnings) == 1
        assert "$toLower" in warnings[0]


def test_a_mixed_case_id_causes_a_full_recount_and_ends_live_updates(
    small: LiveHarness, caplog: pytest.LogCaptureFixture
) -> None:
    small.shop.orders.insert_one(shipped(MIXED_CASE))
    small.update_until_exact()
    assert points(small.shop) == [1, 2, 1]
    assert not small.is_live
    assert sum(m.startswith("resync ") for m in caplog.messages) == 1
    assert sum(m.startswith("live_updates_stopped ") for m in caplog.messages) == 1
    # The command in the warning normalizes the ids. Then live updates start again.
    found = re.search(r"updateMany\((\{.*?\}), \[(.*?)\]\)\. A", caplog.text)
    assert found
    matching = "{'customer_id': {$regex: '^[0-9A-Fa-f]{24}$', $not: {$type: 'array'}}}"
    assert found[1] == matching
    assert found[2] == "{$set: {'customer_id': {$toLower: '$customer_id'}}}"
    small.shop.orders.insert_one({"customer_id": [MIXED_CASE]})
    small.shop.orders.update_many(
        {"customer_id": {"$regex": "^[0-9A-Fa-f]{24}$", "$not": {"$type": "array"}}},
        [{"$set": {"customer_id": {"$toLower": "$customer_id"}}}],
    )
    small.recount()
    assert small.is_live
    assert find_mismatches(small.shop) == []


def test_a_mixed_case_id_outside_the_count_causes_no_repeated_recounts(
    small: LiveHarness, caplog: pytest.LogCaptureFixture
) -> None:
    # The order is not counted, so the full recount does not find the id. Each change is an event.
    small.shop.orders.insert_one({"_id": 1, "customer_id": MIXED_CASE, "status": "Paid"})
    small.shop.orders.update_one({"_id": 1}, {"$set": {"status": "Packed"}})
    small.update_until(lambda: "resync reason=" in caplog.text)
    assert not small.is_live
    small.shop.orders.update_one({"_id": 1}, {"$set": {"status": "Paid"}})
    small.update(0.5)
    assert sum(m.startswith("resync ") for m in caplog.messages) == 1
    small.recount()
    assert small.is_live


# --- the safety check


@pytest.mark.size(3_000, deep=100_000)
def test_renaming_a_status_pauses_live_updates_and_refuses_the_recount(
    deployment: Deployment, database: Database[Any], size: int, caplog: pytest.LogCaptureFixture
) -> None:
    users = size // 5
    database.users.insert_many({"_id": n} for n in range(users))
    database.orders.insert_many(
        {"_id": n, "customer_id": n % users, "status": "Shipped"} for n in range(size)
    )
    make_index(database)
    with live_service(deployment, database) as harness:
        database.orders.update_many({}, {"$set": {"status": "SHIPPED"}})
        # A slow machine reads the events for as long as a pause may last.
        deadline_seconds = LiveLimits().max_pause_seconds + 2 * DEADLINE_SECONDS
        harness.update_until(lambda: "refused" in caplog.text, deadline_seconds)
        assert 'live_updates_paused reason="live updates would take points' in caplog.text
        assert "resync reason=" in caplog.text
        assert "SHIPPED" in caplog.text
        assert caplog.text.count("live_updates_stopped ") == 1
        unchanged = [number for number in points(database) if number == 5]
        assert len(unchanged) > 0.8 * users
        assert "ERROR" not in {r.levelname for r in caplog.records if "refused" not in r.message}
        # After the status is renamed back, the next recount makes all points exact.
        database.orders.update_many({}, {"$set": {"status": "Shipped"}})
        harness.recount()
        assert find_mismatches(database) == []


def test_renaming_a_status_in_batches_stops_live_updates(
    deployment: Deployment, database: Database[Any], caplog: pytest.LogCaptureFixture
) -> None:
    users = 200
    database.users.insert_many({"_id": n} for n in range(users))
    database.orders.insert_many(
        {"_id": n, "customer_id": n, "status": "Shipped"} for n in range(users)
    )
    make_index(database)
    options = {"limits": LiveLimits(quiet_seconds=0.1)}
    with live_service(deployment, database, options) as harness:
        for start in range(0, users, 10):
            batch = {"_id": {"$gte": start, "$lt": start + 10}}
            database.orders.update_many(batch, {"$set": {"status": "SHIPPED"}})
            for _ in range(6):
                harness.update()
        assert "paused for the second time" in caplog.text
        assert not harness.is_live
        assert harness.recount().startswith("refused")
        assert points(database).count(1) > 0.5 * users


def test_increases_do_not_offset_decreases(
    deployment: Deployment, database: Database[Any], caplog: pytest.LogCaptureFixture
) -> None:
    database.users.insert_many({"_id": n} for n in range(100))
    database.orders.insert_many({"customer_id": n, "status": "Shipped"} for n in range(50))
    make_index(database)
    with live_service(deployment, database) as harness:
        database.orders.insert_many({"customer_id": n, "status": "Shipped"} for n in range(50, 100))
        harness.update_until_exact()
        database.orders.update_many({"customer_id": {"$lt": 20}}, {"$set": {"status": "Sent"}})
        harness.update_until(lambda: "live_updates_paused" in caplog.text)


def test_a_pause_ends_after_its_maximum(
    deployment: Deployment, database: Database[Any], caplog: pytest.LogCaptureFixture
) -> None:
    database.users.insert_many({"_id": n} for n in range(50))
    database.orders.insert_many({"customer_id": n, "status": "Shipped"} for n in range(50))
    options = {"limits": LiveLimits(quiet_seconds=1_000, max_pause_seconds=0.5)}
    with live_service(deployment, database, options) as harness:
        database.orders.update_many({"customer_id": {"$lt": 30}}, {"$set": {"status": "Sent"}})
        harness.update_until(lambda: "resync reason=" in caplog.text)
        assert "live_updates_paused" in caplog.text
        assert find_mismatches(database) == []
        assert harness.is_live


def test_while_live_updates_are_paused_there_is_no_heartbeat(
    deployment: Deployment, database: Database[Any], caplog: pytest.LogCaptureFixture
) -> None:
    database.users.insert_many({"_id": n} for n in range(50))
    database.orders.insert_many({"customer_id": n, "status": "Shipped"} for n in range(50))
    options = {"limits": LiveLimits(quiet_seconds=1_000), "heartbeat_interval": timedelta(0)}
    with live_service(deployment, database, options) as harness:
        harness.update()
        assert heartbeats(database)
        database.orders.update_many({}, {"$set": {"status": "Sent"}})
        harness.update_until(lambda: "live_updates_paused" in caplog.text)
        assert harness.service.state.live is None
        before = heartbeats(database)
        harness.update()
        assert heartbeats(database) == before


def heartbeats(shop: Database[Any]) -> list[Any]:
    return list(shop.loyalty_recounts.find({"outcome": "live"}))


def test_with_the_safety_check_turned_off_live_updates_are_never_paused(
    deployment: Deployment, database: Database[Any]
) -> None:
    database.users.insert_many({"_id": n} for n in range(50))
    database.orders.insert_many({"customer_id": n, "status": "Shipped"} for n in range(50))
    with live_service(deployment, database, MAX_DECREASE_PERCENT="100") as harness:
        database.orders.update_many({}, {"$set": {"status": "Returned"}})
        harness.update_until_exact()
        assert harness.is_live


# --- the stream


@pytest.mark.parametrize("code", [280, 286, 10334])
def test_a_stream_that_cannot_be_resumed_causes_a_resync(
    small: LiveHarness, deployment: Deployment, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    with faults.fail_command(deployment.servers[0], "getMore", 1, errorCode=code):
        small.update_until(lambda: f"(code {code}" in caplog.text)
    (line,) = [m for m in caplog.messages if m.startswith("resync ")]
    assert f"(code {code}" in line
    serious = [r.getMessage() for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    assert {message.split()[0] for message in serious} <= {"pre_images_off"}
    small.recount()
    small.shop.orders.insert_one(shipped(IDS[1]))
    small.update_until_exact()


def test_a_second_resync_within_seconds_is_an_error(
    small: LiveHarness, caplog: pytest.LogCaptureFixture
) -> None:
    def replace_orders() -> None:
        small.shop.new.insert_many([shipped(user_id) for user_id in IDS[:2]])
        small.shop.new.rename("orders", dropTarget=True)

    replace_orders()
    small.update_until(lambda: "resync reason=" in caplog.text)
    assert points(small.shop) == [1, 1, 0]
    replace_orders()
    with pytest.raises(DatabaseUnavailable, match="again within 10 s"):
        small.update_until(lambda: False)
    assert not small.is_live
    small.recount()
    assert small.is_live


def test_after_the_oplog_has_lost_history_a_resync_makes_the_points_exact(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # One checkpoint each second: the server may delete oplog entries before the last checkpoint.
    small_oplog = Deployment(oplog_mb=1, options=["--syncdelay", "1"], parent=MEMORY)
    with small_oplog as deployment, deployment.client() as client:
        shop, oplog = client["shop"], client.local["oplog.rs"]
        shop.users.insert_one({"_id": IDS[0]})
        make_index(shop)
        with live_service(deployment, shop) as harness:
            watcher = harness.service.updater._watcher
            assert watcher
            with watcher._condition:  # keeps the thread from reading the stream
                last = shop.orders.insert_one(shipped(IDS[0])).inserted_id

                def is_lost() -> bool:
                    shop.noise.insert_one({"text": "x" * 500_000})
                    return not oplog.find_one({"o._id": last})

                wait_until("a lost order", is_lost)
            harness.update_until(lambda: "resync reason=" in caplog.text)
            assert re.search(r"resync reason=.*\(code (286|136)", caplog.text)
            assert find_mismatches(shop) == []
            shop.orders.insert_one(shipped(IDS[0]))
            harness.update_until_exact()


def test_a_stream_whose_cursor_is_killed_repeatedly_polls_a_few_times_a_second(
    small: LiveHarness, deployment: Deployment
) -> None:
    with faults.fail_command(deployment.servers[0], "getMore", 10_000, errorCode=43):
        before = commands(small.shop)
        small.update(2)
        assert commands(small.shop) - before < 20
    small.shop.orders.insert_one(shipped(IDS[0]))
    small.update_until_exact()
    assert small.is_live


def commands(shop: Database[Any]) -> int:
    """Return how many getMore and aggregate commands the server has executed."""
    metrics = shop.client.admin.command("serverStatus")["metrics"]["commands"]
    return sum(metrics[name]["total"] for name in ("getMore", "aggregate"))


def test_a_stalled_stream_is_an_error(deployment: Deployment, small_shop: Database[Any]) -> None:
    options = {"limits": LiveLimits(stall_timeout_seconds=0.2)}
    with (
        faults.delay_command(deployment.servers[0], "getMore", 3000),
        live_service(deployment, small_shop, options) as harness,
    ):
        with pytest.raises(DatabaseUnavailable, match="stalled"):
            harness.update_until(lambda: False)
        assert not harness.is_live


def test_too_many_pending_changes_cause_a_resync(
    deployment: Deployment, small_shop: Database[Any], caplog: pytest.LogCaptureFixture
) -> None:
    options = {"limits": LiveLimits(max_pending=50)}
    with live_service(deployment, small_shop, options) as harness:
        small_shop.orders.insert_many([shipped(ObjectId()) for _ in range(1_000)])
        small_shop.orders.insert_one(shipped(IDS[0]))
        harness.update_until(lambda: "resync reason=" in caplog.text)
        assert "more than 50 changes are pending" in caplog.text
        assert points(small_shop) == [2, 1, 1]
        assert harness.is_live


@pytest.mark.parametrize("level", ["local", "available", "majority", "linearizable"])
def test_live_updates_work_with_any_read_concern_of_the_uri(
    deployment: Deployment, small_shop: Database[Any], level: str
) -> None:
    uri = deployment.uri_for(database=small_shop.name)
    uri += f"{'&' if '?' in uri else '?'}readConcernLevel={level}"
    with live_service(deployment, small_shop, MONGODB_URI=uri) as harness:
        small_shop.orders.insert_one(shipped(IDS[0]))
        small_shop.orders.update_one({"customer_id": str(IDS[1])}, {"$set": {"status": "Paid"}})
        harness.update_until_exact()
        assert harness.is_live


def test_a_stream_that_fails_to_open_is_retried_before_the_recount(
    small: LiveHarness, deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    small.service.disconnect()
    small.service.connect()
    with faults.fail_command(deployment.servers[0], "aggregate", 1, errorCode=8):
        small.recount()
    assert small.is_live
    assert "live_updates_unavailable" not in caplog.text


@pytest.mark.parametrize(("code", "is_transient"), [(8, True), (13, False)])
def test_a_stream_that_does_not_open_does_not_stop_the_recount(
    deployment: Deployment,
    small_shop: Database[Any],
    caplog: pytest.LogCaptureFixture,
    code: int,
    *,
    is_transient: bool,
) -> None:
    policy = RetryPolicy(timeout_seconds=0, initial_seconds=1, max_seconds=1)
    options = {"limits": LiveLimits(opening_retry=policy)}
    with live_service(deployment, small_shop, options) as harness:
        harness.service.disconnect()
        harness.service.connect()
        small_shop.orders.insert_one(shipped(IDS[0]))
        with faults.fail_command(deployment.servers[0], "aggregate", 1, errorCode=code):
            outcome = harness.service.recount(ignore_progress)
        assert points(small_shop) == [2, 1, 1]
        assert "live_updates_unavailable" in caplog.text
        assert not harness.is_live
        # Only a transient error causes an earlier recount.
        if is_transient:
            assert outcome.next_after_seconds
            assert 60 <= outcome.next_after_seconds <= 90
        else:
            assert outcome.next_after_seconds is None
        outcome = harness.service.recount(ignore_progress)
        assert harness.state is LiveState.LIVE
        assert outcome.next_after_seconds is None


@pytest.mark.parametrize("target", [None, "orders_old"])
def test_the_resync_is_refused_while_the_orders_are_missing(
    deployment: Deployment, database: Database[Any], target: str | None
) -> None:
    database.users.insert_many([{"_id": n} for n in range(20)])
    orders = [{"customer_id": n, "status": "Shipped"} for n in range(20)]
    database.orders.insert_many(orders)
    with live_service(deployment, database) as harness:
        if target is None:
            database.orders.drop()
        else:
            database.orders.rename(target)
        outcome = None
        while outcome is None:
            outcome = harness.service.run_between(0.05, ignore_progress)
        assert outcome.status.startswith("refused")
        assert outcome.next_after_seconds == REFUSED_RETRY_SECONDS <= 600
        assert not harness.is_live
        assert points(database) == [1] * 20
        assert harness.service.run_between(0, ignore_progress) is None
        database.orders.insert_many(orders[:10] + [{**orders[0], "_id": ObjectId()}])
        harness.recount()
        assert harness.state is LiveState.LIVE
        assert find_mismatches(database) == []


def test_every_state_and_transition_is_in_the_documents() -> None:
    page = (ROOT / "docs" / "live-updates.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.*) \|$", page, re.MULTILINE)
    assert {(LiveState(a), LiveState(b)): text for a, b, text in rows} == TRANSITIONS
    states = re.findall(r"^\| `(\w+)` \| ([A-Z].*\.) \|$", page, re.MULTILINE)
    assert [name for name, _ in states] == [*LiveState]


def test_the_watermark_advances_with_and_without_events(database: Database[Any]) -> None:
    with database.orders.watch(max_await_time_ms=200) as stream:
        with database.client.start_session() as session:
            database.orders.insert_one({}, session=session)
        event = None
        while event is None:
            event = stream.try_next()
        watermark = events.read_watermark(stream.resume_token)
        assert watermark == event["clusterTime"] == session.operation_time
        database.other.insert_one({})
        deadline = time.monotonic() + DEADLINE_SECONDS
        while events.read_watermark(stream.resume_token) == watermark:
            assert stream.try_next() is None
            assert time.monotonic() < deadline
        assert events.read_watermark(stream.resume_token) > watermark
    assert events.read_watermark(None) == events.read_watermark({"_data": b"?"}) == Timestamp(0, 0)


def test_the_stream_returns_only_events_that_can_change_a_count(database: Database[Any]) -> None:
    settings = settings_for("mongodb://localhost", ORDER_STATUS_FIELD="a.status")
    orders = database.orders
    orders.insert_one({"_id": 0})
    with orders.watch(
        events.build_change_stream_pipeline(settings), max_await_time_ms=200
    ) as stream:
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


# --- the heartbeat


def test_the_heartbeat_is_written_once_an_interval_with_the_progress(
    deployment: Deployment, small_shop: Database[Any]
) -> None:
    assert timedelta(seconds=10) == HEARTBEAT_INTERVAL
    options = {"heartbeat_interval": timedelta(seconds=0.4)}
    written: list[Any] = []

    def note_new_heartbeats() -> bool:
        written.extend(beat for beat in heartbeats(small_shop) if beat not in written)
        return len(written) == 3

    with live_service(deployment, small_shop, options) as harness:
        started_at = time.monotonic()
        small_shop.orders.insert_one(shipped(IDS[0]))
        harness.update_until(note_new_heartbeats)
    assert time.monotonic() - started_at > 2 * 0.4
    last = written[-1]
    assert last["last_event"]
    assert last["live_since"] <= last["last_update"] <= last["at"]
    assert (last["users_updated"], last["waiting"]) == (1, 0)


def test_all_changes_before_as_of_of_the_heartbeat_are_counted(small: LiveHarness) -> None:
    def as_of() -> datetime:
        assert small.service.state.live
        return small.service.state.live.as_of

    small.update()
    with small.shop.client.start_session() as session:
        small.shop.orders.insert_one(shipped(IDS[0]), session=session)
        assert session.operation_time
        inserted_at = session.operation_time.as_datetime()
    assert small.service.updater.state is LiveState.LIVE
    while as_of() <= inserted_at:
        assert as_of() <= datetime.now(UTC)
        time.sleep(0.1)
        small.shop.other.insert_one({})  # an idle server advances its time every 10 s
        small.update()
    assert points(small.shop) == [2, 1, 1]


def test_the_time_of_the_heartbeat_is_the_time_of_the_server(small: LiveHarness) -> None:
    small.update()
    live = small.service.state.live
    assert live
    wrong = datetime.now(UTC) - timedelta(days=3)
    History(small.shop.loyalty_recounts, small.service.settings).write_heartbeat(
        replace(live, at=wrong)
    )
    (beat,) = heartbeats(small.shop)
    assert abs(datetime.now(UTC) - beat["at"]) < timedelta(minutes=1)
    assert beat["at"] == beat["finished_at"]


def test_status_reads_the_heartbeat(
    small: LiveHarness, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    small.update()
    (beat,) = heartbeats(small.shop)
    assert {*beat} == {
        *("_id", "recorded_by", "outcome", "finished_at", "live_since", "as_of", "last_event"),
        *("last_update", "users_updated", "waiting", "at", "settings", "host", "expires_at"),
    }
    assert command("--status", LIVE_UPDATES="yes") == 0
    assert "Live updates: running since" in capsys.readouterr().out
    old = {"at": datetime.now(UTC) - timedelta(minutes=5)}
    small.shop.loyalty_recounts.update_one({"outcome": "live"}, {"$set": old})
    command("--status", LIVE_UPDATES="yes")
    assert "Live updates: NOT running, the last heartbeat was 5m ago" in capsys.readouterr().out
    command("--status")
    assert "live" not in capsys.readouterr().out.lower()
    small.shop.loyalty_recounts.delete_many({"outcome": "live"})
    command("--status", LIVE_UPDATES="yes")
    assert "Live updates: NOT running, there is no heartbeat" in capsys.readouterr().out


# --- reload


def test_a_reload_uses_the_new_settings_with_a_new_connection(
    deployment: Deployment, small_shop: Database[Any]
) -> None:
    uri = deployment.uri_for(database=small_shop.name)
    current = [settings_for(uri, LIVE_UPDATES="yes")]
    reloaded = Service(current[0], lambda: current[0])
    harness = LiveHarness(small_shop, reloaded)
    harness.recount()
    current[0] = settings_for(uri, POINTS_PER_ORDER="10")
    reloaded.reload()
    assert not harness.is_live
    harness.recount()
    assert points(small_shop) == [10, 10, 10]
    assert not harness.is_live
    reloaded.disconnect()


def test_after_a_wrong_reload_the_current_settings_stay(
    deployment: Deployment, small_shop: Database[Any]
) -> None:
    uri = deployment.uri_for(database=small_shop.name)
    values = {"LIVE_UPDATES": "yes"}
    reloaded = Service(settings_for(uri, **values), lambda: settings_for(uri, **values))
    harness = LiveHarness(small_shop, reloaded)
    harness.recount()
    values["POINTS_PER_ORDER"] = "many"
    with pytest.raises(ConfigurationError):
        reloaded.reload()
    small_shop.orders.insert_one(shipped(IDS[0]))
    harness.update_until_exact()
    assert harness.is_live
    reloaded.disconnect()


# --- --check-config


@pytest.mark.usefixtures("pre_images")
def test_check_config_reports_live_updates_and_pre_images(
    small: LiveHarness, low_limit: int, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--check-config") == 0
    assert "live updates" not in capsys.readouterr().out
    assert command("--check-config", LIVE_UPDATES="yes") == 0
    said = capsys.readouterr().out
    assert re.search("live updates +will work\n", said)
    found = re.search(r"pre-images +off: .* switch pre-images on: db.runCommand\((.*)\)", said)
    assert found
    # The printed command is for mongosh; this is the same command for the driver.
    assert found[1] == "{collMod: 'orders', changeStreamPreAndPostImages: {enabled: true}}"
    small.shop.command("collMod", "orders", changeStreamPreAndPostImages={"enabled": True})
    command("--check-config", LIVE_UPDATES="yes")
    assert re.search("pre-images +on\n", capsys.readouterr().out)
    order = {"customer_id": "66AbcdefabcdefabcdefabcD", "status": "Shipped"}
    mixed_case = small.shop.orders.insert_one(order).inserted_id
    assert command("--check-config", LIVE_UPDATES="yes") == 1
    said = capsys.readouterr().out
    assert "will NOT work: some customer ids are hex strings in mixed case" in said
    assert "PROBLEM: live updates will not work: some customer ids are hex strings" in said
    small.shop.orders.delete_one({"_id": mixed_case})
    small.shop.orders.insert_many({"status": "Paid"} for _ in range(low_limit + 1))
    small.shop.orders.drop_indexes()
    assert command("--check-config", LIVE_UPDATES="yes") == 1
    said = capsys.readouterr().out
    assert "will NOT work: live updates need a usable index" in said
    assert "PROBLEM: live updates will not work: live updates need a usable index" in said
