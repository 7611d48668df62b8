"""RECOUNTS_COLLECTION: a record of each recount, and the heartbeat of live updates.

Two shops in one database may share the collection. Records and heartbeats belong to one target: the
combination of orders collection, users collection and points field.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

import pymongo
from bson import ObjectId
from pymongo import WriteConcern
from pymongo.collection import Collection

from config import Settings
from loyalty.errors import ConfigurationError, ServiceError
from loyalty.heartbeat import Heartbeat
from loyalty.logs import WarnOnce
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.privileges import collection_type, require_privileges
from loyalty.mongo.values import Document

_WRITE_TIMEOUT_SECONDS = 5  # a record is less important than the next recount

OWNER_FILTER = {"recorded_by": "loyalty-microservice"}
"""Matches the documents that this service wrote. It reads no others, and no others expire."""

_NOT_HEARTBEAT = {"outcome": {"$ne": "live"}}
_SUCCESSES = {"outcome": {"$in": ["succeeded", "incomplete"]}}

TARGET_SETTINGS = ("orders", "users", "points_field")
"""The settings that tell two shops in one database apart."""
_COUNTED_SETTINGS = ("points_per_order", "status_field", "customer_field", "user_key_field")


class History:
    """The records of one target. Without a collection there are none, and writing does nothing."""

    def __init__(
        self, collection: Collection[Any] | None, settings: Settings | None = None
    ) -> None:
        assert collection is None or settings is not None
        self._collection = collection
        self._settings = recorded_settings(settings) if settings else {}
        self._retention = settings.retention if settings else timedelta(0)
        self._target = {f"settings.{name}": self._settings.get(name) for name in TARGET_SETTINGS}
        self._have_expiry_index: set[str] = set()
        self._last_id: Any = None
        self._warn_once = WarnOnce()

    def write(self, record: Document) -> None:
        """Insert the record of one recount. A failure is one warning, and nothing else."""
        if self._collection is None:
            return
        record = {**OWNER_FILTER, **record, **self._common_fields(record["finished_at"])}
        with self._warn_on_failure("record_write_failed"):
            with suppress(ServiceError):
                self._warn_of_other_service(self._collection)
            with map_driver_errors("insert", self._collection):
                self._last_id = self._collection.insert_one(record).inserted_id
        self.create_expiry_index(self._collection)

    def write_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Replace this host's heartbeat for the target. A failure is one warning."""
        if self._collection is None:
            return
        target = {name: self._settings[name] for name in TARGET_SETTINGS}
        heartbeat_id = {"_id": {"heartbeat_of": socket.gethostname(), **target}}
        values = {
            **OWNER_FILTER,
            **asdict(heartbeat),
            **self._common_fields(heartbeat.at),
            "outcome": "live",
        }
        del values["at"]  # its age is measured by the server's clock, not by this machine's
        update = {"$set": values, "$currentDate": {"at": True, "finished_at": True}}
        with (
            self._warn_on_failure("heartbeat_write_failed"),
            map_driver_errors("update", self._collection),
        ):
            # Not by a majority: it must tell how old the points are also while no majority
            # acknowledges writes. A rollback makes nothing in it untrue.
            collection = self._collection.with_options(write_concern=WriteConcern(1))
            collection.update_one(heartbeat_id, update, upsert=True)

    def _common_fields(self, at: datetime) -> dict[str, Any]:
        return {
            "settings": self._settings,
            "host": socket.gethostname(),
            "expires_at": at + self._retention,
        }

    def create_expiry_index(self, collection: Collection[Any]) -> None:
        """Create the index by which documents expire, once. A failure is one warning."""
        if collection.name in self._have_expiry_index:
            return
        with (
            self._warn_on_failure("expiry_index_failed"),
            map_driver_errors("createIndex", collection),
        ):
            collection.create_index(
                "expires_at",
                name="loyalty_expires_at",
                expireAfterSeconds=0,
                partialFilterExpression=OWNER_FILTER,
            )
            self._have_expiry_index.add(collection.name)

    def _warn_of_other_service(self, collection: Collection[Any]) -> None:
        """Warn if a service with other settings has recounted since our last record.

        The first recount of a process does not warn: the operator may have changed the settings.
        """
        if self._last_id is None:
            return
        with map_driver_errors("find", collection):
            newest = collection.find_one(
                {**OWNER_FILTER, **_NOT_HEARTBEAT, **self._target}, sort=[("finished_at", -1)]
            )
        if newest is None or newest["_id"] == self._last_id:
            return
        differences = {
            name: value
            for name, value in newest["settings"].items()
            if value != self._settings.get(name)
        }
        if differences:
            listed = ", ".join(f"{name}={value!r}" for name, value in differences.items())
            self._warn_once(
                "other_service",
                f"a service on host {newest['host']} counts the same orders for the same users "
                f"with other settings, and each replaces the points of the other: {listed}",
            )

    @contextmanager
    def _warn_on_failure(self, event: str) -> Iterator[None]:
        try:
            with pymongo.timeout(_WRITE_TIMEOUT_SECONDS):
                yield
        except ServiceError as error:
            self._warn_once(event, error)
        else:
            if event != "expiry_index_failed":  # it concerns two collections
                self._warn_once.reset(event)

    def check_collection(self) -> None:
        """Raise ConfigurationError if the collection is not one for records; any ServiceError."""
        if self._collection is not None:
            hint = "RECOUNTS_COLLECTION must name a collection of its own, which need not exist"
            require_own_collection(self._collection, hint)

    def check_privileges(self) -> None:
        """Raise NoPermission if records cannot be written; any ServiceError."""
        if self._collection is not None:
            database = self._collection.database
            wanted = {self._collection.name: ["insert", "createIndex"]}
            require_privileges(database.client, database.name, wanted)

    def is_empty(self) -> bool:
        """Return whether the target has no record yet; False if that cannot be read."""
        with suppress(ServiceError):
            return not self.newest(1)
        return False

    def newest(self, limit: int, matching: Document | None = None) -> list[Document]:
        """Return the target's records, newest first. Raises ServiceError."""
        if self._collection is None:
            raise ConfigurationError("RECOUNTS_COLLECTION is none, so no records are kept")
        query = {**OWNER_FILTER, **self._target, **(matching or _NOT_HEARTBEAT)}
        with map_driver_errors("find", self._collection):
            return list(self._collection.find(query).sort("finished_at", -1).limit(limit))

    def last_success(self) -> Document | None:
        """Return the newest record of a success that was not undone. Raises ServiceError."""
        not_undone = {**_SUCCESSES, "_id": {"$nin": self.undone_recounts()}}
        return next(iter(self.newest(1, not_undone)), None)

    def undo_since_success(self) -> Document | None:
        """Return the record of an undo after the newest success, if any. Raises ServiceError."""
        newest = self.newest(1, {"outcome": {"$in": [*_SUCCESSES["outcome"]["$in"], "undone"]}})
        return newest[0] if newest and newest[0]["outcome"] == "undone" else None

    def undone_recounts(self) -> list[ObjectId]:
        """Return the ids of the recounts that were undone; none without records."""
        return self._find_ids("undone_recount", {"outcome": "undone"})

    def recounts_without_effect(self) -> list[ObjectId]:
        """Return the ids of recounts that were undone, or whose updates all failed."""
        idle = {"outcome": {"$nin": ["undone", "live"]}, "changed": 0}
        return self.undone_recounts() + self._find_ids("_id", idle)

    def has_record(self, recount: ObjectId) -> bool:
        """Return whether a recount has ended: one that was interrupted has no record."""
        return self._collection is None or bool(self._find_ids("_id", {"_id": recount}))

    def _find_ids(self, field: str, condition: Document) -> list[ObjectId]:
        if self._collection is None:
            return []
        with map_driver_errors("find", self._collection):
            return self._collection.distinct(field, {**OWNER_FILTER, **condition})

    def age(self, now: datetime, heartbeat: Heartbeat | None = None) -> timedelta | None:
        """Return the age of the points; None if no recount has succeeded. Raises ServiceError.

        `now` is the server's time, as all times that it is compared with are.
        """
        record = self.last_success()
        if record is None:
            return None
        as_of: datetime = record["as_of"]
        if heartbeat is not None:
            as_of = max(as_of, heartbeat.as_of)
        return max(timedelta(0), now - as_of)  # `now` may be of another member, with its own clock

    def heartbeat(self) -> Heartbeat | None:
        """Return the newest heartbeat, or None. Raises ServiceError."""
        for found in self.newest(1, {"outcome": "live", "as_of": {"$exists": True}}):
            return Heartbeat(**{name: found[name] for name in Heartbeat.__slots__})
        return None


def require_own_collection(collection: Collection[Any], hint: str) -> None:
    """Raise ConfigurationError with `hint` if this is no collection, or not of this service only.

    Raises NoPermission without `find`.
    """
    kind = collection_type(collection.database, collection.name)
    if kind not in (None, "collection"):
        raise ConfigurationError(f"{collection.full_name} is a {kind}: {hint}")
    with map_driver_errors("find", collection):
        foreign = collection.find_one({"recorded_by": {"$ne": OWNER_FILTER["recorded_by"]}})
    if foreign is not None:
        raise ConfigurationError(
            f"{collection.full_name} holds documents of other programs: {hint}"
        )


def recorded_settings(settings: Settings) -> Document:
    """Return the settings that say what is counted, and where."""
    values = {name: getattr(settings, name) for name in (*TARGET_SETTINGS, *_COUNTED_SETTINGS)}
    statuses, order_filter = list(settings.order_statuses), settings.order_filter_json
    return values | {"order_statuses": statuses, "order_filter": order_filter}
