"""The connection to MongoDB: made, and proved to allow what the service must do."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import pymongo
from bson import ObjectId
from bson.codec_options import CodecOptions, DatetimeConversion
from pymongo import MongoClient, WriteConcern
from pymongo.collection import Collection
from pymongo.errors import OperationFailure

from config import Settings
from loyalty.errors import AuthenticationFailed, ConfigurationError, DatabaseUnavailable
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.uri import parse_options, split_uri
from loyalty.mongo.values import Document

_CONNECT_SECONDS = 5  # one try; then it is logged and tried again
_MONGODB_5 = 13  # as a wire version; the first with snapshot reads
_MONGODB_6 = 17  # the first with pre-images
_LONGEST_SOCKET_TIMEOUT_MS = 999_999_999  # the driver takes no more


@dataclass(frozen=True)
class Connection:
    """A client that has proved its access, and the collections of one shop."""

    client: MongoClient[Any]
    orders: Collection[Any]
    users: Collection[Any]
    recounts: Collection[Any] | None
    changes: Collection[Any] | None
    hosts: str
    server_version: str
    topology: str
    """replica_set, sharded or standalone."""
    snapshots: bool
    """Whether the server can read as of one point in time, and has change streams."""
    pre_images: bool
    """Whether the server can tell how orders were before a change."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()

    @property
    def description(self) -> str:
        return (
            f"host={self.hosts} database={self.users.database.name} "
            f"server={self.server_version} topology={self.topology}"
        )

    @property
    def snapshot_unsupported_reason(self) -> str:
        """Why the server cannot read as of one point in time; "" if it can."""
        if self.snapshots:
            return ""
        return "a standalone server" if self.topology == "standalone" else "before MongoDB 5.0"


def connect(settings: Settings, *, writing: bool) -> Connection:
    """Connect, and prove that what the service must do is allowed.

    Raises Misconfigured or Unavailable, within about 5 seconds.
    """
    with map_driver_errors("connect", settings.hosts):
        client: MongoClient[Any] = MongoClient(settings.mongodb_uri, **_defaults(settings))
    try:
        with pymongo.timeout(_CONNECT_SECONDS):
            connection = _verify_access(client, settings, writing)
        if writing:
            _wait_for_orphaned_writes(connection)
    except AuthenticationFailed as error:
        client.close()
        raise ConfigurationError(f"{error}; {_auth_source_hint(settings.mongodb_uri)}") from error
    except BaseException:
        client.close()
        raise
    return connection


def _auth_source_hint(uri: str) -> str:
    _, _, database, _ = split_uri(uri)
    named = parse_options(uri).get("authsource")
    source = named or database or "admin"
    why, other = ", as authSource says" * bool(named), "NAME" if source == "admin" else "admin"
    return (
        f"the user was looked up in the database {source!r}{why}: if it lives in another, say so "
        f"with ?authSource={other}"
    )


def _verify_access(client: MongoClient[Any], settings: Settings, writing: bool) -> Connection:
    with map_driver_errors("connect", settings.hosts):
        hello = client.admin.command("hello")
        version = client.server_info()["version"]
    if hello.get("secondary"):
        if client.topology_description.topology_type_name != "Single":
            raise DatabaseUnavailable(f"{settings.hosts} has no primary just now")  # an election
        name = hello["setName"]
        raise ConfigurationError(
            f"{settings.hosts} is a secondary: name the replica set, with ?replicaSet={name} and "
            "without directConnection, so that the primary is found"
        )
    database = client.get_database(
        settings.database,
        # Points that a failover could roll back would be wrong until the next recount.
        write_concern=WriteConcern("majority", wtimeout=60_000),
        codec_options=CodecOptions(
            tz_aware=True,
            datetime_conversion=DatetimeConversion.DATETIME_AUTO,
            unicode_decode_error_handler="replace",  # only for what people read
        ),
    )
    orders, users = database[settings.orders], database[settings.users]
    # A ping succeeds without credentials, so access is proved by doing what will be done.
    for collection in (orders, users):
        with map_driver_errors("find", collection):
            collection.find_one({"_id": ObjectId()})  # matches nothing: the id is new
    if writing:
        with map_driver_errors("update", users):
            users.update_one({"_id": ObjectId()}, {"$set": {settings.points_field: 0}})
    sharded = hello.get("msg") == "isdbgrid"
    topology = "sharded" if sharded else "replica_set" if "setName" in hello else "standalone"
    return Connection(
        client=client,
        orders=orders,
        users=users,
        recounts=database[settings.recounts] if settings.recounts else None,
        changes=database[settings.changes] if settings.changes else None,
        hosts=settings.hosts,
        server_version=version,
        topology=topology,
        snapshots=topology != "standalone" and hello["maxWireVersion"] >= _MONGODB_5,
        pre_images=hello["maxWireVersion"] >= _MONGODB_6,
    )


def _wait_for_orphaned_writes(connection: Connection) -> None:
    """Wait until the server has done the writes that it does for us now, before we have asked.

    A service that was killed leaves a few batches on the way; one that landed after our
    count would put older points back. To see one's own operations takes no permission.
    """
    client, users = connection.client, connection.users.full_name
    ours = {"ns": users, "op": "update", "appName": client.options.pool_options.appname}
    look: list[Document] = [{"$currentOp": {}}, {"$match": ours}, {"$project": {"opid": 1}}]
    deadline = time.monotonic() + _CONNECT_SECONDS
    # A hosted server may not let us look.
    with map_driver_errors("$currentOp", connection.hosts), suppress(OperationFailure):
        old = {operation["opid"] for operation in client.admin.aggregate(look)}
        while old:
            if time.monotonic() > deadline:
                raise DatabaseUnavailable(
                    f"the server still updates {users} for a service that is gone"
                )
            time.sleep(0.05)
            old &= {operation["opid"] for operation in client.admin.aggregate(look)}


def _defaults(settings: Settings) -> dict[str, Any]:
    """Options for the client that the URI does not set itself."""
    defaults: dict[str, Any] = {
        "appname": "loyalty-microservice",
        "connectTimeoutMS": 10_000,
        # The server ends a count at COUNT_TIMEOUT; silence beyond that is a dead connection.
        "socketTimeoutMS": min(settings.count_ms + 30_000, _LONGEST_SOCKET_TIMEOUT_MS),
    }
    given = parse_options(settings.mongodb_uri)
    return {name: value for name, value in defaults.items() if name.lower() not in given}
