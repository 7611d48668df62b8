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
from loyalty.concurrency import Moved
from loyalty.errors import ConfigError, Misconfigured, Refused, Unavailable
from loyalty.history import HEARTBEAT, History
from loyalty.live.events import Marks
from loyalty.live.watcher import Live, open_live
from loyalty.metrics import Metrics
from loyalty.mongo.connection import Connection
from loyalty.recount.counter import Customers
from loyalty.recount.customer_ids import any_case
from loyalty.recount.runner import Task, open_shop, perform
from loyalty.recount.tally import FEW_PERCENT, Result, Totals, are_many

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
        self._live: Live | None = None
        self._warned = False
        self._last = Result(datetime.now(UTC), datetime.now(UTC))  # full recount
        self._newest = _NEVER  # time that a live update was about
        self._losers = 0  # since the last full recount, less those who have gained
        self._held_at = -inf
        self._beat_at = 0.0

    def connect(self) -> Connection:
        """Connect, as the settings are. Raises ServiceError."""
        self._metrics.keep()
        self._connection = open_shop(self._settings, writing=True)
        self._history = History(self._connection.recounts)
        return self._connection

    def recount(self, moved: Moved) -> str:
        """Recount everyone, and return how it went, for a person. Raises ServiceError."""

        def moving(progress: str) -> None:
            self._metrics.keep()
            moved(progress)

        try:
            with self._metrics.counting(), self._stop_live_on_failure():
                connection = self._connection or self._reconnect()
                since = self._watch(connection)
                # Also where another server answers, or one that is behind: nothing older is written
                # over what is known to be newer.
                task = Task(at=max(since, self._newest))
                result = perform(connection, self._settings, self._history, task, moving)
        except Refused as error:  # to try again soon would not help; the next is on schedule
            log.error("refused %s", error)
            return f"refused: {error}"
        except Misconfigured:
            if self._connection is not None:
                self._connection.client.close()
                self._connection = None
            raise
        self._metrics.recounted(result)
        self._last, self._losers = result, 0
        if self._live is not None and result.first_time is not None:
            self._live.forget(result.first_time)
        return report.status_of(result)

    def _reconnect(self) -> Connection:
        try:
            self._settings = self._reload()  # the password may have changed, and the file with it
        except ConfigError as error:
            raise Misconfigured(str(error)) from error
        return self.connect()

    def meanwhile(self, seconds: float, moved: Moved) -> None:
        """Do live updates for about so long. Raises ServiceError if that cannot go on.

        Then everyone is to be recounted.
        """
        self._metrics.keep()
        if self._live is None or self._connection is None:
            time.sleep(seconds)
            return
        with self._stop_live_on_failure():
            self._update(self._connection, self._live, seconds, moved)

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
            self._live, after = open_live(connection, self._settings)
        except Misconfigured as error:
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

    def _update(self, connection: Connection, live: Live, seconds: float, moved: Moved) -> None:
        if live.held:  # and so no heartbeat, which would call the points fresh
            live.check()
            if live.quiet_for() > _QUIET:
                raise Unavailable(
                    "live updates would take points from many users: recount everyone"
                )
            time.sleep(min(seconds, _QUIET / 4))
            return
        if marks := live.take(seconds):
            self._recount_marked(connection, live, marks, moved)
        due = time.monotonic() - self._beat_at >= HEARTBEAT.total_seconds()
        if due and not live.held:
            self._beat_at = time.monotonic()
            beat = live.heartbeat()
            self._history.beat(beat)
            self._metrics.live(beat.waiting, live.lag())
            moved(report.status_of_live(beat))

    def _recount_marked(
        self, connection: Connection, live: Live, marks: Marks, moved: Moved
    ) -> None:
        customers = self._customers(marks)
        self._newest = max(self._newest, marks.time)
        task = Task(customers=customers, at=marks.time, guard=self._too_many_losers)
        try:
            result = perform(connection, self._settings, History(None), task, moved)
        except Refused as error:
            self._hold(live, error)
            return
        totals = result.totals
        self._losers = max(0, self._losers + totals.decreased - totals.increased)
        live.customers_updated += totals.changed - result.refused_updates
        live.last_update = datetime.now(UTC)
        log.debug("live_update customers=%d changed=%d", len(customers), totals.changed)

    def _hold(self, live: Live, why: Refused) -> None:
        """Hold live updates back: a mass change, and the guard is to judge the whole of it.

        Once it is over, everyone is recounted. Another within the interval may be a piece of the
        same: then the schedule decides when, as it does without live updates.
        """
        now, interval = time.monotonic(), self._settings.recount_interval.total_seconds()
        again = now - self._held_at < interval
        live.held, self._held_at = True, now
        self._metrics.not_live()
        log.warning("held %s%s", why, ", again: until the next recount" if again else "")
        if again:
            self._stop_watching()

    def _customers(self, marks: Marks) -> Customers:
        odd_forms = self._last.odd_forms
        customers = marks.forms({} if odd_forms is None else odd_forms)
        if not self._last.finds_customers:  # all orders are read, and few: see `open_live`
            return [(own, []) for own, _ in customers]
        if odd_forms is not None:
            return customers
        if len(customers) > _ODD_CUSTOMERS:
            raise Unavailable("too many changes while ids are in mixed case: recount everyone")
        return [
            (own, [*forms, *any_case(own)] if isinstance(own, ObjectId) else forms)
            for own, forms in customers
        ]

    def _too_many_losers(self, totals: Totals) -> str | None:
        losers = self._losers + totals.decreased - totals.increased
        holders = self._last.totals.holding
        is_wanted = self._settings.max_decrease_percent < 100
        if not (is_wanted and are_many(losers, holders, FEW_PERCENT)):
            return None
        return f"live updates would take points from {losers:,} of {holders:,} users in all"
