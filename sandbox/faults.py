"""Faults of a server, by the fail points of mongod. The server must be started with OPTIONS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from sandbox.mongod import Deployment, Server, wait_until

SERVICE = "loyalty-microservice"  # its appName
OPTIONS = ("--setParameter", "enableTestCommands=1")


@dataclass(frozen=True)
class FaultPoint:
    """A fail point for one collection, reached after `skip` operations."""

    name: str
    failpoint: str
    collection: str
    skip: int = 0

    def __str__(self) -> str:
        return self.name


COUNTING = FaultPoint("counting", "hangBeforeDocumentSourceCursorLoadBatch", "users")
FETCHING = FaultPoint("fetching", "waitWithPinnedCursorDuringGetMoreBatch", "orders")
WRITING = FaultPoint("writing", "hangDuringBatchUpdate", "users", skip=5)
RECORDING = FaultPoint("recording", "hangDuringBatchInsert", "loyalty_recounts")


@contextmanager
def pause_at(server: Server, database: str, point: FaultPoint) -> Iterator[Callable[[], None]]:
    """Pause every operation that reaches the point on `server`, until the end of the block.

    Yields a function that returns once an operation has reached it.
    """
    mode = {"skip": point.skip} if point.skip else "alwaysOn"
    # A paused operation can still be killed, and it ends when the server steps down.
    data = {"nss": f"{database}.{point.collection}", "shouldCheckForInterrupt": True}
    with _failpoint(server, point.failpoint, mode, data) as wait_until_reached:
        yield wait_until_reached


@contextmanager
def delay_command(server: Server, command: str, milliseconds: int) -> Iterator[None]:
    """Delay each such command of the service, until the end of the block."""
    data = {"failCommands": [command], "appName": SERVICE, "blockConnection": True}
    with _failpoint(server, "failCommand", "alwaysOn", {**data, "blockTimeMS": milliseconds}):
        yield


@contextmanager
def fail_command(server: Server, command: str, times: int, **data: Any) -> Iterator[None]:
    """Make such commands of the service fail `times` times, by `errorCode` or `closeConnection`."""
    data |= {"failCommands": [command], "appName": SERVICE}
    with _failpoint(server, "failCommand", {"times": times}, data):
        yield


@contextmanager
def _failpoint(
    server: Server, name: str, mode: str | dict[str, int], data: dict[str, Any]
) -> Iterator[Callable[[], None]]:
    with _client(server) as client:
        reply = client.admin.command("configureFailPoint", name, mode=mode, data=data)
    times = reply["count"] + 1

    def wait_until_reached() -> None:
        with _client(server) as client:
            client.admin.command("waitForFailPoint", name, timesEntered=times, maxTimeMS=60_000)

    try:
        yield wait_until_reached
    finally:
        if server.is_alive:  # otherwise the fail point has ended with the process
            with suppress(PyMongoError), _client(server) as client:
                client.admin.command("configureFailPoint", name, mode="off")


def _client(server: Server) -> MongoClient[dict[str, Any]]:
    """Return a client of this one server. Closing it takes 5 s after the server was killed."""
    return MongoClient(server.uri, serverSelectionTimeoutMS=5000)


def kill_cursors(client: MongoClient[Any], database: str, collection: str) -> int:
    """Kill the cursors on a collection, as an administrator would; return how many."""
    operations = client.admin.aggregate([{"$currentOp": {"allUsers": True, "idleCursors": True}}])
    cursors = [
        operation["cursor"]["cursorId"]
        for operation in operations
        if operation.get("ns") == f"{database}.{collection}" and "cursor" in operation
    ]
    if cursors:
        client[database].command("killCursors", collection, cursors=cursors)
    return len(cursors)


def step_down(server: Server) -> None:
    """Make the primary step down. Raises PyMongoError if the server is not the primary."""
    with _client(server) as client:
        client.admin.command("replSetStepDown", 20, force=True)


def recover(deployment: Deployment) -> None:
    """Resume and start servers until all are healthy. Raises SandboxError."""
    for server in deployment.servers:
        server.resume()
        if not server.is_alive:
            server.start()
    with deployment.client() as client:

        def is_healthy() -> bool:
            with suppress(PyMongoError):
                members = client.admin.command("replSetGetStatus")["members"]
                return {member["stateStr"] for member in members} <= {"PRIMARY", "SECONDARY"}
            return False

        wait_until("every server to be primary or secondary", is_healthy)
