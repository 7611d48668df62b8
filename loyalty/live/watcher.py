"""The change stream on orders: which customers' orders have changed, and when.

It only marks them. Whoever recounts takes the marks, and counts at the time of the newest or later.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import UTC, datetime
from typing import Any

from bson import ObjectId, Timestamp
from bson.codec_options import CodecOptions, DatetimeConversion
from pymongo.change_stream import ChangeStream

from config import Settings
from loyalty.errors import ConfigurationError, DatabaseUnavailable, ServiceError
from loyalty.history import Heartbeat
from loyalty.live.events import (
    INVALIDATING_EVENTS,
    PendingChanges,
    change_stream_pipeline,
    value_at,
)
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.recount.counter import pin_cluster_time
from loyalty.recount.customer_ids import Document
from loyalty.recount.index import missing_index_hint

log = logging.getLogger("loyalty")

MAX_PENDING = 100_000  # changes that wait; beyond that, everyone is recounted

_SETTLE = 0.03  # seconds from the first change of a burst, to gather what comes with it
_SETTLE_LONGEST = 0.5  # while many come
_MANY = 10
MAX_AWAIT_MS = 1_000  # the server answers a stream at least this often
EMPTY_POLL_DELAY_SECONDS = (
    0.5  # after an answer that came at once and without a change: some cursor was killed
)
STALL_TIMEOUT_SECONDS = 30.0
_BATCH = 1_000
# What has no Python value must not end the stream; full recounts count such ids.
LENIENT_CODEC: CodecOptions[dict[str, Any]] = CodecOptions(
    datetime_conversion=DatetimeConversion.DATETIME_AUTO, unicode_decode_error_handler="replace"
)


class ChangeStreamWatcher:
    """An open stream, and a thread that drains it; close it at the end."""

    def __init__(self, connection: Connection, settings: Settings, after: Timestamp) -> None:
        """Open it for whatever comes after a cluster time. Raises ServiceError."""
        self.since = datetime.now(UTC)
        self.last_event: datetime | None = None
        self.last_update: datetime | None = None
        self.customers_updated = 0
        self.paused = False
        """Whether updates are held back until everyone has been counted."""
        self._field = settings.customer_field
        self._client = connection.client
        self._orders = connection.orders.with_options(codec_options=LENIENT_CODEC)
        self._marks = PendingChanges()
        self._lock = threading.Condition()  # of an RLock
        self._problem: ServiceError | None = None
        self._closed = False
        self._answered = self._marked = self._oldest = time.monotonic()
        with map_driver_errors("watch", connection.orders):
            self._stream: ChangeStream[Any] = self._orders.watch(
                change_stream_pipeline(settings),
                # A count at a time sees all that was done at it.
                start_at_operation_time=Timestamp(after.time, after.inc + 1),
                max_await_time_ms=MAX_AWAIT_MS,
                batch_size=_BATCH,
                full_document_before_change="whenAvailable" if connection.pre_images else None,
            )
        threading.Thread(target=self._drain, name="live", daemon=True).start()

    def close(self) -> None:
        """Let the thread end once the server has answered it."""
        self._closed = True

    def waiting(self) -> int:
        """Return how many changes are waiting."""
        return len(self._marks)

    def heartbeat(self) -> Heartbeat:
        """Return how live updates are doing by now."""
        return Heartbeat(
            live_since=self.since,
            last_event=self.last_event,
            last_update=self.last_update,
            customers_updated=self.customers_updated,
            waiting=self.waiting(),
        )

    def lag(self) -> float:
        """Return for how many seconds the oldest of them has been waiting."""
        return time.monotonic() - self._oldest if self._marks else 0.0

    def idle_seconds(self) -> float:
        """Return the seconds since the last change."""
        return time.monotonic() - self._marked

    def check(self) -> None:
        """Raise ServiceError if the stream has died, is silent or has marked too many."""
        if self._problem:
            raise self._problem
        if time.monotonic() - self._answered > STALL_TIMEOUT_SECONDS:
            raise DatabaseUnavailable(f"the change stream on {self._orders.full_name} is silent")

    def pop_pending(self, seconds: float) -> PendingChanges | None:
        """Return what is marked, as soon as there is something; None after `seconds`.

        Raises what `check` raises.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._marks or self._problem, seconds)
            if self._marks:
                self._settle()
            self.check()
            taken, self._marks = self._marks, PendingChanges()
        self._resolve_customers(taken)
        return taken if taken.customers else None

    def _settle(self) -> None:
        """Wait for what comes together: a moment, or a longer one while many come."""
        until, before = time.monotonic() + _SETTLE_LONGEST, 0
        while before < len(self._marks) and time.monotonic() < until and not self._problem:
            before = len(self._marks)
            self._lock.wait_for(lambda: self._problem, _SETTLE)
            if len(self._marks) <= _MANY:
                return

    def _resolve_customers(self, marks: PendingChanges) -> None:
        """Mark the customers of updated orders. An order that is gone has another event to come."""
        wanted = {self._field: 1}
        with map_driver_errors("find", self._orders), self._client.start_session() as session:
            session.advance_operation_time(marks.time)  # wherever the URI says to read
            for start in range(0, len(marks.orders), _BATCH):
                some = {"_id": {"$in": marks.orders[start : start + _BATCH]}}
                for order in self._orders.find(some, wanted, session=session):
                    marks.add(value_at(order, self._field))
        marks.orders.clear()

    def discard_until(self, until: Timestamp) -> None:
        """Drop all marks, unless one is newer than a count of everyone; hold back no more."""
        self.paused = False
        with self._lock:
            if self._marks.time <= until:
                self._marks = PendingChanges()

    def _drain(self) -> None:
        try:
            with self._stream, map_driver_errors("watch", self._orders):
                while not self._closed and self._stream.alive:
                    asked = time.monotonic()
                    event = self._stream.try_next()
                    self._answered = time.monotonic()
                    if event:
                        self._mark(event)
                    elif self._answered - asked < EMPTY_POLL_DELAY_SECONDS:
                        time.sleep(EMPTY_POLL_DELAY_SECONDS)
            self._end(
                DatabaseUnavailable(f"the change stream on {self._orders.full_name} has ended")
            )
        except ServiceError as problem:
            self._end(problem)
        except Exception as error:
            log.exception("bug")
            self._end(DatabaseUnavailable(f"the change stream ended: {type(error).__name__}"))

    def _mark(self, event: Document) -> None:
        kind = event["operationType"]
        with self._lock:
            if not self._marks:
                self._oldest = time.monotonic()
            if kind == "update":
                self._marks.orders.append(event["documentKey"]["_id"])
            for name in ("fullDocument", "fullDocumentBeforeChange"):
                self._marks.add(value_at(event.get(name), self._field))
            self._marks.time = max(self._marks.time, event["clusterTime"])
            self.last_event = event["clusterTime"].as_datetime()
            self._marked = time.monotonic()
            if kind in INVALIDATING_EVENTS:
                self._end(
                    DatabaseUnavailable(f"{self._orders.full_name} was changed as a whole: {kind}")
                )
            if len(self._marks) > MAX_PENDING:
                self._end(DatabaseUnavailable(f"more than {MAX_PENDING:,} changes at a time"))
            self._lock.notify_all()

    def _end(self, problem: ServiceError) -> None:
        with self._lock:
            self._problem = self._problem or problem
            self._closed = True
            self._lock.notify_all()


