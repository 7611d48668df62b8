"""When to run: the schedule, the retries and systemd, without a database."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import settings_for

import loyalty.daemon as daemon_module
from loyalty.concurrency import ProgressCallback
from loyalty.daemon import Daemon
from loyalty.errors import ConfigurationError, DatabaseUnavailable
from sandbox.mongod import wait_until

Recounting = Callable[[ProgressCallback], str]


class FakeWork:
    """What the daemon is given to do, made of two functions."""

    def __init__(self, recount: Recounting, connect: Callable[[], None]) -> None:
        self.recount = recount
        self.connect = connect

    def run_between(self, seconds: float, on_progress: ProgressCallback) -> None:
        time.sleep(seconds)


class Over:
    """What a worker is given that is left behind: to wait for the end of the tests."""

    def connect(self) -> None: ...

    def recount(self, on_progress: ProgressCallback) -> str:
        return ""

    def run_between(self, seconds: float, on_progress: ProgressCallback) -> None:
        threading.Event().wait()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short pauses, and the signal handlers as they were."""
    monkeypatch.setattr(daemon_module, "INITIAL_BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(daemon_module, "_TICK", 0.05)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make(
    work: Recounting,
    connect: Callable[[], None] = lambda: None,
    *,
    interval: float = 3600,
    stall_timeout: float = 60,
) -> Daemon:
    return Daemon(
        FakeWork(work, connect),
        interval=timedelta(seconds=interval),
        stall_timeout=timedelta(seconds=stall_timeout),
    )


def run_until(daemon: Daemon, ready: Callable[[], object]) -> None:
    """Run it in this thread, and SIGTERM it once `ready`."""

    def stop() -> None:
        try:
            wait_until("ready", ready, 20)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    daemon.run()
    stopper.join()
    # The worker is left behind, and in here it lives on. Without a schedule it would never rest.
    daemon._work = Over()
    daemon.scheduler.clear()


def test_schedule_is_asked_for_the_two_hours_of_the_default() -> None:
    settings = settings_for("mongodb://localhost")
    (job,) = make(lambda _: "", interval=settings.recount_interval.total_seconds()).scheduler.jobs
    assert (job.interval, job.unit) == (7200, "seconds")


def test_it_works_at_once_and_then_not_before_the_interval() -> None:
    calls: list[float] = []

    def work(on_progress: ProgressCallback) -> str:
        calls.append(time.monotonic())
        return "done"

    daemon = make(work)
    (job,) = daemon.scheduler.jobs
    run_until(daemon, lambda: calls)
    assert len(calls) == 1
    assert job.next_run is not None
    assert job.last_run is not None
    assert job.next_run - job.last_run == pytest.approx(
        timedelta(hours=1), abs=timedelta(seconds=1)
    )


def test_what_is_done_meanwhile_is_done_before_it_is_connected_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tries: list[str] = []
    done_after: list[int] = []

    def connect() -> None:
        tries.append("")
        if len(tries) == 1:
            raise DatabaseUnavailable("gone")

    def run_between(work: FakeWork, seconds: float, on_progress: ProgressCallback) -> None:
        done_after.append(len(tries))
        time.sleep(seconds)

    monkeypatch.setattr(FakeWork, "run_between", run_between)
    run_until(make(lambda _: "", connect), lambda: len(tries) == 2)
    assert done_after[0] == 1


def test_a_failure_is_tried_again_after_pauses_that_double(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_module, "MAX_BACKOFF_SECONDS", 0.05)
    outcomes: list[Exception | None] = [
        DatabaseUnavailable("gone"),
        ConfigurationError("no permission"),
        ValueError("a bug"),
        None,
    ]

    def work(on_progress: ProgressCallback) -> str:
        if error := outcomes.pop(0):
            raise error
        return "done"

    daemon = make(work)
    run_until(daemon, lambda: not outcomes)
    assert caplog.messages[:3] == [
        'failed error="gone" retry_in=0.02s',
        'failed error="no permission" retry_in=0.04s',
        "bug retry_in=0.05s",
    ]
    assert [bool(record.exc_info) for record in caplog.records[:3]] == [False, False, True]
    assert not outcomes


