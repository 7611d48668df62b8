"""Faults of a server: held up at a chosen moment of a recount, slowed down, and made well again.

It takes the failpoints of mongod, which are there when it runs with OPTIONS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from sandbox.mongod import Deployment, Server, wait_until

SERVICE = "loyalty-microservice"  # as it calls itself to the server
OPTIONS = ("--setParameter", "enableTestCommands=1")


@dataclass(frozen=True)
class FaultPoint:
    """What the server does with a collection, or the operation that comes after `skip` others."""

    name: str
    failpoint: str
    collection: str
    skip: int = 0

    def __str__(self) -> str:
        return self.name


COUNTING = FaultPoint("counting", "hangBeforeDocumentSourceCursorLoadBatch", "users")
# The first is the proof, when it connects, that the server can count.
FETCHING = FaultPoint("fetching", "waitWithPinnedCursorDuringGetMoreBatch", "orders", skip=1)
WRITING = FaultPoint("writing", "hangDuringBatchUpdate", "users", skip=5)
RECORDING = FaultPoint("recording", "hangDuringBatchInsert", "loyalty_recounts")


@contextmanager
def pause_at(server: Server, database: str, point: FaultPoint) -> Iterator[Callable[[], None]]:
    """Hold up whatever comes to that moment on `server`, until the end of the block.

    Gives a function that returns once something has come there.
    """
    mode = {"skip": point.skip} if point.skip else "alwaysOn"
    # What is held up can still be killed, and gives way when the server steps down.
    data = {"nss": f"{database}.{point.collection}", "shouldCheckForInterrupt": True}
    with _failpoint(server, point.failpoint, mode, data) as wait_until_reached:
        yield wait_until_reached


@contextmanager
def delay_command(server: Server, command: str, milliseconds: int) -> Iterator[None]:
    """Let the service wait that long for each such command, until the end of the block."""
    data = {"failCommands": [command], "appName": SERVICE, "blockConnection": True}
    with _failpoint(server, "failCommand", "alwaysOn", {**data, "blockTimeMS": milliseconds}):
        yield


@contextmanager
def fail_command(server: Server, command: str, times: int, **data: Any) -> Iterator[None]:
    """Fail such commands of the service, a few times: `errorCode` or `closeConnection` says how."""
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
        if server.alive:  # where it is dead, so is the failpoint
            with suppress(PyMongoError), _client(server) as client:
                client.admin.command("configureFailPoint", name, mode="off")


def _client(server: Server) -> MongoClient[dict[str, Any]]:
    """Return a client of this one server; one that is open when it dies takes 5 s to close."""
    return MongoClient(server.uri, serverSelectionTimeoutMS=5000)


def kill_cursors(client: MongoClient[Any], database: str, collection: str) -> int:
    """Kill the cursors over a collection, as an administrator would; return how many."""
    change_stream_pipeline = [{"$currentOp": {"allUsers": True, "idleCursors": True}}]
    operations = client.admin.aggregate(change_stream_pipeline)
    mine = [o for o in operations if o.get("ns") == f"{database}.{collection}" and "cursor" in o]
    cursors = [operation["cursor"]["cursorId"] for operation in mine]
    if cursors:
        client[database].command("killCursors", collection, cursors=cursors)
    return len(cursors)


def step_down(server: Server) -> None:
    """Let another server be primary. Raises PyMongoError if this one is not."""
    with _client(server) as client:
        client.admin.command("replSetStepDown", 20, force=True)


def recover(deployment: Deployment) -> None:
    """Resume and start servers until all are healthy. Raises SandboxError."""
    for server in deployment.servers:
        server.thaw()
        if not server.alive:
            server.start()
    with deployment.client() as client:

        def well() -> bool:
            with suppress(PyMongoError):
                members = client.admin.command("replSetGetStatus")["members"]
                return {member["stateStr"] for member in members} <= {"PRIMARY", "SECONDARY"}
            return False

        wait_until("every server well again", well)
