"""Work that overlaps: several items on the way at a time, and how far all of it has come."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from threading import Event
from typing import TypeVar

log = logging.getLogger("loyalty")

REPORT_SECONDS = 5.0

T = TypeVar("T")
R = TypeVar("R")

ProgressCallback = Callable[[str], None]
"""What long work calls whenever it has moved on, with how far it is ("" if that is not news)."""


def ignore_progress(_: str) -> None:
    """Serve as a `Moved` where nobody wants to know."""


@contextmanager
def map_ordered(
    do: Callable[[T], R], items: Iterator[T], workers: int, *, prefetch: int = 0
) -> Iterator[Iterator[R]]:
    """Yield the results of `do(item)` in their order, with `workers` of them on the way at a time.

    So the server has work while an answer travels, or while we take it apart; and little is left
    for it to do, and in our memory, when one side dies. Up to `ahead` more are done before their
    turn while one takes long. None is on the way any more at the end, lest a write land after a
    newer count; only Ctrl-C does not wait for that. After one that fails, none is begun.
    """
    pool, failed = ThreadPoolExecutor(workers), Event()

    def attempt(item: T) -> R:
        if failed.is_set():  # a later item's turn never comes
            raise CancelledError
        try:
            return do(item)
        except BaseException:
            failed.set()
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
    except (KeyboardInterrupt, GeneratorExit):  # the latter where only a count is abandoned
        wait = False
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=True)


class Progress:
    """Says every few seconds how far long work is: to the log, and to whoever listens."""

    def __init__(self, doing: str, total: int, on_progress: ProgressCallback) -> None:
        self._doing = doing
        self._total = total
        self._moved = on_progress
        self._done = 0
        self._started = self._reported = time.monotonic()

    def add(self, done: int) -> None:
        """Add what has been done since the last time."""
        self._done += done
        now = time.monotonic()
        if now - self._reported < REPORT_SECONDS:
            self._moved("")
            return
        self._reported = now
        rate = self._done / (now - self._started)
        self._moved(f"{self._doing} {self._done:,} of {self._total:,}, {rate:,.1f}/s")
        log.info(
            "%s done=%d total=%d percent=%d rate=%.1f/s",
            *(self._doing, self._done, self._total, 100 * self._done // self._total, rate),
            extra={
                "event": self._doing,
                "fields": {"done": self._done, "total": self._total, "rate": round(rate, 1)},
            },
        )
