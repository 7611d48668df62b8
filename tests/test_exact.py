"""Exactness: one cluster time beside busy writers, two services at once, and reads that fail."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from unittest import mock
from uuid import uuid4

import pytest
from boundaries import fixed_boundaries
from conftest import MEMORY, Command, settings_for
from pymongo import MongoClient
from pymongo.database import Database
from writers import ORDERS, USERS, object_id, writers

from config import Settings
from loyalty.commands import once
from loyalty.errors import QueryTimeout, SnapshotTooOld
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.recount.counter import ROWS_PER_BATCH
from loyalty.recount.partitions import find_boundaries
from loyalty.recount.result import Result
from loyalty.recount.runner import RecountRequest, run_recount
from loyalty.recount.snapshot import pin_cluster_time
from loyalty.recount.tally import Totals
from loyalty.retry import RetryPolicy
from sandbox import faults
from sandbox.mongod import Deployment, wait_until
from sandbox.service import Process
from sandbox.shop import find_mismatches

MANY_USERS = ROWS_PER_BATCH + 1


def fill(shop: Database[Any], users: int, points: int) -> None:
    """Insert users who each hold `points`, and as many counted orders."""
    shop.users.insert_many([{"_id": n, "loyalty_points": points} for n in range(users)])
    shop.orders.insert_many(
        [{"customer_id": n, "status": "Shipped"} for n in range(users) for _ in range(points)]
    )


@pytest.fixture(scope="module")
def busy(deployment: Deployment, client: MongoClient[Any]) -> Iterator[tuple[Connection, Settings]]:
    """A shop whose orders are all counted, and whose users are up to date."""
    shop = client[f"busy_{uuid4().hex[:12]}"]
    shop.users.insert_many([{"_id": object_id(n)} for n in range(USERS)])
    rng = random.Random(1)
    shop.orders.insert_many(
        {
            "_id": n,
            "customer_id": str(object_id(rng.randrange(USERS))),
            "status": rng.choice(["Shipped", "Delivered"]),
        }
        for n in range(ORDERS)
    )
    settings = settings_for(
        deployment.uri_for(database=shop.name), ORDER_STATUSES="Shipped,Delivered"
    )
    connection = connect(settings, writing=True)
    connection.orders.create_index([("status", 1), ("customer_id", 1)])
    run(connection, settings)
    yield connection, settings
    connection.client.close()
    client.drop_database(shop.name)


def recount(
    connection: Connection, settings: Settings, *, write: bool = True, cuts: list[Any] | None = None
) -> Result:
    boundaries = find_boundaries if cuts is None else fixed_boundaries(cuts)
    request = RecountRequest(write=write, force=True, find_boundaries=boundaries)
    return run_recount(connection, settings, History(None, settings), request)


def run(connection: Connection, settings: Settings) -> Totals:
    return recount(connection, settings).totals


def count_false_changes(
    connection: Connection, settings: Settings, *, recounts: int
) -> tuple[int, int]:
    """Recount beside the writers; return the number of recounts and of changes that they found.

    Nothing is written, so that each false change is seen by itself. The first one ends it.
    """
    done = found = 0
    while done < recounts and not found:
        result = recount(connection, settings, write=False)
        done += 1
        found += result.totals.changed
        assert result.count.exact is connection.supports_snapshots
        if connection.supports_snapshots:
            assert result.totals.counted_orders == ORDERS
    return done, found


@pytest.mark.xdist_group("busy")
@pytest.mark.size(3, deep=30)
@pytest.mark.parametrize(
    ("index", "kind"),
    [(True, "move"), (False, "move"), (True, "swap")],
    ids=["moving_with_index", "moving_without_index", "swapping_customers"],
)
def test_a_recount_during_concurrent_writes_finds_no_wrong_change(
    busy: tuple[Connection, Settings], index: bool, kind: str, size: int
) -> None:
    connection, settings = busy
    if not index:
        connection.orders.drop_indexes()
    try:
        with writers(settings.mongodb_uri, kind, kind):
            done, found = count_false_changes(connection, settings, recounts=size)
    finally:
        connection.orders.create_index([("status", 1), ("customer_id", 1)])
    print(f"{done} recounts, {found} false changes")
    assert (done, found) == (size, 0)


@pytest.mark.xdist_group("busy")
def test_without_a_snapshot_concurrent_writes_cause_wrong_changes(
    busy: tuple[Connection, Settings],
) -> None:
    """An index scan misses an order that moves meanwhile, or sees it twice."""
    connection, settings = busy
    with writers(settings.mongodb_uri, "move", "move"):
        done, found = count_false_changes(
            replace(connection, supports_snapshots=False), settings, recounts=1_000
        )
    print(f"{done} recounts, {found} false changes")
    assert found > 0


@pytest.mark.xdist_group("busy")
@pytest.mark.size(2, deep=40)
@pytest.mark.parametrize("kind", ["all", "all_upper"])
def test_during_concurrent_writes_a_recount_equals_a_python_count_at_its_snapshot(
    busy: tuple[Connection, Settings], kind: str, size: int
) -> None:
    """The orders are read again at that cluster time, and counted in plain Python."""
    connection, settings = busy
    users = connection.users
    # Many partitions, one with a boundary among the upper-case ids.
    cuts = [object_id(n) for n in range(0, USERS, USERS // 12)] + ["65A"]
    changed = 0
    with writers(settings.mongodb_uri, kind, kind):
        for _ in range(size):
            result = recount(connection, settings, cuts=cuts)
            assert result.count.exact
            changed += result.totals.changed
            concern = {"level": "snapshot", "atClusterTime": result.count.cluster_time}
            fields: list[Any] = [{"$project": {"status": 1, "customer_id": 1}}]
            orders = connection.orders.aggregate(fields, readConcern=concern)
            expected = Counter(
                o["customer_id"].lower() for o in orders if o["status"] in settings.order_statuses
            )
            stored = {str(user["_id"]): user["loyalty_points"] for user in users.find()}
            assert stored == {user_id: expected[user_id] for user_id in stored}
            assert result.totals.counted_orders == expected.total()
    assert changed > 0
    run(connection, settings)
    assert find_mismatches(users.database, settings.order_statuses) == []


@pytest.mark.xdist_group("busy")
def test_one_recount_corrects_points_that_other_programs_wrote(
    busy: tuple[Connection, Settings],
) -> None:
    connection, settings = busy
    shop, statuses = connection.users.database, settings.order_statuses
    with writers(settings.mongodb_uri, "change"):
        wait_until("changes", lambda: run(connection, settings).changed)
    run(connection, settings)
    assert find_mismatches(shop, statuses) == []


@pytest.mark.xdist_group("busy")
@pytest.mark.size(1, deep=10)
def test_after_one_of_two_services_is_killed_the_next_recount_is_exact(
    busy: tuple[Connection, Settings], service: Callable[..., Process], size: int
) -> None:
    connection, settings = busy
    shop, statuses = connection.users.database, settings.order_statuses
    env = {"MONGODB_URI": settings.mongodb_uri, "ORDER_STATUSES": ",".join(statuses)}
    env["MAX_DECREASE_PERCENT"] = "100"  # the writers may take points from nearly all users
    with writers(settings.mongodb_uri, "change", "change"):
        one, two = (service(**env, RECOUNT_INTERVAL="1s") for _ in range(2))
        one.wait_for("outcome=succeeded", times=size)
        two.wait_for("outcome=succeeded", times=size)
        one.kill()
        two.wait_for("outcome=succeeded", times=size + 2)
    assert two.stop() == 0
    assert service("--once", **env).wait() == 0
    assert find_mismatches(shop, statuses) == []


@pytest.fixture
def wrong_shop(deployment: Deployment) -> Iterator[Connection]:
    """A shop whose users all hold wrong points, with more rows than the server's first reply."""
    settings = settings_for(deployment.uri_for(database=f"shop_{uuid4().hex[:12]}"))
    with connect(settings, writing=True) as connection:
        shop = connection.users.database
        fill(shop, MANY_USERS, 1)
        shop.users.update_many({}, {"$set": {"loyalty_points": 5}})
        yield connection
        connection.client.drop_database(shop.name)


