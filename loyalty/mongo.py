"""The connection to MongoDB, and the one place where the driver's errors are sorted.

Whoever asks the driver for something does so inside `with sorted_errors(...)`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import pymongo
from bson import ObjectId
from bson.codec_options import CodecOptions, DatetimeConversion
from pymongo import MongoClient, WriteConcern
from pymongo.collection import Collection
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)
from pymongo.uri_parser import split_options

from config import Settings
from loyalty.counting import COLLATION, INDEX, POINTS, Document

_CONNECT_SECONDS = 5  # one try; then it is logged and tried again
_MONGODB_5 = 13  # as a wire version; the first with snapshot reads
_LARGE = 100_000  # orders that are slow to read without an index

_UNAUTHORIZED = 13
_FINAL = {166, 171}  # a view where a collection is needed; an index over two arrays
_BAD_CREDENTIALS = {18, 8000}  # the server's own, and Atlas's
_MAX_TIME_EXPIRED = 50


class ServiceError(Exception):
    """Something went wrong that is not a bug; the text is one line for a person."""

    exit_code = 70  # EX_SOFTWARE


class Misconfigured(ServiceError):
    """Credentials, permissions or options that only a person can put right."""

    exit_code = 78  # EX_CONFIG


class Unavailable(ServiceError):
    """The database cannot serve us now; a later try may succeed."""

    exit_code = 69  # EX_UNAVAILABLE


class TooSlow(Unavailable):
    """The server gave up at the time limit; trying again at once would not help."""


class RefusedWrites(ServiceError):
    """Some operations of a bulk write were refused, all others done; `reasons` by position."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(f"{len(reasons)} updates refused")
        self.reasons = reasons


