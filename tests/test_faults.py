"""Faults of the database and of the service, caused in a real process with a real server.

Afterwards the stored points are compared with an independent count. Tests of one `xdist_group`
share servers of their own; all others use the one that every worker has.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote_plus
from uuid import uuid4

import pytest
from boundaries import fixed_boundaries
from bson import ObjectId
from conftest import MEMORY, ROOT, Command, settings_for
from hypothesis import given
from hypothesis import strategies as st
from pymongo import MongoClient
from pymongo.database import Database

import loyalty_microservice
from loyalty.history import History
from loyalty.mongo.connection import connect
from loyalty.recount.counter import ROWS_PER_BATCH
from loyalty.recount.index_build import create_index
from loyalty.recount.runner import RecountRequest, run_recount
from sandbox import faults
from sandbox.faults import COUNTING, FETCHING, RECORDING, WRITING, FaultPoint
from sandbox.mongod import Deployment, wait_until
from sandbox.service import Process, service_environment
from sandbox.shop import Shop, find_mismatches

Start = Callable[..., Process]

LAUNCHER = ROOT / "tests" / "faults_launcher.py"
# Arguments of the launcher: the daemon tries to connect for 2 s instead of 5 s, and again after 1 s
# instead of 10 s.
SHORT_PAUSES = ("pause", "1,2")
UNUSED_URI = "mongodb://127.0.0.1:1/shop"  # no server listens on this port


@dataclass
class FaultHarness:
    """A shop on a deployment, and the service that counts its orders."""

    deployment: Deployment
    database: Database[Any]
    shop: Shop

    @property
    def uri(self) -> str:
        return self.deployment.uri_for(database=self.database.name)

    @property
    def records(self) -> list[dict[str, Any]]:
        return list(self.database["loyalty_recounts"].find().sort("finished_at"))

    def set_wrong_points(self) -> None:
        """Give every user wrong points, so that a recount has to write all users."""
        self.shop.users.update_many({}, {"$set": {"loyalty_points": -1}})

    def add_unknown_customers(self) -> None:
        """Add so many unknown customers that the count needs a second answer of the server."""
        names = (f"nobody-{n}" for n in range(ROWS_PER_BATCH + 1))
        orders = ({"customer_id": name, "status": "Shipped"} for name in names)
        self.shop.orders.insert_many(orders)

    def recount(self) -> None:
        """Recount in this process, as the next service would."""
        settings = settings_for(self.uri)
        with connect(settings, writing=True) as connection:
            run_recount(connection, settings, History(connection.recounts, settings))

    def assert_exact(self) -> None:
        """Compare the points with the independent count, and check the record."""
        assert find_mismatches(self.database) == []
        assert self.shop.users.find_one({"loyalty_points": {"$gt": 0}})
        newest = self.records[-1]
        assert (newest["outcome"], newest["exact"], newest["error"]) == ("succeeded", True, None)


@contextmanager
def start_harness(
    deployment: Deployment, *, users: int = 1000, orders: int = 2000
) -> Iterator[FaultHarness]:
    with deployment.client() as client:
        database = client[f"faults_{uuid4().hex[:12]}"]
        shop = Shop(database, random.Random(database.name))
        shop.fill(users=users, orders=orders)
        harness = FaultHarness(deployment, database, shop)
        harness.set_wrong_points()
        yield harness
        client.drop_database(database.name)


@pytest.fixture
def harness(deployment: Deployment) -> Iterator[FaultHarness]:
    with start_harness(deployment) as harness:
        yield harness


@pytest.fixture
def cluster_harness(three_node_cluster: Deployment) -> Iterator[FaultHarness]:
    """A shop on three nodes. After the test, all nodes run again."""
    try:
        with start_harness(three_node_cluster) as harness:
            create_expiry_indexes(harness)
            yield harness
            faults.recover(three_node_cluster)
    finally:
        faults.recover(three_node_cluster)


def create_expiry_indexes(harness: FaultHarness) -> None:
    """Create the indexes by which documents expire, as an earlier service has.

    This needs every server: with a dead one, each test would wait for it in vain.
    """
    history = History(None, settings_for(harness.uri))
    for name in ("loyalty_recounts", "loyalty_changes"):
        history.create_expiry_index(harness.database[name])


def prepare(harness: FaultHarness, point: FaultPoint) -> None:
    """Change data so that the service reaches that point."""
    if point is FETCHING:
        harness.add_unknown_customers()


def lines_with(text: str, process: Process) -> list[str]:
    return [line for line in process.lines if text in line]


@pytest.mark.xdist_group("cluster")
def test_tests_of_one_group_run_in_one_worker(request: pytest.FixtureRequest) -> None:
    """Without groups, every worker would start all servers, and no test would fail."""
    if request.config.getoption("loadgroup", default=False):  # in a worker of --dist loadgroup
        assert request.node.nodeid.endswith("@cluster")


# --- failures of the database


def test_the_daemon_waits_with_growing_pauses_for_a_database_that_starts_later(
    service: Start,
) -> None:
    deployment = Deployment(parent=MEMORY)
    uri = deployment.uri_for(database="shop")
    once = service("--once", MONGODB_URI=uri)
    daemon = service(*SHORT_PAUSES, program=LAUNCHER, MONGODB_URI=uri, RECOUNT_INTERVAL="3s")
    assert once.wait() == 69
    assert len(once.lines) == 1
    daemon.wait_for("retry_in=2s")
    assert [line.split("retry_in=")[1] for line in daemon.lines][:2] == ["1s", "2s"]
    assert all("connect to" in line for line in daemon.lines)
    with deployment, deployment.client() as client:
        Shop(client["shop"], random.Random(1)).fill()
        daemon.wait_for("outcome=succeeded")
        # If the first recount began before all orders were inserted, the next recount counts them.
        wait_until("exact points", lambda: not find_mismatches(client["shop"]))
        assert daemon.stop() == 0


@pytest.mark.xdist_group("cluster")
@pytest.mark.parametrize("point", [COUNTING, WRITING], ids=str)
def test_a_recount_whose_primary_is_killed_succeeds_on_the_next_primary(
    cluster_harness: FaultHarness, service: Start, point: FaultPoint
) -> None:
    if point is COUNTING:  # of the first recount, which would make the index of the records
        cluster_harness.database["loyalty_recounts"].drop_indexes()
    primary = cluster_harness.deployment.primary()
    with faults.pause_at(primary, cluster_harness.database.name, point) as wait_until_reached:
        daemon = service(MONGODB_URI=cluster_harness.uri)
        wait_until_reached()
        primary.kill()
        daemon.wait_for("outcome=succeeded")
    cluster_harness.assert_exact()
    assert len(cluster_harness.records) == 1  # of this recount: none has failed before
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.output


def kill_primary(harness: FaultHarness) -> None:
    harness.deployment.primary().kill()


def kill_cursor(harness: FaultHarness) -> None:
    data: Any = {"failCommands": ["aggregate"], "errorCode": 237, "appName": faults.SERVICE}
    with MongoClient[Any](harness.deployment.primary().uri) as client:
        client.admin.command("configureFailPoint", "failCommand", mode={"times": 1}, data=data)


def drop_index(harness: FaultHarness) -> None:
    harness.shop.orders.drop_indexes()


def create_other_index(harness: FaultHarness) -> None:
    harness.shop.orders.create_index("total_cents")


@pytest.mark.xdist_group("cluster")
def test_a_recount_whose_primary_is_killed_between_two_partitions_is_exact(
    cluster_harness: FaultHarness,
) -> None:
    recount_with_fault(cluster_harness, kill_primary)


@pytest.mark.parametrize("fault", [kill_cursor, drop_index, create_other_index])
def test_a_recount_with_a_fault_between_two_partitions_is_exact(
    harness: FaultHarness, fault: Callable[[FaultHarness], None], caplog: pytest.LogCaptureFixture
) -> None:
    recount_with_fault(harness, fault)
    if fault is not drop_index:  # it also ends a query that is running, if there is one
        assert ("count_retry attempt=2" in caplog.text) is (fault is kill_cursor)


def recount_with_fault(harness: FaultHarness, fault: Callable[[FaultHarness], None]) -> None:
    """Recount, and cause the fault between two partitions; compare the points."""
    settings = settings_for(harness.uri)
    users = [user["_id"] for user in harness.shop.users.find({"_id": {"$type": "objectId"}})]
    cuts, calls = sorted(users)[:: len(users) // 30], itertools.count(1)

    def disturb(_: str) -> None:
        if next(calls) == 3:  # far more partitions follow than are counted before their turn
            fault(harness)

    # Arrays and hex ids that are not in lower case would prevent the partitions.
    upper_case = {"$regex": "^(?=.*[A-F])[0-9A-Fa-f]{24}$"}
    harness.shop.orders.delete_many({"customer_id": {"$type": "array"}})
    harness.shop.orders.delete_many({"customer_id": upper_case})
    harness.shop.users.delete_many({"_id": upper_case})
    with connect(settings, writing=True) as connection:
        create_index(connection.orders, settings)
        history = History(connection.recounts, settings)
        request = RecountRequest(find_boundaries=fixed_boundaries(cuts))
        result = run_recount(connection, settings, history, request, disturb)
    faults.recover(harness.deployment)
    assert result.count.exact
    # Without the index, one query counts all customers.
    assert next(calls) > (3 if fault is drop_index else 30)
    harness.assert_exact()


@pytest.mark.xdist_group("cluster")
def test_a_recount_whose_primary_steps_down_succeeds_on_the_next_primary(
    cluster_harness: FaultHarness, service: Start
) -> None:
    primary = cluster_harness.deployment.primary()
    with faults.pause_at(primary, cluster_harness.database.name, WRITING) as wait_until_reached:
        daemon = service(MONGODB_URI=cluster_harness.uri)
        wait_until_reached()
        faults.step_down(primary)
    daemon.wait_for("outcome=succeeded")
    cluster_harness.assert_exact()
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.output


@pytest.mark.xdist_group("cluster")
@pytest.mark.size(2_000, deep=10_000)
def test_a_recount_whose_primary_is_suspended_succeeds_on_the_next_primary(
    cluster_harness: FaultHarness, service: Start, size: int
) -> None:
    """The larger number is what the driver waits for by itself: for 20 s in all."""
    primary = cluster_harness.deployment.primary()
    timeouts = f"&connectTimeoutMS={size}&heartbeatFrequencyMS={size}"
    with faults.pause_at(primary, cluster_harness.database.name, WRITING) as wait_until_reached:
        daemon = service(MONGODB_URI=cluster_harness.uri + timeouts)
        wait_until_reached()
        primary.suspend()
        daemon.wait_for("outcome=succeeded")
        primary.resume()
    faults.recover(cluster_harness.deployment)
    cluster_harness.assert_exact()  # also after the suspended node continues with half a batch
    assert daemon.stop() == 0


@pytest.mark.xdist_group("cluster")
def test_with_all_servers_suspended_sigterm_stops_the_daemon_and_others_recover(
    cluster_harness: FaultHarness, service: Start
) -> None:
    servers = cluster_harness.deployment.servers
    with faults.pause_at(
        cluster_harness.deployment.primary(), cluster_harness.database.name, WRITING
    ) as wait_until_reached:
        stopped = service(MONGODB_URI=cluster_harness.uri)
        wait_until_reached()
        patient = service(MONGODB_URI=cluster_harness.uri)
        for server in servers:
            server.suspend()
        assert stopped.stop() == 0
        late = service(MONGODB_URI=cluster_harness.uri)
        late.wait_for("retry_in=1")
        for server in servers:
            server.resume()
    for daemon in (patient, late):
        daemon.wait_for("outcome=succeeded")
    cluster_harness.assert_exact()
    assert patient.stop() == late.stop() == 0
    assert "Traceback" not in stopped.output + patient.output + late.output


def test_a_count_whose_cursor_is_killed_is_repeated_once(
    harness: FaultHarness, service: Start
) -> None:
    harness.add_unknown_customers()
    server, name = harness.deployment.servers[0], harness.database.name
    with faults.pause_at(server, name, FETCHING) as wait_until_reached:
        daemon = service(MONGODB_URI=harness.uri)
        wait_until_reached()
        assert faults.kill_cursors(harness.database.client, name, "orders") == 1
    daemon.wait_for("outcome=succeeded")
    assert len(lines_with("count_retry attempt=2", daemon)) == 1, daemon.output
    assert len(harness.records) == 1
    harness.assert_exact()


@pytest.mark.machine
def test_recounts_fail_while_the_disk_of_the_server_is_full(tmp_path: Path, service: Start) -> None:
    # Small files of the journal: the server soon needs space for the next one.
    journal = "log=(enabled=true,remove=true,path=journal,prealloc=false,file_max=100KB)"
    options = [*faults.OPTIONS, "--wiredTigerEngineConfigString", journal]
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(tmp_path / "disk"))
        deployment = stack.enter_context(Deployment(options=options, parent=disk))
        # More updates than fit into the journal file in use.
        large = start_harness(deployment, users=4000, orders=8000)
        harness = stack.enter_context(large)
        server = deployment.servers[0]
        with faults.pause_at(server, harness.database.name, WRITING) as wait_until_reached:
            daemon = service(MONGODB_URI=harness.uri)
            wait_until_reached()
            filler = fill(disk)
        wait_until("a server that stops, as its disk is full", lambda: not server.is_alive)
        daemon.wait_for(" failed error=")  # not record_write_failed
        (line,) = lines_with(" failed error=", daemon)
        assert f"update on {harness.database.name}.users" in line
        filler.unlink()
        faults.recover(deployment)
        daemon.wait_for("outcome=succeeded")
        harness.assert_exact()
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.output


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.fail(f"a full disk needs root, to mount a small one: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """Fill the disk with a file, and return the file."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def test_failed_updates_are_counted_and_all_other_users_are_written(
    harness: FaultHarness, service: Start
) -> None:
    failing = [user["_id"] for user in harness.shop.users.find().sort("_id").limit(3)]
    rule = {"$or": [{"_id": {"$nin": failing}}, {"loyalty_points": -1}]}
    harness.database.command("collMod", "users", validator=rule)
    daemon = service(MONGODB_URI=harness.uri, RECOUNT_INTERVAL="1s")
    daemon.wait_for("WARNING incomplete", times=2)
    mismatches = find_mismatches(harness.database)
    assert {mismatch.stored for mismatch in mismatches} == {-1}
    assert sorted(repr(m.user) for m in mismatches) == sorted(map(repr, failing))
    first, second = lines_with("WARNING incomplete", daemon)[:2]
    assert "failed_updates=3 updates=1000 " in first
    assert "DocumentValidationFailure" in first
    assert "failed_updates=3 updates=3 " in second
    assert "@example.com" not in daemon.output  # the message of the server contains whole documents
    assert "retry_in" not in daemon.output
    assert [(r["outcome"], r["failed_updates"]) for r in harness.records[:2]] == [
        ("incomplete", 3)
    ] * 2
    harness.database.command("collMod", "users", validator={})
    daemon.wait_for("outcome=succeeded")
    harness.assert_exact()
    assert daemon.stop() == 0


