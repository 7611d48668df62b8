"""When to run: the schedule, the retries, the signals and systemd. Never orders or points.

A worker thread connects and does the work; the main thread only waits for signals and speaks to
systemd. So a signal is answered at once, also while the worker waits for a server that counts, or
hangs: every write can be repeated, and the worker is simply left behind.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Protocol

import schedule

from loyalty.concurrency import ProgressCallback
from loyalty.errors import ConfigurationError, ServiceError

log = logging.getLogger("loyalty")

INITIAL_BACKOFF_SECONDS = 10.0
MAX_BACKOFF_SECONDS = 300.0
BACKOFF_RESET_SECONDS = 60.0  # seconds without a failure, after which pauses are short again
_TICK = 1.0  # the longest time, in seconds, between two looks at the clocks


class Job(Protocol):
    """What a daemon does; all of it may raise ServiceError."""

    def connect(self) -> object:
        """Do once what has to succeed before anything else."""

    def recount(self, on_progress: ProgressCallback) -> str:
        """Do it all once, and return how it went in a few words; call `moved` meanwhile."""

    def run_between(self, seconds: float, on_progress: ProgressCallback) -> None:
        """Do what there is to do while waiting, or nothing, for about so long.

        That may be before `connect` has succeeded.
        """


class Daemon:
    """Lets `work` connect until it succeeds, then recount at once and after every `interval`.

    `patience` is how long it may be silent before systemd's watchdog is no longer fed. Whatever
    fails is logged and tried again after a pause; only Misconfigured from the first `connect` ends
    the daemon.
    """

    def __init__(self, work: Job, *, interval: timedelta, stall_timeout: timedelta) -> None:
        self._work = work
        self._interval = interval.total_seconds()
        self._patience = stall_timeout.total_seconds()
        self._connected = False
        self._pause = INITIAL_BACKOFF_SECONDS
        self._failed = float("-inf")
        self._due = 0.0
        self._moved = time.monotonic()
        self._fatal: BaseException | None = None
        # Not the module-wide scheduler of `schedule`, which belongs to whoever imports it.
        self.scheduler = schedule.Scheduler()
        self.scheduler.every(int(self._interval)).seconds.do(self._attempt, self._recount)

    def run(self) -> None:
        """Run until SIGTERM or SIGINT. Raises what ended the worker, should that happen."""
        receive, send = socket.socketpair()
        with receive, send:
            # A handler may interrupt anything, so ours do nothing: Python itself writes the
            # signal's number to the socket. They stay set, so that a second signal is harmless.
            send.setblocking(False)
            signal.set_wakeup_fd(send.fileno())
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _ignore)
            worker = threading.Thread(target=self._run_worker, args=(send,), daemon=True)
            worker.start()
            seconds = _watchdog_seconds()
            while not select.select([receive], [], [], min(_TICK, seconds / 2))[0]:
                if time.monotonic() - self._moved < self._patience:
                    _notify("WATCHDOG=1")
            received = receive.recv(1)[0]
            signal.set_wakeup_fd(-1)
        if self._fatal is not None:
            raise self._fatal
        _notify("STOPPING=1")
        log.info("stopped signal=%s", signal.Signals(received).name)

    def _run_worker(self, wake: socket.socket) -> None:
        try:
            while not self._attempt(self._connect):
                while time.monotonic() < self._due:
                    self._wait()
            self._due = 0.0
            while True:
                # The scheduler goes by the wall clock, so the hours count that a machine sleeps.
                # A clock set back would stall it; the monotonic one would not.
                if time.monotonic() >= self._due:
                    self.scheduler.run_all()
                else:
                    self.scheduler.run_pending()
                self._wait()
        except BaseException as error:  # noqa: BLE001 -- the main thread raises it again
            self._fatal = error
            wake.send(b"\0")

    def _connect(self) -> str:
        self._work.connect()
        self._connected = True
        _notify("READY=1")
        return "connected"

    def _recount(self) -> str:
        self._move("recounting")
        return self._work.recount(self._move)

    def _attempt(self, step: Callable[[], str]) -> bool:
        """Do `step`, decide when it is due next, and return whether it succeeded."""
        began = time.monotonic()
        try:
            status = step()
        except Exception as error:
            if isinstance(error, ConfigurationError) and not self._connected:
                raise  # only a person can put that right, and is likely still watching
            self._fail(error, began)
            return False
        # The time that work takes is no time without a failure.
        self._failed += time.monotonic() - began
        self._plan(status, self._interval)
        return True

    def _fail(self, error: Exception, began: float) -> None:
        """Log an error of what began then, and plan the next recount after a pause.

        This is where errors end.
        """
        longest = min(MAX_BACKOFF_SECONDS, self._interval)
        lately = began - self._failed < self._pause + BACKOFF_RESET_SECONDS
        self._pause = min(2 * self._pause if lately else INITIAL_BACKOFF_SECONDS, longest)
        self._failed = time.monotonic()
        if isinstance(error, ServiceError):
            fields = {"error": str(error), "retry_in": self._pause}
            log.error(
                'failed error="%s" retry_in=%gs', error, self._pause, extra={"fields": fields}
            )
            status = f"failed: {error}"
        else:
            log.error("bug retry_in=%gs", self._pause, exc_info=error)
            status = "failed: a bug, see the log"
        self._plan(status, self._pause)

    def _plan(self, status: str, seconds: float) -> None:
        self._due = time.monotonic() + seconds
        at = datetime.now(UTC) + timedelta(seconds=seconds)
        _notify(f"STATUS={status}; next at {at:%Y-%m-%d %H:%M:%S} UTC")

    def _wait(self) -> None:
        self._move("")
        seconds = min(_TICK, max(0.0, self._due - time.monotonic()))
        try:
            self._work.run_between(seconds, self._move)
        except Exception as error:  # noqa: BLE001 -- logged there
            self._fail(error, time.monotonic())

    def _move(self, progress: str) -> None:
        self._moved = time.monotonic()
        if progress:
            _notify(f"STATUS={progress}")


def _ignore(number: int, frame: object) -> None: ...


def _notify(state: str) -> None:
    """Tell systemd, as sd_notify(3) does; nothing happens where no one listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out, suppress(OSError):
            out.sendto(state.encode(), address.replace("@", "\0", 1))


def _watchdog_seconds() -> float:
    """Return the time within which systemd wants to hear from us, see sd_watchdog_enabled(3)."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return float("inf")
    return int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 or float("inf")
