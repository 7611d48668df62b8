"""Retries and backoff, on a clock that only the tests move."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loyalty.errors import (
    ClientUnusable,
    ConfigurationError,
    DatabaseUnavailable,
    QueryTimeout,
    SnapshotTooOld,
)
from loyalty.retry import DAEMON_BACKOFF, SHORT_OUTAGE_RETRY, Backoff, RetryPolicy, retry

NO_JITTER = RetryPolicy(initial_seconds=1, max_seconds=10, jitter=0)


class FakeClock:
    """A clock that advances only by what is slept; `pauses` are the seconds of each sleep."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


class Operation:
    """Raises the errors it is given, one at each call, and then returns "done"."""

    def __init__(self, *errors: Exception, clock: FakeClock, seconds: float = 0) -> None:
        self._errors = list(errors)
        self._clock = clock
        self._seconds = seconds
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        self._clock.now += self._seconds
        if self._errors:
            raise self._errors.pop(0)
        return "done"


def down(times: int) -> list[Exception]:
    return [DatabaseUnavailable(f"down {number}") for number in range(1, times + 1)]


def run(
    operation: Operation,
    policy: RetryPolicy,
    clock: FakeClock,
    on_retry: Callable[[int, Exception], None] = lambda _attempt, _error: None,
) -> str:
    return retry(operation, policy, on_retry=on_retry, clock=clock, sleep=clock.sleep)


def test_an_operation_that_succeeds_is_called_once_without_a_pause(clock: FakeClock) -> None:
    operation = Operation(clock=clock)
    assert run(operation, NO_JITTER, clock) == "done"
    assert (operation.calls, clock.pauses) == (1, [])


def test_pauses_double_up_to_the_maximum(clock: FakeClock) -> None:
    operation = Operation(*down(6), clock=clock)
    assert run(operation, NO_JITTER, clock) == "done"
    assert clock.pauses == [1, 2, 4, 8, 10, 10]


def test_each_retry_is_reported_before_its_pause(clock: FakeClock) -> None:
    errors = down(2)
    reported: list[tuple[int, Exception, int]] = []
    run(
        Operation(*errors, clock=clock),
        NO_JITTER,
        clock,
        lambda attempt, error: reported.append((attempt, error, len(clock.pauses))),
    )
    assert reported == [(2, errors[0], 0), (3, errors[1], 1)]


def test_no_attempt_starts_after_the_timeout(clock: FakeClock) -> None:
    policy = RetryPolicy(timeout_seconds=8, initial_seconds=1, max_seconds=10, jitter=0)
    started = clock.now
    with pytest.raises(DatabaseUnavailable, match=r"^down 4$"):
        run(Operation(*down(9), clock=clock), policy, clock)
    assert clock.now - started == 1 + 2 + 4


def test_the_timeout_starts_at_the_first_failure(clock: FakeClock) -> None:
    # Such as a count that takes ten minutes and is ended by an election.
    policy = RetryPolicy(timeout_seconds=30, initial_seconds=1, max_seconds=10)
    operation = Operation(*down(1), clock=clock, seconds=600)
    assert run(operation, policy, clock) == "done"
    with pytest.raises(DatabaseUnavailable, match=r"^down 2$"):
        run(Operation(*down(9), clock=clock, seconds=600), policy, clock)


@pytest.mark.parametrize(
    "error", [QueryTimeout("slow"), ClientUnusable("no keys"), KeyError(), ConfigurationError("no")]
)
def test_an_error_that_is_not_transient_is_raised_immediately(
    clock: FakeClock, error: Exception
) -> None:
    operation = Operation(error, clock=clock)
    with pytest.raises(type(error)):
        run(operation, NO_JITTER, clock)
    assert (operation.calls, clock.pauses) == (1, [])


@pytest.mark.parametrize("error", [DatabaseUnavailable("down"), SnapshotTooOld("old")])
def test_an_error_that_is_transient_is_retried(clock: FakeClock, error: Exception) -> None:
    assert run(Operation(error, clock=clock), NO_JITTER, clock) == "done"
    assert clock.pauses == [1]