# --- failures of the service


@pytest.mark.size(3, deep=20)
def test_after_a_kill_at_a_random_moment_the_next_recount_is_exact(
    harness: FaultHarness, service: Start, size: int
) -> None:
    rng = random.Random()
    for _ in range(size):
        harness.set_wrong_points()
        daemon = service(MONGODB_URI=harness.uri, BATCH_SIZE="20")
        daemon.wait_for("connected")
        time.sleep(rng.uniform(0, 0.6))
        daemon.kill()
        harness.shop.ship_orders(20)
        harness.shop.return_orders(20)
        harness.recount()
        harness.assert_exact()


def test_the_next_start_waits_for_the_batch_of_a_killed_service(
    harness: FaultHarness, service: Start
) -> None:
    harness.recount()
    # Plain values only: a query would also find an array that contains them, which earns nothing.
    order = next(
        order
        for user in harness.shop.users.find(
            {"loyalty_points": {"$gt": 2}, "_id": {"$type": "objectId"}}
        )
        for order in harness.shop.orders.find(
            {"customer_id": str(user["_id"]), "status": "Shipped"}
        )
        if order["customer_id"] == str(user["_id"]) and order["status"] == "Shipped"
    )
    user_id, order_id = ObjectId(order["customer_id"]), {"_id": order["_id"]}
    with harness.database.client.start_session() as session, session.start_transaction():
        # A lock delays the batch at this user, as a busy server would.
        harness.shop.users.update_one({"_id": user_id}, {"$set": {"busy": True}}, session=session)
        harness.shop.orders.update_one(order_id, {"$set": {"status": "Returned"}})
        killed = service(MONGODB_URI=harness.uri)
        wait_until("the batch at the user", lambda: conflicts(harness) > 0)
        killed.kill()
        harness.shop.orders.update_one(order_id, {"$set": {"status": "Shipped"}})
        # The stored points are now correct, until the batch of the killed service is written.
        following = service(*SHORT_PAUSES, program=LAUNCHER, MONGODB_URI=harness.uri)
        wait_until("what it says first", lambda: following.lines)
        session.abort_transaction()
    following.wait_for("outcome=succeeded")
    wait_until("the end of the batch", lambda: not updates(harness))
    harness.assert_exact()


