"""It does no harm, whatever it is told: plain mistakes are refused, and said in plain words."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import uuid4

import pytest
from bson import ObjectId
from conftest import MEMORY, ROOT, Command, examples, settings_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymongo import MongoClient
from pymongo.database import Database
from test_recount import EDGES, ORDERS, USERS

from config import declared
from loyalty.errors import DatabaseUnavailable
from loyalty.history import OWNER_FILTER, History
from loyalty.mongo import connection as mongo
from loyalty.mongo.connection import Connection, connect
from loyalty.recount import counter as count_failures
from loyalty.recount.index import Plan, create_index, inspect_plan
from loyalty.recount.runner import RecountRequest, run_recount
from sandbox import faults
from sandbox.mongod import Deployment, wait_until
from sandbox.service import Process
from sandbox.shop import Names, disagreements

Start = Callable[..., Process]
Capture = pytest.CaptureFixture[str]
LONG_AGO = datetime(2024, 1, 1, tzinfo=UTC)


def ship(shop: Database[Any], *customers: Any, status: Any = "Shipped") -> None:
    shop.orders.insert_many([{"customer_id": c, "status": status} for c in customers])


# It deletes nothing.


@pytest.fixture(scope="module")
def expiring() -> Iterator[MongoClient[Any]]:
    """A server that looks for expired documents every second."""
    options = ("--setParameter", "ttlMonitorSleepSecs=1")
    with Deployment(options=options, parent=MEMORY) as deployment, deployment.client() as client:
        yield client


def test_a_document_that_is_not_the_services_never_expires(
    expiring: MongoClient[Any], command: Command, capsys: Capture
) -> None:
    host, port = expiring.address or ("", 0)
    uri = f"mongodb://{host}:{port}/harm?replicaSet=rs0"
    shop = expiring.harm
    shop.users.insert_one({"_id": 1})
    shop.jobs.insert_many([{"finished_at": LONG_AGO} for _ in range(5)])
    for flag in ("--check-config", "--once"):
        assert command(flag, MONGODB_URI=uri, RECOUNTS_COLLECTION="jobs") == 78
        assert "harm.jobs holds documents that are not this service's" in capsys.readouterr().err
    assert list(shop.jobs.index_information()) == ["_id_"]

    assert command("--once", MONGODB_URI=uri) == 0
    foreign = {"finished_at": LONG_AGO, "outcome": "succeeded"}  # comes into the records later
    shop.loyalty_recounts.insert_many([foreign, {**OWNER_FILTER, "finished_at": LONG_AGO}])
    expired = {**OWNER_FILTER, "finished_at": LONG_AGO}
    wait_until("expiry", lambda: not shop.loyalty_recounts.count_documents(expired))
    assert shop.loyalty_recounts.count_documents({"finished_at": LONG_AGO}) == 1
    assert shop.loyalty_recounts.count_documents(OWNER_FILTER) == 1
    assert shop.jobs.count_documents({}) == 5


def test_records_have_a_collection_of_their_own(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.create_collection("seen", viewOn="users", pipeline=[])
    for name, words in (
        ("users", "must be different collections"),
        ("orders", "must be different collections"),
        ("seen", "must name a collection of its own"),
    ):
        for flag in ("--once", "--check-config"):
            assert command(flag, RECOUNTS_COLLECTION=name) == 78
            said = capsys.readouterr().err
            assert words in said
            assert "RECOUNTS_COLLECTION" in said


# It believes no plain mistake.


@pytest.mark.parametrize("found", ["shipped", "SHIPPED", "Shipped ", " ship ped"])
def test_orders_in_a_status_that_differs_only_in_case_or_blanks_are_refused(
    database: Database[Any], command: Command, capsys: Capture, found: str
) -> None:
    database.users.insert_many([{"_id": n} for n in range(3)])
    ship(database, 0, 1, 1, status=found)
    for n in range(11):  # more frequent ones do not hide it
        ship(database, *range(4), status=f"other {n}")

    assert command("--once") == 65

    said = capsys.readouterr().err
    assert "no order has status Shipped; found: other 0 (4), " in said
    assert ": correct ORDER_STATUSES. Or let one recount through with --once --force" in said
    assert database.users.count_documents({"loyalty_points": {"$exists": True}}) == 0
    (record,) = database.loyalty_recounts.find()
    assert record["outcome"] == "refused"
    assert command("--once", "--force") == 0
    assert disagreements(database) == []


def test_one_counted_order_is_enough(database: Database[Any], command: Command) -> None:
    database.users.insert_one({"_id": 1})
    ship(database, 1)
    ship(database, 1, 1, status="shipped")
    assert command("--once") == 0
    assert disagreements(database) == []


def test_no_counted_order_at_all_is_a_warning_with_the_statuses_that_there_are(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_one({"_id": 1})
    ship(database, 1, 1, status="Sent")
    ship(database, 1, status=None)
    assert command("--once", ORDER_STATUSES="Shipped,Done") == 0
    said = capsys.readouterr().err
    assert (
        "WARNING no_counted_order no order has status Shipped, Done; found: Sent (2), none (1)"
        in said
    )
    assert command("--once", ORDERS_COLLECTION="Orders") == 0
    assert "no order has status Shipped; found: no orders" in capsys.readouterr().err
    assert disagreements(database) == []


def test_a_misspelt_setting_in_the_file_is_a_fault_like_any_other(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_one({"_id": 1})
    assert command("--once", MONGODB_DATBASE="webshop", batchsize="5") == 78
    said = capsys.readouterr().err
    assert "ERROR unknown setting MONGODB_DATBASE, did you mean MONGODB_DATABASE?" in said
    assert "ERROR unknown setting batchsize, did you mean BATCH_SIZE?" in said
    assert list(database.users.find()) == [{"_id": 1}]


def test_taking_points_in_the_first_recount_or_from_more_than_a_tenth_is_a_warning(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_many([{"_id": n, "loyalty_points": 2} for n in range(100)])
    ship(database, *range(100), *range(97))
    assert command("--once") == 0
    warning = "WARNING points_taken from {} of the 100 users with points"
    assert warning.format(3) + ", as this is the first recount" in capsys.readouterr().err
    for n, warned in ((10, False), (11, True)):
        for customer in range(n):
            database.orders.delete_one({"customer_id": customer})
        assert command("--dry-run") == 1
        assert (f"points from {n} of the 100 users" in capsys.readouterr().out) is warned
        assert command("--once") == 0
        said = capsys.readouterr().err
        assert (warning.format(n) in said) is warned
        assert "first recount" not in said
        ship(database, *range(n))
        assert command("--once") == 0
        capsys.readouterr()
    assert disagreements(database) == []


# One fault does not spoil the rest.


def test_a_user_who_refuses_the_update_makes_a_recount_incomplete_and_no_more(
    database: Database[Any], uri: str, service: Start, command: Command, capsys: Capture
) -> None:
    database.users.insert_many([{"_id": n, "locked": n == 3} for n in range(5)])
    ship(database, *range(5))
    rule = {"$or": [{"locked": False}, {"loyalty_points": {"$exists": False}}]}
    database.command("collMod", "users", validator=rule)
    daemon = service(MONGODB_URI=uri, RECOUNT_INTERVAL="1s")
    daemon.wait_for("INFO recount outcome=incomplete", times=3)
    assert daemon.stop() == 0
    assert (
        "WARNING incomplete 1 of 5 users refused the update, the others are written"
        in daemon.output
    )
    assert "refused: 3; because: code 121" in daemon.output
    assert "retry_in" not in daemon.output
    assert [wrong.user for wrong in disagreements(database)] == [3]
    for record in database.loyalty_recounts.find():
        assert (record["outcome"], record["failed_updates"]) == ("incomplete", 1)
    assert command("--status") == 0
    assert "fresh" in capsys.readouterr().out
    assert command("--once") == 1
    said = capsys.readouterr().out
    assert "Recount incomplete in " in said
    assert re.search(r"^  refused the update +1$", said, re.MULTILINE)
    assert command("--once", "--customer", "3") == 1
    assert "WARNING incomplete refused: 3; because: code 121" in capsys.readouterr().err
    database.command("collMod", "users", validator={})
    assert command("--once") == 0
    assert disagreements(database) == []


RANGES = {
    "POINTS_PER_ORDER": ("1", "1000000"),
    "RECOUNT_INTERVAL": ("1s", "366d"),
    "COUNT_TIMEOUT": ("1s", "24d"),
    "COUNT_WORKERS": ("1", "16"),
    "MAX_DECREASE_PERCENT": ("0", "100"),
    "BATCH_SIZE": ("1", "100000"),
    "LOG_LEVEL": ("DEBUG", "ERROR"),
    "MONGODB_DATABASE": ("a", "a" * 63),
    "USER_POINTS_FIELD": ("p", ".".join("p" * 50)),
    "ORDER_STATUSES": ("Shipped", ",".join(["Shipped", *(f"status {n}" for n in range(500))])),
}


@pytest.mark.parametrize("end", [0, 1])
def test_every_setting_works_at_both_ends_of_its_range(
    deployment: Deployment, client: MongoClient[Any], end: int
) -> None:
    values = {name: ends[end] for name, ends in RANGES.items()}
    shop = client[values["MONGODB_DATABASE"]]
    try:
        shop.users.insert_many([{"_id": n} for n in range(3)])
        ship(shop, 0, 1, 1)
        told = settings_for(deployment.uri, **values)
        with connect(told, writing=True) as connection:
            create_index(connection.orders, told)
            run_recount(connection, told, History(connection.recounts))
        names = Names(points=told.points_field)
        assert disagreements(shop, ("Shipped",), told.points_per_order, names) == []
    finally:
        client.drop_database(shop.name)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mongo, "CONNECT_TIMEOUT_SECONDS", 0.5)


def test_a_host_name_that_is_not_known_yet_is_waited_for(
    service: Start, command: Command, capsys: Capture, impatient: None
) -> None:
    uri = "mongodb://no-such-host.invalid:27017/shop"
    daemon = service(MONGODB_URI=uri)
    for flag in ("--once", "--check-config"):
        assert command(flag, MONGODB_URI=uri) == 69
        said = capsys.readouterr().err
        assert "no-such-host.invalid:27017 failed: no such host name, or not yet" in said
    daemon.wait_for("no such host name, or not yet")
    assert "retry_in=10s" in daemon.output
    assert daemon.stop() == 0


# The command for support tickets.


def test_customer_lists_all_orders_form_by_form_and_they_add_up(
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
        "none": ["7", "none", "1", "0", why],
    }
    assert out[7:] == ["  user  from  to", "  7     none  40"]
    assert disagreements(database, ("Shipped",), 10) == []


def test_customer_shows_the_forms_of_an_object_id_apart(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    ada = ObjectId("66abcdefabcdefabcdefabcd")
    database.users.insert_many([{"_id": ada}, {"_id": str(ada).upper()}])
    ship(database, ada, ada, str(ada), str(ada).upper(), "66ABcdefabcdefabcdefabcd", ObjectId())
    assert command("--once", "--customer", str(ada)) == 0
    out = capsys.readouterr().out
    for form in (f"{ada}  ", f"'{ada}'", f"'{str(ada).upper()}'", "'66ABcdefabcdefabcdefabcd'"):
        assert re.search(rf"^  {form} +Shipped  ([12])  +\1$", out, re.MULTILINE), form
    assert re.search(rf"^  {ada} +none  5$", out, re.MULTILINE)
    assert disagreements(database) == []


# Other shapes, by settings alone.

NAMES = Names("sales.all", "people", "sale.state", "sale.buyer.id", "loyalty.points")
SHAPE = {
    "ORDERS_COLLECTION": NAMES.orders,
    "USERS_COLLECTION": NAMES.users,
    "ORDER_STATUS_FIELD": NAMES.status,
    "ORDER_CUSTOMER_FIELD": NAMES.customer,
    "USER_POINTS_FIELD": NAMES.points,
}


def reshape(database: Database[Any]) -> None:
    """Move everything of a shop of the usual shape to where NAMES says."""
    for usual, other, fields in (
        ("orders", NAMES.orders, {"status": NAMES.status, "customer_id": NAMES.customer}),
        ("users", NAMES.users, {"loyalty_points": NAMES.points}),
    ):
        database[usual].update_many({}, {"$rename": fields})
        database[usual].aggregate([{"$out": other}])
        database[usual].drop()


@pytest.fixture
def reshaped(deployment: Deployment) -> Iterator[Connection]:
    """A shop of that shape with the index, and nothing in it."""
    told = settings_for(deployment.uri_for(database=f"shop_{uuid4().hex[:12]}"), **SHAPE)
    with connect(told, writing=True) as connection:
        connection.orders.insert_one({})
        create_index(connection.orders, told)
        yield connection
        connection.client.drop_database(connection.users.database.name)


@settings(max_examples=examples(25, 200), suppress_health_check=list(HealthCheck))
@given(users=USERS, orders=ORDERS, cuts=st.lists(EDGES, max_size=4))
def test_in_a_shop_of_another_shape_every_user_has_the_points_that_plain_python_counts(
    reshaped: Connection, users: list[Any], orders: list[Any], cuts: list[Any]
) -> None:
    shop = reshaped.users.database
    for name, documents in (("users", users), ("orders", orders)):
        shop[{"users": NAMES.users, "orders": NAMES.orders}[name]].delete_many({})
        if documents:
            shop[name].insert_many(documents)
    reshape(shop)
    told = settings_for("mongodb://unused/", **SHAPE)
    with mock.patch.object(count_failures, "edges", return_value=cuts):
        result = run_recount(reshaped, told, History(None), RecountRequest(force=True))
        again = run_recount(reshaped, told, History(None), RecountRequest(force=True))
    assert disagreements(shop, names=NAMES) == []
    assert result.totals.users == len(users)
    assert again.totals.changed == 0


def test_the_index_serves_nested_fields_as_well(reshaped: Connection) -> None:
    told = settings_for("mongodb://unused/", **SHAPE)
    assert inspect_plan(reshaped.orders, told) == Plan(
        supports_partitions=True, status_is_multikey=False, needs_fetch=False
    )
    reshaped.orders.insert_one({"sale": {"state": "Shipped", "buyer": [{"id": 1}]}})
    assert not inspect_plan(reshaped.orders, told).supports_partitions


def test_a_shop_of_another_shape_is_examined_filled_and_exact_by_settings_alone(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    """Two statuses, ids that are numbers, and every message in the shop's own words."""
    database.users.insert_many([{"_id": n, "name": f"n{n}"} for n in range(40)])
    ship(database, *[n % 30 for n in range(90)], None, 99)
    ship(database, *range(20), status="Delivered")
    ship(database, *range(10), status="Returned")
    reshape(database)
    shape = {**SHAPE, "ORDER_STATUSES": "Shipped,Delivered", "POINTS_PER_ORDER": "2"}
    shape["RECOUNTS_COLLECTION"] = "sales.recounts"
    before = list(database.people.find({}, {"loyalty": 0}))

    assert command("--create-index", **shape) == 0
    assert "sale.state_1_sale.buyer.id_1" in capsys.readouterr().out
    assert command("--check-config", **shape) == 0
    out = re.sub(" {2,}", "  ", capsys.readouterr().out)
    assert "  users  40: _id is int 40\n" in out
    assert "  Shipped  92, counts\n" in out
    assert "  Delivered  20, counts\n" in out
    assert "  that count, of no user  1, such as 99\n" in out
    assert "  index sale.state, sale.buyer.id  there, and all" in out
    assert command("--dry-run", **shape) == 1
    assert command("--once", **shape) == 0
    assert disagreements(database, ("Shipped", "Delivered"), 2, NAMES) == []
    assert list(database.people.find({}, {"loyalty": 0})) == before
    assert command("--dry-run", **shape) == 0
    assert command("--status", **shape) == 0
    capsys.readouterr()
    assert command("--dry-run", "--customer", "3", **shape) == 0
    out = capsys.readouterr().out
    assert "sale.buyer.id  sale.state  orders  points" in out
    assert "3     8     8\n" in out
    assert set(database.list_collection_names()) == {"people", "sales.all", "sales.recounts"}
    database["sales.all"].update_many({}, {"$set": {"sale.state": "shipped"}})
    assert command("--once", **shape) == 65
    assert "no order has status Shipped, Delivered; found: shipped (122)" in capsys.readouterr().err


