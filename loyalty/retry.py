"""Retries and backoff: how long to wait after a failure, and when to give up.

Every wait between attempts in this service follows one of the three policies below.
"""

from __future__ import annotations

import random as random_module
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from math import inf
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When an operation that failed is tried again, and when it is not.

    The pause after the n-th failure in a row is `initial_seconds * exponential ** (n - 1)`, plus a
    random share of it: up to `jitter` (0.5: up to half as much again). No pause is longer than
    `max_seconds`, its jitter included.

    `attempts` counts the first one. `timeout_seconds` starts at the first *failure*, not at the
    first attempt: one count may take minutes before it fails. No attempt starts after that time.
    """

    attempts: float = inf
    timeout_seconds: float = inf
    initial_seconds: float
    max_seconds: float
    exponential: float = 2.0
    jitter: float = 0.5

    def delay_seconds(
        self, failures: int, random: Callable[[], float] = random_module.random
    ) -> float:
        """Return the seconds to wait after this many failures in a row; at least one."""
        # The jitter is part of the maximum: cut off at the maximum, services that lost the same
        # database would end up in step again.
        longest = self.max_seconds / (1 + self.jitter)
        # An exponent of 1,000 would overflow a float, and is far above any maximum.
        exponent = min(failures - 1, 64)
        delay = min(self.initial_seconds * self.exponential**exponent, longest)
        return delay * (1 + self.jitter * random())


DAEMON_BACKOFF = RetryPolicy(initial_seconds=10, max_seconds=300)
"""After a recount or a connection that failed; the daemon never gives up."""

BACKOFF_RESET_SECONDS = 60.0
"""Idle time without a failure after which the daemon's next failure counts as the first."""

COUNT_RETRY = RetryPolicy(timeout_seconds=30, initial_seconds=0.5, max_seconds=8)
"""Within one recount: an election takes about 10 seconds, and may have to be repeated."""

ORPHANED_WRITES_POLL = RetryPolicy(
    timeout_seconds=5, initial_seconds=0.05, max_seconds=0.5, jitter=0
)
"""Until the server has finished the writes of a service that was killed."""


@dataclass(frozen=True)
class Retry:
    """An attempt that failed and will be repeated."""

    attempt: int
    """The number of the attempt that follows; 2 after the first failure."""
    delay_seconds: float
    error: Exception


def retry(
    operation: Callable[[], T],
    policy: RetryPolicy,
    *,
    on: type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool],
    on_retry: Callable[[Retry], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    random: Callable[[], float] = random_module.random,
) -> T:
    """Return what `operation` returns; repeat it while it raises an error that `on` selects.

    `on` is an exception type, several, or a function that decides. `on_retry` is called before each
    pause. Raises the last error when the policy gives up, and any other error at once.
    """
    delays = _delays(policy, clock, random)
    for attempt in count(2):
        try:
            return operation()
        except Exception as error:
            selected = isinstance(error, on) if isinstance(on, type | tuple) else on(error)
            delay = next(delays, None) if selected else None
            if delay is None:
                raise
            on_retry(Retry(attempt, delay, error))
        sleep(delay)
    raise AssertionError("unreachable: count() does not end")


def poll(
    is_done: Callable[[], bool],
    policy: RetryPolicy,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    random: Callable[[], float] = random_module.random,
) -> bool:
    """Call `is_done` until it returns True; return False if the policy gives up before."""
    delays = _delays(policy, clock, random)
    while not is_done():
        delay = next(delays, None)
        if delay is None:
            return False
        sleep(delay)
    return True


def _delays(
    policy: RetryPolicy, clock: Callable[[], float], random: Callable[[], float]
) -> Iterator[float]:
    """Yield the pause after each failure; end when there is to be no further attempt."""
    deadline = clock() + policy.timeout_seconds  # runs from the first next(): the first failure
    for failures in count(1):
        delay = policy.delay_seconds(failures, random)
        if failures >= policy.attempts or clock() + delay > deadline:
            return
        yield delay


class Backoff:
    """The pauses of a task that is repeated without end, and that fails now and then.

    Failures count as consecutive until `reset_seconds` pass without one. Neither the pause itself
    nor the time in which the task works is part of them.
    """

    def __init__(
        self,
        policy: RetryPolicy = DAEMON_BACKOFF,
        *,
        reset_seconds: float = BACKOFF_RESET_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        self._policy = policy
        self._reset_seconds = reset_seconds
        self._clock = clock
        self._random = random
        self.reset()

    def reset(self) -> None:
        """Let the next failure be the first."""
        self._failures = 0
        self._pause = 0.0
        self._failed_at = -inf

    def record_work(self, seconds: float) -> None:
        """Note that the task has just worked for so long, without a failure."""
        self._failed_at += seconds

    def record_failure(self, started: float, *, max_seconds: float = inf) -> float:
        """Return the seconds to wait after a failure now, of work that started then."""
        failed_recently = started - self._failed_at < self._pause + self._reset_seconds
        self._failures = self._failures + 1 if failed_recently else 1
        self._pause = min(self._policy.delay_seconds(self._failures, self._random), max_seconds)
        self._failed_at = self._clock()
        return self._pause