@pytest.mark.parametrize(
    ("command", "code"),
    [("aggregate", 239), ("aggregate", 43), ("getMore", 43), ("aggregate", 11602), ("find", 239)],
    ids=["snapshot_too_old", "cursor_not_found", "cursor_killed", "interrupted", "find_fails"],
)
def test_a_count_whose_read_fails_is_repeated(
    wrong_shop: Connection,
    deployment: Deployment,
    command: str,
    code: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = settings_for("mongodb://unused/")
    with faults.fail_command(deployment.servers[0], command, 2, errorCode=code):
        result = recount(wrong_shop, settings)
    totals = result.totals
    assert totals.changed == totals.users == totals.counted_orders == MANY_USERS
    assert find_mismatches(wrong_shop.users.database) == []
    assert result.count.exact
    retries = [m for m in caplog.messages if m.startswith("count_retry attempt=")]
    assert 1 <= len(retries) <= 2


def test_a_count_beyond_the_timeout_fails_with_advice_and_is_not_repeated(
    wrong_shop: Connection, deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_for("mongodb://unused/")
    with (
        faults.fail_command(deployment.servers[0], "aggregate", 99, errorCode=50),
        pytest.raises(QueryTimeout, match="raise COUNT_TIMEOUT"),
    ):
        recount(wrong_shop, settings)
    assert "count_retry" not in caplog.text


NO_RETRY = RetryPolicy(timeout_seconds=0, initial_seconds=1, max_seconds=1)


def test_without_a_usable_snapshot_all_customers_are_counted_without_one(
    wrong_shop: Connection, deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    """A server may forget each snapshot immediately: minSnapshotHistoryWindowInSeconds=0."""
    settings = settings_for("mongodb://unused/")
    request = RecountRequest(force=True, retry_policy=NO_RETRY)
    with faults.fail_command(deployment.servers[0], "aggregate", 1, errorCode=239):
        result = run_recount(wrong_shop, settings, History(None, settings), request)
    assert caplog.text.count("snapshot_unavailable") == 1
    assert not result.count.exact
    assert result.as_of == result.started_at
    assert result.totals.counted_orders == MANY_USERS
    assert find_mismatches(wrong_shop.users.database) == []


def test_without_a_usable_snapshot_a_live_update_fails(
    wrong_shop: Connection, deployment: Deployment
) -> None:
    """It could count orders as they were before `not_before`. An attempt can read twice."""
    settings = settings_for("mongodb://unused/")
    not_before = pin_cluster_time(wrong_shop)
    request = RecountRequest(customers=[(1, [1])], not_before=not_before, retry_policy=NO_RETRY)
    with (
        # One more: some customers are counted again at a new snapshot at once.
        faults.fail_command(deployment.servers[0], "aggregate", 2, errorCode=239),
        pytest.raises(SnapshotTooOld),
    ):
        run_recount(wrong_shop, settings, History(None, settings), request)
    assert wrong_shop.users.count_documents({"loyalty_points": 5}) == MANY_USERS


def test_without_a_usable_snapshot_requested_customers_are_counted_without_one(
    wrong_shop: Connection, deployment: Deployment
) -> None:
    settings = settings_for("mongodb://unused/")
    request = RecountRequest(customers=[(1, [1])], retry_policy=NO_RETRY)
    with faults.fail_command(deployment.servers[0], "aggregate", 2, errorCode=239):
        result = run_recount(wrong_shop, settings, History(None, settings), request)
    assert not result.count.exact
    assert wrong_shop.users.count_documents({"loyalty_points": 5}) == MANY_USERS - 1
    (user,) = wrong_shop.users.find({"_id": 1})
    assert user["loyalty_points"] == wrong_shop.orders.count_documents(
        {"status": "Shipped", "customer_id": 1}
    )


def test_a_standalone_server_is_read_without_a_snapshot(service: Callable[..., Process]) -> None:
    with Deployment(replica_set=False, parent=MEMORY) as alone, alone.client() as client:
        fill(client.oms_db, 5, 2)
        client.oms_db.users.update_many({}, {"$set": {"loyalty_points": 7}})
        daemon = service(MONGODB_URI=alone.uri, RECOUNT_INTERVAL="1s")
        daemon.wait_for("exact=false", times=3)
        assert daemon.stop() == 0
        assert sum("snapshot_unsupported" in line for line in daemon.lines) == 1
        assert find_mismatches(client.oms_db) == []
        assert [r["exact"] for r in client.oms_db.loyalty_recounts.find()][:2] == [False, False]
        status = service("--status", MONGODB_URI=alone.uri)
        assert status.wait() == 0
        assert "fresh" in status.output


def test_a_count_that_always_fails_ends_with_69(
    deployment: Deployment,
    database: Database[Any],
    command: Command,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fill(database, 3, 1)
    fault = {"errorCode": 43, "namespace": f"{database.name}.orders"}
    short_retry = RetryPolicy(timeout_seconds=2, initial_seconds=0.1, max_seconds=1)

    def recount_with_short_retry(connection: Any, told: Any, history: Any, request: Any) -> Result:
        request = replace(request, retry_policy=short_retry)
        return run_recount(connection, told, history, request)

    with (
        faults.fail_command(deployment.servers[0], "aggregate", 999, **fault),
        mock.patch.object(once, "run_recount", recount_with_short_retry),
    ):
        assert command("--once") == 69
    output = capsys.readouterr().err
    assert output.count("count_retry") >= 2
    assert "code 43" in output
    assert "Traceback" not in output


def test_as_of_is_the_time_at_which_the_orders_were_read(
    database: Database[Any], command: Command
) -> None:
    fill(database, 3, 1)
    before = datetime.now(UTC)
    assert command("--once") == 0
    (record,) = database.loyalty_recounts.find()
    assert record["exact"] is True
    assert abs((record["as_of"] - before).total_seconds()) < 15
    assert record["as_of"] == record["cluster_time"].as_datetime()
    wait_until("the expiry index", lambda: len(database.loyalty_recounts.index_information()) == 2)
