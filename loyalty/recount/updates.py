"""The changes: spooled, then written in overlapping batches, past users who refuse theirs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Self

import bson
from bson import ObjectId
from bson.raw_bson import RawBSONDocument
from pymongo import UpdateMany, UpdateOne
from pymongo.collection import Collection

from loyalty.concurrency import Progress, ProgressCallback, map_ordered
from loyalty.errors import BulkUpdateErrors, DatabaseUnavailable
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.recount.customer_ids import RAW, UNREADABLE, Document, format_value, get_value
from loyalty.recount.spool import Spool
from loyalty.recount.tally import FailedUpdates

_SAMPLES = 5
_WRITERS = 8
_BATCH_BYTES = 4 * 1024 * 1024  # of ids in one batch; a command may have 16 MB
_OBJECT_ID_BYTES = 20  # with its place in an array; to measure each would take time


class Changes:
    """Users and the points to write: `add` them all, then `write`; close it at the end.

    They wait in a temporary file, so that all of them are known before the first write, in little
    memory: a BSON document for each batch, `{size, updates: [{q: filter, n: points}]}`. Users who
    get the same points share an update, which takes half the time of one for each.
    """

    def __init__(self, batch_size: int, points_field: str) -> None:
        self._batch_size = batch_size
        self._field = points_field
        self.clear()

    def clear(self) -> None:
        """Forget all that was added."""
        self._total = 0
        self._spool = Spool()  # the one before closes itself
        self._begin_batch()

    def _begin_batch(self) -> None:
        self._in_batch = self._bytes = 0
        self._ids: defaultdict[int, list[Any]] = defaultdict(list)
        self._unreadable: list[Document] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._spool.close()

    def add(self, key: Document, points: int) -> None:
        """Add a user, given as `{_id}`. Raises NoRoom."""
        own = get_value(key, "_id")
        if own is UNREADABLE:
            self._unreadable.append({"q": key, "n": points})
        else:
            self._ids[points].append(own)
        self._in_batch += 1
        self._bytes += _OBJECT_ID_BYTES if isinstance(own, ObjectId) else len(bson.encode(key))
        if self._in_batch == self._batch_size or self._bytes > _BATCH_BYTES:
            self._end_batch()

    def _end_batch(self) -> None:
        updates = [{"q": {"_id": {"$in": ids}}, "n": n} for n, ids in self._ids.items()]
        self._spool.add(
            bson.encode({"size": self._in_batch, "updates": updates + self._unreadable})
        )
        self._total += self._in_batch
        self._begin_batch()

    def write(self, users: Collection[Any], on_progress: ProgressCallback) -> FailedUpdates:
        """Set the points, and return who refused. Raises ServiceError."""
        if self._in_batch:
            self._end_batch()
        refusing = FailedUpdates()
        batches = (bson.decode(batch, RAW) for batch in self._spool)
        progress = Progress("writing", self._total, on_progress)
        with map_ordered(partial(_write_batch, users, self._field), batches, _WRITERS) as results:
            for size, reasons, refused in results:
                refusing.reasons.update(reasons)
                refusing.sample = (refusing.sample + refused)[:_SAMPLES]
                progress.add(size)
        return refusing


def _write_batch(
    users: Collection[Any], points_field: str, batch: RawBSONDocument
) -> tuple[int, Sequence[str], list[str]]:
    """Return how many users were tried, why some were refused, and which."""
    updates: list[Document] = batch["updates"]

    def setting(update: Document) -> dict[str, Any]:
        return {"$set": {points_field: update["n"]}}

    try:
        _bulk_write(users, [UpdateMany(update["q"], setting(update)) for update in updates])
    except (BulkUpdateErrors, DatabaseUnavailable):
        # A user that refuses ends an UpdateMany, and the driver does not try one again when the
        # primary is lost. One by one the refusing are known, and the driver does try again.
        each = [(one, setting(update)) for update in updates for one in _one_by_one(update["q"])]
        try:
            _bulk_write(users, [UpdateOne(*one) for one in each])
        except BulkUpdateErrors as error:
            refused = [
                format_value(get_value(each[position][0], "_id")) for position in error.reasons
            ]
            return batch["size"], list(error.reasons.values()), refused
    return batch["size"], [], []


def _one_by_one(query: Document) -> Iterator[Document]:
    ids = get_value(query, "_id")
    yield from [query] if ids is UNREADABLE else ({"_id": own} for own in ids["$in"])


def _bulk_write(users: Collection[Any], updates: Sequence[UpdateOne | UpdateMany]) -> None:
    with map_driver_errors("update", users):
        users.bulk_write(updates, ordered=False)
