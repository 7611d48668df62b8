"""Connects to MongoDB, and verifies the access that the service needs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Self

import pymongo
from pymongo import MongoClient, ReadPreference, WriteConcern
from pymongo.collection import Collection
from pymongo.read_concern import ReadConcern

from config import Settings
from loyalty.errors import AuthenticationFailed, ConfigurationError, DatabaseUnavailable
from loyalty.logs import log
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.privileges import read_collection_type, require_privileges
from loyalty.mongo.uri import parse_options, split_uri
from loyalty.mongo.values import READABLE_CODEC
from loyalty.retry import ORPHANED_WRITES_RETRY, retry

CONNECT_TIMEOUT_SECONDS = 5.0
MAX_CLOCK_SKEW_SECONDS = 60
_WIRE_VERSION_MONGODB_5 = 13  # the first with snapshot reads
_WIRE_VERSION_MONGODB_6 = 17  # the first with pre-images
_MAX_SOCKET_TIMEOUT_MS = 999_999_999  # the driver takes no more

# A URI is often shared with other programs, whose options must not weaken what the service relies
# on: reads from the primary, snapshots, majority writes, and queries as long as COUNT_TIMEOUT.
OVERRIDDEN_OPTIONS = (
    "readPreference",
    "readPreferenceTags",
    "maxStalenessSeconds",
    "readConcernLevel",
    "w",
    "wTimeoutMS",
    "journal",
    "timeoutMS",
    "socketTimeoutMS",
    "maxPoolSize",
    "waitQueueTimeoutMS",
)


@dataclass(frozen=True)
class Connection:
    """A client, what its server can do, and the collections of one shop."""

    client: MongoClient[Any]
    orders: Collection[Any]
    users: Collection[Any]
    recounts: Collection[Any] | None
    changes: Collection[Any] | None
    hosts: str
    server_version: str
    topology: str
    """replica_set, sharded or standalone."""
    supports_snapshots: bool
    """Whether the server has snapshot reads and change streams."""
    supports_pre_images: bool
    """Whether the server can report orders as they were before a change."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()

    @property
    def snapshot_unsupported_reason(self) -> str:
        """Why the server has no snapshot reads; "" if it has."""
        if self.supports_snapshots:
            return ""
        if self.topology == "standalone":
            return "the server is standalone"
        return "the server is older than MongoDB 5.0"


def connect(
    settings: Settings,
    *,
    writing: bool = False,
    verify: bool = True,
    timeout_seconds: float = CONNECT_TIMEOUT_SECONDS,
) -> Connection:
    """Connect, and verify that orders and users can be read and, if `writing`, users updated.

    Without `verify`, the caller checks the access. If `writing`, this waits until the server has
    finished the updates of an earlier process. Raises ConfigurationError or DatabaseUnavailable,
    within about twice `timeout_seconds`.
    """
    given = parse_options(settings.mongodb_uri)
    options = _build_options(settings, given)
    with map_driver_errors("connect", settings.hosts):
        client: MongoClient[Any] = MongoClient(settings.mongodb_uri, **options)
    try:
        with pymongo.timeout(timeout_seconds):
            connection = _inspect_server(client, settings)
            if verify:
                _verify_access(connection, writing=writing)
        if writing:
            _wait_for_orphaned_writes(connection, timeout_seconds)
    except AuthenticationFailed as error:
        client.close()
        raise AuthenticationFailed(f"{error}; {_explain_login(settings.mongodb_uri)}") from error
    except BaseException:
        client.close()
        raise
    if overridden := [name for name in OVERRIDDEN_OPTIONS if name.lower() in given]:
        log.info("uri_options_overridden options=%s", ",".join(overridden))
    return connection


