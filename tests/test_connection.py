"""The connection: options of the URI, access, privileges, and orphaned writes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import time_machine
from conftest import Command, settings_for
from pymongo.database import Database

from loyalty.concurrency import ignore_progress
from loyalty.env_file import load_settings
from loyalty.errors import ClientUnusable, DatabaseUnavailable, MissingPrivilege
from loyalty.mongo.connection import connect
from loyalty.mongo.privileges import find_missing_privileges, read_collection_type
from loyalty.service import Service
from sandbox.faults import fail_command
from sandbox.mongod import Deployment, wait_until

PASSWORD = "a-password"

READ_OPTIONS = [
    "readConcernLevel=local",
    "readConcernLevel=available",
    "readConcernLevel=majority",
    "readConcernLevel=linearizable",
    "readConcernLevel=snapshot",
    "readPreference=primaryPreferred",
    "readPreference=secondary",
    "readPreference=secondaryPreferred&maxStalenessSeconds=90",
    "readPreference=nearest&readPreferenceTags=region:north",
    "maxPoolSize=1&waitQueueTimeoutMS=1",
    "maxIdleTimeMS=1",
    "timeoutMS=1",
]


def with_options(uri: str, options: str) -> str:
    return f"{uri}&{options}" if "?" in uri else f"{uri}?{options}"


@pytest.fixture
def shop(database: Database[Any]) -> Database[Any]:
    database.users.insert_many({"_id": n} for n in range(50))
    database.orders.insert_many({"customer_id": n, "status": "Shipped"} for n in range(50))
    return database


@pytest.mark.parametrize("options", READ_OPTIONS)
def test_no_uri_option_hides_the_writes_of_a_killed_service(
    shop: Database[Any], uri: str, options: str
) -> None:
    settings = settings_for(with_options(uri, options))
    with connect(settings, writing=True) as killed, shop.client.start_session() as session:
        with session.start_transaction():
            # A lock delays the update, as a busy server would.
            shop.users.update_one({"_id": 1}, {"$set": {"busy": True}}, session=session)
            change: dict[str, Any] = {"$set": {"loyalty_points": 7}}
            update = threading.Thread(target=killed.users.update_one, args=({"_id": 1}, change))
            update.start()
            wait_until("the update to wait for the lock", lambda: has_conflicts(shop))
            with pytest.raises(DatabaseUnavailable, match="are still running"):
                connect(settings, writing=True, timeout_seconds=1)
            session.abort_transaction()
        update.join()
        connect(settings, writing=True).client.close()
    assert shop.users.find_one({"_id": 1}) == {"_id": 1, "loyalty_points": 7}


def has_conflicts(shop: Database[Any]) -> bool:
    operations = shop.client.admin.aggregate([{"$currentOp": {}}])
    return any(o.get("writeConflicts") for o in operations if o.get("ns") == shop.users.full_name)


@pytest.mark.parametrize("code", [204, 205, 211])
def test_a_client_that_a_restore_made_unusable_is_replaced(
    shop: Database[Any],
    uri: str,
    deployment: Deployment,
    caplog: pytest.LogCaptureFixture,
    code: int,
) -> None:
    caplog.set_level(logging.INFO, "loyalty")
    settings = settings_for(uri)
    service = Service(settings, lambda: settings)
    service.connect()

    def fail() -> None:
        with fail_command(deployment.primary(), "aggregate", 99, errorCode=code):
            service.recount(ignore_progress)

    with pytest.raises(ClientUnusable):
        fail()
    service.recount(ignore_progress)
    with pytest.raises(ClientUnusable):  # which also closes the second client
        fail()
    assert sum(message.startswith("connected ") for message in caplog.messages) == 2
    assert shop.users.count_documents({"loyalty_points": 1}) == 50


def test_a_client_that_became_unusable_in_a_live_update_is_replaced_by_the_next_recount(
    shop: Database[Any], uri: str, deployment: Deployment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "loyalty")
    settings = settings_for(uri, LIVE_UPDATES="yes")
    service = Service(settings, lambda: settings)
    service.connect()
    service.recount(ignore_progress)
    user = shop.users.find_one({"loyalty_points": 1}, {"_id": 1})
    assert user
    shop.orders.insert_one({"customer_id": user["_id"], "status": "Shipped"})

    def update() -> None:
        for _ in range(60):
            service.run_between(1, ignore_progress)

    failing = fail_command(deployment.primary(), "aggregate", 1, errorCode=204)
    with failing, pytest.raises(ClientUnusable):
        update()
    service.recount(ignore_progress)
    service.disconnect()
    assert sum(message.startswith("connected ") for message in caplog.messages) == 2
    assert shop.users.find_one(user) == {**user, "loyalty_points": 2}


@pytest.mark.parametrize("code", [13, 8000, 59])
def test_orphaned_writes_that_cannot_be_seen_cause_one_warning(
    uri: str, deployment: Deployment, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    with fail_command(deployment.primary(), "aggregate", 1, errorCode=code):
        connect(settings_for(uri), writing=True).client.close()
    (warning,) = caplog.messages
    assert warning.startswith("orphaned_writes_unknown")


def test_a_transient_error_while_looking_for_orphaned_writes_is_not_ignored(
    uri: str, deployment: Deployment
) -> None:
    with (
        fail_command(deployment.primary(), "aggregate", 9, errorCode=11600),
        pytest.raises(DatabaseUnavailable),
    ):
        connect(settings_for(uri), writing=True)


def test_a_server_that_does_not_reply_about_orphaned_writes_is_unavailable(
    uri: str, deployment: Deployment
) -> None:
    blocked = {"blockConnection": True, "blockTimeMS": 10_000}
    with fail_command(deployment.primary(), "aggregate", 9, **blocked):
        started_at = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            connect(settings_for(uri), writing=True, timeout_seconds=1)
        assert time.monotonic() - started_at < 8


@pytest.mark.parametrize(
    ("ahead_seconds", "said"),
    [(-7200, 'clock="behind the server"'), (7200, 'clock="ahead of the server"')],
)
def test_a_clock_that_differs_from_the_servers_causes_a_warning(
    uri: str, ahead_seconds: int, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    connect(settings_for(uri)).client.close()
    assert "clock_skew" not in "".join(caplog.messages)
    with time_machine.travel(time.time() + ahead_seconds):
        connect(settings_for(uri)).client.close()
    (warning,) = [message for message in caplog.messages if message.startswith("clock_skew")]
    assert said in warning


# Access.


@pytest.fixture
def allow(authenticated_deployment: Deployment) -> Iterator[Callable[..., str]]:
    """Make a user with these privileges on `limited`, and return the URI with its login."""
    with authenticated_deployment.client() as client:
        client.limited.users.insert_one({"_id": 1})
        client.limited.orders.insert_one({"customer_id": 1, "status": "Shipped"})

        def make(*privileges: tuple[dict[str, Any], list[str]]) -> str:
            entries = [{"resource": resource, "actions": done} for resource, done in privileges]
            client.admin.command("createRole", "limited", privileges=entries, roles=[])
            client.admin.command("createUser", "limited", pwd=PASSWORD, roles=["limited"])
            return authenticated_deployment.uri_for("limited", PASSWORD, "limited")

        yield make
        client.admin.command("dropUser", "limited")
        client.admin.command("dropRole", "limited")
        client.drop_database("limited")


def on(collection: str, database: str = "limited") -> dict[str, Any]:
    return {"db": database, "collection": collection}


NONE_ALLOWED = ["find on users", "update on users", "insert on loyalty_recounts"]


@pytest.mark.xdist_group("auth")
@pytest.mark.parametrize(
    ("privileges", "missing"),
    [
        ([(on("users"), ["find"])], NONE_ALLOWED[1:]),
        ([(on("users"), ["find", "update"]), (on("other"), ["insert"])], NONE_ALLOWED[2:]),
        ([(on(""), ["find", "update", "insert"])], []),
        ([(on("", ""), ["find", "update"])], NONE_ALLOWED[2:]),
        ([(on("users", ""), ["update"])], [NONE_ALLOWED[0], NONE_ALLOWED[2]]),
        ([(on("users", "another"), ["find", "update"])], NONE_ALLOWED),
        ([({"anyResource": True}, ["update", "insert"])], NONE_ALLOWED[:1]),
        ([({"cluster": True}, ["inprog"])], NONE_ALLOWED),
    ],
)
def test_missing_privileges_are_those_that_no_role_allows(
    allow: Callable[..., str], privileges: Any, missing: list[str]
) -> None:
    with connect(settings_for(allow(*privileges)), verify=False) as connection:
        users, recounts = connection.users, connection.recounts
        assert recounts is not None
        on_users = find_missing_privileges(users, "find", "update")
        on_recounts = find_missing_privileges(recounts, "insert")
    found = [*(f"{action} on users" for action in on_users)]
    assert found + [f"{action} on loyalty_recounts" for action in on_recounts] == missing


def test_privileges_are_unknown_without_a_login(uri: str) -> None:
    with connect(settings_for(uri)) as connection:
        assert find_missing_privileges(connection.users, "find") == []


def test_privileges_are_unknown_where_the_server_does_not_list_them(
    deployment: Deployment, uri: str
) -> None:
    with (
        fail_command(deployment.primary(), "connectionStatus", 1, errorCode=59),
        connect(settings_for(uri)) as connection,
    ):
        assert find_missing_privileges(connection.users, "find") == []


@pytest.mark.xdist_group("auth")
def test_a_missing_update_privilege_is_detected_without_an_update(
    allow: Callable[..., str],
) -> None:
    uri = allow((on("users"), ["find"]), (on("orders"), ["find"]))
    connect(settings_for(uri)).client.close()
    with pytest.raises(MissingPrivilege, match=r"no privilege for update on limited\.users"):
        connect(settings_for(uri), writing=True)


@pytest.mark.xdist_group("auth")
def test_a_monitoring_user_needs_nothing_but_find_on_the_records(
    allow: Callable[..., str],
    authenticated_deployment: Deployment,
    command: Command,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        command("--once", MONGODB_URI=authenticated_deployment.uri, MONGODB_DATABASE="limited") == 0
    )
    uri = allow((on("loyalty_recounts"), ["find"]))
    assert command("--status", MONGODB_URI=uri) == 0
    assert "succeeded" in capsys.readouterr().out
    assert command("--dry-run", MONGODB_URI=uri) == 78


@pytest.mark.xdist_group("auth")
def test_after_a_rejected_login_only_the_connection_string_is_read_again(
    authenticated_deployment: Deployment, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / ".env"
    file.touch(0o600)
    others = "LOG_LEVEL=ERROR\nLOG_FORMAT=json\nPOINTS_PER_ORDER=5\n"
    file.write_text(f"MONGODB_URI={authenticated_deployment.uri}\n{others}")
    wrong = settings_for(authenticated_deployment.uri_for("nobody", PASSWORD))
    service = Service(wrong, lambda: load_settings(file, file, {}))
    service.connect()
    service.disconnect()
    assert service.settings == replace(wrong, mongodb_uri=authenticated_deployment.uri)
    logging.getLogger("loyalty").info("event")
    assert caplog.handler.stream.getvalue().splitlines()[-1].endswith(" INFO event")


@pytest.mark.xdist_group("auth")
def test_create_index_needs_no_privilege_on_users(
    allow: Callable[..., str], command: Command
) -> None:
    uri = allow((on("orders"), ["find", "createIndex"]))
    assert command("--create-index", MONGODB_URI=uri) == 0


@pytest.mark.xdist_group("auth")
def test_reading_the_type_of_a_collection_needs_only_find(allow: Callable[..., str]) -> None:
    uri = allow((on("users"), ["find"]))
    with connect(settings_for(uri), verify=False) as connection:
        database = connection.users.database
        assert read_collection_type(database.users) == "collection"
        assert read_collection_type(database.orders) is None
        assert read_collection_type(database.missing) is None


def test_views_and_time_series_are_distinguished_from_collections(shop: Database[Any]) -> None:
    shop.create_collection("seen", viewOn="users", pipeline=[])
    shop.create_collection("measured", timeseries={"timeField": "at"})
    names = ("users", "seen", "measured", "none")
    found = {name: read_collection_type(shop[name]) for name in names}
    assert found == {"users": "collection", "seen": "view", "measured": "timeseries", "none": None}


def test_a_slow_view_is_not_read_to_its_end_to_verify_access(shop: Database[Any], uri: str) -> None:
    sleep = {"$function": {"body": "function() { sleep(500) }", "args": [], "lang": "js"}}
    stages = [{"$set": {"slept": sleep}}, {"$project": {"_id": 0}}]
    shop.create_collection("seen", viewOn="orders", pipeline=stages)
    with connect(settings_for(uri, ORDERS_COLLECTION="seen")) as connection:
        assert connection.orders.name == "seen"


@pytest.mark.parametrize("kind", ["view", "timeseries"])
def test_users_and_records_must_be_collections(
    shop: Database[Any], command: Command, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    options: dict[str, Any] = {"viewOn": "users", "pipeline": []}
    if kind == "timeseries":
        options = {"timeseries": {"timeField": "at"}}
    shop.create_collection("other", **options)
    assert command("--once", USERS_COLLECTION="other") == 78
    assert f"other is a {kind}, which cannot be updated" in capsys.readouterr().err
    for flag in ("--once", "--check-config"):
        assert command(flag, RECOUNTS_COLLECTION="other") == 78
        assert f"other is a {kind}: RECOUNTS_COLLECTION must" in capsys.readouterr().err
    assert shop.users.count_documents({"loyalty_points": {"$exists": True}}) == 0
