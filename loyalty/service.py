"""What the daemon repeats: full recounts, live updates in between, and the connection it keeps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from math import inf

from bson import ObjectId, Timestamp

from config import Settings
from loyalty import report
from loyalty.concurrency import ProgressCallback
from loyalty.errors import ClientUnusable, ConfigurationError, DatabaseUnavailable, RecountRefused
from loyalty.history import HEARTBEAT, History
from loyalty.live.events import PendingChanges
from loyalty.live.watcher import ChangeStreamWatcher, open_watcher
from loyalty.metrics import Metrics
from loyalty.mongo.connection import Connection
from loyalty.recount.counter import Customers
from loyalty.recount.customer_ids import any_case
from loyalty.recount.runner import RecountRequest, connect_and_verify, run_recount
from loyalty.recount.tally import FEW_PERCENT, Result, Totals, exceeds_share

log = logging.getLogger("loyalty")

_ODD_CUSTOMERS = 1_000  # each of which is looked for in 256 forms
_QUIET = 1.0  # seconds without a change, after which a mass change has come to its end
_NEVER = Timestamp(0, 0)


class Service:
    """Does the daemon's work; makes a new connection when the one it keeps is rejected."""

    def __init__(self, settings: Settings, reload: Callable[[], Settings]) -> None:
        self._settings = settings
        self._reload = reload
        self._connection: Connection | None = None
        self._history = History(None)
        self._metrics = Metrics(settings)
        self._live: ChangeStreamWatcher | None = None
        self._warned = False
        self._last = Result(datetime.now(UTC), datetime.now(UTC))  # full recount
        self._newest = _NEVER  # time that a live update was about
        self._losers = 0  # since the last full recount, less those who have gained
        self._held_at = -inf
        self._beat_at = 0.0

    def connect(self) -> Connection:
        """Connect, as the settings are. Raises ServiceError."""
        self._metrics.refresh_if_due()
        self._connection = connect_and_verify(self._settings, writing=True)
        self._history = History(self._connection.recounts)
        return self._connection

    def recount(self, on_progress: ProgressCallback) -> str:
        """Recount everyone, and return how it went, for a person. Raises ServiceError."""

        def moving(progress: str) -> None:
            self._metrics.refresh_if_due()
            on_progress(progress)

        try:
            with self._metrics.count_failures(), self._stop_live_on_failure():
                connection = self._connection or self._reconnect()
                since = self._watch(connection)
                # Also where another server answers, or one that is behind: nothing older is written
                # over what is known to be newer.
                task = RecountRequest(at=max(since, self._newest))
                result = run_recount(connection, self._settings, self._history, task, moving)
        except RecountRefused as error:  # to try again soon would not help; the next is on schedule
            log.error("refused %s", error)
            return f"refused: {error}"
        except (ClientUnusable, ConfigurationError):
            if self._connection is not None:
                self._connection.client.close()
                self._connection = None
            raise
        self._metrics.record_recount(result)
        self._last, self._losers = result, 0
        if self._live is not None and result.oldest_snapshot is not None:
            self._live.discard_until(result.oldest_snapshot)
        return report.systemd_status(result)

    def _reconnect(self) -> Connection:
        try:
            self._settings = self._reload()  # the password may have changed, and the file with it
        except ConfigurationError as error:
            raise ConfigurationError(str(error)) from error
        return self.connect()

    def run_between(self, seconds: float, on_progress: ProgressCallback) -> None:
        """Do live updates for about so long. Raises ServiceError if that cannot go on.

        Then everyone is to be recounted.
        """
        self._metrics.refresh_if_due()
        if self._live is None or self._connection is None:
            time.sleep(seconds)
            return
        with self._stop_live_on_failure():
            self._update(self._connection, self._live, seconds, on_progress)

    @contextmanager
    def _stop_live_on_failure(self) -> Iterator[None]:
        """Should anything fail: give up the stream with its marks; a full recount opens another."""
        try:
            yield
        except BaseException:
            self._stop_watching()
            raise

    def _watch(self, connection: Connection) -> Timestamp:
        """Open the stream if that is wanted; return the time from which on it tells all."""
        if self._live is not None or not self._settings.live_updates:
            return _NEVER
        try:
            self._live, after = open_watcher(connection, self._settings)
        except ConfigurationError as error:
            if not self._warned:
                log.warning('not_live error="%s"', error)
            self._warned = True
            return _NEVER
        self._warned = False
        log.info("live since=%s", f"{self._live.since:%Y-%m-%dT%H:%M:%SZ}")
        return after

    def _stop_watching(self) -> None:
        if self._live is not None:
            self._live.close()
            self._live = None
            self._metrics.not_live()
            log.info("live_ended until the next recount of everyone")

    def _update(
        self,
        connection: Connection,
        live: ChangeStreamWatcher,
        seconds: float,
        on_progress: ProgressCallback,
    ) -> None:
        if live.paused:  # and so no heartbeat, which would call the points fresh
            live.check()
            if live.idle_seconds() > _QUIET:
                raise DatabaseUnavailable(
                    "live updates would take points from many users: recount everyone"
                )
            time.sleep(min(seconds, _QUIET / 4))
            return
        if marks := live.pop_pending(seconds):
            self._recount_marked(connection, live, marks, on_progress)
        due = time.monotonic() - self._beat_at >= HEARTBEAT.total_seconds()
        if due and not live.paused:
            self._beat_at = time.monotonic()
            heartbeat = live.heartbeat()
            self._history.write_heartbeat(heartbeat)
            self._metrics.live(heartbeat.waiting, live.lag())
            on_progress(report.status_of_live(heartbeat))

    def _recount_marked(
        self,
        connection: Connection,
        live: ChangeStreamWatcher,
        marks: PendingChanges,
        on_progress: ProgressCallback,
    ) -> None:
        customers = self._customers(marks)
        self._newest = max(self._newest, marks.time)
        task = RecountRequest(customers=customers, at=marks.time, guard=self._too_many_losers)
        try:
            result = run_recount(connection, self._settings, History(None), task, on_progress)
        except RecountRefused as error:
            self._pause(live, error)
            return
        totals = result.totals
        self._losers = max(0, self._losers + totals.decreased - totals.increased)
        live.customers_updated += totals.changed - result.failed_updates
        live.last_update = datetime.now(UTC)
        log.debug("live_update customers=%d changed=%d", len(customers), totals.changed)

    def _pause(self, live: ChangeStreamWatcher, why: RecountRefused) -> None:
        """Hold live updates back: a mass change, and the guard is to judge the whole of it.

        Once it is over, everyone is recounted. Another within the interval may be a piece of the
        same: then the schedule decides when, as it does without live updates.
        """
        now, interval = time.monotonic(), self._settings.recount_interval.total_seconds()
        again = now - self._held_at < interval
        live.paused, self._held_at = True, now
        self._metrics.not_live()
        log.warning("held %s%s", why, ", again: until the next recount" if again else "")
        if again:
            self._stop_watching()

    def _customers(self, marks: PendingChanges) -> Customers:
        odd_forms = self._last.odd_forms
        customers = marks.forms({} if odd_forms is None else odd_forms)
        if not self._last.has_customer_index:  # all orders are read, and few: see `open_live`
            return [(own, []) for own, _ in customers]
        if odd_forms is not None:
            return customers
        if len(customers) > _ODD_CUSTOMERS:
            raise DatabaseUnavailable(
                "too many changes while ids are in mixed case: recount everyone"
            )
        return [
            (own, [*forms, *any_case(own)] if isinstance(own, ObjectId) else forms)
            for own, forms in customers
        ]

    def _too_many_losers(self, totals: Totals) -> str | None:
        losers = self._losers + totals.decreased - totals.increased
        users_with_points_before = self._last.totals.users_with_points_after
        is_wanted = self._settings.max_decrease_percent < 100
        if not (is_wanted and exceeds_share(losers, users_with_points_before, FEW_PERCENT)):
            return None
        return (
            f"live updates would take points from {losers:,} of "
            f"{users_with_points_before:,} users in all"
        )
