"""RECOUNTS_COLLECTION: a record of each recount, and the heartbeat of live updates.

Two shops in one database may share the collection. Records and heartbeats belong to one target: the
combination of orders collection, users collection and points field.
"""

import socket
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
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

_SUCCESS_OUTCOMES = ["succeeded", "incomplete"]
_UNDO_OUTCOMES = ["undoing", "undone"]
"""An undo inserts a record before it starts, and another one when it has finished."""
_SHOWN_OUTCOMES = {"outcome": {"$nin": ["live", "undoing"]}}

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
        self._has_written = False
        # By collection: an index may fail on one of them, and exist on the other.
        self._warn_once: defaultdict[str, WarnOnce] = defaultdict(WarnOnce)

    def write(self, record: Document) -> None:
        """Insert the record of one recount. A failure causes one warning, and raises no error."""
        if self._collection is None:
            return
        record = {**OWNER_FILTER, **record, **self._common_fields(record["finished_at"])}
        with self._warn_on_failure("record_write_failed", self._collection):
            if record["outcome"] in _UNDO_OUTCOMES:
                record["last_success"] = next((r["_id"] for r in self._find_newest_success()), None)
            # The first recount of a process warns only if it was refused: the operator may have
            # changed the settings.
            elif self._has_written or record["outcome"] == "refused":
                with suppress(ServiceError):
                    self._warn_of_other_service(self._warn_once[self._collection.name])
            with map_driver_errors("insert", self._collection):
                self._collection.insert_one(record)
            self._has_written = True
        self.create_expiry_index(self._collection)

    def write_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Replace this host's heartbeat for the target. A failure causes one warning."""
        if self._collection is None:
            return
        target = {name: self._settings[name] for name in TARGET_SETTINGS}
        heartbeat_id = {"_id": {"heartbeat_of": socket.gethostname(), **target}}
        values = {**OWNER_FILTER, **asdict(heartbeat), **self._common_fields(heartbeat.at)}
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

    def _common_fields(self, at: datetime) -> dict[str, Any]:
        return {
            "settings": self._settings,
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

    def _warn_of_other_service(self, warn_once: WarnOnce) -> None:
        """Warn if the newest record of the target has other settings. Raises ServiceError."""
        for newest in self.find_newest(1):
            differences = [
                f"{name}={value!r}"
                for name, value in newest["settings"].items()
                if value != self._settings.get(name)
            ]
            if differences:
                warn_once(
                    "other_service",
                    f"a service on host {newest['host']} last counted the same orders for the same "
                    "users with other settings; while both services run, each overwrites the "
                    f"points of the other: {', '.join(differences)}",
                )

    @contextmanager
    def _warn_on_failure(self, event: str, collection: Collection[Any]) -> Iterator[None]:
        warn_once = self._warn_once[collection.name]
        try:
            with pymongo.timeout(_WRITE_TIMEOUT_SECONDS):
                yield
        except ServiceError as error:
            warn_once(event, error)
        else:
            warn_once.reset(event)

    def check_collection(self) -> None:
        """Raise ConfigurationError if the collection is not one for records; any ServiceError."""
        if self._collection is not None:
            hint = "RECOUNTS_COLLECTION must name a collection that only this service uses"
            require_own_collection(self._collection, hint)

    def check_privileges(self) -> None:
        """Raise NoPermission if records cannot be written; any ServiceError."""
        if self._collection is not None:
            require_privileges(self._collection, "insert", "createIndex")

    def find_newest(self, limit: int, matching: Document | None = None) -> list[Document]:
        """Return the target's records, newest first. Raises ServiceError."""
        if self._collection is None:
            raise ConfigurationError("RECOUNTS_COLLECTION is none, so no records are kept")
        query = {**OWNER_FILTER, **self._target, **(matching or _SHOWN_OUTCOMES)}
        with map_driver_errors("find", self._collection):
            return list(self._collection.find(query).sort("finished_at", -1).limit(limit))

    def find_last_success(self) -> Document | None:
        """Return the newest record of a success that was not undone. Raises ServiceError."""
        not_undone = {"_id": {"$nin": self.find_undone_recounts()}}
        return next(iter(self._find_newest_success(not_undone)), None)

    def find_undo_since_success(self) -> Document | None:
        """Return the record of an undo after the newest success, if any. Raises ServiceError."""
        for success in self._find_newest_success():
            # Not by time: an undo may run on another machine, with its own clock.
            undo = {"outcome": {"$in": _UNDO_OUTCOMES}, "last_success": success["_id"]}
            return next(iter(self.find_newest(1, undo)), None)
        return None

    def has_success_since(self, at: datetime) -> bool:
        """Return whether a recount that started then or later succeeded. Raises ServiceError."""
        return bool(self._find_newest_success({"started_at": {"$gte": at}}))

    def _find_newest_success(self, condition: Document | None = None) -> list[Document]:
        return self.find_newest(1, {"outcome": {"$in": _SUCCESS_OUTCOMES}, **(condition or {})})

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

        Without a collection, all outcomes are "unknown".
        """
        if self._collection is None:
            return dict.fromkeys(recounts, "unknown")
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

    def compute_age(self, now: datetime, heartbeat: Heartbeat | None = None) -> timedelta | None:
        """Return the age of the points; None if no recount has succeeded. Raises ServiceError.

        `now` is the server's time, as all times that it is compared with are.
        """
        record = self.find_last_success()
        if record is None:
            return None
        as_of: datetime = record["as_of"]
        if heartbeat is not None:
            as_of = max(as_of, heartbeat.as_of)
        return max(timedelta(0), now - as_of)  # `now` may be of another member, with its own clock

    def find_heartbeat(self) -> Heartbeat | None:
        """Return the newest heartbeat, or None. Raises ServiceError."""
        for found in self.find_newest(1, {"outcome": "live", "as_of": {"$exists": True}}):
            return Heartbeat(**{name: found[name] for name in Heartbeat.__slots__})
        return None


def recorded_settings(settings: Settings) -> Document:
    """Return the settings that say what is counted, and where."""
    values = {name: getattr(settings, name) for name in (*TARGET_SETTINGS, *_COUNTED_SETTINGS)}
    # Sorted: services that differ only in the order of these count the same orders.
    settings = replace(settings, order_filter=dict(sorted(settings.order_filter.items())))
    statuses, order_filter = sorted(settings.order_statuses), settings.order_filter_json
    return values | {"order_statuses": statuses, "order_filter": order_filter}
