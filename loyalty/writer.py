"""Write points to users, in batches that overlap, past users that the server refuses to update."""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import bson
from bson.raw_bson import RawBSONDocument
from pymongo import UpdateMany, UpdateOne
from pymongo.collection import Collection

from loyalty.counting import POINTS, Document
from loyalty.ids import RAW, Odd, shown, value_of
from loyalty.mongo import RefusedWrites, ServiceError, Unavailable, sorted_errors

log = logging.getLogger("loyalty")

_SPOOL_BYTES = 4 * 1024 * 1024
_PROGRESS = "writing done=%d total=%d percent=%d rate=%d/s"
_PROGRESS_SECONDS = 5.0
_SAMPLES = 5
_WRITERS = 8

T = TypeVar("T")
R = TypeVar("R")


class Incomplete(ServiceError):
    """Some users refused their update; all others were written."""

    exit_code = 1


class SpoolFailed(ServiceError):
    """There is no room for the changes; nothing was written."""

    exit_code = 69  # EX_UNAVAILABLE


class Changes:
    """Users and the points to write: `add` them all, then `write`; close it at the end.

    They wait in a temporary file, so that any number of them takes little memory: a BSON document
    for each batch, `{size, updates: [{q: filter, n: points}]}`. Users who get the same points
    share an update, which takes half the time of one for each.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._in_batch = 0
        self._ids: defaultdict[int, list[Any]] = defaultdict(list)
        self._odd: list[Document] = []
        self._file = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115 -- close()
        self._total = 0

    def close(self) -> None:
        with suppress(OSError):  # a full disk says so once more
            self._file.close()

    def add(self, user: Document, points: int) -> None:
        """Add a user, given as `{_id}`. Raises SpoolFailed if there is no room."""
        own = value_of(user, "_id")
        if isinstance(own, Odd):
            self._odd.append({"q": user, "n": points})
        else:
            self._ids[points].append(own)
        self._in_batch += 1
        if self._in_batch == self._batch_size:
            self._end_batch()

    def _end_batch(self) -> None:
        updates = [{"q": {"_id": {"$in": ids}}, "n": n} for n, ids in self._ids.items()]
        batch = bson.encode({"size": self._in_batch, "updates": updates + self._odd})
        try:
            self._file.write(batch)
            self._file.flush()  # or a full disk would show up much later
        except OSError as error:
            where = tempfile.gettempdir()
            raise SpoolFailed(f"cannot keep the changes in {where}: {error.strerror}") from error
        self._total += self._in_batch
        self._in_batch = 0
        self._ids.clear()
        self._odd.clear()

    def write(self, users: Collection[Any], on_progress: Callable[[], None]) -> None:
        """Set the points. Raises SpoolFailed, or Incomplete at the end if users refused theirs."""
        if self._in_batch:
            self._end_batch()
        self._file.seek(0)
        batches = bson.decode_file_iter(self._file, RAW)
        refused: Counter[str] = Counter()
        sample: list[str] = []
        started = reported = time.monotonic()
        done, total = 0, self._total
        with overlapping(partial(_write_batch, users), batches, _WRITERS) as results:
            for size, reasons, refusing in results:
                done += size
                refused.update(reasons)
                sample = (sample + refusing)[:_SAMPLES]
                on_progress()
                now = time.monotonic()
                if now - reported >= _PROGRESS_SECONDS:
                    reported, percent, rate = now, 100 * done // total, done / (now - started)
                    log.info(_PROGRESS, done, total, percent, rate)
        if refused:
            raise Incomplete(
                f"{refused.total():,} of {total:,} users refused the update, the others are "
                f"written; refused: {', '.join(sample)}; because: "
                + ", ".join(f"{reason} ({n:,} times)" for reason, n in refused.most_common(3))
            )


def _write_batch(
    users: Collection[Any], batch: RawBSONDocument
) -> tuple[int, Sequence[str], list[str]]:
    """Return how many users were tried, why some were refused, and which."""
    updates: list[Document] = batch["updates"]
    try:
        _bulk_write(users, [UpdateMany(update["q"], _set(update)) for update in updates])
    except (RefusedWrites, Unavailable):
        # A user that refuses ends an UpdateMany, and the driver does not try one again when the
        # primary is lost. One by one the refusing are known, and the driver does try again.
        each = [(one, _set(update)) for update in updates for one in _one_by_one(update["q"])]
        try:
            _bulk_write(users, [UpdateOne(*one) for one in each])
        except RefusedWrites as error:
            refused = [shown(value_of(each[position][0], "_id")) for position in error.reasons]
            return batch["size"], list(error.reasons.values()), refused
    return batch["size"], [], []


def _one_by_one(query: Document) -> list[Document]:
    ids = value_of(query, "_id")
    return [query] if isinstance(ids, Odd) else [{"_id": own} for own in ids["$in"]]


def _bulk_write(users: Collection[Any], updates: Sequence[UpdateOne | UpdateMany]) -> None:
    with sorted_errors("update", users.full_name):
        users.bulk_write(updates, ordered=False)


def _set(update: Document) -> dict[str, Any]:
    return {"$set": {POINTS: update["n"]}}


@contextmanager
def overlapping(do: Callable[[T], R], items: Iterator[T], workers: int) -> Iterator[Iterator[R]]:
    """Yield the results of `do(item)` in their order, with `workers` of them on the way at a time.

    So the server has work while an answer travels, or while we take it apart; and little is left
    for it to do, and in our memory, when one side dies. None is on the way any more at the end,
    lest a write land after a newer count; only Ctrl-C does not wait.
    """
    pool = ThreadPoolExecutor(workers)

    def results() -> Iterator[R]:
        pending = deque(pool.submit(do, item) for item in islice(items, workers))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(do, item) for item in islice(items, 1))
            yield result

    wait = True
    try:
        yield results()
    except KeyboardInterrupt:
        wait = False
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=True)
