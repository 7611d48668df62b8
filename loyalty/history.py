"""The record: one document for each recount, kept 90 days, and how stale the points are."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pymongo
from bson import ObjectId
from pymongo.collection import Collection

from loyalty.errors import ConfigurationError, NoPermission, ServiceError
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.privileges import collection_type, require_privileges
from loyalty.mongo.values import Document

log = logging.getLogger("loyalty")

RETENTION = timedelta(days=90)
HEARTBEAT = timedelta(seconds=10)

_SECONDS = 5

# What we wrote, and nothing else, is read again and expires.
OWNER_FILTER = {"recorded_by": "loyalty-microservice"}

_RECOUNTS = {"outcome": {"$ne": "live"}}
_FRESH = {"outcome": {"$in": ["succeeded", "incomplete"]}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """How live updates are doing; times are UTC."""

    live_since: datetime
    last_event: datetime | None
    last_update: datetime | None
    customers_updated: int
    waiting: int
    """Changed orders, and customers, that are still to be counted."""
    at: datetime = field(default_factory=lambda: datetime.now(UTC))

    def is_alive(self, now: datetime) -> bool:
        return now - self.at <= 3 * HEARTBEAT


class History:
    """The records of one shop; without a collection there are none, and writing does nothing."""

    def __init__(self, collection: Collection[Any] | None) -> None:
        self._collection = collection
        self._indexed = False
        self._warned = False

    def write(self, record: Document) -> None:
        """Write the record of one recount. Failing to is a warning, and only the first time."""
        if self._collection is None:
            return
        with self.warn_once():
            with map_driver_errors("insert", self._collection):
                self._collection.insert_one({**OWNER_FILTER, **record})
            if not self._indexed:
                with map_driver_errors("createIndex", self._collection):
                    self._collection.create_index(
                        "finished_at",
                        name="loyalty_records_expire",
                        expireAfterSeconds=int(RETENTION.total_seconds()),
                        partialFilterExpression=OWNER_FILTER,
                    )
                self._indexed = True

    def write_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Replace this host's heartbeat. Failing to is a warning, as with records."""
        if self._collection is None:
            return
        own = {"_id": f"live {socket.gethostname()}", **OWNER_FILTER}
        values = {**asdict(heartbeat), "outcome": "live", "finished_at": heartbeat.at}
        with self.warn_once(), map_driver_errors("update", self._collection):
            self._collection.update_one(own, {"$set": values}, upsert=True)

    @contextmanager
    def warn_once(self) -> Iterator[None]:
        try:
            # The record is the least of the work: it must not hold up the next recount.
            with pymongo.timeout(_SECONDS):
                yield
        except ServiceError as problem:
            if not self._warned:
                log.warning('not_recorded error="%s"', problem)
            self._warned = True
        else:
            self._warned = False

    def check(self) -> str | None:
        """Return why records cannot be read or written, if so.

        Raises Misconfigured if this is no collection for them, and Unavailable.
        """
        if self._collection is None:
            return None
        name = self._collection.full_name
        hint = "RECOUNTS_COLLECTION must name a collection of its own, which need not exist"
        try:
            kind = collection_type(self._collection.database, self._collection.name)
            if kind not in (None, "collection"):
                raise ConfigurationError(f"{name} is a {kind}")
            with map_driver_errors("find", self._collection):
                foreign = self._collection.find_one(
                    {"recorded_by": {"$ne": OWNER_FILTER["recorded_by"]}}
                )
            if foreign is not None:
                raise ConfigurationError(f"{name} holds documents that are not this service's")
            database = self._collection.database
            wanted = {self._collection.name: ["insert", "createIndex"]}
            require_privileges(database.client, database.name, wanted)
        except NoPermission as error:
            return str(error)
        except ConfigurationError as error:
            raise ConfigurationError(f"{error}: {hint}") from error
        return None

    def is_empty(self) -> bool:
        """Return whether there is no record yet; False if there is no telling."""
        with suppress(ServiceError):
            return not self.newest(1)
        return False

    def newest(self, limit: int, matching: Document | None = None) -> list[Document]:
        """Return the newest records of recounts first. Raises ServiceError."""
        if self._collection is None:
            raise ConfigurationError("RECOUNTS_COLLECTION is empty, so no record is kept")
        with map_driver_errors("find", self._collection):
            found = self._collection.find({**OWNER_FILTER, **(matching or _RECOUNTS)}, {"_id": 0})
            return list(found.sort("finished_at", -1).limit(limit))

    def newest_success(self) -> Document | None:
        """Return the newest record of a recount that succeeded or is incomplete, if any."""
        return next(iter(self.newest(1, _FRESH)), None)

    def undone_recounts(self) -> list[ObjectId]:
        """Return the ids of the recounts that were undone; none without records."""
        if self._collection is None:
            return []
        with map_driver_errors("find", self._collection):
            found = self._collection.find(
                {**OWNER_FILTER, "outcome": "undone"}, {"undone_recount": 1}
            )
            return [record["undone_recount"] for record in found]

    def age(self, now: datetime) -> timedelta | None:
        """Return how old the points are that the last success left, None if there was none."""
        newest = self.newest(1, _FRESH)
        return now - newest[0]["as_of"] if newest else None

    def heartbeat(self) -> Heartbeat | None:
        """Return the newest heartbeat, if there has been one. Raises ServiceError."""
        for found in self.newest(1, {"outcome": "live"}):
            return Heartbeat(**{name: found[name] for name in Heartbeat.__slots__})
        return None


def is_fresh(age: timedelta | None, interval: timedelta) -> bool:
    """Return whether points of this age are as new as they have to be."""
    return age is not None and age <= 2 * interval
