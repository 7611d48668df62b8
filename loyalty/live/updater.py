"""Live updates: recount the customers whose orders have changed, as soon as they have."""

import time
from contextlib import suppress
from datetime import UTC, datetime
from math import inf

from bson import Timestamp

from config import Settings
from loyalty.concurrency import ProgressCallback
from loyalty.errors import DatabaseUnavailable, RecountRefused, ResyncRequired, ServiceError
from loyalty.heartbeat import Heartbeat
from loyalty.history import History
from loyalty.live.events import NEVER, PendingChanges
from loyalty.live.lookup import find_customers
from loyalty.live.opening import describe_mixed_case, open_watcher, warn_if_pre_images_are_off
from loyalty.live.state import TRANSITIONS, LiveState
from loyalty.live.watcher import ChangeStreamWatcher, LiveLimits
from loyalty.logs import WarnOnce, log
from loyalty.mongo.connection import Connection
from loyalty.recount.counter import Customers
from loyalty.recount.customer_ids import indexable_forms
from loyalty.recount.index import find_index_problem
from loyalty.recount.result import Result
from loyalty.recount.runner import RecountRequest, run_recount
from loyalty.recount.safety import check_live_update
from loyalty.recount.tally import Totals
from loyalty.retry import REOPEN_STREAM_BACKOFF
from loyalty.state import ServiceState

_PAUSED_POLL_SECONDS = 0.25


