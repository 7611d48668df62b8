"""Pending updates: all users are written, also if the server fails between batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from bson import ObjectId
from conftest import settings_for
from pymongo import UpdateMany
from pymongo.errors import BulkWriteError

from loyalty.concurrency import ignore_progress
from loyalty.errors import DatabaseUnavailable, TooManyFailedUpdates
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.recount.change_log import find_changes, open_change_log
from loyalty.recount.result import Result
from loyalty.recount.runner import RecountRequest, run_recount
from loyalty.recount.tally import User
from loyalty.recount.updates import PendingUpdates
from sandbox import faults
from sandbox.mongod import Deployment
from sandbox.shop import find_mismatches

TRANSIENT_CODES = {
    91: "ShutdownInProgress",
    112: "WriteConflict",
    189: "PrimarySteppedDown",
    246: "SnapshotUnavailable",
    365: "TemporarilyUnavailable",
    10107: "NotWritablePrimary",
    11600: "InterruptedAtShutdown",
}


@pytest.fixture
def connection(deployment: Deployment) -> Iterator[Connection]:
    """A shop of 10 users, each with one counted order and no points."""
    uri = deployment.uri_for(database=f"shop_{uuid4().hex[:12]}")
    # After a shutdown error the driver asks for the primary again only this often.
    settings = settings_for(f"{uri}&heartbeatFrequencyMS=500")
    with connect(settings, writing=True) as connection:
        connection.users.insert_many([{"_id": n} for n in range(10)])
        connection.orders.insert_many([{"customer_id": n, "status": "Shipped"} for n in range(10)])
        yield connection
        connection.client.drop_database(connection.users.database.name)


def recount(
    connection: Connection, on_progress: Callable[[str], None] = ignore_progress, **values: str
) -> Result:
    settings = settings_for("mongodb://unused/", **{"BATCH_SIZE": "4", **values})
    request = RecountRequest(force=True)
    return run_recount(connection, settings, History(None, settings), request, on_progress)


def write_points(users: Any, ids: Sequence[Any], *, batch_size: int = 4) -> PendingUpdates:
    """Write one point for each id to the collection, or to what behaves like one."""
    updates = PendingUpdates(batch_size, "loyalty_points")
    for user_id in ids:
        updates.add(User(user_id, None, has_points_field=False), 1)
    updates.write(users, ignore_progress)
    return updates


@pytest.mark.parametrize("code", TRANSIENT_CODES, ids=TRANSIENT_CODES.values())
def test_a_batch_that_fails_with_a_transient_error_is_written_again(
    connection: Connection, deployment: Deployment, code: int
) -> None:
    with faults.fail_command(deployment.servers[0], "update", 1, errorCode=code):
        result = recount(connection)
    assert (result.outcome, result.written, result.failed_updates) == ("succeeded", 10, 0)
    assert find_mismatches(connection.users.database) == []


# With one of them the driver looks for the primary again. test_driver_errors.py has all codes.
@pytest.mark.parametrize("code", [112, 11600], ids=TRANSIENT_CODES.get)
def test_a_persistent_transient_error_ends_the_recount(
    connection: Connection, deployment: Deployment, code: int
) -> None:
    settings = settings_for("mongodb://unused/")
    history = History(connection.recounts, settings_for("mongodb://unused/"))
    with (
        faults.fail_command(deployment.servers[0], "update", 99, errorCode=code),
        pytest.raises(DatabaseUnavailable),
    ):
        run_recount(connection, settings, history)
    assert connection.recounts is not None
    (record,) = connection.recounts.find()
    assert (record["outcome"], record["changed"], record["failed_updates"]) == ("failed", 0, 0)
    assert recount(connection).written == 10


class RejectingUsers:
    """The users behind a router that reports an error for one update of each bulk write."""

    def __init__(self, connection: Connection, code: int, times: float) -> None:
        self.name, self.full_name = connection.users.name, connection.users.full_name
        self._users = connection.users
        self._code = code
        self._times = times

    def bulk_write(self, updates: Any, **options: Any) -> Any:
        if self._times <= 0:
            return self._users.bulk_write(updates, **options)
        self._times -= 1
        matched = 0
        if rest := updates[1:]:
            matched = self._users.bulk_write(rest, **options).matched_count
        error = {"index": 0, "code": self._code, "errmsg": "the shard has no primary"}
        raise BulkWriteError(
            {"writeErrors": [error], "writeConcernErrors": [], "nMatched": matched}
        )


@pytest.mark.parametrize("code", [112, 11600], ids=TRANSIENT_CODES.get)
@pytest.mark.parametrize("times", [1, 99])
def test_a_transient_error_of_one_update_is_not_a_failed_update(
    connection: Connection, code: int, times: int
) -> None:
    """A router reports it so for the updates of one shard."""
    users = RejectingUsers(connection, code, times)
    if times == 1:
        updates = write_points(users, range(10), batch_size=10)
        assert (updates.result.written, updates.result.failed) == (10, 0)
        assert find_mismatches(connection.users.database) == []
    else:
        with pytest.raises(DatabaseUnavailable):
            write_points(users, range(10), batch_size=10)


def test_an_error_of_one_document_is_a_failed_update(connection: Connection) -> None:
    updates = write_points(RejectingUsers(connection, 121, 2), range(10), batch_size=10)
    result = updates.result
    assert (result.written, result.deleted, result.failed) == (9, 0, 1)
    assert result.failed_sample == ["0"]
    assert [mismatch.user for mismatch in find_mismatches(connection.users.database)] == [0]


class ForgetfulUsers:
    """The users of a cluster that does not find one of them for the first UpdateMany."""

    def __init__(self, connection: Connection) -> None:
        self.name, self.full_name = connection.users.name, connection.users.full_name
        self._users = connection.users
        self.is_first = True

    def bulk_write(self, updates: Any, **options: Any) -> Any:
        if self.is_first:
            self.is_first = False
            updates = [UpdateMany({"_id": {"$in": [0, 1]}}, {"$set": {"loyalty_points": 1}})]
        return self._users.bulk_write(updates, **options)


def test_users_that_an_update_does_not_find_are_written_one_by_one(connection: Connection) -> None:
    """A chunk migration can hide users from an update that goes to several shards."""
    updates = write_points(ForgetfulUsers(connection), range(10), batch_size=10)
    assert (updates.result.written, updates.result.deleted) == (10, 0)
    assert find_mismatches(connection.users.database) == []


def test_a_user_who_is_deleted_after_the_count_is_no_failed_update(connection: Connection) -> None:
    def delete_user(_: str) -> None:
        connection.users.delete_one({"_id": 3})

    result = recount(connection, delete_user)
    assert (result.outcome, result.totals.changed, result.written) == ("succeeded", 10, 9)
    assert result.failed_updates == 0
    assert find_mismatches(connection.users.database) == []
    assert connection.users.count_documents({"_id": 3}) == 0


@pytest.mark.parametrize(("failing", "users"), [(10, 999), (11, 1_050)])
def test_more_than_one_percent_of_failed_updates_fail_the_recount(
    connection: Connection, failing: int, users: int
) -> None:
    connection.users.insert_many([{"_id": n} for n in range(10, users)])
    rule = {"$or": [{"loyalty_points": {"$exists": False}}, {"_id": {"$gte": failing}}]}
    connection.users.database.command("collMod", "users", validator=rule)
    history = History(connection.recounts, settings_for("mongodb://unused/"))
    with pytest.raises(TooManyFailedUpdates, match=f"{failing} of {users:,} updates failed"):
        run_recount(connection, settings_for("mongodb://unused/"), history)
    assert len(find_mismatches(connection.users.database)) == failing
    assert connection.recounts is not None
    (record,) = connection.recounts.find()
    assert (record["outcome"], record["failed_updates"]) == ("failed", failing)
    assert record["changed"] == users - failing


def test_no_text_of_the_server_about_a_failed_update_is_kept(
    connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    connection.users.insert_one({"_id": "ada@example.com", "phone": "+49 30"})
    rule = {"$or": [{"loyalty_points": {"$exists": False}}, {"_id": {"$type": "int"}}]}
    connection.users.database.command("collMod", "users", validator=rule)
    with caplog.at_level("INFO"):
        result = recount(connection)
    assert result.failed_updates == 1
    assert "ada@example.com" not in caplog.text
    assert "+49 30" not in caplog.text + result.updates.describe_failures()


def test_a_batch_is_ended_before_it_is_too_large_for_one_command(connection: Connection) -> None:
    ids = [f"{n:0900000}" for n in range(40)]
    connection.users.insert_many([{"_id": user_id} for user_id in ids])
    updates = write_points(connection.users, ids, batch_size=100_000)
    assert updates.result.written == 40


def test_a_value_that_the_change_log_cannot_hold_is_a_failed_update(connection: Connection) -> None:
    changes = connection.changes
    assert changes is not None
    recount_id, settings = ObjectId(), settings_for("mongodb://unused/")
    log_changes = open_change_log(
        changes, settings, recount=recount_id, started_at=datetime.now(UTC), cluster_time=None
    )
    updates = PendingUpdates(1000, "loyalty_points")
    for user_id, size in enumerate([10, 4_000_000, 13_000_000, 16_770_000, 10]):
        updates.add(User(user_id, "x" * size, has_points_field=True), 1)
    updates.write(connection.users, ignore_progress, log_changes)
    result = updates.result
    assert (result.written, result.failures) == (4, {"UnsupportedValue": 1})
    logged = [change["user"] for batch in find_changes(changes, recount_id) for change in batch]
    assert sorted(logged) == [0, 1, 2, 4]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failed_write_concern_is_no_failed_update(
    connection: Connection, deployment: Deployment, failing: int
) -> None:
    rule = {"$or": [{"loyalty_points": {"$exists": False}}, {"_id": {"$gte": failing}}]}
    connection.users.database.command("collMod", "users", validator=rule)
    error = {"code": 64, "errmsg": "waiting for replication timed out"}
    with (
        faults.fail_command(deployment.servers[0], "update", 99, writeConcernError=error),
        pytest.raises(DatabaseUnavailable, match="code 64, WriteConcernTimeout"),
    ):
        recount(connection, BATCH_SIZE="10")


def test_progress_is_reported_after_each_batch(connection: Connection) -> None:
    texts: list[str] = []
    updates = PendingUpdates(4, "loyalty_points")
    for n in range(10):
        updates.add(User(n, None, has_points_field=False), 1)
    updates.write(connection.users, texts.append)
    assert len(texts) == 3
