"""Concurrency: an ordered parallel map, and progress reports for long work."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from typing import TypeVar

from loyalty.logs import log

T = TypeVar("T")
R = TypeVar("R")

ProgressCallback = Callable[[str], None]
"""Called after each step of long work: from time to time with a text for people, otherwise with "".

The call shows that the work has not stalled.
"""


def ignore_progress(_: str) -> None: ...


@contextmanager
def map_ordered(
    do: Callable[[T], R], items: Iterator[T], workers: int, *, prefetch: int = 0
) -> Iterator[Iterator[R]]:
    """Yield an iterator over `do(item)`, in the order of `items`, computed by `workers` threads.

    The threads keep the server busy while a reply is transferred or decoded. If one item takes
    long, up to `prefetch` later items are computed in advance. After an item has failed, no further
    item is started. The end of the block waits for running calls: otherwise a write could still
    arrive after the next count. Ctrl-C does not wait. If there is only one item, the calling thread
    computes it.
    """
    first = list(islice(items, 2))
    if len(first) < 2:
        yield map(do, first)
        return
    items = chain(first, items)
    pool = ThreadPoolExecutor(workers)
    errors: list[BaseException] = []

    def attempt(item: T) -> R:
        if errors:
            raise errors[0]
        try:
            return do(item)
        except BaseException as error:
            errors.append(error)
            raise

    def results() -> Iterator[R]:
        pending = deque(pool.submit(attempt, item) for item in islice(items, workers + prefetch))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(attempt, item) for item in islice(items, 1))
            yield result

    wait = True
    try:
        yield results()
    except KeyboardInterrupt:
        wait = False
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=True)


class Progress:
    """Reports the progress of long work every `report_seconds`, to the log and to a callback.

    `total` may be an estimate.
    """

    def __init__(
        self,
        activity: str,
        total: int,
        on_progress: ProgressCallback,
        *,
        report_seconds: float = 5.0,
    ) -> None:
        self._activity = activity
        self._total = total
        self._on_progress = on_progress
        self._report_seconds = report_seconds
        self._done = 0
        self._started = self._reported = time.monotonic()

    def add(self, done: int) -> None:
        self._done += done
        self._total = max(self._total, self._done)
        now = time.monotonic()
        if now - self._reported < self._report_seconds:
            self._on_progress("")
            return
        self._reported = now
        rate = self._done / (now - self._started)
        self._on_progress(f"{self._activity} {self._done:,} of {self._total:,}, {rate:,.1f}/s")
        log.info(
            "%s done=%d total=%d percent=%d rate=%.1f/s",
            *(self._activity, self._done, self._total, 100 * self._done // self._total, rate),
            extra={
                "event": self._activity,
                "fields": {"done": self._done, "total": self._total, "rate": round(rate, 1)},
            },
        )