@dataclass(frozen=True)
class Connection:
    """A client that has proved its access, and the collections of one shop."""

    client: MongoClient[Any]
    orders: Collection[Any]
    users: Collection[Any]
    recounts: Collection[Any] | None
    hosts: str
    server_version: str
    snapshots: bool
    """Whether the server can read as of one point in time; a standalone one cannot."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()

    @property
    def description(self) -> str:
        kind = "replica_set_or_sharded" if self.snapshots else "standalone"
        return (
            f"host={self.hosts} database={self.users.database.name} "
            f"server={self.server_version} topology={kind}"
        )


def connect(settings: Settings, *, writing: bool) -> Connection:
    """Connect, and prove that what the service must do is allowed.

    Raises Misconfigured or Unavailable, within about 5 seconds.
    """
    with sorted_errors("connect to", settings.hosts):
        client: MongoClient[Any] = MongoClient(settings.mongodb_uri, **_defaults(settings))
    try:
        with pymongo.timeout(_CONNECT_SECONDS):
            connection = _prove(client, settings, writing)
        if writing:
            _outlast_dead_writers(connection)
    except BaseException:
        client.close()
        raise
    return connection


def _prove(client: MongoClient[Any], settings: Settings, writing: bool) -> Connection:
    with sorted_errors("connect to", settings.hosts):
        hello = client.admin.command("hello")
        version = client.server_info()["version"]
    database = client.get_database(
        settings.database,
        # Points that a failover could roll back would be wrong until the next recount.
        write_concern=WriteConcern("majority", wtimeout=60_000),
        codec_options=CodecOptions(
            tz_aware=True, datetime_conversion=DatetimeConversion.DATETIME_AUTO
        ),
    )
    orders, users = database[settings.orders], database[settings.users]
    # A ping succeeds without credentials, so access is proved by doing what will be done.
    for collection in (orders, users):
        with sorted_errors("find in", collection.full_name):
            collection.find_one({"_id": ObjectId()})  # matches nothing: the id is new
    if writing:
        with sorted_errors("update", users.full_name):
            users.update_one({"_id": ObjectId()}, {"$set": {POINTS: 0}})
    return Connection(
        client=client,
        orders=orders,
        users=users,
        recounts=database[settings.recounts] if settings.recounts else None,
        hosts=settings.hosts,
        server_version=version,
        snapshots=hello["maxWireVersion"] >= _MONGODB_5
        and ("setName" in hello or hello.get("msg") == "isdbgrid"),
    )


def _outlast_dead_writers(connection: Connection) -> None:
    """Wait until the server has done the writes that it does for us now, before we have asked.

    A service that was killed leaves a few batches on the way; one that landed after our
    count would put older points back. To see one's own operations takes no permission.
    """
    client, users = connection.client, connection.users.full_name
    ours = {"ns": users, "op": "update", "appName": client.options.pool_options.appname}
    look: list[Document] = [{"$currentOp": {}}, {"$match": ours}, {"$project": {"opid": 1}}]
    deadline = time.monotonic() + _CONNECT_SECONDS
    # A hosted server may not let us look.
    with sorted_errors("look at the operations of", connection.hosts), suppress(OperationFailure):
        old = {operation["opid"] for operation in client.admin.aggregate(look)}
        while old:
            if time.monotonic() > deadline:
                raise Unavailable(f"the server still updates {users} for a service that is gone")
            time.sleep(0.05)
            old &= {operation["opid"] for operation in client.admin.aggregate(look)}


def _defaults(settings: Settings) -> dict[str, Any]:
    """Options for the client that the URI does not set itself."""
    count_ms = int(settings.count_timeout.total_seconds() * 1000)
    defaults: dict[str, Any] = {
        "appname": "loyalty-microservice",
        "connectTimeoutMS": 10_000,
        # The server ends a count at COUNT_TIMEOUT; silence beyond that is a dead connection.
        "socketTimeoutMS": count_ms + 30_000,
    }
    _, _, options = settings.mongodb_uri.partition("?")
    given = {name.lower() for name in split_options(options)} if options else set()
    return {name: value for name, value in defaults.items() if name.lower() not in given}


def index_is_missing(orders: Collection[Any]) -> bool:
    """Return whether `orders` is large and has no index that starts with what a recount reads."""
    try:
        with sorted_errors("list the indexes of", orders.full_name):
            indexes = orders.index_information().values()
            usable = [i["key"][: len(INDEX)] for i in indexes if "collation" not in i]
            return INDEX not in usable and orders.estimated_document_count() > _LARGE
    except ServiceError:  # advice is worth no permission, and a view has no indexes
        return False


def create_index(orders: Collection[Any]) -> str:
    """Make the index that a recount reads, if it is not there; return its name."""
    with sorted_errors("create an index on", orders.full_name):
        return orders.create_index(INDEX, collation=COLLATION)


@contextmanager
def sorted_errors(doing: str, where: str) -> Iterator[None]:
    """Turn whatever the driver raises inside into Misconfigured or Unavailable.

    `doing` and `where` name the action for the reader: "find in", "oms_db.orders".
    """
    try:
        yield
    except (PyMongoError, OSError) as error:
        raise _sorted(error, doing, where) from error


def _sorted(error: PyMongoError | OSError, doing: str, where: str) -> ServiceError:
    if isinstance(error, OSError):  # a certificate file that is missing or no certificate
        return Misconfigured(f"could not {doing} {where}: {error}")
    if isinstance(error, BulkWriteError) and not error.details["writeConcernErrors"]:
        return RefusedWrites(
            {
                e["index"]: f"code {e['code']}, {_one_line(e['errmsg'])}"
                for e in error.details["writeErrors"]
            }
        )
    # OperationFailure's own text ends in the whole reply, commands and documents included.
    code = error.code if isinstance(error, OperationFailure) else None
    if code == _UNAUTHORIZED:
        return Misconfigured(
            f"no permission to {doing} {where}: grant it to the database user "
            "(deploy/mongodb-role.js), or put a user name and password into MONGODB_URI"
        )
    if code in _BAD_CREDENTIALS:
        return Misconfigured("the server rejects the user name or password in MONGODB_URI")
    if code == _MAX_TIME_EXPIRED:
        return TooSlow(
            f"could not {doing} {where} in time: raise COUNT_TIMEOUT, "
            "or make the index with --create-index"
        )
    if isinstance(error, OperationFailure):
        reason = str((error.details or {}).get("errmsg", "no reason given"))
        sort = Misconfigured if code in _FINAL else Unavailable
        return sort(f"could not {doing} {where}: {_one_line(reason)} (code {code})")
    if isinstance(error, ConfigurationError) and not _passing_dns(error):
        return Misconfigured(f"could not {doing} {where}: {_one_line(str(error))}")
    if isinstance(error, ServerSelectionTimeoutError) and _no_such_name(str(error)):
        return Misconfigured(f"could not {doing} {where}: no such host name")
    kind = "" if isinstance(error, ConnectionFailure) else f"{type(error).__name__}: "
    return Unavailable(f"could not {doing} {where}: {kind}{_one_line(str(error))}")


def _passing_dns(error: ConfigurationError) -> bool:
    # The driver wraps every failure to resolve a mongodb+srv name; only "no such name" is final.
    cause = type(error.__cause__)
    return cause.__module__.startswith("dns.") and cause.__name__ not in ("NXDOMAIN", "NoAnswer")


def _no_such_name(reason: str) -> bool:
    """Whether every server failed for an unknown name (getaddrinfo's EAI_NONAME)."""
    servers = reason.split(", Timeout:")[0].count("configured timeouts")
    return 0 < servers == reason.split(", Timeout:")[0].count("[Errno -2]")


def _one_line(reason: str) -> str:
    # The driver appends its timeouts and its whole view of the topology.
    return reason.split(", Timeout:")[0].split(" (configured")[0].replace("\n", " ")[:300]
