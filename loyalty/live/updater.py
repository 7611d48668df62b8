"""Live updates: recount the customers whose orders have changed, as soon as they have.

off    -> live    `start` opened the change stream, and a full recount succeeded
live   -> paused  a live update would take points from too many users
paused -> off     the mass change is over, or the pause has lasted too long: ResyncRequired
live   -> off     an error, or ResyncRequired; `stop` closes the stream
any    -> off     an id in mixed case, which no index lookup can find
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from math import inf

from bson import Timestamp

from config import Settings
from loyalty.concurrency import ProgressCallback
from loyalty.errors import RecountRefused, ResyncRequired, ServiceError
from loyalty.history import Heartbeat, History
from loyalty.live.events import PendingChanges
from loyalty.live.watcher import ChangeStreamWatcher, LiveLimits, keeps_pre_images, open_watcher
from loyalty.logs import WarnOnce
from loyalty.mongo.connection import Connection
from loyalty.recount.counter import Customers
from loyalty.recount.index import missing_index_hint
from loyalty.recount.result import Result
from loyalty.recount.runner import RecountRequest, run_recount
from loyalty.recount.safety import check_live_update
from loyalty.recount.tally import Totals

log = logging.getLogger("loyalty")

NEVER = Timestamp(0, 0)
_PAUSED_POLL_SECONDS = 0.25


class LiveUpdater:
    """Owns the change stream, its pending changes and the safety check of live updates.

    It is used by one thread. Its methods raise ServiceError; the caller then calls `stop`.
    """

    def __init__(self, settings: Settings, limits: LiveLimits) -> None:
        self.newest = NEVER
        """The newest cluster time that a live update has counted at."""
        self._settings = settings
        self._limits = limits
        self._watcher: ChangeStreamWatcher | None = None
        self._has_started = False
        self._is_blocked = False
        self._warn_once = WarnOnce()
        self._full_recount: Result | None = None
        self._decreased = 0
        """Users who have lost points in live updates since the last full recount."""
        self._paused_at: float | None = None
        self._last_pause_at = -inf
        self._last_update: datetime | None = None
        self._customers_updated = 0

    @property
    def is_live(self) -> bool:
        """Whether the change stream is open, and so `update` has work to do."""
        return self._watcher is not None

    @property
    def is_paused(self) -> bool:
        return self._paused_at is not None

    def start(self, connection: Connection) -> Timestamp:
        """Open the change stream before a full recount, if live updates are wanted.

        Returns the cluster time that the recount must not be older than. A stream that cannot be
        opened is a warning: it never keeps the recount from running.
        """
        if self._watcher is not None or not self._settings.live_updates or self._is_blocked:
            return NEVER
        try:
            self._watcher, start_after = open_watcher(connection, self._settings, self._limits)
        except ServiceError as error:
            self._warn_once("live_updates_unavailable", error)
            return NEVER
        if connection.pre_images and keeps_pre_images(connection) is False:
            # Also after a restore of the collection, which does not restore the option.
            log.warning(
                "pre_images_off deletes, and orders that another customer gets, wait for the next "
                "full recount; --check-config prints the command that switches pre-images on"
            )
        self._has_started = False
        self._last_update, self._customers_updated = None, 0
        return start_after

    def finish_recount(self, result: Result) -> None:
        """Take note of a full recount: it includes every change up to its snapshot."""
        self._full_recount = result
        self._decreased = 0
        self._paused_at = None
        self._is_blocked = False
        if self._watcher is None:
            return
        if result.count.has_mixed_case_ids:
            self._warn_of_mixed_case()
            self.stop("ids in mixed case")
            return
        if result.count.oldest_snapshot is not None:
            self._watcher.discard_until(result.count.oldest_snapshot)
        if not self._has_started:
            self._has_started = True
            self._warn_once.reset("live_updates_unavailable")
            log.info("live_updates_started since=%s", f"{self._watcher.since:%Y-%m-%dT%H:%M:%SZ}")

    def stop(self, reason: str = "") -> None:
        """Close the change stream and drop what is pending. The next full recount opens another.

        Without a `reason` that is not logged: it is followed by a full recount at once.
        """
        if self._watcher is None:
            return
        self._watcher.close()
        self._watcher = None
        self._paused_at = None
        if self._has_started and reason:
            log.info('live_updates_stopped until="the next full recount" reason="%s"', reason)

    def update(self, connection: Connection, seconds: float, on_progress: ProgressCallback) -> None:
        """Wait up to `seconds` for pending changes, and recount their customers.

        Raises ResyncRequired when only a full recount helps, and ServiceError.
        """
        watcher = self._watcher
        assert watcher is not None
        if self._paused_at is not None:
            watcher.check()
            paused_for = time.monotonic() - self._paused_at
            is_quiet = watcher.idle_seconds() > self._limits.quiet_seconds
            if is_quiet or paused_for > self._limits.max_pause_seconds:
                raise ResyncRequired("live updates were paused")
            time.sleep(min(seconds, _PAUSED_POLL_SECONDS))
            return
        changes = watcher.pop_pending(seconds)
        if changes is None:
            return
        if changes.has_mixed_case_ids:
            # The full recount that follows is exact; it must not open the stream again, or each
            # change of such an order would cause another full recount.
            self._is_blocked = True
            self._warn_of_mixed_case()
            raise ResyncRequired("a changed order has a customer id in mixed case")
        self._recount_customers(connection, changes, on_progress)

    def check_index(self, connection: Connection) -> None:
        """Raise ResyncRequired if each update would read all orders: the index was dropped.

        The full recount that follows does not open the stream, until the index is there again.
        """
        if hint := missing_index_hint(connection.orders, self._settings):
            raise ResyncRequired(f"each update would read all orders; the index: {hint}")

    def heartbeat(self) -> Heartbeat | None:
        """Return the progress of live updates, or None while they are off or paused."""
        if self._watcher is None or self.is_paused or not self._has_started:
            return None
        return Heartbeat(
            live_since=self._watcher.since,
            last_event=self._watcher.last_event,
            last_update=self._last_update,
            customers_updated=self._customers_updated,
            waiting=self._watcher.pending_count(),
        )

    def lag_seconds(self) -> float:
        """Return for how long the oldest pending change has been waiting."""
        return self._watcher.lag_seconds() if self._watcher is not None else 0.0

    def _recount_customers(
        self, connection: Connection, changes: PendingChanges, on_progress: ProgressCallback
    ) -> None:
        customers: Customers = changes.customers_with_variants()
        if self._full_recount is not None and not self._full_recount.count.has_customer_index:
            # The collection is small (see `open_watcher`), and the query reads all of its orders.
            customers = [(customer, []) for customer, _ in customers]
        self.newest = max(self.newest, changes.cluster_time)
        request = RecountRequest(
            customers=customers, not_before=changes.cluster_time, safety_check=self._check_decreases
        )
        try:
            result = run_recount(connection, self._settings, History(None), request, on_progress)
        except RecountRefused as error:
            self._pause(error)
            return
        self._decreased += result.totals.decreased
        self._customers_updated += result.written
        self._last_update = datetime.now(UTC)
        log.debug("live_update customers=%d changed=%d", len(customers), result.totals.changed)

    def _check_decreases(self, totals: Totals) -> str | None:
        """Return why a live update is refused, or None: the safety check of live updates.

        Decreases are summed since the last full recount, so that a mass change in many small
        batches is noticed. Increases do not make up for them: a renamed status takes points away
        while a migration gives others theirs.
        """
        if self._full_recount is None:
            return None
        holders = self._full_recount.totals.users_with_points_after
        return check_live_update(self._decreased + totals.decreased, holders, self._settings)

    def _pause(self, reason: RecountRefused) -> None:
        """Pause until the mass change is over; then a full recount checks the whole of it.

        A second mass change within the interval is probably part of the first: live updates stop
        until the next full recount, as otherwise full recounts could follow one after another.
        """
        now = time.monotonic()
        is_repeated = now - self._last_pause_at < self._settings.recount_interval.total_seconds()
        self._last_pause_at = now
        log.warning('live_updates_paused reason="%s"', reason)
        if is_repeated:
            self.stop("paused for the second time within RECOUNT_INTERVAL")
        else:
            self._paused_at = now

    def _warn_of_mixed_case(self) -> None:
        name, field = self._settings.orders, self._settings.customer_field
        key = self._settings.user_key_field
        matching = f"{{'{field}': {{$regex: '^[0-9A-Fa-f]{{24}}$', $not: {{$type: 'array'}}}}}}"
        self._warn_once(
            "live_updates_unavailable",
            "some ids are hex strings in mixed case, which no index lookup finds. To normalize "
            f"those of orders: db.getCollection('{name}').updateMany({matching}, "
            f"[{{$set: {{'{field}': {{$toLower: '${field}'}}}}}}]). A user whose {key} is such a "
            f"string must {'be inserted again in' if key == '_id' else 'get it in'} lower case",
        )