def updates(harness: FaultHarness) -> list[dict[str, Any]]:
    """Return the updates of the service that the server is executing."""
    operations = harness.database.client.admin.aggregate([{"$currentOp": {}}])
    ours = [o for o in operations if o.get("appName") == "loyalty-microservice"]
    return [operation for operation in ours if operation.get("op") == "update"]


def conflicts(harness: FaultHarness) -> int:
    return sum(operation.get("writeConflicts", 0) for operation in updates(harness))


def assert_stops_at_sigterm(process: Process) -> None:
    """Send SIGTERM twice."""
    process.send_signal(signal.SIGTERM)
    assert process.stop() == 0
    assert "Traceback" not in process.output
    # This is not always the last line: other threads may still log.
    # During the imports the service does not log yet.
    assert not process.output or "stopped signal=SIGTERM" in process.output


@pytest.mark.parametrize("point", [COUNTING, FETCHING, WRITING, RECORDING], ids=str)
def test_sigterm_during_a_recount_stops_the_daemon_within_two_seconds(
    harness: FaultHarness, service: Start, point: FaultPoint
) -> None:
    prepare(harness, point)
    server = harness.deployment.servers[0]
    with faults.pause_at(server, harness.database.name, point) as wait_until_reached:
        daemon = service(MONGODB_URI=harness.uri)
        wait_until_reached()
        assert_stops_at_sigterm(daemon)
    harness.recount()
    harness.assert_exact()


