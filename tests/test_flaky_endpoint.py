"""The service behind an endpoint that fails, as a load balancer or a bad network does.

A relay that closes, resets, stalls and cuts connections is between the service and a real server
with TLS. Orders change through a direct connection to the server.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from conftest import Command, settings_for
from live_harness import make_index
from pymongo.database import Database
from pymongo.errors import NetworkTimeout

from loyalty.errors import DatabaseUnavailable
from loyalty.mongo.connection import connect
from loyalty.recount.snapshot import pin_cluster_time
from sandbox.mongod import Deployment, wait_until
from sandbox.relay import Fault, FaultCycle, relay
from sandbox.service import Process
from sandbox.shop import Shop, find_mismatches

WORKING_SECONDS = 3.0
CHANGE_PAUSE_SECONDS = 0.2
# An attempt to connect through a failing endpoint ends after 5 s; the next one starts 3 s later. An
# answer that stalls ends a recount after COUNT_TIMEOUT and 30 s, if the driver does not notice.
SETTINGS = {"LIVE_UPDATES": "yes", "RECOUNT_INTERVAL": "3s", "COUNT_TIMEOUT": "5s"}
RECOVERY_SECONDS = 180.0

pytestmark = pytest.mark.xdist_group("tls")  # one server with TLS


@dataclass
class Endpoint:
    """A shop, the direct connection to it, and the URI and the faults of the endpoint."""

    database: Database[Any]
    shop: Shop
    uri: str
    faults: FaultCycle

    def change_orders(self) -> None:
        self.shop.ship_orders(20)
        self.shop.return_orders(15)
        time.sleep(CHANGE_PAUSE_SECONDS)

    def assert_exact(self) -> None:
        """Wait until all points equal an independent count. Orders must not change any more."""
        wait_until("exact points", lambda: not find_mismatches(self.database), RECOVERY_SECONDS)
        assert self.database.users.find_one({"loyalty_points": {"$gt": 1}})

    def count_recounts(self) -> int:
        return self.database.loyalty_recounts.count_documents({"outcome": "succeeded"})


@pytest.fixture
def endpoint(tls_deployment: Deployment, ca_file: str) -> Iterator[Endpoint]:
    faults = FaultCycle(WORKING_SECONDS)
    with (
        tls_deployment.client() as client,
        relay(tls_deployment.servers[0].port, faults=faults) as port,
    ):
        database = client[f"flaky_{uuid4().hex[:12]}"]
        shop = Shop(database, random.Random(database.name))
        shop.fill(users=500, orders=2000, dirty=0)
        make_index(database)
        login = urlsplit(tls_deployment.uri).netloc.partition("@")[0]
        options = f"tls=true&tlsCAFile={ca_file}&directConnection=true&authSource=admin"
        # Far below the defaults: a stalled connection ends after 1 s, and the driver looks for the
        # server twice a second, so that it meets all faults in a short time.
        options += "&connectTimeoutMS=1000&heartbeatFrequencyMS=500"
        uri = f"mongodb://{login}@127.0.0.1:{port}/{database.name}?{options}"
        yield Endpoint(database, shop, uri, faults)
        client.drop_database(database.name)


def assert_log_is_clean(process: Process, uri: str) -> None:
    """Check that the log has no traceback and no credential."""
    output = process.output
    assert "Traceback" not in output
    assert "internal_error" not in output
    assert str(urlsplit(uri).password) not in output
    assert "mongodb://" not in output


def test_the_daemon_waits_for_an_endpoint_that_only_fails(
    endpoint: Endpoint, service: Callable[..., Process]
) -> None:
    endpoint.faults.working_seconds = 0
    process = service(MONGODB_URI=endpoint.uri, **SETTINGS)
    process.wait_for(" failed error=", times=2)
    new_connection_faults = set(Fault) - {Fault.STALL_REPLY}
    wait_until("every fault", lambda: new_connection_faults <= set(endpoint.faults.counts))
    assert process.exit_code is None
    assert endpoint.count_recounts() == 0
    endpoint.faults.is_active = False
    process.wait_for("outcome=succeeded")
    endpoint.assert_exact()
    assert process.stop() == 0
    assert_log_is_clean(process, endpoint.uri)


@pytest.mark.size(15, deep=120)
def test_the_daemon_survives_a_flaky_endpoint_and_is_exact_afterwards(
    endpoint: Endpoint,
    service: Callable[..., Process],
    command: Command,
    capsys: pytest.CaptureFixture[str],
    size: int,
) -> None:
    """The size is the duration of the faults in seconds."""
    process = service(MONGODB_URI=endpoint.uri, **SETTINGS)
    end = time.monotonic() + size

    def change_orders_until_end() -> bool:
        endpoint.change_orders()
        assert process.exit_code is None, process.output
        return time.monotonic() > end and set(endpoint.faults.counts) == set(Fault)

    wait_until("every fault", change_orders_until_end, seconds=size + 120)
    endpoint.faults.is_active = False
    endpoint.assert_exact()

    def is_fresh() -> bool:
        status = command("--status", "--json", MONGODB_URI=endpoint.uri, **SETTINGS)
        report = json.loads(capsys.readouterr().out)
        return status == 0 and report["fresh"] and report["heartbeat"]["alive"]

    wait_until("fresh points", is_fresh)
    endpoint.change_orders()
    endpoint.assert_exact()
    assert process.exit_code is None
    assert process.stop() == 0
    assert_log_is_clean(process, endpoint.uri)


def test_the_first_read_of_a_recount_does_not_wait_for_the_socket_timeout(
    endpoint: Endpoint,
) -> None:
    endpoint.faults.is_active = False
    with connect(settings_for(endpoint.uri)) as connection:
        assert pin_cluster_time(connection) is not None
        endpoint.faults.is_active = True  # open connections stall
        with pytest.raises(DatabaseUnavailable) as raised:
            pin_cluster_time(connection, timeout_seconds=0.5)
    assert isinstance(raised.value.__cause__, NetworkTimeout)
    assert endpoint.faults.counts[Fault.STALL_REPLY] > 0
