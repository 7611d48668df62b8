"""Messages for operators: each names the cause, and what to do about it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from bson import ObjectId
from conftest import MEMORY, Command, settings_for
from pymongo.database import Database

from loyalty.errors import DatabaseUnavailable
from loyalty.mongo import connection as mongo
from loyalty.mongo.connection import connect
from sandbox import faults
from sandbox.mongod import Deployment
from sandbox.service import Process
from sandbox.shop import find_mismatches

Start = Callable[..., Process]
Capture = pytest.CaptureFixture[str]


def ship(shop: Database[Any], *customers: Any, status: Any = "Shipped") -> None:
    shop.orders.insert_many([{"customer_id": c, "status": status} for c in customers])


@pytest.fixture
def short_connect_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mongo, "CONNECT_TIMEOUT_SECONDS", 0.5)


def test_a_host_name_that_does_not_resolve_yet_is_retried(
    service: Start, command: Command, capsys: Capture, short_connect_timeout: None
) -> None:
    uri = "mongodb://no-such-host.invalid:27017/shop"
    daemon = service(MONGODB_URI=uri)
    for flag in ("--once", "--check-config"):
        assert command(flag, MONGODB_URI=uri) == 69
        text = capsys.readouterr().err
        assert "no-such-host.invalid:27017 failed: the host name cannot be resolved" in text
    daemon.wait_for("the host name cannot be resolved")
    assert "retry_in=1" in daemon.output
    assert daemon.stop() == 0


def test_customer_lists_all_orders_by_form_of_the_id_and_status(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_one({"_id": 7})
    ship(database, *[7] * 4, *["7"] * 2)
    ship(database, 7, 7, status="Shipped ")
    ship(database, 7, status=["Shipped"])
    database.orders.insert_one({"customer_id": 7})
    assert command("--once", "--customer", "7", POINTS_PER_ORDER="10") == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split(None, 1) for line in out[1:3]] == [
        ["customer_id", "status       orders  points"],
        ["'7'", "Shipped      2       0       no user has the _id '7'"],
    ]
    rows = {re.split(r"  +", line.strip())[1]: re.split(r"  +", line.strip()) for line in out[3:7]}
    why = "only Shipped counts"
    assert rows == {
        "Shipped": ["7", "Shipped", "4", "40"],
        "'Shipped '": ["7", "'Shipped '", "2", "0", why],
        "['Shipped']": ["7", "['Shipped']", "1", "0", why],
        "null": ["7", "null", "1", "0", why],
    }
    assert out[7:] == ["  user  from  to", "  7     null  40"]
    assert find_mismatches(database, ("Shipped",), 10) == []


def test_customer_shows_each_form_of_an_object_id_in_its_own_row(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    ada = ObjectId("66abcdefabcdefabcdefabcd")
    database.users.insert_many([{"_id": ada}, {"_id": str(ada).upper()}])
    ship(database, ada, ada, str(ada), str(ada).upper(), "66ABcdefabcdefabcdefabcd", ObjectId())
    assert command("--once", "--customer", str(ada)) == 0
    out = capsys.readouterr().out
    for form in (f"{ada}  ", f"'{ada}'", f"'{str(ada).upper()}'", "'66ABcdefabcdefabcdefabcd'"):
        assert re.search(rf"^  {form} +Shipped  ([12])  +\1$", out, re.MULTILINE), form
    assert re.search(rf"^  {ada} +null  5$", out, re.MULTILINE)
    assert find_mismatches(database) == []


@pytest.mark.xdist_group("auth")
@pytest.mark.parametrize(
    ("options", "looked_up"),
    [
        ("", "in the database 'shop': if the user is defined"),
        (
            "&authSource=stock",
            "in the database 'stock', because of authSource: if the user is defined",
        ),
    ],
)
def test_the_error_for_a_rejected_login_names_the_authentication_database(
    authenticated_deployment: Deployment,
    command: Command,
    capsys: Capture,
    options: str,
    looked_up: str,
) -> None:
    uri = (
        authenticated_deployment.uri.replace("/?", "/shop?").replace("&authSource=admin", "")
        + options
    )
    assert command("--once", MONGODB_URI=uri) == 78
    text = capsys.readouterr().err
    assert f"the user was looked up {looked_up}" in text
    assert "set the option authSource=admin" in text
    assert command("--create-index", MONGODB_URI=authenticated_deployment.uri_for("x", "y")) == 78
    assert "looked up in the database 'admin'" in capsys.readouterr().err


def test_the_error_for_a_uri_of_a_secondary_names_the_replica_set(
    command: Command, capsys: Capture
) -> None:
    with Deployment(parent=MEMORY) as alone:
        faults.step_down(alone.servers[0])
        uri = alone.servers[0].uri
        assert command("--once", MONGODB_URI=uri) == 78
    text = capsys.readouterr().err
    host = uri.split("/")[2]
    assert f"{host} is a secondary. Add ?replicaSet=rs0" in text


def test_a_primary_that_has_just_stepped_down_is_unavailable(deployment: Deployment) -> None:
    # No fail point changes the reply to `hello`, and a real step-down is never in that moment.
    command = Database.command

    def stepping_down(database: Database[Any], asked: Any, **options: Any) -> Any:
        reply = command(database, asked, **options)
        return {**reply, "secondary": True} if asked == "hello" else reply

    with mock.patch.object(Database, "command", stepping_down), pytest.raises(DatabaseUnavailable):
        connect(settings_for(deployment.uri), writing=False)


def test_the_error_for_a_slow_count_suggests_creating_the_index(
    database: Database[Any], deployment: Deployment, command: Command, capsys: Capture
) -> None:
    ship(database, 1)
    for made in (False, True):
        if made:
            assert command("--create-index") == 0
        fault = {"errorCode": 50, "namespace": f"{database.name}.orders"}
        with faults.fail_command(deployment.servers[0], "aggregate", 9, **fault):
            assert command("--once") == 69
        text = capsys.readouterr().err
        assert "took too long: raise COUNT_TIMEOUT" in text
        assert ("--create-index" in text) is not made


def test_the_error_for_a_server_without_tls_says_to_check_tls(
    deployment: Deployment, command: Command, capsys: Capture
) -> None:
    assert command("--once", MONGODB_URI=deployment.uri + "&tls=true") == 69
    assert "check that the server and the URI agree on TLS" in capsys.readouterr().err


def test_a_compressor_that_is_not_installed_is_one_problem(service: Start) -> None:
    once = service("--once", MONGODB_URI="mongodb://127.0.0.1:1/?compressors=snappy")
    assert once.wait() == 78
    assert 'ERROR configuration_problem error="MONGODB_URI: ' in once.lines[0]
    assert "compressors" in once.lines[0]
    assert "Warning" not in once.output
    assert len(once.lines) == 2


def test_an_old_replica_set_is_not_called_standalone(uri: str) -> None:
    with connect(settings_for(uri), writing=False) as connection:
        assert connection.snapshot_unsupported_reason == ""
        old = dataclasses.replace(connection, supports_snapshots=False)
        assert old.snapshot_unsupported_reason == "the server is older than MongoDB 5.0"
        assert (
            dataclasses.replace(old, topology="standalone").snapshot_unsupported_reason
            == "the server is standalone"
        )


def test_the_numbers_of_changes_by_kind_add_up(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    points: list[Any] = [{"loyalty_points": p} for p in (0, 9, 1.0, "x", 2)]
    database.users.insert_many([{"_id": n, **p} for n, p in enumerate([*points, {}, {}])])
    ship(database, 0, 2, 4, 4, 5)
    assert command("--dry-run") == 1
    (line,) = re.findall(r"changed users +(.*)", capsys.readouterr().out)
    assert line == "6 (2 increased, 1 decreased, 1 initialized to 0, 2 changed only in type)"


def test_customer_lists_every_status_with_any_collation_of_the_orders(
    database: Database[Any], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    database.create_collection("orders", collation={"locale": "en", "strength": 2})
    database.users.insert_one({"_id": "K001"})
    database.orders.insert_many(
        [{"customer_id": "K001", "status": status} for status in ("shipped", "Shipped")]
    )
    assert command("--once", "--customer", "K001") == 0
    listed = capsys.readouterr().out
    rows = [line.split()[:2] for line in listed.splitlines()]
    assert ["'K001'", "shipped"] in rows
    assert ["'K001'", "Shipped"] in rows
