"""The daemon's schedule, backoff and signals, with a fake job; and its reload as a real process."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from bson import ObjectId
from conftest import settings_for
from pymongo.database import Database

from loyalty.concurrency import ProgressCallback
from loyalty.daemon import Daemon, StepOutcome
from loyalty.errors import ConfigurationError, DatabaseUnavailable
from loyalty.retry import Backoff, RetryPolicy
from sandbox.mongod import DEADLINE_SECONDS, wait_until
from sandbox.service import Process

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SHORT_PAUSES = RetryPolicy(initial_seconds=0.02, max_seconds=300, jitter=0)
T = TypeVar("T")
DOWN = DatabaseUnavailable("down")


class FakeJob:
    """A job of four functions that records when each is called, as (name, monotonic time)."""

    def __init__(
        self,
        recount: Callable[[ProgressCallback], StepOutcome | None] = lambda _: None,
        *,
        connect: Callable[[], None] = lambda: None,
        reload: Callable[[], None] = lambda: None,
        run_between: Callable[[float], StepOutcome | None] = time.sleep,
        interval: float = 3600,
        stall_timeout: float = 60,
    ) -> None:
        self.interval = timedelta(seconds=interval)
        self.stall_timeout = timedelta(seconds=stall_timeout)
        self.calls: list[tuple[str, float]] = []
        self.is_over = threading.Event()
        self._recount, self._connect = recount, connect
        self._reload, self._run_between = reload, run_between

    def connect(self) -> None:
        self._call("connect", self._connect)

    def recount(self, on_progress: ProgressCallback) -> StepOutcome:
        return self._call("recount", self._recount, on_progress) or StepOutcome("done")

    def reload(self) -> None:
        self._call("reload", self._reload)

    def run_between(self, seconds: float, on_progress: ProgressCallback) -> StepOutcome | None:
        return self._call("run_between", self._run_between, seconds)

    def count(self, name: str) -> int:
        return sum(called == name for called, _ in self.calls)

    @property
    def steps(self) -> list[str]:
        """The calls in their order, without `run_between`."""
        return [name for name, _ in self.calls if name != "run_between"]

    def _call(self, name: str, function: Callable[..., T], *arguments: object) -> T:
        self._stop_if_over()
        self.calls.append((name, time.monotonic()))
        try:
            return function(*arguments)
        finally:
            self._stop_if_over()

    def _stop_if_over(self) -> None:
        """Stop the worker that the daemon left behind: it would disturb the tests that follow."""
        if self.is_over.is_set():
            threading.Event().wait()


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make(job: FakeJob, policy: RetryPolicy = SHORT_PAUSES, *, reset: float = 60) -> Daemon:
    return Daemon(job, backoff=Backoff(policy, reset_seconds=reset), tick_seconds=0.05)


def run(job: FakeJob, script: Callable[[], object], daemon: Daemon | None = None) -> None:
    """Run the daemon in this thread and `script` in another; then end the daemon with SIGTERM."""
    errors: list[BaseException] = []

    def follow() -> None:
        try:
            script()
        except BaseException as error:  # noqa: BLE001 -- raised below, in the test's own thread
            errors.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=follow)
    thread.start()
    (daemon or make(job)).run()
    job.is_over.set()
    thread.join()
    if errors:
        raise errors[0]


def run_until(job: FakeJob, ready: Callable[[], object], daemon: Daemon | None = None) -> None:
    run(job, lambda: wait_until("the condition", ready, 20), daemon)


def raising(*errors: Exception | None) -> Callable[..., None]:
    """Return a function that raises these errors, one a call (None: no error), and then none."""
    left = list(errors)

    def step(*_: object) -> None:
        if left and (error := left.pop(0)):
            raise error

    return step


def wait_for(event: threading.Event) -> None:
    event.wait(60)


# Schedule


def has_scheduled(job: FakeJob, recounts: int) -> bool:
    """Return whether the next recount is scheduled, after this many recounts."""
    return job.count("recount") == recounts and job.calls[-1][0] == "run_between"


def test_the_first_recount_is_at_start_and_the_second_two_hours_later_by_default() -> None:
    interval = settings_for("mongodb://localhost").recount_interval.total_seconds()
    job = FakeJob(interval=interval)
    daemon = make(job)
    run_until(job, lambda: has_scheduled(job, 1), daemon)
    assert job.steps == ["connect", "recount"]
    (scheduled,) = daemon.scheduler.jobs
    assert (scheduled.interval, scheduled.unit) == (7200, "seconds")


def test_a_recount_is_due_when_the_wall_clock_has_passed_its_time() -> None:
    """The monotonic clock does not count the time in which the machine was suspended."""
    job = FakeJob()
    daemon = make(job)

    def script() -> None:
        wait_until("a recount", lambda: has_scheduled(job, 1))
        (scheduled,) = daemon.scheduler.jobs
        assert scheduled.next_run
        scheduled.next_run -= timedelta(hours=2)
        wait_until("another recount", lambda: job.count("recount") == 2)

    run(job, script, daemon)


def test_recounts_longer_than_the_interval_neither_overlap_nor_accumulate() -> None:
    running = 0
    overlaps: list[int] = []

    def recount(_: ProgressCallback) -> None:
        nonlocal running
        running += 1
        overlaps.append(running)
        time.sleep(1.3)
        running -= 1

    job = FakeJob(recount, interval=1)
    started = time.monotonic()
    run_until(job, lambda: len(overlaps) >= 3)
    assert set(overlaps) == {1}
    assert time.monotonic() - started >= 2 * (1.3 + 1)


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_a_recount_can_request_an_earlier_next_recount(seconds: float) -> None:
    outcomes = [StepOutcome("refused", next_after_seconds=seconds), StepOutcome("done")]
    job = FakeJob(lambda _: outcomes.pop(0))
    daemon = make(job)
    run_until(job, lambda: has_scheduled(job, 2), daemon)
    first, second = (at for name, at in job.calls if name == "recount")
    assert second - first >= seconds
    (scheduled,) = daemon.scheduler.jobs  # then the interval applies again
    assert scheduled.interval == 3600


def test_an_unscheduled_recount_can_request_an_earlier_recount() -> None:
    outcomes = [StepOutcome("refused", next_after_seconds=0.3)]

    def run_between(seconds: float) -> StepOutcome | None:
        if job.count("recount") and outcomes:
            return outcomes.pop()
        time.sleep(seconds)
        return None

    job = FakeJob(run_between=run_between)
    run_until(job, lambda: job.count("recount") == 2)
    first, second = (at for name, at in job.calls if name == "recount")
    assert second - first >= 0.3


def test_the_interval_begins_again_after_an_unscheduled_recount() -> None:
    times: list[datetime | None] = []

    def run_between(seconds: float) -> StepOutcome | None:
        if job.count("recount"):
            times.append(daemon.scheduler.next_run)
            if len(times) == 1:
                return StepOutcome("resync")
        time.sleep(seconds)
        return None

    job = FakeJob(run_between=run_between)
    daemon = make(job)
    run_until(job, lambda: len(times) > 1, daemon)
    before, after = times[:2]
    assert before
    assert after
    assert after > before


def test_a_recount_cannot_request_a_later_next_recount(systemd: Callable[[], list[str]]) -> None:
    job = FakeJob(lambda _: StepOutcome("refused", next_after_seconds=1e6), interval=1)
    run_until(job, lambda: systemd() and job.count("recount") == 2)
    (status, *_) = [message for message in systemd() if "refused" in message]
    at = datetime.fromisoformat(status.split("next at ")[1].replace(" UTC", "+00:00"))
    assert at < datetime.now(UTC) + timedelta(seconds=60)


# Failures and backoff


def test_the_job_runs_between_attempts_to_connect() -> None:
    job = FakeJob(connect=raising(DOWN))
    run_until(job, lambda: job.count("recount"))
    names = [name for name, _ in job.calls]
    assert "run_between" in names[: names.index("connect", 1)]


def test_failures_are_retried_after_pauses_that_double(caplog: pytest.LogCaptureFixture) -> None:
    errors = [DatabaseUnavailable("gone"), ConfigurationError("no permission"), ValueError("bug")]
    job = FakeJob(raising(*errors))
    policy = RetryPolicy(initial_seconds=0.02, max_seconds=0.05, jitter=0)
    run_until(job, lambda: job.count("recount") == 4, make(job, policy))
    failures = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.getMessage() for record in failures] == [
        'failed error="gone" retry_in=0.02s',
        'failed error="no permission" retry_in=0.04s',
        "internal_error retry_in=0.05s",
    ]
    assert [bool(record.exc_info) for record in failures] == [False, False, True]
    fields = [record.fields for record in failures]  # type: ignore[attr-defined]
    assert fields[0] == {"error": "gone", "retry_in": 0.02}
    assert fields[2] == {"error": "ValueError", "retry_in": 0.05}


def test_recount_time_is_not_idle_time(caplog: pytest.LogCaptureFixture) -> None:
    fail = raising(DOWN, DOWN)
    ended: list[bool] = []

    def recount(_: ProgressCallback) -> None:
        time.sleep(0.6)
        fail()

    def run_between(seconds: float) -> None:
        if job.count("recount") == 3 and not ended:  # just after a recount that succeeded
            ended.append(True)
            raise DatabaseUnavailable("ended")
        time.sleep(seconds)

    job = FakeJob(recount, run_between=run_between)
    run_until(job, lambda: job.count("recount") >= 4, make(job, reset=0.4))
    assert caplog.messages[:3] == [
        'failed error="down" retry_in=0.02s',
        'failed error="down" retry_in=0.04s',
        'failed error="ended" retry_in=0.08s',
    ]


@pytest.mark.parametrize("has_succeeded", [True, False])
def test_the_time_of_a_resync_is_not_idle_time(
    caplog: pytest.LogCaptureFixture, *, has_succeeded: bool
) -> None:
    resyncs: list[bool] = []

    def run_between(seconds: float) -> StepOutcome | None:
        if job.count("recount") != 2 or len(resyncs) == 2:
            time.sleep(seconds)
            return None
        resyncs.append(True)
        if len(resyncs) == 1 or not has_succeeded:
            time.sleep(0.6)
        if len(resyncs) == 1 and has_succeeded:
            return StepOutcome("resync")
        raise DatabaseUnavailable("ended")

    job = FakeJob(raising(DOWN), run_between=run_between)
    run_until(job, lambda: job.count("recount") >= 3, make(job, reset=0.4))
    assert caplog.messages[:2] == [
        'failed error="down" retry_in=0.02s',
        'failed error="ended" retry_in=0.04s',
    ]


def test_a_configuration_error_ends_the_daemon_only_before_the_first_connection() -> None:
    job = FakeJob(connect=raising(DOWN, DOWN, ConfigurationError("no")))
    with pytest.raises(ConfigurationError, match="no"):
        make(job).run()
    assert job.steps == ["connect"] * 3


def test_a_pause_is_never_longer_than_the_interval() -> None:
    job = FakeJob(raising(DOWN), interval=1)
    policy = RetryPolicy(initial_seconds=1000, max_seconds=1000)
    run_until(job, lambda: job.count("recount") == 2, make(job, policy))


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_ends_the_daemon_while_a_recount_hangs(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "loyalty")
    hang = threading.Event()
    job = FakeJob(lambda _: wait_for(hang))

    def script() -> None:
        wait_until("a recount", lambda: job.count("recount"))
        os.kill(os.getpid(), number)
        wait_until("its end", lambda: "stopped signal=" in caplog.text)

    run(job, script)
    assert caplog.messages[-1] == f"stopped signal={number.name}"
    hang.set()


def reload_settings() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


def test_sighup_reloads_the_settings_and_recounts_immediately() -> None:
    job = FakeJob()

    def script() -> None:
        wait_until("a recount", lambda: job.count("recount") == 1)
        reload_settings()
        wait_until("another recount", lambda: job.count("recount") == 2)

    run(job, script)
    assert job.steps == ["connect", "recount", "reload", "recount"]


def test_several_sighups_during_a_recount_cause_one_reload() -> None:
    go_on = threading.Event()
    job = FakeJob(lambda _: wait_for(go_on))

    def script() -> None:
        wait_until("a recount", lambda: job.count("recount") == 1)
        for _ in range(3):
            reload_settings()
            time.sleep(0.1)
        assert job.steps == ["connect", "recount"]
        go_on.set()
        wait_until("another recount", lambda: job.count("recount") == 2)
        time.sleep(0.3)

    run(job, script)
    assert job.steps == ["connect", "recount", "reload", "recount"]


def test_sighup_during_a_reload_reloads_once_more() -> None:
    def reload() -> None:
        if job.count("reload") == 1:
            reload_settings()
            time.sleep(0.3)

    job = FakeJob(reload=reload)

    def script() -> None:
        wait_until("a recount", lambda: job.count("recount") == 1)
        reload_settings()
        wait_until("two reloads", lambda: job.count("reload") == 2)
        wait_until("another recount", lambda: job.steps[-1] == "recount")

    run(job, script)
    assert job.steps[:3] == ["connect", "recount", "reload"]


@pytest.mark.parametrize("name", ["connect", "recount"])
def test_sighup_ends_a_pause_and_the_next_pause_is_short_again(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    fail = raising(DOWN, DOWN)
    steps: dict[str, Any] = {name: fail}
    job = FakeJob(**steps)
    policy = RetryPolicy(initial_seconds=1000, max_seconds=3000, jitter=0)

    def script() -> None:
        wait_until("a failure", lambda: job.count(name) == 1)
        reload_settings()
        wait_until("another failure", lambda: job.count(name) == 2)
        reload_settings()
        wait_until("a recount", lambda: job.steps[-1] == "recount" and job.count(name) == 3)

    run(job, script, make(job, policy))
    failures = [line for line in caplog.messages if line.startswith("failed ")]
    assert failures == ['failed error="down" retry_in=1000s'] * 2


def has_reloaded(job: FakeJob, times: int) -> bool:
    return job.count("reload") == times


def test_settings_that_are_wrong_are_reported_and_change_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = FakeJob(reload=raising(ConfigurationError("A: wrong", "B: wrong"), OSError("bug"), DOWN))

    def script() -> None:
        wait_until("a recount", lambda: job.count("recount") == 1)
        for times in (1, 2, 3):
            reload_settings()
            wait_until("a reload", partial(has_reloaded, job, times))
        time.sleep(0.3)  # six ticks, in which a recount would start

    run(job, script)
    assert job.steps == ["connect", "recount", "reload", "reload", "reload"]
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.getMessage() for record in errors] == [
        'reload_failed error="A: wrong"',
        'reload_failed error="B: wrong"',
        "internal_error during=reload",
        'reload_failed error="down"',
    ]


def test_a_failed_reload_does_not_end_a_pause() -> None:
    job = FakeJob(raising(DOWN), reload=raising(ConfigurationError("wrong")))

    def script() -> None:
        wait_until("a recount", lambda: job.count("recount") == 1)
        reload_settings()
        wait_until("a reload", lambda: job.count("reload") == 1)
        time.sleep(0.3)

    run(job, script, make(job, RetryPolicy(initial_seconds=1000, max_seconds=3000)))
    assert job.count("recount") == 1


def test_a_reload_changes_the_interval_and_the_stall_timeout(
    systemd: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    hang = threading.Event()

    def reload() -> None:
        job.interval, job.stall_timeout = timedelta(seconds=1), timedelta(seconds=0.3)

    def recount(_: ProgressCallback) -> None:
        if job.count("recount") == 4:
            hang.wait(2 * DEADLINE_SECONDS)

    job = FakeJob(recount, reload=reload)
    daemon = make(job)

    def is_not_fed() -> bool:
        before = systemd().count("WATCHDOG=1")
        time.sleep(0.5)
        return job.count("recount") == 4 and systemd().count("WATCHDOG=1") == before

    def script() -> None:
        wait_until("a recount", lambda: systemd() and job.count("recount") == 1)
        reload_settings()
        wait_until("recounts", lambda: systemd() and job.count("recount") == 4)
        wait_until("a watchdog that is not fed", is_not_fed)

    run(job, script, daemon)
    hang.set()


# systemd


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """Listen in place of systemd; call it for the messages so far.

    A test has to call it all the time: the kernel lets a sender wait after some ten messages.
    """
    address = tmp_path / "notify"
    messages: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(address))
        receiver.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(address))

        def read() -> list[str]:
            while True:
                try:
                    messages.append(receiver.recv(4096).decode())
                except BlockingIOError:
                    return messages

        yield read


def test_systemd_is_notified_when_the_daemon_is_ready_has_a_status_and_stops(
    systemd: Callable[[], list[str]],
) -> None:
    job = FakeJob(lambda _: StepOutcome("recounted, 3 changed"), connect=raising(DOWN))
    run_until(job, lambda: "3 changed" in str(systemd()))
    messages = [message for message in systemd() if message != "WATCHDOG=1"]
    assert messages[0].startswith("STATUS=failed: down; next at ")
    assert messages[1] == "READY=1"
    assert messages[-2].startswith("STATUS=recounted, 3 changed; next at ")
    assert messages[-1] == "STOPPING=1"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "reloaded"),
        (ConfigurationError("wrong"), "reload failed, the old settings are kept; see the log"),
    ],
)
def test_systemd_is_told_when_a_reload_starts_and_ends(
    systemd: Callable[[], list[str]], error: Exception | None, status: str
) -> None:
    job = FakeJob(reload=raising(error))
    before = time.monotonic_ns() // 1000

    def script() -> None:
        wait_until("a recount", lambda: "STATUS=done" in str(systemd()))
        reload_settings()
        wait_until("its end", lambda: "RELOADING=1" in str(systemd()) and status in str(systemd()))

    run(job, script)
    messages = [message for message in systemd() if message != "WATCHDOG=1"]
    (start,) = [n for n, message in enumerate(messages) if message.startswith("RELOADING=1")]
    at = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", messages[start])
    assert at
    assert before <= int(at[1]) <= time.monotonic_ns() // 1000
    assert messages[start + 1] == f"READY=1\nSTATUS={status}"


def test_a_reload_before_the_first_connection_does_not_notify_ready(
    systemd: Callable[[], list[str]],
) -> None:
    job = FakeJob(connect=raising(DOWN), reload=raising(ConfigurationError("wrong")))

    def script() -> None:
        wait_until("an attempt", lambda: job.count("connect") == 1)
        reload_settings()
        wait_until(
            "an end of the reload",
            lambda: job.calls[-1][0] == "run_between" and systemd() and job.count("reload"),
        )
        assert "READY=1" not in str(systemd())
        assert "RELOADING=1" not in str(systemd())

    run(job, script, make(job, RetryPolicy(initial_seconds=1000, max_seconds=3000)))


def test_the_watchdog_is_notified_until_the_stall_timeout_without_progress(
    systemd: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    hang = threading.Event()
    fed: list[int] = []

    def recount(on_progress: ProgressCallback) -> None:
        for _ in range(20):
            time.sleep(0.05)
            on_progress("")
        fed.append(systemd().count("WATCHDOG=1"))
        hang.wait(2 * DEADLINE_SECONDS)

    def is_not_fed() -> bool:
        if not fed:
            return False
        before = systemd().count("WATCHDOG=1")
        time.sleep(0.5)
        return systemd().count("WATCHDOG=1") == before

    job = FakeJob(recount, stall_timeout=0.4)
    run_until(job, is_not_fed)
    hang.set()
    assert fed[0] >= 3


# Reload of the real process


@pytest.fixture
def customer(database: Database[Any]) -> ObjectId:
    """A user with three shipped orders."""
    user = database.users.insert_one({}).inserted_id
    database.orders.insert_many([{"customer_id": user, "status": "Shipped"} for _ in range(3)])
    return ObjectId(user)


def points(database: Database[Any], customer: ObjectId) -> Any:
    user = database.users.find_one({"_id": customer})
    assert user
    return user.get("loyalty_points")


def write_settings(file: Path, **settings: str) -> None:
    file.touch(0o600)
    lines = (f"{name}={value}\n" for name, value in settings.items())
    file.write_text("".join(lines), encoding="utf-8")


def test_the_process_reloads_its_file_of_settings_or_keeps_the_old_ones(
    service: Callable[..., Process],
    uri: str,
    database: Database[Any],
    customer: ObjectId,
    tmp_path: Path,
) -> None:
    file = tmp_path / "settings"
    write_settings(file, MONGODB_URI=uri, POINTS_PER_ORDER="2")
    daemon = service("--env-file", str(file))
    daemon.wait_for("outcome=succeeded")
    assert points(database, customer) == 6

    write_settings(file, MONGODB_URI=uri, POINTS_PER_ORDER="5", BATCH_SIZE="0", COUNT_WORKERS="x")
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("ERROR reload_failed ", times=2)
    assert "BATCH_SIZE" in daemon.output
    assert "COUNT_WORKERS" in daemon.output

    write_settings(file, MONGODB_URI=uri, POINTS_PER_ORDER="5")
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("outcome=succeeded", times=2)
    assert points(database, customer) == 15
    assert daemon.stop() == 0
    recounts = [line.split()[2] for line in daemon.lines if " recount outcome=" in line]
    assert len(recounts) == 2, "a failed reload has recounted"


def test_sighup_during_the_start_does_not_end_the_process(
    service: Callable[..., Process], uri: str, database: Database[Any], customer: ObjectId
) -> None:
    daemon = service(MONGODB_URI=uri)
    status = Path(f"/proc/{daemon.pid}/status")

    def is_blocked() -> bool:
        mask = int(status.read_text(encoding="ascii").split("SigBlk:")[1].split()[0], 16)
        return bool(mask & 1 << (signal.SIGHUP - 1))

    wait_until("the entry point", is_blocked)
    daemon.send_signal(signal.SIGHUP)
    daemon.wait_for("INFO reloaded")
    daemon.wait_for("outcome=succeeded")
    assert points(database, customer) == 3
    assert daemon.stop() == 0
