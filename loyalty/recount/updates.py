"""Pending updates: spooled to a file, then written in parallel batches.

A batch that fails is repeated with one update for each user, so that one user whose update fails
stops no other.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import bson
from bson import ObjectId
from pymongo import UpdateMany, UpdateOne
from pymongo.collection import Collection

from loyalty.concurrency import Progress, ProgressCallback, map_ordered
from loyalty.errors import BulkUpdateErrors, DatabaseUnavailable
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.values import LENIENT_CODEC, Document, format_value, try_encode
from loyalty.recount.spool import Spool
from loyalty.recount.tally import User

MAX_WRITERS = 8
MAX_SAMPLES = 5
MAX_BATCH_BYTES = 4 * 1024 * 1024
"""Maximum size of the ids and old values in one batch of several users."""
_MAX_CHANGE_BYTES = 16 * 1024 * 1024 - 16 * 1024
"""Maximum size of one user's change: a document of the change log may have 16 MB."""
_OBJECT_ID_BYTES = 20  # in an array of ids; the points are ignored, as they are small
UNSUPPORTED_VALUE = "UnsupportedValue"
"""Why an update fails: Python cannot encode the id or the old value unchanged, or the old value is
too large for the change log."""

LogChanges = Callable[[Sequence[Document]], None]
"""Is called with a batch's changes, `{user, before, after}`, before the batch is written."""


@dataclass(slots=True)
class UpdateResult:
    """The numbers of users whose points were written, who were deleted, and whose update failed.

    Failed updates are counted by the description of the error code. The server's own text is left
    out: it quotes the user's document.
    """

    written: int = 0
    deleted: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    failed_sample: list[str] = field(default_factory=list)
    """A few formatted ids, for DEBUG only."""

    @property
    def failed(self) -> int:
        return self.failures.total()

    def describe_failures(self) -> str:
        return ", ".join(f"{reason}: {n:,}" for reason, n in self.failures.most_common(3))

    def add_failure(self, reason: str, user: Any) -> None:
        self.add(UpdateResult(failures=Counter([reason]), failed_sample=[format_value(user)]))

    def add(self, other: Self) -> None:
        self.written += other.written
        self.deleted += other.deleted
        self.failures += other.failures
        self.failed_sample = (self.failed_sample + other.failed_sample)[:MAX_SAMPLES]


class PendingUpdates:
    """Users and the points to write: `add` all of them, then `write`.

    A temporary file holds them, so that all are known before the first write, in constant memory:
    a BSON document for each batch, `{changes: [{user, before, after}]}`.
    """

    def __init__(self, batch_size: int, points_field: str) -> None:
        self._batch_size = batch_size
        self._field = points_field
        self.result = UpdateResult()
        """The results of the updates so far."""
        self._total = self._batch_bytes = 0
        self._batch: list[Document] = []
        self._spool = Spool()

    def add(self, user: User, points: int) -> None:
        """Add a user to update. Raises NoTempSpace."""
        change = {"user": user.id, "before": user.points, "after": points}
        if not user.has_points_field:
            del change["before"]
            if user.created_path:
                change["created"] = user.created_path
        size = _measure_change(user, change)
        if size is None or size > _MAX_CHANGE_BYTES:
            self.result.add_failure(UNSUPPORTED_VALUE, user.id)
            return
        if self._batch and self._batch_bytes + size > MAX_BATCH_BYTES:
            self._end_batch()
        self._batch.append(change)
        self._batch_bytes += size
        if len(self._batch) == self._batch_size:
            self._end_batch()

    def _end_batch(self) -> None:
        self._spool.add(bson.encode({"changes": self._batch}))
        self._total += len(self._batch)
        self._batch, self._batch_bytes = [], 0

    def write(
        self,
        users: Collection[Any],
        on_progress: ProgressCallback,
        log_changes: LogChanges | None = None,
    ) -> None:
        """Set the points, each batch after its changes are logged. Raises ServiceError.

        `result` is complete then. After an error it may lack batches that were written.
        """
        if self._batch:
            self._end_batch()
        progress = Progress("writing", self._total, on_progress)
        batches = (bson.decode(batch, LENIENT_CODEC)["changes"] for batch in self._spool)
        write_batch = partial(_write_batch, users, self._field, log_changes)
        # Without prefetch, one slow batch leaves the other writers idle: with 20 ms to the server,
        # a first fill of 300,000 users took 14.2 s without it and 12.7 s with it.
        with map_ordered(write_batch, batches, MAX_WRITERS, prefetch=MAX_WRITERS) as results:
            for result in results:
                self.result.add(result)
                progress.add(result.written + result.deleted + result.failed)


def _measure_change(user: User, change: Document) -> int | None:
    """Return about how many bytes the id and the old value have; None if they cannot be encoded."""
    if isinstance(user.id, ObjectId) and isinstance(user.points, int | float | None):
        return _OBJECT_ID_BYTES + len(user.created_path or "")
    encoded = try_encode(change)
    return None if encoded is None else len(encoded)


def _write_batch(
    users: Collection[Any],
    points_field: str,
    log_changes: LogChanges | None,
    changes: Sequence[Document],
) -> UpdateResult:
    if log_changes is not None:
        log_changes(changes)
    ids_by_points: defaultdict[int, list[Any]] = defaultdict(list)
    for change in changes:
        ids_by_points[change["after"]].append(change["user"])
    # Users who get the same points share an update: half the time of one update for each. Not in a
    # transaction, which would halve the server's CPU time once more: after this process was killed,
    # the shop's own updates of these users waited 68 s.
    updates = [
        UpdateMany({"_id": {"$in": ids}}, {"$set": {points_field: points}})
        for points, ids in ids_by_points.items()
    ]
    # An UpdateMany stops at the first user whose update fails, and the driver does not retry it
    # when the primary is lost. A chunk migration can hide users from it. Deleted users never match.
    with suppress(BulkUpdateErrors, DatabaseUnavailable):
        if bulk_write(users, updates) == len(changes):
            return UpdateResult(written=len(changes))
    return _write_each_user(users, points_field, changes)


def _write_each_user(
    users: Collection[Any], points_field: str, changes: Sequence[Document]
) -> UpdateResult:
    updates = [UpdateOne({"_id": c["user"]}, {"$set": {points_field: c["after"]}}) for c in changes]
    result = UpdateResult()
    try:
        result.written = bulk_write(users, updates)
    except BulkUpdateErrors as error:
        result.written = error.matched
        for position, reason in error.reasons.items():
            result.add_failure(reason, changes[position]["user"])
    result.deleted = len(changes) - result.written - result.failed
    return result


def bulk_write(users: Collection[Any], updates: Sequence[UpdateOne | UpdateMany]) -> int:
    """Return how many users were matched. Raises BulkUpdateErrors and other ServiceErrors."""
    with map_driver_errors("update", users):
        return users.bulk_write(updates, ordered=False).matched_count
