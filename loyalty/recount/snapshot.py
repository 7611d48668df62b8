"""The cluster time that a count reads at."""

from typing import Any

import pymongo
from bson import ObjectId, Timestamp

from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors

PIN_TIMEOUT_SECONDS = 30.0
"""This is the first read after hours without one. A connection that has silently died meanwhile
must not hold up a recount for the socket timeout, which is longer than COUNT_TIMEOUT."""


def pin_cluster_time(
    connection: Connection,
    not_before: Timestamp | None = None,
    *,
    timeout_seconds: float = PIN_TIMEOUT_SECONDS,
) -> Timestamp | None:
    """Return the newest cluster time that everything can be read at; None without snapshots.

    A new primary may be behind: then the server waits until `not_before` can be read.
    Raises ServiceError.
    """
    if not connection.supports_snapshots:
        return None
    with pymongo.timeout(timeout_seconds):
        time = _read_cluster_time(connection, {"level": "snapshot"})
        if not_before is not None and time is not None and time < not_before:
            at_not_before = {"level": "snapshot", "atClusterTime": not_before}
            time = _read_cluster_time(connection, at_not_before)
    return time


def _read_cluster_time(connection: Connection, read_concern: dict[str, Any]) -> Timestamp | None:
    users = connection.users
    read = {"find": users.name, "filter": {"_id": ObjectId()}, "singleBatch": True}
    with map_driver_errors("find", users):
        reply = users.database.command({**read, "readConcern": read_concern})
        time: Timestamp | None = reply["cursor"].get("atClusterTime")
        # The reply has no atClusterTime if the collection does not exist: then any time will do. If
        # there are users, the server has ignored the read concern, and has no snapshots.
        if time is None and users.find_one({}, {"_id": 1}) is None:
            time = reply.get("operationTime")
    return time