def test_pauses_double_also_where_the_work_takes_longer_than_they_do(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_module, "BACKOFF_RESET_SECONDS", 0.4)
    recounts: list[int] = []
    ended: list[bool] = []

    def work(on_progress: ProgressCallback) -> str:
        recounts.append(len(recounts))
        time.sleep(0.6)
        if len(recounts) < 3:
            raise DatabaseUnavailable("gone")
        return "done"

    def run_between(seconds: float, on_progress: ProgressCallback) -> None:
        if len(recounts) == 3 and not ended:  # just after a recount that succeeded
            ended.append(True)
            raise DatabaseUnavailable("ended")
        time.sleep(seconds)

    daemon = make(work)
    # Not of the class: the workers of earlier tests live on.
    monkeypatch.setattr(daemon._work, "run_between", run_between)
    run_until(daemon, lambda: len(recounts) >= 4)
    assert caplog.messages[:3] == [
        'failed error="gone" retry_in=0.02s',
        'failed error="gone" retry_in=0.04s',
        'failed error="ended" retry_in=0.08s',
    ]


def test_the_database_may_be_down_at_start_but_not_be_forbidden() -> None:
    problems: list[Exception] = [
        DatabaseUnavailable("down"),
        DatabaseUnavailable("down"),
        ConfigurationError("no"),
    ]

    def connect() -> None:
        raise problems.pop(0)

    with pytest.raises(ConfigurationError, match="no"):
        make(lambda _: pytest.fail("not connected"), connect).run()
    assert not problems


def test_a_pause_is_never_longer_than_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_module, "INITIAL_BACKOFF_SECONDS", 1000.0)
    calls: list[int] = []

    def work(on_progress: ProgressCallback) -> str:
        calls.append(1)
        raise DatabaseUnavailable("gone")

    run_until(make(work, interval=1), lambda: len(calls) >= 2)


def test_a_recount_longer_than_the_interval_neither_overlaps_nor_piles_up() -> None:
    running = 0
    overlaps: list[int] = []

    def work(on_progress: ProgressCallback) -> str:
        nonlocal running
        running += 1
        overlaps.append(running)
        time.sleep(1.3)
        running -= 1
        return "done"

    started = time.monotonic()
    run_until(make(work, interval=1), lambda: len(overlaps) >= 3)
    assert set(overlaps) == {1}
    assert time.monotonic() - started >= 2 * (1.3 + 1)


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """A socket as systemd's; call it for what has been said so far."""
    address = tmp_path / "notify"
    said: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(address))
        receiver.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(address))

        def read() -> list[str]:
            while True:
                try:
                    said.append(receiver.recv(4096).decode())
                except BlockingIOError:
                    return said

        yield read


def test_systemd_hears_ready_once_connected_then_status_and_stopping(
    systemd: Callable[[], list[str]],
) -> None:
    problems = [DatabaseUnavailable("down")]

    def connect() -> None:
        if problems:
            raise problems.pop(0)

    run_until(
        make(lambda _: "recounted, 3 changed", connect), lambda: "3 changed" in str(systemd())
    )
    said = [line for line in systemd() if line != "WATCHDOG=1"]
    assert said[0].startswith("STATUS=failed: down; next at ")
    assert said[1] == "READY=1"
    assert said[-2].startswith("STATUS=recounted, 3 changed; next at ")
    assert said[-1] == "STOPPING=1"


def test_the_watchdog_is_fed_while_work_moves_and_let_go_when_it_hangs(
    systemd: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    hang = threading.Event()
    fed: list[int] = []

    def work(on_progress: ProgressCallback) -> str:
        for _ in range(20):  # long, but it moves
            time.sleep(0.05)
            on_progress("")
        fed.append(systemd().count("WATCHDOG=1"))
        hang.wait(20)
        return "done"

    def let_go() -> bool:
        if not fed:
            return False
        before = systemd().count("WATCHDOG=1")
        time.sleep(0.5)
        return systemd().count("WATCHDOG=1") == before

    run_until(make(work, stall_timeout=0.4), let_go)
    hang.set()
    assert fed[0] >= 3


def test_a_watchdog_meant_for_another_process_is_not_fed(
    systemd: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    assert daemon_module._watchdog_seconds() == 0.1
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert daemon_module._watchdog_seconds() == float("inf")


def test_nobody_listens_to_notifications(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    calls: list[int] = []

    def work(on_progress: ProgressCallback) -> str:
        calls.append(1)
        return ""

    run_until(make(work), lambda: calls)