def test_points_whose_place_is_taken_by_something_else_are_refused_by_that_user_alone(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_many(
        [{"_id": 1, "loyalty": "gold"}, {"_id": 2}, {"_id": 3, "loyalty": {}}]
    )
    ship(database, 1, 2, 3)
    assert command("--once", USER_POINTS_FIELD="loyalty.points") == 1
    assert "refused: 1; because: code 28" in capsys.readouterr().err
    wrong = disagreements(database, names=Names(points="loyalty.points"))
    assert [one.user for one in wrong] == [1]
    assert database.users.find_one({"_id": 1}) == {"_id": 1, "loyalty": "gold"}


# Messages.


@pytest.mark.xdist_group("auth")
@pytest.mark.parametrize(
    ("options", "looked_up"),
    [
        ("", "in the database 'shop': if it lives"),
        ("&authSource=stock", "in the database 'stock', as authSource says: if it lives"),
    ],
)
def test_where_a_rejected_user_was_looked_up_is_said(
    authenticating: Deployment, command: Command, capsys: Capture, options: str, looked_up: str
) -> None:
    uri = authenticating.uri.replace("/?", "/shop?").replace("&authSource=admin", "") + options
    assert command("--once", MONGODB_URI=uri) == 78
    said = capsys.readouterr().err
    assert f"the user was looked up {looked_up} in another" in said
    assert "?authSource=admin" in said
    assert command("--create-index", MONGODB_URI=authenticating.uri_for("x", "y")) == 78
    assert "looked up in the database 'admin'" in capsys.readouterr().err


def test_a_secondary_is_called_that(command: Command, capsys: Capture) -> None:
    with Deployment(parent=MEMORY) as alone:
        faults.step_down(alone.servers[0])
        uri = alone.servers[0].uri
        assert command("--once", MONGODB_URI=uri) == 78
    said = capsys.readouterr().err
    host = uri.split("/")[2]
    assert f"{host} is a secondary: name the replica set, with ?replicaSet=rs0" in said


def test_a_primary_that_has_just_stepped_down_is_waited_for(deployment: Deployment) -> None:
    command = Database.command

    def stepping_down(database: Database[Any], asked: Any, **options: Any) -> Any:
        reply = command(database, asked, **options)
        return {**reply, "secondary": True} if asked == "hello" else reply

    with mock.patch.object(Database, "command", stepping_down), pytest.raises(DatabaseUnavailable):
        connect(settings_for(deployment.uri), writing=False)


def test_a_count_that_is_too_slow_with_the_index_there_gets_no_advice_to_make_it(
    database: Database[Any], deployment: Deployment, command: Command, capsys: Capture
) -> None:
    ship(database, 1)
    for made in (False, True):
        if made:
            assert command("--create-index") == 0
        with faults.failing(deployment.servers[0], "aggregate", 9, errorCode=50):
            assert command("--dry-run") == 69
        said = capsys.readouterr().err
        assert "took too long: raise COUNT_TIMEOUT" in said
        assert ("--create-index" in said) is not made


def test_tls_to_a_server_without_it_names_the_likely_cause(
    deployment: Deployment, command: Command, capsys: Capture
) -> None:
    assert command("--once", MONGODB_URI=deployment.uri + "&tls=true") == 69
    assert "does the server expect TLS, as the URI?" in capsys.readouterr().err


def test_a_compressor_that_is_not_installed_is_one_line(service: Start) -> None:
    once = service("--once", MONGODB_URI="mongodb://127.0.0.1:1/?compressors=snappy")
    assert once.wait() == 78
    assert "ERROR MONGODB_URI: " in once.lines[0]
    assert "snappy" in once.lines[0]
    assert "Warning" not in once.output
    assert len(once.lines) == 2


def test_an_old_replica_set_is_not_called_standalone(uri: str) -> None:
    with connect(settings_for(uri), writing=False) as connection:
        assert connection.snapshot_unsupported_reason == ""
        old = dataclasses.replace(connection, snapshots=False)
        assert old.snapshot_unsupported_reason == "before MongoDB 5.0"
        assert (
            dataclasses.replace(old, topology="standalone").snapshot_unsupported_reason
            == "a standalone server"
        )


def test_ids_of_unknown_customers_are_in_the_log_at_debug_only(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_one({"_id": 1})
    ship(database, 1, "eve@example.com")
    for level in ("INFO", "DEBUG"):
        assert command("--once", LOG_LEVEL=level) == 0
        said = capsys.readouterr()
        assert ("eve@example.com" in said.err) is (level == "DEBUG")
        assert "eve@example.com" not in said.out
    for flag in ("--dry-run", "--check-config"):
        command(flag)
        said = capsys.readouterr()
        assert "eve@example.com" in said.out
        assert "eve@example.com" not in said.err


# Small things.


@pytest.mark.parametrize(
    ("arguments", "number", "code"),
    [
        ([], signal.SIGINT, 130),
        ([], signal.SIGTERM, 0),
        (["--env-file", os.devnull], signal.SIGTERM, 0),
        (["--once"], signal.SIGINT, 130),
        (["--once"], signal.SIGTERM, 143),  # nobody is to think it is done
    ],
)
def test_a_signal_during_the_imports_ends_it_without_a_traceback(
    tmp_path: Path, arguments: list[str], number: signal.Signals, code: int
) -> None:
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "schedule.py").write_text(slow)  # found before the real one
    with subprocess.Popen(
        [sys.executable, str(ROOT / "loyalty_microservice.py"), *arguments],
        # Without coverage, which at this moment can wait for a lock of its own.
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("COV")},
            "PYTHONPATH": str(tmp_path),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        rest = process.communicate(timeout=30)
    assert rest == ("", "")
    assert process.returncode == code


def run_in_shell(command: str, **env: str) -> subprocess.CompletedProcess[str]:
    program = (
        f"{shlex.quote(sys.executable)} {ROOT / 'loyalty_microservice.py'} --env-file /dev/null"
    )
    return subprocess.run(
        ["sh", "-c", f"{program} {command}"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_stdout_that_is_full_is_said_and_is_no_bug(database: Database[Any], uri: str) -> None:
    database.users.insert_one({"_id": 1})
    ran = run_in_shell("--once > /dev/full", MONGODB_URI=uri)
    assert ran.returncode == 1
    assert "ERROR the results cannot be written: No space left on device" in ran.stderr
    assert "bug" not in ran.stderr
    assert "Traceback" not in ran.stderr
    assert disagreements(database) == []


def test_a_terminal_that_is_not_utf_8_gets_what_it_can_show(
    database: Database[Any], uri: str
) -> None:
    database.users.insert_one({"_id": "Zoë", "loyalty_points": 1})
    ran = run_in_shell("--dry-run", MONGODB_URI=uri, PYTHONIOENCODING="ascii")
    assert ran.returncode == 1
    assert r"'Zo\xeb'" in ran.stdout
    assert "bug" not in ran.stderr


def test_up_down_and_all_else_add_up(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    points: list[Any] = [{"loyalty_points": p} for p in (0, 9, 1.0, "x", 2)]
    database.users.insert_many([{"_id": n, **p} for n, p in enumerate([*points, {}, {}])])
    ship(database, 0, 2, 4, 4, 5)
    assert command("--dry-run") == 1
    (line,) = re.findall(r"changed +(.*)", capsys.readouterr().out)
    assert line == "6 (2 up, 1 down, 1 set to 0, 2 only in type)"


def test_the_declared_ranges_are_the_tested_ones() -> None:
    numbers = {s.name for s in declared().values() if re.fullmatch(r"\d+[a-z]?", s.default)}
    assert numbers <= RANGES.keys()
    assert timedelta(days=24) == settings_for("mongodb://h", COUNT_TIMEOUT="24d").count_timeout


def test_a_field_of_the_orders_that_none_of_them_has_is_refused(
    database: Database[Any], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    database.users.insert_many([{"_id": n} for n in range(20)])
    database.orders.insert_many([{"customer_id": n, "state": "Shipped"} for n in range(20)])
    assert command("--check-config") == 1
    assert "no order has a field status: is ORDER_STATUS_FIELD right?" in capsys.readouterr().out
    assert command("--once") == 65
    assert database.users.count_documents({"loyalty_points": {"$exists": True}}) == 0


def test_a_field_of_the_users_that_holds_something_else_is_not_overwritten(
    database: Database[Any], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    tier = {"points": 1, "tier": "gold"}
    database.users.insert_many([{"_id": n, "loyalty": tier} for n in range(20)])
    database.orders.insert_many([{"customer_id": n, "status": "Shipped"} for n in range(20)])
    assert command("--once", USER_POINTS_FIELD="loyalty") == 65
    assert (
        "20 of the 20 users who have loyalty hold something else in it" in capsys.readouterr().err
    )
    assert database.users.count_documents({"loyalty": tier}) == 20
    assert command("--once", USER_POINTS_FIELD="loyalty.points") == 0
    assert database.users.count_documents({"loyalty": {"points": 1, "tier": "gold"}}) == 20


@pytest.mark.parametrize("other", ["+49 30", True, {"city": "Berlin"}])
def test_a_field_that_fewer_than_half_of_the_users_have_is_not_overwritten_either(
    database: Database[Any], command: Command, capsys: pytest.CaptureFixture[str], other: Any
) -> None:
    before: list[dict[str, Any]] = [{"_id": n} for n in range(30)]
    before += [{"_id": 30 + n, "phone": other} for n in range(12)]
    database.users.insert_many(before)
    database.orders.insert_many([{"customer_id": n, "status": "Shipped"} for n in range(42)])
    assert command("--once", USER_POINTS_FIELD="phone") == 65
    assert "12 of the 12 users who have phone" in capsys.readouterr().err
    assert list(database.users.find()) == before
    # A few that are dirty are put right, and it is said.
    database.users.update_many({"_id": {"$lt": 30}}, {"$set": {"phone": 0}})
    assert command("--once", USER_POINTS_FIELD="phone") == 0
    assert "values_replaced 12 users hold something else in phone" in capsys.readouterr().err
    assert database.users.count_documents({"phone": 1}) == 42


def test_swapped_collections_are_refused(
    database: Database[Any], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    database.users.insert_many([{"_id": n, "status": "active"} for n in range(20)])
    database.orders.insert_many([{"customer_id": n, "status": "Shipped"} for n in range(20)])
    swapped = {"ORDERS_COLLECTION": "users", "USERS_COLLECTION": "orders"}
    assert command("--check-config", **swapped) == 1
    assert command("--once", **swapped) == 65
    assert "are ORDERS_COLLECTION and USERS_COLLECTION swapped?" in capsys.readouterr().err
    assert database.orders.count_documents({"loyalty_points": {"$exists": True}}) == 0


def test_orders_of_nobody_that_is_known_are_refused(
    database: Database[Any], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    database.users.insert_many([{"_id": n} for n in range(20)])
    database.orders.insert_many([{"customer_id": n, "status": "Shipped"} for n in range(20)])
    database.products.insert_one({"_id": "a"})
    for wrong in ({"ORDER_CUSTOMER_FIELD": "customerId"}, {"USERS_COLLECTION": "products"}):
        assert command("--check-config", **wrong) == 1
        capsys.readouterr()
        assert command("--once", **wrong) == 65
        assert "no order that counts refers to a user: are" in capsys.readouterr().err
    assert database.users.count_documents({"loyalty_points": {"$exists": True}}) == 0
    assert database.products.count_documents({"loyalty_points": {"$exists": True}}) == 0


def test_a_status_that_no_order_has_is_a_problem_before_the_first_recount(
    database: Database[Any], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    database.users.insert_one({"_id": 1})
    database.orders.insert_one({"customer_id": 1, "status": "Shipped"})
    assert command("--check-config", ORDER_STATUSES="Shiped") == 1
    assert "PROBLEM: no order has status Shiped; found: Shipped (1)" in capsys.readouterr().out


def test_a_status_that_ends_with_a_blank_is_counted_where_it_is_named_in_quotes(
    database: Database[Any], command: Command
) -> None:
    database.users.insert_one({"_id": 1})
    database.orders.insert_many([{"customer_id": 1, "status": "shipped "} for _ in range(3)])
    assert command("--once", ORDER_STATUSES="\"'shipped ',Delivered\"") == 0
    assert database.users.find_one() == {"_id": 1, "loyalty_points": 3}


def test_of_a_customer_every_status_is_listed_whatever_the_collation_of_the_orders(
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
