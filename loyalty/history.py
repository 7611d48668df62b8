"""RECOUNTS_COLLECTION: a record of each recount, and the heartbeat of live updates.

Two shops in one database may share the collection. Records and heartbeats belong to one target: the
combination of orders collection, users collection and points field.
"""

import socket
from collections.abc import Iterator, Sequence
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
from loyalty.mongo.privileges import OWNER_FILTER, require_own_collection, require_privileges
from loyalty.mongo.values import Document

_WRITE_TIMEOUT_SECONDS = 5  # a record is less important than the next recount

NO_RECORD = "no record"
"""The outcome of a recount without a record."""
UNKNOWN = "unknown"
"""The outcome if no records are kept, or they cannot be read."""

_SUCCESS_OUTCOMES = ["succeeded", "incomplete"]
_UNDO_OUTCOMES = ["undoing", "undone"]
"""An undo inserts a record before it starts, and another one when it has finished."""
_FINISHED_CONDITION = {"outcome": {"$nin": ["live", "undoing"]}}
_HEARTBEAT_CONDITION = {"outcome": "live"}

_TARGET_SETTINGS = ("orders", "users", "points_field")
"""The settings that tell two shops in one database apart."""


class History:
    """The records of one target. Without a collection there are none, and writing does nothing."""

    def __init__(self, collection: Collection[Any] | None, settings: Settings) -> None:
        self._collection = collection
        self._recorded_settings = settings.to_record()
        self._retention = settings.retention
        self._target = {name: self._recorded_settings[name] for name in _TARGET_SETTINGS}
        self._have_expiry_index: set[str] = set()
        self._has_written = False
        self._warn_once = WarnOnce()

    def write(self, record: Document) -> None:
        """Insert the record of one recount. A failure causes one warning, and raises no error."""
        if self._collection is None:
            return
        record = {**OWNER_FILTER, **record, **self._build_common_fields(record["finished_at"])}
        with self._warn_on_failure("record_write_failed", self._collection):
            if record["outcome"] in _UNDO_OUTCOMES:
                success = self._find_success()
                record["last_success"] = success and success["_id"]
            # At the first record of a connection, the newest record may be this service's own, from
            # before its settings were changed. A refusal may still be the fault of another service.
            elif self._has_written or record["outcome"] == "refused":
                with suppress(ServiceError):
                    self._warn_of_other_service()
            with map_driver_errors("insert", self._collection):
                self._collection.insert_one(record)
            self._has_written = True
        self.create_expiry_index(self._collection)

    def write_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Replace this host's heartbeat for the target. A failure causes one warning."""
        if self._collection is None:
            return
        heartbeat_id = {"_id": {"heartbeat_of": socket.gethostname(), **self._target}}
        values = {**OWNER_FILTER, **asdict(heartbeat), **self._build_common_fields(heartbeat.at)}
        values["outcome"] = "live"
        del values["at"]  # its age is measured by the server's clock, not by this machine's
        update = {"$set": values, "$currentDate": {"at": True, "finished_at": True}}
        with (
            self._warn_on_failure("heartbeat_write_failed", self._collection),
            map_driver_errors("update", self._collection),
        ):
            # Not with write concern "majority": it must show the age of the points also while no
            # majority acknowledges writes. Its values stay true after a rollback.
            collection = self._collection.with_options(write_concern=WriteConcern(1))
            collection.update_one(heartbeat_id, update, upsert=True)

    def _build_common_fields(self, at: datetime) -> dict[str, Any]:
        return {
            "settings": self._recorded_settings,
            "host": socket.gethostname(),
            "expires_at": at + self._retention,
        }

    def create_expiry_index(self, collection: Collection[Any]) -> None:
        """Create the TTL index, once. A failure causes one warning."""
        if collection.name in self._have_expiry_index:
            return
        with (
            self._warn_on_failure("expiry_index_failed", collection),
            map_driver_errors("createIndex", collection),
        ):
            collection.create_index(
                "expires_at",
                name="loyalty_expires_at",
                expireAfterSeconds=0,
                partialFilterExpression=OWNER_FILTER,
            )
            self._have_expiry_index.add(collection.name)

    def _warn_of_other_service(self) -> None:
        """Warn if a service with other settings last wrote the points. Raises ServiceError."""
        # A service with another ORDERS_COLLECTION has another target, but writes the same points.
        # `$exists` replaces the target's condition on `settings.orders`.
        newest = self._find_one({**_FINISHED_CONDITION, "settings.orders": {"$exists": True}})
        if newest is None or newest["outcome"] == "refused":  # a refused recount writes no points
            return
        differences = [
            f"{name}={value!r}"
            for name, value in newest["settings"].items()
            if value != self._recorded_settings.get(name)
        ]
        if differences:
            self._warn_once(
                "other_service",
                f"a service on host {newest['host']} last wrote the same points with other "
                "settings; while both services run, each overwrites the points of the other: "
                f"{', '.join(differences)}",
            )

    @contextmanager
    def _warn_on_failure(self, event: str, collection: Collection[Any]) -> Iterator[None]:
        try:
            with pymongo.timeout(_WRITE_TIMEOUT_SECONDS):
                yield
        except ServiceError as error:
            self._warn_once(event, error, collection.name)
        else:
            self._warn_once.reset(event, collection.name)

    def check_collection(self) -> None:
        """Raise ConfigurationError if the collection is not for records; other ServiceErrors."""
        if self._collection is not None:
            hint = "RECOUNTS_COLLECTION must name a collection that only this service uses"
            require_own_collection(self._collection, hint)

    def check_privileges(self) -> None:
        """Raise MissingPrivilege if records cannot be written; other ServiceErrors."""
        if self._collection is not None:
            require_privileges(self._collection, "insert", "createIndex")

    def find_newest(
        self, limit: int, condition: Document = _FINISHED_CONDITION, by: str = "finished_at"
    ) -> list[Document]:
        """Return the target's records, newest first by the field `by`. Raises ServiceError."""
        if self._collection is None:
            raise ConfigurationError("RECOUNTS_COLLECTION is none, so no records are kept")
        target = {f"settings.{name}": value for name, value in self._target.items()}
        with map_driver_errors("find", self._collection):
            found = self._collection.find({**OWNER_FILTER, **target, **condition})
            return list(found.sort([(by, -1), ("_id", -1)]).limit(limit))

    def _find_one(self, condition: Document, by: str = "finished_at") -> Document | None:
        return next(iter(self.find_newest(1, condition, by)), None)

    def _find_success(self, **condition: Any) -> Document | None:
        # Not by `finished_at`: the clock of a service may have been wrong.
        return self._find_one({"outcome": {"$in": _SUCCESS_OUTCOMES}, **condition}, "as_of")

    def find_last_success(self) -> Document | None:
        """Return the newest record of a success that was not undone. Raises ServiceError."""
        return self._find_success(_id={"$nin": self.find_undone_recounts()})

    def find_undo_since_success(self) -> Document | None:
        """Return the record of an undo after the newest success, or None. Raises ServiceError."""
        success = self._find_success()
        if success is None:
            return None
        # Not by time: an undo may run on another machine, with its own clock.
        return self._find_one({"outcome": {"$in": _UNDO_OUTCOMES}, "last_success": success["_id"]})

    def has_success_since(self, at: datetime) -> bool:
        """Return whether a recount that started then or later succeeded. Raises ServiceError."""
        return self._find_success(started_at={"$gte": at}) is not None

    def find_undone_recounts(self, undo_id: ObjectId | None = None) -> list[ObjectId]:
        """Return the ids of the recounts that were undone, by the undo with this id or by any."""
        condition = {"outcome": "undone"} | ({"_id": undo_id} if undo_id else {})
        return self._find_ids("undone_recount", condition)

    def find_recounts_without_effect(self) -> list[ObjectId]:
        """Return the ids of logged recounts that were undone, or whose updates all failed.

        After an error, `changed` may be too low, so a failed recount may have had an effect.
        """
        unwritten = {"outcome": "incomplete", "changed": 0}
        return self.find_undone_recounts() + self._find_ids("_id", unwritten)

    def find_outcomes(self, recounts: Sequence[ObjectId]) -> dict[ObjectId, str]:
        """Return the outcome of each recount; "undone" if undone, NO_RECORD without a record.

        Without a collection, all outcomes are UNKNOWN.
        """
        if self._collection is None:
            return dict.fromkeys(recounts, UNKNOWN)
        condition = {"$or": [{name: {"$in": recounts}} for name in ("_id", "undone_recount")]}
        with map_driver_errors("find", self._collection):
            records = list(self._collection.find({**OWNER_FILTER, **condition}))
        found = {record["_id"]: record["outcome"] for record in records}
        undone = {r["undone_recount"]: "undone" for r in records if r["outcome"] == "undone"}
        return dict.fromkeys(recounts, NO_RECORD) | found | undone

    def _find_ids(self, field: str, condition: Document) -> list[ObjectId]:
        if self._collection is None:
            return []
        with map_driver_errors("find", self._collection):
            return self._collection.distinct(field, {**OWNER_FILTER, **condition})

    def compute_age(self, now: datetime) -> timedelta | None:
        """Return the age of the points at the server's time `now`. Raises ServiceError.

        None if no recount has succeeded.
        """
        success, heartbeat = self.find_last_success(), self._find_one(_HEARTBEAT_CONDITION, "as_of")
        if success is None:
            return None
        as_of: datetime = max(found["as_of"] for found in (success, heartbeat) if found)
        return max(timedelta(0), now - as_of)  # `now` may be of another member, with its own clock

    def find_heartbeat(self) -> Heartbeat | None:
        """Return the newest heartbeat, or None. Raises ServiceError."""
        if found := self._find_one(_HEARTBEAT_CONDITION):
            return Heartbeat(**{name: found[name] for name in Heartbeat.__slots__})
        return None
