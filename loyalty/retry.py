"""Retries and backoff: how long to wait after a failure, and when to give up."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import TypeVar

from loyalty.errors import ClientUnusable, DatabaseUnavailable, QueryTimeout

T = TypeVar("T")
Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Decides when a failed operation is tried again, and when to give up.

    The pause after the n-th failure in a row is `initial_seconds * 2 ** (n - 1)`, plus a random
    share of it: up to `jitter` (0.5: up to half as much again). No pause is longer than
    `max_seconds`, its jitter included.

    `timeout_seconds` starts at the first *failure*, not at the first attempt: one count may take
    minutes before it fails. No attempt starts after that time.
    """

    timeout_seconds: float = inf
    initial_seconds: float
    max_seconds: float
    jitter: float = 0.5

    def delay_seconds(self, failures: int, draw: Callable[[], float] = random.random) -> float:
        """Return the seconds to wait after this number of failures in a row, which is at least 1.

        `draw` returns a random number from 0 to 1.
        """
        # Apply the cap before the jitter; otherwise all clients would wait exactly max_seconds.
        longest = self.max_seconds / (1 + self.jitter)
        exponent = min(failures - 1, 64)  # a much larger one would overflow a float
        delay = min(self.initial_seconds * 2.0**exponent, longest)
        return delay * (1 + self.jitter * draw())


DAEMON_BACKOFF = RetryPolicy(initial_seconds=10, max_seconds=300)
"""The pauses after a failed recount or connection. The daemon never gives up."""

SHORT_OUTAGE_RETRY = RetryPolicy(timeout_seconds=30, initial_seconds=0.5, max_seconds=8)
"""The pauses before a count or a call is repeated. An election takes about 10 s, and may have to be
repeated."""

ORPHANED_WRITES_RETRY = RetryPolicy(initial_seconds=0.05, max_seconds=0.5, jitter=0)
"""The pauses until the server has finished the writes of an earlier process."""

OPEN_STREAM_RETRY = RetryPolicy(timeout_seconds=5, initial_seconds=0.5, max_seconds=4)
"""The pauses while the change stream is opened. This can fail at first: for example, a collection
that was just created has no readable snapshot."""

REOPEN_STREAM_BACKOFF = RetryPolicy(initial_seconds=60, max_seconds=600)
"""The pauses between full recounts while the change stream cannot be opened."""


def is_retryable(error: Exception) -> bool:
    """Return whether the same operation may succeed within seconds."""
    # After a timeout the next attempt would take as long; a new client is the caller's task.
    is_final = isinstance(error, QueryTimeout | ClientUnusable)
    return isinstance(error, DatabaseUnavailable) and not is_final


def retry(
    operation: Callable[[], T],
    policy: RetryPolicy,
    *,
    on_retry: Callable[[int, Exception], None] = lambda _attempt, _error: None,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Return what `operation` returns; repeat it while it raises an error that `is_retryable`.

    `on_retry` is called before each pause with the number of the attempt that follows, 2 after the
    first failure, and the error. Raises the last error when the policy gives up.
    """
    failures, deadline = 0, inf
    while True:
        try:
            return operation()
        except Exception as error:
            failures += 1
            if failures == 1:
                deadline = clock() + policy.timeout_seconds
            delay = policy.delay_seconds(failures)
            if not is_retryable(error) or clock() + delay > deadline:
                raise
            on_retry(failures + 1, error)
        sleep(delay)


class Backoff:
    """Computes the pauses after failures of a task that is repeated without end.

    A failure counts as the first again after `reset_seconds` without one, not counting the pause
    after the last failure and the time of successful work.
    """

    def __init__(
        self,
        policy: RetryPolicy = DAEMON_BACKOFF,
        *,
        reset_seconds: float = 60.0,
        clock: Clock = time.monotonic,
    ) -> None:
        self._policy = policy
        self._reset_seconds = reset_seconds
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Let the next failure be the first."""
        self._failures = 0
        self._pause = 0.0
        self._failed_at = -inf

    def record_work(self, seconds: float) -> None:
        """Exclude the time of successful work from `reset_seconds`."""
        self._failed_at += seconds

    def record_failure(self, started: float, *, max_seconds: float = inf) -> float:
        """Return the seconds to wait after a failure now, of work that started at `started`."""
        has_failed_recently = started - self._failed_at < self._pause + self._reset_seconds
        self._failures = self._failures + 1 if has_failed_recently else 1
        self._pause = min(self._policy.delay_seconds(self._failures), max_seconds)
        self._failed_at = self._clock()
        return self._pause