class LiveUpdater:
    """Owns the change stream, its pending changes and the safety check of live updates.

    It is used by one thread. Its methods raise ServiceError; the caller then calls `stop`.
    """

    def __init__(self, settings: Settings, limits: LiveLimits, service_state: ServiceState) -> None:
        self.state = LiveState.OFF
        self.newest_read = NEVER
        """The newest cluster time that a recount has read at. The next must not read before it."""
        self._settings = settings
        self._limits = limits
        self._service_state = service_state
        self._watcher: ChangeStreamWatcher | None = None
        self._is_started = False
        """Whether the log says that live updates are running."""
        self._is_opening_blocked = False
        """Until a full recount has succeeded."""
        self._failed_openings = 0
        self._warn_once = WarnOnce()
        self._full_recount: Result | None = None
        self._decreased = 0
        """The number of decreases in live updates since the last full recount."""
        self._paused_at = self._update_started_at = -inf
        self._as_of = NEVER
        self._last_update: datetime | None = None
        self._users_updated = 0

    def _enter(self, state: LiveState) -> None:
        """Go to another state; the change stream is closed if the state has none."""
        assert state is self.state or (self.state, state) in TRANSITIONS, f"{self.state} -> {state}"
        if self._watcher is not None and not state.has_stream:
            self._watcher.close()
            self._watcher = None
        self.state = state
        self._report_state()

    def start(self, connection: Connection) -> Timestamp:
        """Open the change stream before a full recount, if live updates are wanted.

        Returns the oldest cluster time that the recount may read at. If the stream cannot be
        opened, this logs a warning, and the recount runs without it.
        """
        if self._watcher is not None or not self._settings.live_updates or self._is_opening_blocked:
            return self.newest_read
        try:
            self._watcher = open_watcher(connection, self._settings, self._limits)
        except ServiceError as error:
            self._warn_once("live_updates_unavailable", error)
            is_transient = isinstance(error, DatabaseUnavailable)
            self._failed_openings = self._failed_openings + 1 if is_transient else 0
            return self.newest_read
        self._failed_openings = 0
        warn_if_pre_images_are_off(connection)
        self._enter(LiveState.OPENING)
        self._last_update, self._users_updated = None, 0
        return max(self._watcher.start_after, self.newest_read)

    def finish_recount(self, result: Result) -> None:
        """Go live after a full recount, if the change stream is open and no id is in mixed case."""
        self._full_recount = result
        self._decreased = 0
        self._is_opening_blocked = False
        self.newest_read = max([self.newest_read, *result.count.snapshots])
        if self._watcher is None:
            self.stop("no change stream")
            return
        if result.count.has_mixed_case_ids:
            self._warn_once("live_updates_unavailable", describe_mixed_case(self._settings))
            self.stop("ids in mixed case")
            return
        self._as_of = max(self._as_of, min(result.count.snapshots, default=NEVER))
        if self.state is LiveState.OPENING:
            self._warn_once.reset("live_updates_unavailable")
            since = self._watcher.start_after.as_datetime()
            log.info("live_updates_started since=%s", f"{since:%Y-%m-%dT%H:%M:%SZ}")
            self._is_started = True
        self._enter(LiveState.LIVE)

    def retry_after_seconds(self) -> float | None:
        """Return the seconds until the stream is opened again after a transient error, or None."""
        failures = self._failed_openings
        return REOPEN_STREAM_BACKOFF.delay_seconds(failures) if failures else None

    def stop(self, reason: str) -> None:
        """Close the change stream until the next full recount, and discard the pending changes."""
        if self._is_started:
            log.info('live_updates_stopped until="the next full recount" reason="%s"', reason)
            self._is_started = False
        self._enter(LiveState.OFF)

    def stop_for_resync(self) -> None:
        """Close the change stream. The caller does a full recount immediately."""
        self._enter(LiveState.RESYNC)

    def update(self, connection: Connection, seconds: float, on_progress: ProgressCallback) -> None:
        """Wait up to `seconds` for pending changes, and recount their customers.

        Raises ResyncRequired when only a full recount helps, and ServiceError.
        """
        watcher = self._watcher
        assert watcher is not None
        if self.state is LiveState.PAUSED:
            self._check_pause(watcher)
            time.sleep(min(seconds, _PAUSED_POLL_SECONDS))
            return
        next_at = self._update_started_at + self._limits.min_interval_seconds
        time.sleep(max(0.0, next_at - time.monotonic()))
        changes = watcher.pop_pending(seconds)
        if changes:
            self._update_started_at = time.monotonic()
            self._recount_customers(connection, changes, on_progress)
        if self.state is LiveState.LIVE:  # not if the changes were a mass change
            self._as_of = max(self._as_of, changes.reported_until)
            self._report_state()

    def _check_pause(self, watcher: ChangeStreamWatcher) -> None:
        """Raise ResyncRequired if the mass change is over, or the pause has taken too long."""
        watcher.check()
        paused_for = time.monotonic() - self._paused_at
        is_quiet = watcher.idle_seconds() > self._limits.quiet_seconds
        if is_quiet or paused_for > self._limits.max_pause_seconds:
            raise ResyncRequired("the pause of live updates has ended")

    def check_index(self, connection: Connection) -> None:
        """Raise ResyncRequired if each update would read all orders, because the index was dropped.

        The full recount that follows does not open the stream, until the index is there again.
        """
        with suppress(DatabaseUnavailable):  # the next check follows soon
            if problem := find_index_problem(connection.orders, self._settings):
                raise ResyncRequired(f"live updates need a usable index: {problem}")

    def _report_state(self) -> None:
        """Set the heartbeat in the state of the service: None in every state except LIVE."""
        live, lag_seconds = None, 0.0
        if self._watcher is not None and self.state is LiveState.LIVE:
            lag_seconds = self._watcher.lag_seconds()
            live = Heartbeat(
                live_since=self._watcher.start_after.as_datetime(),
                as_of=self._as_of.as_datetime(),
                last_event=self._watcher.last_event,
                last_update=self._last_update,
                users_updated=self._users_updated,
                waiting=self._watcher.pending_count(),
            )
        self._service_state.live = live
        self._service_state.live_lag_seconds = lag_seconds

    def _recount_customers(
        self, connection: Connection, changes: PendingChanges, on_progress: ProgressCallback
    ) -> None:
        """Recount the customers of pending changes; pause after a mass change."""
        assert self._full_recount is not None  # only a full recount makes updates live
        not_before = max(changes.cluster_time, self.newest_read)
        found, at = find_customers(connection, self._settings, changes.orders, not_before)
        for customer_id in found:
            changes.add_customer(customer_id)
        if changes.has_mixed_case_ids:
            # The full recount that follows is exact; it must not open the stream again, or each
            # change of such an order would cause another full recount.
            self._is_opening_blocked = True
            self._warn_once("live_updates_unavailable", describe_mixed_case(self._settings))
            raise ResyncRequired("a changed order has a customer id in mixed case")
        if not changes.customers:
            return
        # None: read all orders. Without usable indexes, only a small shop has live updates, see
        # `find_index_problem`.
        has_indexes = self._full_recount.count.has_usable_indexes
        customers: Customers = [
            (customer, indexable_forms(customer) if has_indexes else None)
            for customer in changes.customers.values()
        ]
        request = RecountRequest(
            customers=customers, not_before=at, safety_check=self._check_decreases
        )
        self.newest_read = at  # also if the update is refused, or fails after some writes
        try:
            result = run_recount(
                connection, self._settings, History(None, self._settings), request, on_progress
            )
        except RecountRefused as error:
            self._pause(error)
            return
        self.newest_read = max([self.newest_read, *result.count.snapshots])
        self._decreased += result.totals.decreased
        self._users_updated += result.written
        self._last_update = datetime.now(UTC)
        log.debug("live_update customers=%d changed=%d", len(customers), result.totals.changed)

    def _check_decreases(self, totals: Totals) -> str | None:
        """Return why a live update is refused, or None: the safety check of live updates.

        Decreases are summed since the last full recount, so that a mass change in many small
        batches is noticed. Increases are not subtracted: while a migration renames a status, some
        users lose points and others get theirs back.
        """
        assert self._full_recount is not None
        with_points = self._full_recount.totals.users_with_points_after
        return check_live_update(self._decreased + totals.decreased, with_points, self._settings)

    def _pause(self, reason: RecountRefused) -> None:
        """Pause until the mass change is over; a full recount then checks all of its changes.

        A second mass change within the interval is probably part of the first: live updates stop
        until the next full recount. Otherwise one full recount could follow another without end.
        """
        now = time.monotonic()
        is_repeated = now - self._paused_at < self._settings.recount_interval.total_seconds()
        self._paused_at = now
        log.warning('live_updates_paused reason="%s"', reason)
        if is_repeated:
            self.stop("paused for the second time within RECOUNT_INTERVAL")
        else:
            self._enter(LiveState.PAUSED)