def _build_options(settings: Settings, given: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of the client; those of the URI are `given`, in lower case."""
    defaults: dict[str, Any] = {"appname": "loyalty-microservice", "connectTimeoutMS": 10_000}
    return {
        **{name: value for name, value in defaults.items() if name.lower() not in given},
        # The server ends a count at COUNT_TIMEOUT; silence beyond that is a dead connection.
        "socketTimeoutMS": min(settings.count_ms + 30_000, _MAX_SOCKET_TIMEOUT_MS),
        "timeoutMS": None,
        # No limit: a thread that waits for the change stream must not block another thread.
        "maxPoolSize": None,
        "waitQueueTimeoutMS": None,
    }


def _explain_login(uri: str) -> str:
    named = parse_options(uri).get("authsource")
    source = named or split_uri(uri).database or "admin"
    why = ", because of authSource" if named else ""
    other = "NAME" if source == "admin" else "admin"
    return (
        f"the user was looked up in the database {source!r}{why}: if the user is defined in "
        f"another database, set the option authSource={other}"
    )


def _inspect_server(client: MongoClient[Any], settings: Settings) -> Connection:
    with map_driver_errors("connect", settings.hosts):
        hello = client.admin.command("hello")
        version = client.server_info()["version"]
    if hello.get("secondary"):
        if client.topology_description.topology_type_name != "Single":
            raise DatabaseUnavailable(f"{settings.hosts} has no primary")  # an election
        name = hello["setName"]
        raise ConfigurationError(
            f"{settings.hosts} is a secondary. Add ?replicaSet={name} and remove directConnection, "
            "so that the driver finds the primary"
        )
    _warn_of_clock_skew(hello.get("localTime"))
    database = client.get_database(
        settings.database,
        read_preference=ReadPreference.PRIMARY,
        # The server's default. A count sets "snapshot" itself, and a change stream "majority".
        read_concern=ReadConcern(),
        # Points that a failover could roll back would be wrong until the next recount.
        write_concern=WriteConcern("majority", wtimeout=60_000),
        codec_options=READABLE_CODEC,
    )
    is_sharded = hello.get("msg") == "isdbgrid"
    topology = "sharded" if is_sharded else "replica_set" if "setName" in hello else "standalone"
    return Connection(
        client=client,
        orders=database[settings.orders],
        users=database[settings.users],
        recounts=database[settings.recounts] if settings.recounts else None,
        changes=database[settings.changes] if settings.changes else None,
        hosts=settings.hosts,
        server_version=version,
        topology=topology,
        supports_snapshots=topology != "standalone"
        and hello["maxWireVersion"] >= _WIRE_VERSION_MONGODB_5,
        supports_pre_images=hello["maxWireVersion"] >= _WIRE_VERSION_MONGODB_6,
    )


def _warn_of_clock_skew(server_time: datetime | None) -> None:
    """Warn if the clocks of this machine and of the server differ: ages would be wrong."""
    if server_time is None:
        return
    ahead = (datetime.now(UTC) - server_time.replace(tzinfo=UTC)).total_seconds()
    if abs(ahead) > MAX_CLOCK_SKEW_SECONDS:
        relation = "ahead of" if ahead > 0 else "behind"
        log.warning('clock_skew seconds=%d clock="%s the server"', abs(ahead), relation)


def _verify_access(connection: Connection, *, writing: bool) -> None:
    # A ping succeeds without credentials, so access is verified by a query. It has no condition:
    # to find an _id, the server may have to read a whole view.
    for collection in (connection.orders, connection.users):
        with map_driver_errors("find", collection):
            collection.find_one({}, {"_id": 1})
    if writing:
        users = connection.users
        kind = read_collection_type(users)
        if kind not in (None, "collection"):
            raise ConfigurationError(f"{users.full_name} is a {kind}, which cannot be updated")
        require_privileges(users, "update")


def _wait_for_orphaned_writes(connection: Connection, timeout_seconds: float) -> None:
    """Wait until the server has finished the updates of an earlier process.

    The server may still write batches of a process that was killed. If it wrote such a batch after
    the new count, the points would be those of the older count. On a replica set, a database user
    can see its own operations without a privilege; on mongos and some hosted servers it cannot.
    """
    client, users = connection.client, connection.users.full_name
    admin = client.get_database(
        "admin", read_preference=ReadPreference.PRIMARY, read_concern=ReadConcern("local")
    )
    ours = {"ns": users, "op": "update", "appName": client.options.pool_options.appname}

    def find_updates() -> set[Any]:
        with pymongo.timeout(timeout_seconds), map_driver_errors("$currentOp", connection.hosts):
            found = admin.aggregate(
                [{"$currentOp": {}}, {"$match": ours}, {"$project": {"opid": 1}}]
            )
            return {operation["opid"] for operation in found}

    def check_finished() -> None:
        if orphaned & find_updates():
            raise DatabaseUnavailable(f"updates of an earlier process to {users} are still running")

    try:
        if orphaned := find_updates():
            retry(check_finished, replace(ORPHANED_WRITES_RETRY, timeout_seconds=timeout_seconds))
    except ConfigurationError as error:
        log.warning('orphaned_writes_unknown error="%s"', error)