def open_watcher(
    connection: Connection, settings: Settings
) -> tuple[ChangeStreamWatcher, Timestamp]:
    """Open a stream, and return the time from which on it tells all. Raises ServiceError."""
    after = pin_cluster_time(connection)
    if after is None:
        server = connection.snapshot_unsupported_reason or "a server without snapshots"
        raise ConfigurationError(f"{server} has no change streams for this")
    if advice := missing_index_hint(connection.orders, settings):
        raise ConfigurationError(f"each update would read all orders; the index: {advice}")
    return ChangeStreamWatcher(connection, settings, after), after


def live_updates_blocker(connection: Connection, settings: Settings) -> str | None:
    """Return why live updates would not work, if so. Raises Unavailable."""
    recounts = connection.recounts
    try:
        open_watcher(connection, settings)[0].close()
        if recounts is not None:  # for the heartbeat
            with map_driver_errors("update", recounts):
                recounts.update_one({"_id": ObjectId()}, {"$set": {"outcome": "live"}})
    except ConfigurationError as error:
        return str(error)
    return None


def keeps_pre_images(connection: Connection) -> bool | None:
    """Return whether the orders keep pre-images; None if we may not look, or nobody can tell."""
    try:
        with map_driver_errors("listCollections", connection.orders.database):
            options = connection.orders.options()
    except ServiceError:
        return None
    return bool(options.get("changeStreamPreAndPostImages", {}).get("enabled"))
