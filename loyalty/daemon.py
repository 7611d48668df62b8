"""The schedule, the backoff and the signals. It contains no counting code.

A worker thread does the job. The main thread only waits for signals, and sends WATCHDOG=1 to
systemd. So a signal is handled immediately, also while the worker waits for a server that does not
answer. The process ends without waiting for the worker, because every write can be repeated.
"""

import select
import signal
import socket
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import ceil
from typing import Protocol

import schedule

from loyalty import systemd
from loyalty.concurrency import ProgressCallback
from loyalty.errors import ConfigurationError, ServiceError
from loyalty.logs import log
from loyalty.retry import Backoff


@dataclass(frozen=True)
class StepOutcome:
    """The end of a step that raised no error."""

    status: str
    """One line for `systemctl status`."""
    next_after_seconds: float | None = None
    """When the next step is due, if that is before the interval has passed."""


class Job(Protocol):
    """The work that the daemon repeats. Each method may raise ServiceError.

    The properties are read at start and after each `reload`.
    """

    @property
    def interval(self) -> timedelta:
        """The time between two recounts."""

    @property
    def stall_timeout(self) -> timedelta:
        """How long a method may go without calling `on_progress` before it counts as hung."""

    def connect(self) -> object:
        """Connect; this must succeed once before the first recount."""

    def recount(self, on_progress: ProgressCallback) -> StepOutcome:
        """Do one recount. A refused recount is an outcome, not an error."""

    def run_between(self, seconds: float, on_progress: ProgressCallback) -> StepOutcome | None:
        """Do live updates for about `seconds`, or a full recount if they need one.

        Return the outcome of that recount, or None. Also called before `connect` has succeeded.
        """

    def reload(self) -> None:
        """Read the settings again, for the next `recount` or `connect`.

        Raises ConfigurationError if one is wrong; the current settings then stay in use.
        """


