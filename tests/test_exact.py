"""One point in time, no mass mistakes: the proof under load, the guard, two services at once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from unittest import mock
from uuid import uuid4

import pytest
from conftest import MEMORY, Command, settings_for
from pymongo import InsertOne, MongoClient
from pymongo.database import Database
from writers import ORDERS, USERS, object_id, writers

from config import Settings
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.recount import counter as count_failures
from loyalty.recount import spool
from loyalty.recount.runner import RecountRequest, run_recount
from loyalty.recount.tally import Result, Totals
from sandbox.mongod import Deployment, wait_until
from sandbox.service import Process
from sandbox.shop import count, disagreements


@pytest.fixture(scope="module")
def busy(deployment: Deployment, client: MongoClient[Any]) -> Iterator[tuple[Connection, Settings]]:
    """A shop of 40,000 orders, all of counted statuses, and points that are right."""
    shop = client[f"busy_{uuid4().hex[:12]}"]
    shop.users.insert_many([{"_id": object_id(n)} for n in range(USERS)])
    rng = random.Random(1)
    for start in range(0, ORDERS, 20_000):
        shop.orders.insert_many(
            {
                "_id": n,
                "customer_id": str(object_id(rng.randrange(USERS))),
                "status": rng.choice(["Shipped", "Delivered"]),
            }
            for n in range(start, start + 20_000)
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


def run(connection: Connection, settings: Settings, *, write: bool = True) -> Totals:
    return result_of(connection, settings, write=write).totals


def result_of(connection: Connection, settings: Settings, *, write: bool = True) -> Result:
    return run_recount(connection, settings, History(None), RecountRequest(write=write, force=True))


def false_changes(connection: Connection, settings: Settings, *, recounts: int) -> tuple[int, int]:
    """Recount, back to back, beside the writers; return how many, and the changes they saw.

    Nothing is written, so each false change is seen on its own. The first ends it.
    """
    done = found = 0
    while done < recounts and not found:
        result = result_of(connection, settings, write=False)
        totals = result.totals
        done += 1
        found += totals.changed
        assert result.exact is connection.snapshots
        if connection.snapshots:
            assert totals.counted_orders == ORDERS
    return done, found


def ordinary(connection: Connection) -> Connection:
    """The same connection, reading as on a standalone server: not as of one point in time."""
    return Connection(**{**vars(connection), "snapshots": False})


@pytest.mark.xdist_group("busy")
@pytest.mark.size(5, deep=30)
@pytest.mark.parametrize(
    ("index", "kind"),
    [(True, "move"), (False, "move"), (True, "swap")],
    ids=["moving_with_index", "moving_without_index", "swapping_customers"],
)
def test_a_recount_beside_busy_writers_sees_no_change_where_there_is_none(
    busy: tuple[Connection, Settings], index: bool, kind: str, size: int
) -> None:
    connection, settings = busy
    if not index:
        connection.orders.drop_indexes()
    try:
        with writers(settings.mongodb_uri, *[kind] * 4):
            done, found = false_changes(connection, settings, recounts=size)
    finally:
        connection.orders.create_index([("status", 1), ("customer_id", 1)])
    print(f"{done} recounts, {found} false changes")
    assert (done, found) == (size, 0)


@pytest.mark.xdist_group("busy")
def test_an_ordinary_read_beside_busy_writers_sees_changes_that_are_not_there(
    busy: tuple[Connection, Settings],
) -> None:
    """Why a snapshot: an index scan misses an order, or sees it twice, that moves meanwhile."""
    connection, settings = busy
    with writers(settings.mongodb_uri, *["move"] * 4):
        done, found = false_changes(ordinary(connection), settings, recounts=1_000)
    print(f"{done} recounts, {found} false changes")
    assert found > 0


@pytest.mark.xdist_group("busy")
@pytest.mark.size(3, deep=40)
def test_beside_writers_of_all_kinds_every_recount_is_what_the_orders_said_at_its_cluster_time(
    busy: tuple[Connection, Settings], size: int
) -> None:
    """The audit: the orders are read again as they were then, and counted in plain Python."""
    connection, settings = busy
    shop = connection.users.database
    # In many ranges, of which one has an edge in the middle of the ids in capitals.
    cuts = [object_id(n) for n in range(0, USERS, USERS // 12)] + ["65A"]
    with (
        mock.patch.object(count_failures, "edges", return_value=cuts),
        writers(settings.mongodb_uri, *["all"] * 2),
    ):
        changed = 0
        for _ in range(size):
            result = result_of(connection, settings)
            assert result.exact
            changed += result.totals.changed
            concern = {"level": "snapshot", "atClusterTime": result.cluster_time}
            fields: list[Any] = [{"$project": {"status": 1, "customer_id": 1}}]
            then = connection.orders.aggregate(fields, readConcern=concern)
            right = Counter(
                o["customer_id"].lower() for o in then if o["status"] in settings.order_statuses
            )
            stored = {str(user["_id"]): user["loyalty_points"] for user in shop.users.find()}
            assert stored == {own: right[own] for own in stored}
            assert result.totals.counted_orders == right.total()
    assert changed > 0
    run(connection, settings)
    assert disagreements(shop, settings.order_statuses) == []


@pytest.mark.xdist_group("busy")
def test_after_writers_that_change_counts_one_recount_is_right(
    busy: tuple[Connection, Settings],
) -> None:
    connection, settings = busy
    shop, statuses = connection.users.database, settings.order_statuses
    with writers(settings.mongodb_uri, *["change"] * 4):
        wait_until("changes", lambda: run(connection, settings).changed)
    run(connection, settings)
    assert disagreements(shop, statuses) == []


@pytest.mark.xdist_group("busy")
@pytest.mark.size(2, deep=10)
def test_two_services_at_once_one_killed_and_the_next_recount_is_right(
    busy: tuple[Connection, Settings], service: Callable[..., Process], size: int
) -> None:
    connection, settings = busy
    shop, statuses = connection.users.database, settings.order_statuses
    env = {"MONGODB_URI": settings.mongodb_uri, "ORDER_STATUSES": ",".join(statuses)}
    env["MAX_DECREASE_PERCENT"] = "100"  # the writers may well take points from nearly everyone
    with writers(settings.mongodb_uri, "change", "change"):
        one, two = (service(**env, RECOUNT_INTERVAL="1s") for _ in range(2))
        one.wait_for("outcome=succeeded", times=size)
        two.wait_for("outcome=succeeded", times=size)
        one.kill()
        two.wait_for("outcome=succeeded", times=size + 2)
    assert two.stop() == 0
    assert service("--once", **env).wait() == 0
    assert disagreements(shop, statuses) == []


# The guard


def fill(shop: Database[Any], users: int, points: int) -> None:
    """Users who each hold `points`, rightly."""
    shop.users.insert_many([{"_id": n, "loyalty_points": points} for n in range(users)])
    orders = [{"customer_id": n, "status": "Shipped"} for n in range(users) for _ in range(points)]
    shop.orders.bulk_write([InsertOne(order) for order in orders])


def rename_status(shop: Database[Any]) -> None:
    shop.orders.update_many({}, {"$set": {"status": "Sent"}})


def empty_orders(shop: Database[Any]) -> None:
    shop.orders.delete_many({})


def drop_orders(shop: Database[Any]) -> None:
    shop.orders.drop()


MASS_MISTAKES = [rename_status, empty_orders, drop_orders]


@pytest.mark.parametrize("mistake", MASS_MISTAKES)
def test_the_guard_refuses_a_mass_mistake_and_writes_nothing(
    database: Database[Any],
    command: Command,
    mistake: Callable[[Any], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    fill(database, 30, 2)
    assert command("--once") == 0
    mistake(database)

    assert command("--once") == 65

    assert "30 of the 30 users with points" in capsys.readouterr().err
    assert {u["loyalty_points"] for u in database.users.find()} == {2}
    (record,) = database.loyalty_recounts.find({"outcome": "refused"})
    assert (record["changed"], record["decreased"]) == (30, 30)
    assert "30 of the 30 users" in record["error"]
    assert command("--dry-run") == 1
    assert "The guard would refuse this: 30 of the 30" in capsys.readouterr().out
    assert command("--once", "--force") == 0
    assert disagreements(database) == []
    assert {u["loyalty_points"] for u in database.users.find()} == {0}


def test_the_guard_refuses_the_wrong_database(database: Database[Any], command: Command) -> None:
    database.users.insert_many([{"_id": n, "loyalty_points": 3} for n in range(50)])
    database.other.insert_one({"customer_id": 1, "status": "Shipped"})
    assert command("--once", ORDERS_COLLECTION="other") == 65
    assert {u["loyalty_points"] for u in database.users.find()} == {3}


def test_a_first_fill_is_never_refused(database: Database[Any], command: Command) -> None:
    fill(database, 40, 1)
    database.users.update_many({}, {"$unset": {"loyalty_points": 1}})
    assert command("--once", MAX_DECREASE_PERCENT="0") == 0
    assert disagreements(database) == []


@pytest.mark.parametrize(
    ("users", "losers", "percent", "code"),
    [
        (9, 9, 0, 0),  # fewer than ten users: a small shop may clear out
        (10, 10, 90, 65),
        (100, 90, 90, 0),  # at most so many percent
        (100, 91, 90, 65),
        (100, 10, 9, 65),
        (100, 100, 100, 0),  # turned off
    ],
)
def test_the_guard_goes_by_the_share_of_users_who_hold_points(
    database: Database[Any], command: Command, users: int, losers: int, percent: int, code: int
) -> None:
    fill(database, users, 2)
    database.users.insert_many([{"_id": f"none {n}", "loyalty_points": 0} for n in range(500)])
    for n in range(losers):
        database.orders.delete_one({"customer_id": n})
    assert command("--once", MAX_DECREASE_PERCENT=str(percent)) == code
    wrong = disagreements(database)
    assert len(wrong) == (losers if code else 0)


@pytest.mark.size(6_000, deep=60_000)
def test_the_guard_knows_a_change_set_of_any_size_before_it_writes(
    database: Database[Any], command: Command, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """More changes than fit into the part of the spool that stays in memory."""
    monkeypatch.setattr(spool, "MEMORY_BYTES", 60 * size)  # 200 bytes a user are more
    points = [{"_id": f"{n:>200}", "loyalty_points": 1} for n in range(size)]
    database.users.insert_many(points, ordered=False)
    assert command("--once") == 65
    assert database.users.count_documents({"loyalty_points": 1}) == size
    assert command("--once", "--force") == 0
    assert database.users.count_documents({"loyalty_points": 0}) == size


def test_the_daemon_logs_and_records_a_refusal_and_tries_again_on_schedule(
    database: Database[Any], uri: str, service: Callable[..., Process]
) -> None:
    fill(database, 20, 1)
    rename_status(database)
    daemon = service(MONGODB_URI=uri, RECOUNT_INTERVAL="1s")
    daemon.wait_for("ERROR refused 20 of the 20 users", times=2)
    database.orders.update_many({}, {"$set": {"status": "Shipped"}})
    daemon.wait_for("outcome=succeeded")
    assert daemon.stop() == 0
    outcomes = [r["outcome"] for r in database.loyalty_recounts.find().sort("finished_at")]
    assert outcomes[:2] == ["refused", "refused"]
    assert outcomes[-1] == "succeeded"
    assert disagreements(database) == []


# A standalone server, and reads that fail


def test_a_standalone_server_is_read_in_the_ordinary_way_and_that_is_said_once(
    service: Callable[..., Process],
) -> None:
    with Deployment(replica_set=False, parent=MEMORY) as alone, alone.client() as client:
        fill(client.oms_db, 5, 2)
        client.oms_db.users.update_many({}, {"$set": {"loyalty_points": 7}})
        daemon = service(MONGODB_URI=alone.uri, RECOUNT_INTERVAL="1s")
        daemon.wait_for("exact=false", times=3)
        assert daemon.stop() == 0
        assert sum("not_exact" in line for line in daemon.lines) == 1
        assert disagreements(client.oms_db) == []
        assert [r["exact"] for r in client.oms_db.loyalty_recounts.find()][:2] == [False, False]
        status = service("--status", MONGODB_URI=alone.uri)
        assert status.wait() == 0
        assert "interval of 2h" in status.output


@pytest.fixture
def failing(deployment: Deployment) -> Iterator[Callable[..., None]]:
    with deployment.client() as client:

        def fail(times: int, **data: Any) -> None:
            mode: Any = {"times": times} if times else "off"
            client.admin.command("configureFailPoint", "failCommand", mode=mode, data=data)

        yield fail
        fail(0)


@pytest.mark.parametrize(
    ("command", "code"),
    [("aggregate", 239), ("aggregate", 43), ("getMore", 43), ("aggregate", 11602), ("find", 239)],
    ids=["snapshot_too_old", "cursor_not_found", "cursor_killed", "interrupted", "find_fails"],
)
def test_a_count_whose_read_fails_is_done_again_in_a_new_session(
    deployment: Deployment,
    failing: Callable[..., None],
    command: str,
    code: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = f"shop_{uuid4().hex[:12]}"
    settings = settings_for(deployment.uri_for(database=name))
    connection = connect(settings, writing=True)
    shop = connection.users.database
    fill(shop, 300, 1)  # more than one batch of the cursor
    shop.users.update_many({}, {"$set": {"loyalty_points": 5}})
    failing(2, failCommands=[command], errorCode=code, appName="loyalty-microservice")

    totals = run(connection, settings)

    assert totals.changed == totals.users == totals.counted_orders == 300
    assert disagreements(shop) == []
    again = [m for m in caplog.messages if m.startswith("counting_again")]
    assert 1 <= len(again) <= 2
    connection.client.close()


def test_a_count_that_fails_again_and_again_ends_with_exit_69(
    deployment: Deployment, failing: Callable[..., None], service: Callable[..., Process]
) -> None:
    failing(99, failCommands=["aggregate"], errorCode=239, appName="loyalty-microservice")
    once = service("--dry-run", MONGODB_URI=deployment.uri)
    assert once.wait() == 69
    assert sum("counting_again" in line for line in once.lines) == 2
    assert "(code 239, SnapshotTooOld)" in once.output
    assert "Traceback" not in once.output


def test_a_count_beyond_the_timeout_says_what_to_do(
    deployment: Deployment, failing: Callable[..., None], service: Callable[..., Process]
) -> None:
    failing(99, failCommands=["aggregate"], errorCode=50, appName="loyalty-microservice")
    once = service("--dry-run", MONGODB_URI=deployment.uri)
    assert once.wait() == 69
    assert "raise COUNT_TIMEOUT" in once.output
    assert "counting_again" not in once.output


def test_as_of_is_when_the_orders_were_read(database: Database[Any], command: Command) -> None:
    fill(database, 3, 1)
    before = datetime.now(UTC)
    assert command("--once") == 0
    (record,) = database.loyalty_recounts.find()
    assert record["exact"] is True
    assert abs((record["as_of"] - before).total_seconds()) < 15
    assert count(database) == {0: 1, 1: 1, 2: 1} or len(count(database)) == 3
    wait_until("the expiry index", lambda: len(database.loyalty_recounts.index_information()) == 2)
