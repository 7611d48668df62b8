"""Live updates during faults: of the database, of privileges, of the service itself."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pytest
from conftest import MEMORY, ROOT, Command
from live_harness import live_service, make_index
from pymongo import MongoClient, WriteConcern
from pymongo.collection import Collection
from pymongo.database import Database
from test_faults import FaultHarness, assert_stops_at_sigterm, lines_with, role, start_harness

from loyalty.heartbeat import MAX_LIVE_AGE
from sandbox import faults
from sandbox.faults import COUNTING, WRITING, FaultPoint
from sandbox.mongod import Deployment, wait_until
from sandbox.service import Process
from sandbox.shop import Shop, find_mismatches

Start = Callable[..., Process]

WAITING = FaultPoint("waiting", "waitWithPinnedCursorDuringGetMoreBatch", "orders")
UPDATING = replace(WRITING, name="updating", skip=0)


@pytest.fixture
def start(service: Start) -> Start:
    """Start the daemon with live updates; it tries again after 0.05 s, and not after 10 s."""

    def start(uri: str, **values: str) -> Process:
        daemon = service(
            *("pause", "0.05", "--env-file", os.devnull),
            program=ROOT / "tests" / "faults_launcher.py",
            MONGODB_URI=uri,
            LIVE_UPDATES="yes",
            **values,
        )
        daemon.wait_for("outcome=succeeded")
        daemon.wait_for("live_updates_started")
        return daemon

    return start


def wait_until_exact(shop: Database[Any]) -> None:
    wait_until("exact points", lambda: not find_mismatches(shop))


def normalize_ids(shop: Database[Any]) -> None:
    """Write all hex ids of orders in lower case: live updates do not look up mixed case."""
    shop.orders.update_many(
        {"customer_id": {"$regex": "^[0-9A-Fa-f]{24}$", "$not": {"$type": "array"}}},
        [{"$set": {"customer_id": {"$toLower": "$customer_id"}}}],
    )


def ship_all(harness: FaultHarness) -> None:
    """Ship all paid orders, without a cursor that a failpoint could block."""
    harness.shop.orders.update_many({"status": "Paid"}, {"$set": {"status": "Shipped"}})


@pytest.mark.xdist_group("cluster")
@pytest.mark.size(1, deep=9)
def test_when_the_primary_is_killed_live_updates_continue_with_the_next(
    three_node_cluster: Deployment, start: Start, size: int
) -> None:
    points = [WAITING, COUNTING, UPDATING] * size
    for point in random.sample(points, size):
        with start_harness(three_node_cluster) as harness, ExitStack() as stack:
            stack.callback(faults.recover, three_node_cluster)
            normalize_ids(harness.database)
            daemon = start(harness.uri)
            primary = three_node_cluster.primary()
            paused = faults.pause_at(primary, harness.database.name, point)
            reached = stack.enter_context(paused)
            ship_all(harness)
            reached()
            primary.kill()
            harness.shop.return_orders(20)
            wait_until_exact(harness.database)
            assert daemon.stop() == 0
            assert "Traceback" not in daemon.output, point


@pytest.fixture
def harness(deployment: Deployment) -> Iterator[FaultHarness]:
    with start_harness(deployment, users=500, orders=2000) as harness:
        normalize_ids(harness.database)
        make_index(harness.database)
        yield harness


@pytest.mark.parametrize("point", [WAITING, COUNTING, UPDATING], ids=str)
def test_sigterm_ends_live_updates_within_two_seconds(
    harness: FaultHarness, start: Start, point: FaultPoint
) -> None:
    daemon = start(harness.uri)
    with faults.pause_at(harness.deployment.servers[0], harness.database.name, point) as reached:
        ship_all(harness)
        reached()
        assert_stops_at_sigterm(daemon)


@pytest.mark.size(1, deep=10)
def test_when_one_of_two_services_is_killed_all_points_are_exact_after_the_next_recount(
    harness: FaultHarness, start: Start, size: int
) -> None:
    """Live updates alone do not guarantee it.

    The killed service can have written an older count after the survivor has written a newer one,
    and only the killed service would have read the newer event next (docs/guarantees.md).
    """
    with ExitStack() as stack:
        # Many orders are returned within seconds: the safety check would pause live updates.
        survivor = start(harness.uri, MAX_DECREASE_PERCENT="100")
        for recounts in range(1, size + 1):
            other = start(harness.uri, MAX_DECREASE_PERCENT="100")
            stack.callback(other.kill)
            ship_all(harness)
            for n in range(40):
                if n == 20:
                    other.kill()
                harness.shop.ship_orders(20)
                harness.shop.return_orders(20)
            assert len(lines_with("outcome=succeeded", survivor)) == recounts
            # The operations that the other service has left on the server have ended by now.
            survivor.send_signal(signal.SIGHUP)
            survivor.wait_for("outcome=succeeded", times=recounts + 1)
            wait_until_exact(harness.database)
            time.sleep(0.2)
            assert find_mismatches(harness.database) == []


def test_each_drop_or_rename_of_orders_causes_one_full_recount(
    deployment: Deployment, database: Database[Any], uri: str, start: Start
) -> None:
    users = range(8)  # too few for the safety check
    database.users.insert_many({"_id": n} for n in users)

    def fill(name: str) -> Collection[Any]:
        database[name].insert_many({"customer_id": n, "status": "Shipped"} for n in users)
        return database[name]

    fill("orders")
    daemon = start(uri)
    wait_until_exact(database)
    assert len(lines_with("outcome=succeeded", daemon)) == 1
    changes: list[Callable[[], object]] = [
        lambda: fill("new").rename("orders", dropTarget=True),
        lambda: database.orders.aggregate([{"$set": {"status": "Paid"}}, {"$out": "orders"}]),
    ]
    for done, change in enumerate(changes, start=1):
        change()
        daemon.wait_for("outcome=succeeded", times=done + 1)
        wait_until_exact(database)
        assert len(lines_with("orders: event ", daemon)) == done
    before = commands(database.client)
    time.sleep(2)
    assert commands(database.client) - before < 30
    assert len(lines_with("outcome=succeeded", daemon)) == len(changes) + 1
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.output


def test_sighup_after_a_refused_recount_starts_live_updates_again(
    database: Database[Any], uri: str, start: Start
) -> None:
    users = range(30)
    database.users.insert_many({"_id": n} for n in users)
    database.orders.insert_many({"customer_id": n, "status": "Shipped"} for n in users)
    daemon = start(uri)
    database.orders.update_many({}, {"$set": {"status": "SHIPPED"}})
    daemon.wait_for(" refused ")
    assert len(lines_with("live_updates_started", daemon)) == 1
    database.orders.update_many({}, {"$set": {"status": "Shipped"}})
    time.sleep(1)
    assert len(lines_with("outcome=succeeded", daemon)) == 1
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("outcome=succeeded", times=2)
    daemon.wait_for("live_updates_started", times=2)
    database.orders.insert_one({"customer_id": 1, "status": "Shipped"})
    wait_until_exact(database)
    assert daemon.stop() == 0


def commands(client: MongoClient[Any]) -> int:
    counted = client.admin.command("serverStatus")["opcounters"]
    return sum(counted[kind] for kind in ("command", "query", "getmore", "insert", "update"))


def test_a_standalone_server_causes_one_warning_and_no_live_updates(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Deployment(replica_set=False, parent=MEMORY) as alone, alone.client() as client:
        Shop(client["shop"], random.Random(1)).fill(users=20, orders=100)
        with live_service(alone, client["shop"]) as harness:
            assert not harness.is_live
            assert find_mismatches(harness.shop) == []
            harness.update()
            harness.recount()
            assert sum("live_updates_unavailable" in line for line in caplog.messages) == 1
            assert "the server is standalone" in caplog.text


@pytest.mark.xdist_group("auth")
def test_live_updates_start_after_the_privilege_is_granted(
    authenticated_deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    name, _, plain = role()
    granted = role(create_index=True)[2]  # with all optional privileges of the file
    with authenticated_deployment.client() as client, ExitStack() as stack:
        shop = client[name]
        stack.callback(client.drop_database, name)
        Shop(shop, random.Random(1)).fill(users=20, orders=100)
        client.admin.command("createRole", "liveRole", privileges=plain, roles=[])
        stack.callback(client.admin.command, "dropRole", "liveRole")
        client.admin.command("createUser", "live", pwd="x", roles=["liveRole"])
        stack.callback(client.admin.command, "dropUser", "live")
        uri = authenticated_deployment.uri_for("live", quote_plus("x"), name)
        harness = stack.enter_context(live_service(authenticated_deployment, shop, MONGODB_URI=uri))
        assert not harness.is_live
        harness.recount()
        (line,) = (line for line in caplog.messages if "live_updates_unavailable" in line)
        assert f"no privilege for changeStream on {name}.orders" in line
        client.admin.command("updateRole", "liveRole", privileges=granted, roles=[])
        harness.recount()
        Shop(shop, random.Random(2)).ship_orders(5)
        harness.update_until_exact()
        harness.update(0.1)
        assert shop.loyalty_recounts.count_documents({"outcome": "live"}) == 1
        assert "_write_failed" not in caplog.text


@pytest.mark.xdist_group("cluster")
@pytest.mark.size(14, deep=60)
def test_points_are_reported_as_older_while_the_commit_point_stalls(
    command: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path, size: int
) -> None:
    metrics = tmp_path / "loyalty.prom"
    options = {"heartbeat_interval": timedelta(seconds=0.5)}
    # The stall lasts longer than the limit: twice the interval, at most MAX_LIVE_AGE.
    interval = "4s" if size < 40 else "2h"
    limit = 8 if size < 40 else MAX_LIVE_AGE.total_seconds()
    with Deployment(3, arbiter=True, parent=MEMORY) as deployment, deployment.client() as client:
        shop = client["shop"]
        Shop(shop, random.Random(1)).fill(users=20, orders=100)
        normalize_ids(shop)

        def read_status() -> tuple[int, dict[str, Any]]:
            capsys.readouterr()
            uri = deployment.uri_for(database="shop")
            values = {"MONGODB_URI": uri, "LIVE_UPDATES": "yes", "RECOUNT_INTERVAL": interval}
            code = command("--status", "--json", **values)
            return code, json.loads(capsys.readouterr().out)

        with live_service(deployment, shop, options, METRICS_FILE=str(metrics)) as harness:
            harness.update(1)
            code, status = read_status()
            assert (code, status["fresh"], status["heartbeat"]["alive"]) == (0, True, True)
            deployment.servers[1].suspend()
            stalled_at = datetime.now(UTC)  # the same machine: the server's clock
            order = {"customer_id": 1, "status": "Shipped"}
            shop.with_options(write_concern=WriteConcern(1)).orders.insert_one(order)
            codes, ages, as_of_times = [], [], set()
            while (seconds := (datetime.now(UTC) - stalled_at).total_seconds()) < size:
                harness.update(1)
                code, status = read_status()
                heartbeat = status["heartbeat"]
                as_of = datetime.fromisoformat(heartbeat["as_of"])
                assert as_of <= stalled_at
                as_of_times.add(as_of)
                assert heartbeat["alive"]
                assert status["age_seconds"] >= seconds - 1
                assert code == (status["age_seconds"] > limit)
                assert status["fresh"] is (code == 0)
                codes.append(code)
                ages.append(status["age_seconds"])
                for name in ("loyalty_live_as_of", "loyalty_as_of"):
                    (value,) = re.findall(rf"^{name}_.*}} (.*)$", metrics.read_text(), re.MULTILINE)
                    assert float(value) == as_of.timestamp()
            assert ages == sorted(ages)
            assert codes == sorted(codes)
            assert set(codes) == {0, 1}
            deployment.servers[1].resume()
            harness.update_until(lambda: read_status()[0] == 0)
            harness.update_until_exact()
            assert "write_failed" not in capsys.readouterr().err
