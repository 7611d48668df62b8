"""The record: one document for each recount, kept 90 days, and how stale the points are."""

from __future__ import annotations

import logging
import socket
from datetime import datetime, timedelta
from typing import Any, Literal

import pymongo
from pymongo.collection import Collection

from config import VERSION
from loyalty.counting import Document
from loyalty.mongo import Misconfigured, ServiceError, sorted_errors
from loyalty.recount import Recount

log = logging.getLogger("loyalty")

KEEP = timedelta(days=90)

_SECONDS = 5

Outcome = Literal["succeeded", "refused", "failed"]

COUNTS = (
    "counted_orders",
    "changed",
    "increased",
    "decreased",
    "unknown_customers",
    "orders_of_unknown_customers",
    "orders_without_customer",
)


class History:
    """The records of one shop; without a collection there are none, and writing does nothing."""

    def __init__(self, collection: Collection[Any] | None) -> None:
        self._collection = collection
        self._indexed = False
        self._warned = False

    def write(
        self, result: Recount, outcome: Outcome, error: str | None, finished_at: datetime
    ) -> None:
        """Write the record of one recount. Failing to is a warning, and only the first time."""
        if self._collection is None:
            return
        name = self._collection.full_name
        try:
            # The record is the least of the work: it must not hold up the next recount.
            with pymongo.timeout(_SECONDS):
                with sorted_errors("insert into", name):
                    self._collection.insert_one(_record(result, outcome, error, finished_at))
                if not self._indexed:
                    with sorted_errors("create the expiry index on", name):
                        self._collection.create_index(
                            "finished_at", expireAfterSeconds=int(KEEP.total_seconds())
                        )
                    self._indexed = True
        except ServiceError as problem:
            if not self._warned:
                log.warning('not_recorded error="%s"', problem)
            self._warned = True
        else:
            self._warned = False

    def check(self) -> str | None:
        """Return why records cannot be read or written, if so."""
        if self._collection is None:
            return None
        name = self._collection.full_name
        try:
            with sorted_errors("find in", name):
                self._collection.find_one({})
            with sorted_errors("insert into", name):
                # Permissions are looked at first; then an _id that is an array is turned down.
                self._collection.insert_one({"_id": []})
        except Misconfigured as error:
            return str(error)
        except ServiceError:
            pass
        return None

    def newest(self, limit: int, **matching: str) -> list[Document]:
        """Return the newest records first. Raises ServiceError."""
        if self._collection is None:
            raise Misconfigured("RECOUNTS_COLLECTION is empty, so no record is kept")
        with sorted_errors("find in", self._collection.full_name):
            found = self._collection.find(matching, {"_id": 0})
            return list(found.sort("finished_at", -1).limit(limit))

    def age(self, now: datetime) -> timedelta | None:
        """Return how old the points are that the last success left, None if there was none."""
        newest = self.newest(1, outcome="succeeded")
        return now - newest[0]["as_of"] if newest else None


def _record(
    result: Recount, outcome: Outcome, error: str | None, finished_at: datetime
) -> dict[str, Any]:
    totals = result.totals
    return {
        "started_at": result.started_at,
        "finished_at": finished_at,
        "as_of": totals.as_of,
        "exact": totals.exact,
        "outcome": outcome,
        **{name: getattr(totals, name) for name in COUNTS},
        "error": error,
        "host": socket.gethostname(),
        "version": VERSION,
    }
