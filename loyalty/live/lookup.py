"""Finds the customers of updated orders, whose events contain only the order's `_id`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pymongo
from bson import Timestamp

from config import Settings
from loyalty.errors import ResyncRequired
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.values import READABLE_CODEC, Document, get_nested, split_ids
from loyalty.recount.snapshot import PIN_TIMEOUT_SECONDS, pin_cluster_time
from loyalty.retry import SHORT_OUTAGE_RETRY, retry

_MAX_IDS = 1_000  # in one command


def find_customers(
    connection: Connection,
    settings: Settings,
    orders: Sequence[Any],
    not_before: Timestamp,
    *,
    timeout_seconds: float = PIN_TIMEOUT_SECONDS,
) -> tuple[list[Any], Timestamp]:
    """Return the customer ids in the orders with these `_id`s, and the cluster time to count at.

    The time is the newest one, and at least `not_before`: if two services run, the slower one must
    not replace the newer count of the other. One round trip for up to 1,000 orders. An order that
    is missing was deleted, which another event reports. Raises ServiceError.
    """
    orders_collection = connection.orders

    def find(ids: list[Any], at: Timestamp | None) -> tuple[list[Document], Timestamp | None]:
        """Return orders with their customers, and the cluster time that they were read at."""
        command = {
            "find": orders_collection.name,
            "filter": {"_id": {"$in": ids}},
            "projection": {settings.customer_field: 1},
            "limit": len(ids),  # the server closes the cursor
            "batchSize": len(ids),
            "readConcern": {"level": "snapshot"} | ({"atClusterTime": at} if at else {}),
        }
        with pymongo.timeout(timeout_seconds), map_driver_errors("find", orders_collection):
            reply = orders_collection.database.command(command, codec_options=READABLE_CODEC)
        cursor = reply["cursor"]
        read_at = cursor.get("atClusterTime")  # None: the collection was dropped
        # A new primary may be behind. A read at a given time waits until the server has reached it.
        if read_at is not None and read_at < not_before:
            return find(ids, not_before)
        if cursor["id"]:  # the reply is full
            raise ResyncRequired(f"the customer ids of {len(ids):,} orders are larger than 16 MB")
        return cursor["firstBatch"], read_at

    customers: list[Any] = []
    at: Timestamp | None = None
    for chunk in split_ids(orders, _MAX_IDS):
        found, at = retry(partial(find, chunk, at), SHORT_OUTAGE_RETRY)
        customers += [get_nested(order, settings.customer_field) for order in found]
    # `at` is None without updated orders, or if the collection was dropped. The pinned time is None
    # if the server has ignored the read concern.
    return customers, at or pin_cluster_time(connection, not_before) or not_before