def test_an_interrupt_is_never_retried(clock: FakeClock) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retry(interrupted, NO_JITTER, sleep=clock.sleep)
    assert clock.pauses == []


@given(
    initial=st.floats(0.001, 100),
    factor=st.floats(1, 1000),
    jitter=st.floats(0, 3),
    randoms=st.lists(st.floats(0, 1, exclude_max=True), min_size=20, max_size=20),
)
def test_a_pause_is_between_the_initial_and_the_maximum(
    initial: float, factor: float, jitter: float, randoms: list[float]
) -> None:
    maximum = initial * (1 + jitter) * factor
    policy = RetryPolicy(initial_seconds=initial, max_seconds=maximum, jitter=jitter)
    for failures, number in enumerate(randoms, 1):
        delay = policy.delay_seconds(failures, lambda number=number: number)  # type: ignore[misc]
        assert initial * 0.999 <= delay <= maximum * 1.001
    without_jitter = [policy.delay_seconds(failures, lambda: 0) for failures in (1, 2, 3, 10_000)]
    assert all(earlier <= later for earlier, later in pairwise(without_jitter))


def test_services_that_fail_at_the_same_time_do_not_stay_in_step() -> None:
    for failures in (1, 2, 50):  # also at the maximum
        delays = [DAEMON_BACKOFF.delay_seconds(failures) for _ in range(20)]
        assert max(delays) - min(delays) > 0.1 * min(delays)


def test_a_count_is_retried_for_about_30_seconds(clock: FakeClock) -> None:
    # Longer than an election, which takes 10 to 12 seconds by default.
    for _ in range(20):  # the jitter is random
        started = clock.now
        with pytest.raises(DatabaseUnavailable):
            run(Operation(*down(99), clock=clock), SHORT_OUTAGE_RETRY, clock)
        assert 20 < clock.now - started <= 30


def test_the_daemon_waits_10_seconds_to_5_minutes_and_never_gives_up() -> None:
    assert DAEMON_BACKOFF.delay_seconds(1, lambda: 0) == 10
    assert DAEMON_BACKOFF.delay_seconds(99, lambda: 1) == 300
    assert DAEMON_BACKOFF.timeout_seconds == inf


@pytest.fixture
def backoff(clock: FakeClock) -> Backoff:
    return Backoff(NO_JITTER, reset_seconds=60, clock=clock)


def fail_after(backoff: Backoff, clock: FakeClock, *, idle: float = 0, work: float = 0) -> float:
    """Let the task wait, work and fail; return the pause, and let it pass."""
    clock.now += idle
    started = clock.now
    clock.now += work
    pause = backoff.record_failure(started)
    clock.now += pause
    return pause


def test_failures_in_a_row_have_pauses_that_double(backoff: Backoff, clock: FakeClock) -> None:
    assert [fail_after(backoff, clock) for _ in range(6)] == [1, 2, 4, 8, 10, 10]


@pytest.mark.parametrize(("idle", "pause"), [(59, 2), (60, 1), (1000, 1)])
def test_the_pause_is_short_again_after_enough_idle_time(
    backoff: Backoff, clock: FakeClock, idle: float, pause: float
) -> None:
    assert fail_after(backoff, clock) == 1
    assert fail_after(backoff, clock, idle=idle) == pause


def test_the_time_of_work_is_not_idle_time(backoff: Backoff, clock: FakeClock) -> None:
    assert fail_after(backoff, clock) == 1
    assert fail_after(backoff, clock, work=1000) == 2
    clock.now += 1000  # of work without a failure
    backoff.record_work(1000)
    assert fail_after(backoff, clock, idle=30) == 4
    assert fail_after(backoff, clock, idle=60) == 1


def test_a_pause_can_be_limited(backoff: Backoff, clock: FakeClock) -> None:
    assert [backoff.record_failure(clock.now, max_seconds=3) for _ in range(4)] == [1, 2, 3, 3]


def test_a_reset_makes_the_next_failure_the_first(backoff: Backoff, clock: FakeClock) -> None:
    assert [fail_after(backoff, clock) for _ in range(3)] == [1, 2, 4]
    backoff.reset()
    assert [fail_after(backoff, clock) for _ in range(2)] == [1, 2]
