"""Write points to users, in batches that overlap, past users that the server refuses to update."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import IO, Any, TypeVar

import bson
from bson.raw_bson import RawBSONDocument
from pymongo import UpdateMany, UpdateOne
from pymongo.collection import Collection

from database import RefusedWrites, ServiceError, Unavailable, sorted_errors
from pipeline import POINTS
from values import RAW, Odd, shown, value_of

log = logging.getLogger("loyalty")

_PROGRESS_SECONDS = 5.0
_SAMPLES = 5
_WRITERS = 3

T = TypeVar("T")
R = TypeVar("R")


class Incomplete(ServiceError):
    """Some users refused their update; all others were written."""

    exit_code = 1


def write(
    users: Collection[Any],
    changes: IO[bytes],
    total: int,
    batch_size: int,
    on_progress: Callable[[], None],
) -> None:
    """Set the points in `changes`, which holds `total` BSON documents `{k: {_id}, n: points}`.

    Raises Incomplete, at the end, if the server refused some of the updates.
    """
    rows = bson.decode_file_iter(changes, RAW)
    batches = iter(lambda: list(islice(rows, batch_size)), [])
    refused: Counter[str] = Counter()
    sample: list[str] = []
    started = reported = time.monotonic()
    done = 0
    for size, reasons, refusing in _overlapping(partial(_write_batch, users), batches):
        done += size
        refused.update(reasons)
        sample = (sample + refusing)[:_SAMPLES]
        on_progress()
        now = time.monotonic()
        if now - reported >= _PROGRESS_SECONDS:
            reported, percent, rate = now, 100 * done // total, done / (now - started)
            log.info("writing done=%d total=%d percent=%d rate=%d/s", done, total, percent, rate)
    if refused:
        raise Incomplete(
            f"{refused.total():,} of {total:,} users refused the update, the others are "
            f"written; refused: {', '.join(sample)}; because: "
            + ", ".join(f"{reason} ({n:,} times)" for reason, n in refused.most_common(3))
        )


def _write_batch(
    users: Collection[Any], batch: list[RawBSONDocument]
) -> tuple[int, list[str], list[str]]:
    """Return how many updates were tried, why some were refused, and by which users."""
    try:
        _bulk_write(users, _by_points(batch))
    except (RefusedWrites, Unavailable):
        # A user that refuses ends an UpdateMany, and the driver does not try one again when the
        # primary is lost. One by one the refusing are known, and the driver does try again.
        try:
            _bulk_write(users, [UpdateOne(row["k"], _set(row["n"])) for row in batch])
        except RefusedWrites as error:
            refused = [shown(batch[position]["k"], "_id") for position in error.reasons]
            return len(batch), list(error.reasons.values()), refused
    return len(batch), [], []


def _by_points(batch: list[RawBSONDocument]) -> Iterator[UpdateOne | UpdateMany]:
    """Yield one update for all users who get the same points: half the time of one for each."""
    ids: defaultdict[int, list[Any]] = defaultdict(list)
    for row in batch:
        own = value_of(row["k"], "_id")
        if isinstance(own, Odd):
            yield UpdateOne(row["k"], _set(row["n"]))
        else:
            ids[row["n"]].append(own)
    for points, owns in ids.items():
        yield UpdateMany({"_id": {"$in": owns}}, _set(points))


def _bulk_write(users: Collection[Any], updates: Iterable[UpdateOne | UpdateMany]) -> None:
    with sorted_errors("update", users.full_name):
        users.bulk_write(list(updates), ordered=False)


def _set(points: int) -> dict[str, Any]:
    return {"$set": {POINTS: points}}


def _overlapping(do: Callable[[T], R], items: Iterator[T]) -> Iterator[R]:
    """Yield `do(item)` for each item, with a few on the way at a time.

    So the server has work while an answer travels; and little is left for it to do, and in
    our memory, when one side dies.
    """
    pool = ThreadPoolExecutor(_WRITERS)
    wait = True  # what is on the way must not land after a newer count
    try:
        pending = deque(pool.submit(do, item) for item in islice(items, _WRITERS))
        while pending:
            yield pending.popleft().result()
            pending.extend(pool.submit(do, item) for item in islice(items, 1))
    except KeyboardInterrupt:
        wait = False
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=True)