@pytest.mark.parametrize("point", [COUNTING, WRITING], ids=str)
def test_ctrl_c_during_once_stops_it_within_two_seconds(
    harness: FaultHarness, service: Start, point: FaultPoint
) -> None:
    server = harness.deployment.servers[0]
    with faults.pause_at(server, harness.database.name, point) as wait_until_reached:
        once = service("--once", MONGODB_URI=harness.uri)
        wait_until_reached()
        assert once.stop(signal.SIGINT) == 130
    assert "Traceback" not in once.output
    harness.recount()
    harness.assert_exact()


def test_sigterm_stops_an_idle_connecting_or_waiting_daemon_within_two_seconds(
    harness: FaultHarness, service: Start
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        connecting = service(MONGODB_URI=f"mongodb://127.0.0.1:{silent.getsockname()[1]}")
        waiting, idle = service(MONGODB_URI=UNUSED_URI), service(MONGODB_URI=harness.uri)
        silent.accept()[0].close()
        assert_stops_at_sigterm(connecting)
    idle.wait_for("outcome=succeeded")
    assert_stops_at_sigterm(idle)
    waiting.wait_for("retry_in=")
    assert_stops_at_sigterm(waiting)
    harness.assert_exact()


@pytest.mark.size(5, deep=20)
def test_sigterm_at_a_random_moment_stops_the_daemon_within_two_seconds(
    harness: FaultHarness, service: Start, size: int
) -> None:
    rng = random.Random()
    for _ in range(size):
        harness.set_wrong_points()
        daemon = service(MONGODB_URI=harness.uri, BATCH_SIZE="20", RECOUNT_INTERVAL="1s")
        wait_until("a signal handler", daemon.catches_sigterm)
        time.sleep(rng.uniform(0, 1.2))
        assert_stops_at_sigterm(daemon)
    harness.recount()
    harness.assert_exact()


# --- time


@pytest.fixture
def set_clock(tmp_path: Path) -> Callable[[datetime], str]:
    """Set the service's clock to a moment, and return the file for its launcher."""

    def set_to(moment: datetime) -> str:
        new = tmp_path / "clock.new"
        new.write_text(str(moment.timestamp()))
        return str(new.replace(tmp_path / "clock"))

    return set_to


def test_a_jump_of_the_clock_delays_recounts_by_at_most_one_interval(
    harness: FaultHarness, service: Start, set_clock: Callable[[datetime], str], tmp_path: Path
) -> None:
    interval = 1
    started = time.monotonic()
    file = set_clock(datetime.now(UTC))
    daemon = service(
        *("clock", file, "--env-file", os.devnull),
        program=LAUNCHER,
        MONGODB_URI=harness.uri,
        RECOUNT_INTERVAL=f"{interval}s",
    )
    daemon.wait_for("outcome=succeeded")
    jumps = (-10, 0, 10, 0)
    for hours in jumps:
        harness.shop.ship_orders(10)
        set_clock(datetime.now(UTC) + timedelta(hours=hours))
        done = len(lines_with("outcome=succeeded", daemon))
        daemon.wait_for("outcome=succeeded", times=done + 2)
    assert daemon.stop() == 0
    # After each jump at most one recount is overdue, not all recounts of ten hours.
    on_schedule = 1 + (time.monotonic() - started) / interval
    assert len(lines_with("outcome=succeeded", daemon)) <= on_schedule + len(jumps)
    harness.assert_exact()


@pytest.mark.parametrize("change", ["2026-03-29T01:00:00Z", "2026-10-25T01:00:00Z"])
def test_daylight_saving_delays_no_recount_by_more_than_an_interval(
    harness: FaultHarness,
    service: Start,
    set_clock: Callable[[datetime], str],
    tmp_path: Path,
    change: str,
) -> None:
    file = set_clock(datetime.fromisoformat(change) - timedelta(minutes=10))
    daemon = service(
        *("clock", file, "--env-file", os.devnull),
        program=LAUNCHER,
        MONGODB_URI=harness.uri,
        RECOUNT_INTERVAL="2s",
        TZ="Europe/Berlin",
    )
    daemon.wait_for("outcome=succeeded")
    # The next recount is overdue and starts immediately; the one after it is due after the change.
    set_clock(datetime.fromisoformat(change) - timedelta(seconds=1))
    daemon.wait_for("outcome=succeeded", times=3)
    as_logged = [line.split()[0] for line in lines_with("outcome=succeeded", daemon)]
    assert as_logged[0] < change <= as_logged[2]
    assert daemon.stop() == 0
    harness.assert_exact()


def test_recounts_longer_than_the_interval_neither_overlap_nor_accumulate(
    harness: FaultHarness, service: Start
) -> None:
    with faults.delay_command(harness.deployment.servers[0], "aggregate", 1200):
        daemon = service(MONGODB_URI=harness.uri, RECOUNT_INTERVAL="1s")
        daemon.wait_for("outcome=succeeded", times=2)
    daemon.wait_for("outcome=succeeded", times=4)
    assert daemon.stop() == 0
    records = harness.records
    for earlier, later in pairwise(records):
        assert later["started_at"] - earlier["finished_at"] > timedelta(seconds=0.9)
    assert records[0]["finished_at"] - records[0]["started_at"] > timedelta(seconds=1)
    harness.assert_exact()


# --- internal errors


def test_an_internal_error_is_logged_with_its_traceback_and_the_daemon_continues(
    harness: FaultHarness, service: Start, tmp_path: Path
) -> None:
    bugs = ["1:KeyError", "1:RecursionError", "2:MemoryError"]  # the last while it writes
    daemon = service(
        *("bugs", ",".join(bugs)), program=LAUNCHER, MONGODB_URI=harness.uri, RECOUNT_INTERVAL="1s"
    )
    daemon.wait_for("outcome=succeeded")
    assert len(lines_with("internal_error retry_in=1s", daemon)) == len(bugs)
    assert len(lines_with("Traceback (most recent call last)", daemon)) == len(bugs)
    errors = [record["error"] for record in harness.records]
    assert errors == [*(bug.split(":")[1] for bug in bugs), None]
    assert daemon.stop() == 0
    harness.assert_exact()


@pytest.mark.size(60, deep=600)
def test_many_recounts_do_not_leak_memory_or_files(
    deployment: Deployment, service: Start, size: int
) -> None:
    with start_harness(deployment, users=50, orders=300) as harness:
        process = service("recounts", str(size), program=LAUNCHER, MONGODB_URI=harness.uri)
        assert process.wait(300) == 0
        first, *later = json.loads(process.lines[-1])
        assert len(later) == 5
        for memory, files, threads in later:
            assert memory - first[0] < 4096, process.lines[-1]  # KiB; the first sixth warms up
            # The driver may open one more connection if two threads need one at the same time.
            assert files - first[1] <= 2, process.lines[-1]
            assert threads == first[2], process.lines[-1]


# --- settings, credentials and privileges

PASSWORD = "qJ7/p@5s:w0rd?kZ%#$x"
ENCODED = quote_plus(PASSWORD)


def assert_no_secret(text: str) -> None:
    """Look for every part of the password of four characters or more."""
    for secret in (PASSWORD, ENCODED):
        parts = {secret[n : n + 4] for n in range(len(secret) - 3)}
        assert not [part for part in parts if part in text], text


@pytest.mark.parametrize(
    ("fault", "uri"),
    [
        ("MONGODB_URI: required", ""),
        ("must begin with", f"http://loyalty:{ENCODED}@h"),
        ("percent-encoded", f"mongodb://loyalty:{PASSWORD}@h/shop"),
        ("unknown option", f"mongodb://loyalty:{ENCODED}@h/?retryWritess=true"),
        ("bad value of option", f"mongodb://loyalty:{ENCODED}@h/?timeoutMS=soon"),
        ("PORT", f"mongodb://loyalty:{ENCODED}@h:99999"),
        ("HOST", f"mongodb://loyalty:{ENCODED}@empty..label"),
        ("HOST", f"mongodb://loyalty:{ENCODED}@{'x' * 64}.example"),
        ("tlsCAFile", f"mongodb://loyalty:{ENCODED}@h/?tls=true&tlsCAFile=/none"),
    ],
    ids=["nothing", "scheme", "password", "option", "value", "port"]
    + ["empty label", "long label", "file"],
)
def test_a_wrong_uri_ends_the_daemon_with_78_and_one_line(fault: str, uri: str) -> None:
    code, output = run_daemon(LOG_LEVEL="DEBUG", MONGODB_URI=uri)
    assert code == 78
    told, *hint = output.splitlines()
    assert fault in told
    assert all("settings come from" in line for line in hint)
    assert_no_secret(output)


def run_daemon(**settings: str) -> tuple[int, str]:
    """Run a daemon with wrong settings in this process; return its exit code and its output."""
    output = StringIO()
    with (
        mock.patch.dict(os.environ, service_environment(**settings), clear=True),
        redirect_stderr(output),
        redirect_stdout(output),
    ):
        return loyalty_microservice.main(["--env-file", os.devnull]), output.getvalue()


def test_each_of_ten_wrong_settings_is_reported_on_its_own_line() -> None:
    bad = {
        "MONGODB_URI": f"mongodb://u:{PASSWORD}@h/shop",
        "MONGODB_DATABASE": "a b",
        "ORDERS_COLLECTION": "a$b",
        "ORDER_STATUSES": ",",
        "POINTS_PER_ORDER": "0",
        "RECOUNT_INTERVAL": "soon",
        "COUNT_TIMEOUT": "1000d",
        "MAX_DECREASE_PERCENT": "101",
        "BATCH_SIZE": "1e3",
        "LOG_LEVEL": "LOUD",
    }
    code, output = run_daemon(**bad)
    assert code == 78
    *told, _ = output.splitlines()
    assert len(told) == len(bad)
    assert all(any(f"{name}: " in line for line in told) for name in bad)
    assert_no_secret(output)


@given(
    uri=st.text(st.sampled_from("ab:/?@&=%,.[]+1#$ "), max_size=25),
    values=st.dictionaries(
        st.sampled_from(["ORDER_STATUSES", "BATCH_SIZE", "COUNT_TIMEOUT", "USERS_COLLECTION"]),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
    ),
)
def test_no_combination_of_wrong_settings_causes_a_traceback_or_shows_the_password(
    uri: str, values: dict[str, str]
) -> None:
    # The interval is always wrong, so that no example gets as far as a connection.
    secret = {"MONGODB_URI": f"mongodb://user:{PASSWORD}{uri}", "RECOUNT_INTERVAL": "soon"}
    code, output = run_daemon(**values | secret, LOG_LEVEL="DEBUG")
    assert code == 78
    assert "RECOUNT_INTERVAL: 'soon' is not a duration" in output
    assert "Traceback" not in output
    assert_no_secret(output)


def test_a_settings_file_that_others_can_read_causes_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / ".env"
    for mode, warnings in ((0o644, 1), (0o600, 0)):
        file.write_text("MONGODB_URI=http://\n")
        file.chmod(mode)
        assert loyalty_microservice.main(["--env-file", str(file)]) == 78
        assert capsys.readouterr().err.count(f"other users can read {file}") == warnings


Privilege = dict[str, Any]


def role(*, create_index: bool = False) -> tuple[str, str, list[Privilege]]:
    """Read the names of the database and of the user, and the privileges, from the file."""
    text = (ROOT / "deploy" / "mongodb-role.js").read_text()
    names = dict(re.findall(r'^const (\w+) = "(.*)";$', text, re.MULTILINE))
    found = re.search(r"^const privileges = (\[.*?^\]);", text, re.MULTILINE | re.DOTALL)
    assert found
    body = found[1].replace("// {", "{") if create_index else found[1]
    body = re.sub(r"//.*", "", body)
    body = re.sub(r": (\w+)", lambda name: f': "{names[name[1]]}"', body)
    body = re.sub(r"(\w+): ", r'"\1": ', body)
    return names["database"], names["user"], json.loads(re.sub(r",(\s*\])", r"\1", body))


@dataclass
class Secured(FaultHarness):
    """A shop whose service is the user of the role, on a server with authentication."""

    user: str

    @property
    def uri(self) -> str:
        return self.deployment.uri_for(self.user, PASSWORD, self.database.name)

    def allow(self, privileges: list[Privilege]) -> None:
        """Give the role exactly these privileges."""
        admin = self.database.client.admin
        admin.command("updateRole", "loyaltyMicroservice", privileges=privileges, roles=[])

    def allow_all_but(self, collection: str, action: str) -> None:
        """Give the role the privileges of the file without one action."""
        privileges = role()[2]
        kept = [p for p in privileges if p["resource"]["collection"] == collection]
        assert any(action in p["actions"] for p in kept)
        for privilege in kept:
            privilege["actions"] = [a for a in privilege["actions"] if a != action]
        self.allow([p for p in privileges if p["actions"]])

    def create_user(self) -> None:
        self.database.client.admin.command(
            "createUser", self.user, pwd=PASSWORD, roles=["loyaltyMicroservice"]
        )


@pytest.fixture
def secured(authenticated_deployment: Deployment) -> Iterator[Secured]:
    name, user, privileges = role()
    with authenticated_deployment.client() as client:
        shop = Shop(client[name], random.Random(1))
        shop.fill(users=100, orders=400)
        client.admin.command("createRole", "loyaltyMicroservice", privileges=privileges, roles=[])
        harness = Secured(authenticated_deployment, client[name], shop, user)
        harness.create_user()
        yield harness
        client.admin.command("dropUser", user)
        client.admin.command("dropRole", "loyaltyMicroservice")
        client.drop_database(name)


@pytest.mark.xdist_group("auth")
def test_the_role_allows_everything_but_creating_the_index(
    secured: Secured, command: Command, service: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(flag: str) -> int:
        return command(flag, MONGODB_URI=secured.uri, LOG_LEVEL="DEBUG")

    assert run("--check-config") == 0
    checked, log = capsys.readouterr()
    assert re.search("privileges +sufficient", checked)
    assert run("--dry-run") == 1
    daemon = service(MONGODB_URI=secured.uri, LOG_LEVEL="DEBUG")
    daemon.wait_for("outcome=succeeded")
    assert daemon.stop() == 0
    secured.assert_exact()
    expiry = secured.database["loyalty_recounts"].index_information()["loyalty_expires_at"]
    assert expiry["expireAfterSeconds"] == 0
    assert run("--status") == 0
    assert run("--create-index") == 78
    output = "".join([checked, log, daemon.output, *capsys.readouterr()])
    assert "no privilege for createIndex on oms_db.orders" in output
    secured.allow(role(create_index=True)[2])
    assert run("--create-index") == 0
    output += "".join(capsys.readouterr())
    assert_no_secret(output)
    assert "Traceback" not in output
    warnings = [line for line in output.splitlines() if "WARNING" in line]
    assert all("safety_warning" in line for line in warnings)


@pytest.mark.xdist_group("auth")
@pytest.mark.parametrize(
    ("collection", "action"), [("orders", "find"), ("users", "find"), ("users", "update")]
)
def test_a_missing_privilege_at_start_ends_the_daemon_with_78(
    secured: Secured, service: Start, collection: str, action: str
) -> None:
    secured.allow_all_but(collection, action)
    daemon = service(MONGODB_URI=secured.uri)
    assert daemon.wait() == 78
    (line,) = daemon.lines
    assert f"no privilege for {action}" in line
    assert f"oms_db.{collection}" in line
    assert_no_secret(daemon.output)


@pytest.mark.xdist_group("auth")
@pytest.mark.parametrize("action", ["insert", "createIndex"])
def test_a_missing_privilege_for_the_record_causes_one_warning(
    secured: Secured, service: Start, action: str
) -> None:
    secured.allow_all_but("loyalty_recounts", action)
    daemon = service(MONGODB_URI=secured.uri, RECOUNT_INTERVAL="1s")
    daemon.wait_for("outcome=succeeded", times=3)
    event = {"insert": "record_write_failed", "createIndex": "expiry_index_failed"}[action]
    assert len(lines_with(event, daemon)) == 1
    assert len(lines_with(f"no privilege for {action} on oms_db.loyalty_recounts", daemon)) == 1
    assert find_mismatches(secured.database) == []
    assert daemon.stop() == 0


@pytest.mark.xdist_group("auth")
def test_without_find_on_records_only_commands_that_read_them_fail(
    secured: Secured, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    secured.allow_all_but("loyalty_recounts", "find")
    assert command("--once", MONGODB_URI=secured.uri) == 0
    secured.assert_exact()
    capsys.readouterr()
    for flag, code in (("--status", 78), ("--check-config", 1)):
        assert command(flag, MONGODB_URI=secured.uri) == code
        output = "".join(capsys.readouterr())
        assert "no privilege for find on oms_db.loyalty_recounts" in output


@pytest.mark.xdist_group("auth")
@pytest.mark.parametrize(
    ("login", "words"),
    [
        (("loyalty", PASSWORD + "x"), "rejects the user name or password"),
        (("nobody", PASSWORD), "rejects the user name or password"),
        (("", ""), "add a user name and a password to MONGODB_URI"),
    ],
    ids=["wrong password", "unknown user", "no credentials"],
)
def test_wrong_credentials_at_start_end_the_daemon_with_78(
    secured: Secured, service: Start, login: tuple[str, str], words: str
) -> None:
    uri = secured.deployment.uri_for(*login, secured.database.name)
    daemon = service(MONGODB_URI=uri, LOG_LEVEL="DEBUG")
    assert daemon.wait() == 78
    (line,) = daemon.lines
    assert words in line
    assert_no_secret(daemon.output)


@pytest.fixture
def running(secured: Secured, service: Start, tmp_path: Path) -> Process:
    """The service after its first recount, with only the documented privileges."""
    file = tmp_path / "uri"
    file.write_text(secured.uri)
    daemon = service(MONGODB_URI_FILE=str(file), RECOUNT_INTERVAL="1s")
    daemon.wait_for("outcome=succeeded")
    return daemon


def assert_recovers(secured: Secured, running: Process) -> None:
    done = len(lines_with("outcome=succeeded", running))
    running.wait_for("outcome=succeeded", times=done + 2)
    secured.assert_exact()
    assert running.stop() == 0
    assert_no_secret(running.output)
    assert "Traceback" not in running.output


@pytest.mark.xdist_group("auth")
@pytest.mark.parametrize(
    ("collection", "action"), [("orders", "find"), ("users", "find"), ("users", "update")]
)
def test_recounts_fail_while_a_privilege_is_revoked(
    secured: Secured, running: Process, collection: str, action: str
) -> None:
    secured.allow_all_but(collection, action)
    secured.shop.ship_orders(50)
    running.wait_for(f"no privilege for {action}", times=2)
    secured.allow(role()[2])
    assert_recovers(secured, running)


@pytest.mark.xdist_group("auth")
def test_recounts_fail_while_the_database_user_is_missing(
    secured: Secured, running: Process
) -> None:
    secured.database.client.admin.command("dropUser", secured.user)
    secured.shop.ship_orders(50)
    running.wait_for("failed error=", times=2)
    secured.create_user()
    assert_recovers(secured, running)


@pytest.mark.xdist_group("auth")
def test_a_changed_password_is_an_error_until_the_file_has_it(
    secured: Secured, running: Process, tmp_path: Path
) -> None:
    new = PASSWORD[::-1]
    secured.database.client.admin.command("updateUser", secured.user, pwd=new)
    secured.deployment.servers[0].restart()  # open connections keep their privileges
    faults.recover(secured.deployment)
    secured.shop.ship_orders(50)
    running.wait_for("rejects the user name or password", times=2)
    assert "failed error=" in running.lines[-1]
    file = tmp_path / "uri"
    file.write_text(secured.deployment.uri_for(secured.user, new, secured.database.name))
    assert_recovers(secured, running)
    assert quote_plus(new)[:6] not in running.output