class Daemon:
    """Connects, recounts immediately and after each interval, until SIGTERM or SIGINT.

    - An error is logged, and the step is repeated after a pause that `backoff` decides. Only a
      ConfigurationError before the first connection ends the daemon, because only an operator can
      correct it.
    - SIGHUP makes the job reload its settings between two recounts. If they are right, a recount
      follows immediately; if not, the error is logged and nothing else changes.
    - WATCHDOG=1 is sent until the job has made no progress for its `stall_timeout`.
    - The worker starts due or requested work within `tick_seconds`.
    """

    def __init__(
        self, job: Job, *, backoff: Backoff | None = None, tick_seconds: float = 1.0
    ) -> None:
        self._job = job
        self._backoff = backoff or Backoff()
        self._tick_seconds = tick_seconds
        self._has_connected = False
        self._progress_at = time.monotonic()
        self._reload_requested = threading.Event()
        self._fatal: BaseException | None = None
        # Not the module-wide scheduler of `schedule`, which other code in this process may use.
        self.scheduler = schedule.Scheduler()
        self._read_job_times()
        self._schedule_step(0)

    def run(self) -> None:
        """Run until SIGTERM or SIGINT. Raises the error that ended the worker, if one did."""
        receive, send = socket.socketpair()
        with receive, send:
            # Python itself writes the number of each signal to the socket, so the handlers do
            # nothing. They stay set to the end, because a second signal must do no harm.
            send.setblocking(False)
            signal.set_wakeup_fd(send.fileno())
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, lambda *_: None)
            # The entry point blocks it: a SIGHUP during the start must not end the process.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
            worker = threading.Thread(target=self._run_worker, args=(send,), daemon=True)
            worker.start()
            received = self._wait_for_stop(receive)
            signal.set_wakeup_fd(-1)
        if self._fatal is not None:
            raise self._fatal
        systemd.notify("STOPPING=1")
        log.info("stopped signal=%s", signal.Signals(received).name)

    def _wait_for_stop(self, signals: socket.socket) -> int:
        timeout = min(self._tick_seconds, systemd.read_watchdog_seconds() / 2)
        while True:
            if select.select([signals], [], [], timeout)[0]:
                number = signals.recv(1)[0]
                if number != signal.SIGHUP:
                    return number
                self._reload_requested.set()
            if time.monotonic() - self._progress_at < self._stall_seconds:
                systemd.notify("WATCHDOG=1")

    def _run_worker(self, wake: socket.socket) -> None:
        try:
            while True:
                if self._reload_requested.is_set():
                    self._reload()
                if time.monotonic() >= self._due_at:
                    self.scheduler.run_all()
                else:
                    self.scheduler.run_pending()
                self._run_between()
        except BaseException as error:  # noqa: BLE001 -- the main thread raises it again
            self._fatal = error
            wake.send(b"\0")  # no signal has the number 0

    def _schedule_step(self, seconds: float) -> None:
        """Let the next step start after `seconds`."""
        # The scheduler follows the wall clock, so that time in which the machine was suspended
        # counts. The monotonic clock helps when the wall clock is set back.
        self._due_at = time.monotonic() + seconds
        self.scheduler.clear()
        self.scheduler.every(max(1, ceil(seconds))).seconds.do(self._step)

    def _step(self) -> None:
        """Recount, or connect if that has not succeeded yet; schedule the next step."""
        started = time.monotonic()
        try:
            outcome = self._recount() if self._has_connected else self._connect()
        except Exception as error:
            if isinstance(error, ConfigurationError) and not self._has_connected:
                raise  # only an operator can correct it
            self._handle_failure(error, started)
        else:
            self._backoff.record_work(time.monotonic() - started)
            self._handle_outcome(outcome)

    def _connect(self) -> StepOutcome:
        self._job.connect()
        self._has_connected = True
        systemd.notify("READY=1")
        return StepOutcome("connected", next_after_seconds=0)

    def _recount(self) -> StepOutcome:
        self._report_progress("recounting")
        return self._job.recount(self._report_progress)

    def _run_between(self) -> None:
        self._report_progress("")
        started = time.monotonic()
        seconds = min(self._tick_seconds, max(0.0, self._due_at - started))
        try:
            if outcome := self._job.run_between(seconds, self._report_progress):
                self._backoff.record_work(time.monotonic() - started)
                self._handle_outcome(outcome)
        except Exception as error:  # noqa: BLE001 -- `_handle_failure` logs it
            self._handle_failure(error, started)

    def _handle_outcome(self, outcome: StepOutcome) -> None:
        after, interval = outcome.next_after_seconds, self._interval_seconds
        self._schedule_next(outcome.status, interval if after is None else min(after, interval))

    def _handle_failure(self, error: Exception, started: float) -> None:
        """Log the error of a step that started at `started`; schedule the next after a pause."""
        pause = self._backoff.record_failure(started, max_seconds=self._interval_seconds)
        shown = round(pause, 2)
        if isinstance(error, ServiceError):
            extra = {"fields": {"error": str(error), "retry_in": pause}}
            log.error('failed error="%s" retry_in=%gs', error, shown, extra=extra)
            self._schedule_next(f"failed: {error}", pause)
        else:
            extra = {"fields": {"error": type(error).__name__, "retry_in": pause}}
            log.error("internal_error retry_in=%gs", shown, exc_info=error, extra=extra)
            self._schedule_next("failed: internal error, see the log", pause)

    def _schedule_next(self, status: str, seconds: float) -> None:
        self._schedule_step(seconds)
        at = datetime.now(UTC) + timedelta(seconds=seconds)
        systemd.notify(f"STATUS={status}; next at {at:%Y-%m-%d %H:%M:%S} UTC")

    def _report_progress(self, progress: str) -> None:
        self._progress_at = time.monotonic()
        if progress:
            systemd.notify(f"STATUS={progress}")

    def _reload(self) -> None:
        self._reload_requested.clear()
        if self._has_connected:  # otherwise READY=1 below would report a complete start
            # Type=notify-reload needs the time, to know that this answers its latest SIGHUP.
            systemd.notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        status = "reload failed, the old settings are kept; see the log"
        try:
            self._job.reload()
        except ServiceError as error:
            for problem in error.problems:
                fields = {"error": problem}
                log.error('reload_failed error="%s"', problem, extra={"fields": fields})
        except Exception:  # the old settings still work
            log.exception("internal_error during=reload")
        else:
            self._read_job_times()
            self._backoff.reset()
            self._schedule_step(0)
            log.info("reloaded")
            status = "reloaded"
        if self._has_connected:
            systemd.notify("READY=1", f"STATUS={status}")

    def _read_job_times(self) -> None:
        self._interval_seconds = self._job.interval.total_seconds()
        self._stall_seconds = self._job.stall_timeout.total_seconds()
