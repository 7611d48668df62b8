"""The daemon's job: the connection, full recounts, and live updates between them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from math import inf

from config import Settings
from loyalty.concurrency import ProgressCallback
from loyalty.daemon import StepOutcome
from loyalty.errors import (
    AuthenticationFailed,
    ClientUnusable,
    ConfigurationError,
    DatabaseUnavailable,
    RecountRefused,
    ResyncRequired,
)
from loyalty.heartbeat import HEARTBEAT_INTERVAL
from loyalty.history import History
from loyalty.live.updater import LiveUpdater
from loyalty.live.watcher import LiveLimits
from loyalty.logs import log, set_log_format
from loyalty.metrics import Metrics
from loyalty.mongo.connection import Connection
from loyalty.recount.preflight import connect_and_verify
from loyalty.recount.runner import RecountRequest, run_recount
from loyalty.state import ServiceState

REFUSED_RETRY_SECONDS = 600.0  # an operator may correct the data meanwhile
MIN_RESYNC_INTERVAL_SECONDS = 10.0  # a stream that ends immediately must not cause a loop


class Service:
    """Implements `daemon.Job`, which documents the methods."""

    def __init__(
        self,
        settings: Settings,
        load_settings: Callable[[], Settings],
        *,
        limits: LiveLimits | None = None,
        heartbeat_interval: timedelta = HEARTBEAT_INTERVAL,
    ) -> None:
        self._load_settings = load_settings
        self._limits = limits or LiveLimits()
        self._heartbeat_seconds = heartbeat_interval.total_seconds()
        self._heartbeat_at = self._resync_at = -inf
        self._connection: Connection | None = None
        self._history: History  # set by `connect`
        self.state = ServiceState()
        self._apply_settings(settings)

    def _apply_settings(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics(settings, self.state)
        self.updater = LiveUpdater(settings, self._limits, self.state)

    def connect(self) -> Connection:
        """Connect with the current settings. Raises ServiceError.

        After a rejected login, it reads the settings again, and connects with the new connection
        string if that has changed, for example by a new password. Other settings stay as they are.
        """
        self.metrics.refresh_if_due()
        try:
            self._connection = connect_and_verify(self.settings, writing=True)
        except AuthenticationFailed:
            uri = self._read_settings().mongodb_uri
            if uri == self.settings.mongodb_uri:
                raise
            log.info("uri_reloaded")
            self.settings = replace(self.settings, mongodb_uri=uri)
            self._connection = connect_and_verify(self.settings, writing=True)
        self._history = History(self._connection.recounts, self.settings)
        return self._connection

    def disconnect(self) -> None:
        """Close the change stream and the connection; the next recount connects again."""
        self.updater.stop("disconnected")
        if self._connection is not None:
            self._connection.client.close()
            self._connection = None

    def reload(self) -> None:
        settings = self._read_settings()
        self.disconnect()
        self._apply_settings(settings)
        self._set_up_log()

    def _read_settings(self) -> Settings:
        """Load the settings again; the log keeps its format and level."""
        try:
            return self._load_settings()
        finally:
            self._set_up_log()

    def _set_up_log(self) -> None:
        set_log_format(self.settings.log_format)
        log.setLevel(self.settings.log_level)

    @property
    def interval(self) -> timedelta:
        return self.settings.recount_interval

    @property
    def stall_timeout(self) -> timedelta:
        # The driver waits for a reply for COUNT_TIMEOUT + 30 s, its socket timeout, and repeats a
        # read once. Progress is reported after each long query.
        return 2 * (self.settings.count_timeout + timedelta(minutes=1))

    def recount(self, on_progress: ProgressCallback) -> StepOutcome:
        def report_progress(progress: str) -> None:
            self.metrics.refresh_if_due()
            on_progress(progress)

        try:
            with self.metrics.count_failures(), self._clean_up_on_error():
                connection = self._connection or self.connect()
                # The recount must not read at an earlier time than the last live update, also after
                # a failover to a server that is behind: a stale count would replace newer points.
                request = RecountRequest(not_before=self.updater.start(connection))
                result = run_recount(
                    connection, self.settings, self._history, request, report_progress
                )
        except RecountRefused as error:
            log.error('refused reason="%s"', error)
            return StepOutcome(f"refused: {error}", REFUSED_RETRY_SECONDS)
        self.state.result = result
        self.updater.finish_recount(result)
        self.metrics.record_recount(result)
        return StepOutcome(self.state.status, self.updater.retry_after_seconds())

    def run_between(self, seconds: float, on_progress: ProgressCallback) -> StepOutcome | None:
        """Do live updates for about `seconds`, or a full recount if they need a resync."""
        self.metrics.refresh_if_due()
        if self._connection is None or not self.updater.state.has_stream:
            time.sleep(seconds)
            return None
        with self._clean_up_on_error():
            try:
                self.updater.update(self._connection, seconds, on_progress)
                self._report_if_due(self._connection, on_progress)
            except ResyncRequired as error:
                self.updater.stop_for_resync()
                return self._resync(error, on_progress)
        return None

    def _resync(self, reason: ResyncRequired, on_progress: ProgressCallback) -> StepOutcome:
        if time.monotonic() - self._resync_at < MIN_RESYNC_INTERVAL_SECONDS:
            # The daemon retries with backoff.
            raise DatabaseUnavailable(f"{reason}, again within {MIN_RESYNC_INTERVAL_SECONDS:g} s")
        log.info('resync reason="%s"', reason)
        try:
            return self.recount(on_progress)
        finally:
            self._resync_at = time.monotonic()

    @contextmanager
    def _clean_up_on_error(self) -> Iterator[None]:
        """Close the stream on any error: the changes of an update that failed are lost."""
        try:
            yield
        except BaseException as error:
            self.updater.stop(type(error).__name__)
            # The next recount connects again, and verifies the access.
            if isinstance(error, ConfigurationError | ClientUnusable):
                self.disconnect()
            if isinstance(error, ClientUnusable):
                # After a restore, the cluster time may be before that of the last recount.
                self.updater = LiveUpdater(self.settings, self._limits, self.state)
            raise

    def _report_if_due(self, connection: Connection, on_progress: ProgressCallback) -> None:
        """Check the index, and report to the heartbeat, the metrics and systemd, if that is due."""
        now = time.monotonic()
        if self.state.live is None or now - self._heartbeat_at < self._heartbeat_seconds:
            return
        self._heartbeat_at = now
        self.updater.check_index(connection)
        self._history.write_heartbeat(self.state.live)
        self.metrics.write()
        on_progress(self.state.status)
