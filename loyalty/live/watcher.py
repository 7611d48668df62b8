"""The change stream on orders: collects the customers whose orders have changed.

A thread reads the stream and only adds to the pending changes. The worker thread pops them, and
counts at the cluster time of the newest one or later.
"""

import threading
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bson import Timestamp
from pymongo.change_stream import ChangeStream
from pymongo.read_concern import ReadConcern

from config import Settings
from loyalty.errors import DatabaseUnavailable, ResyncRequired, ServiceError
from loyalty.live.events import (
    INVALIDATING_EVENTS,
    PendingChanges,
    build_change_stream_pipeline,
    read_watermark,
)
from loyalty.logs import log
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.values import Document, get_nested
from loyalty.retry import OPEN_STREAM_RETRY, RetryPolicy

MAX_AWAIT_MS = 1_000  # the server answers each getMore of the stream within this time
EMPTY_POLL_DELAY_SECONDS = 0.5
"""The pause after an empty reply that came at once, as when cursors are killed again and again."""
_BATCH_SIZE = 1_000


@dataclass(frozen=True, kw_only=True)
class LiveLimits:
    """The limits of live updates. Tests pass smaller ones."""

    max_pending: int = 100_000
    """One full recount is cheaper than a live update of more changes."""
    stall_timeout_seconds: float = 30.0
    """How long the server may take to answer a getMore of the stream."""
    quiet_seconds: float = 1.0
    """A mass change is over when no order has changed for this time."""
    max_pause_seconds: float = 60.0
    """The maximum duration of a pause, for a shop whose orders change all the time."""
    opening_retry: RetryPolicy = OPEN_STREAM_RETRY
    min_interval_seconds: float = 0.012
    """The minimum time between the starts of two live updates. A single change does not wait.
    Changes in quick succession are processed in one update, which saves CPU time."""


class ChangeStreamWatcher:
    """An open change stream, and the thread that reads it. `close` it at the end."""

    def __init__(
        self, connection: Connection, settings: Settings, start_after: Timestamp, limits: LiveLimits
    ) -> None:
        """Open the stream for the changes after a cluster time. Raises ServiceError."""
        self.start_after = start_after
        self.last_event: datetime | None = None
        self._limits = limits
        self._customer_field = settings.customer_field
        # Overrides the URI's read concern: a change stream accepts only "majority".
        self._orders = connection.orders.with_options(read_concern=ReadConcern("majority"))
        self._pending = PendingChanges(reported_until=start_after)
        self._condition = threading.Condition()  # reentrant: `_add` calls `_fail`
        self._error: ServiceError | None = None
        self._is_closed = False
        self._answered_at = self._changed_at = self._oldest_at = time.monotonic()
        pre_images = "whenAvailable" if connection.supports_pre_images else None
        with map_driver_errors("changeStream", self._orders):
            self._stream: ChangeStream[Any] = self._orders.watch(
                build_change_stream_pipeline(settings),
                # A count at a cluster time sees everything that was written at that time.
                start_at_operation_time=Timestamp(start_after.time, start_after.inc + 1),
                max_await_time_ms=MAX_AWAIT_MS,
                batch_size=_BATCH_SIZE,
                full_document_before_change=pre_images,
            )
        threading.Thread(target=self._read, name="change-stream", daemon=True).start()

    def close(self) -> None:
        """Let the thread end after the server's next answer."""
        self._is_closed = True

    def pending_count(self) -> int:
        return len(self._pending)

    def lag_seconds(self) -> float:
        """Return for how long the oldest pending change has been waiting."""
        return time.monotonic() - self._oldest_at if self._pending else 0.0

    def idle_seconds(self) -> float:
        return time.monotonic() - self._changed_at

    def check(self) -> None:
        """Raise ServiceError if the stream has ended or the server does not answer."""
        if self._error:
            raise self._error
        if time.monotonic() - self._answered_at > self._limits.stall_timeout_seconds:
            raise DatabaseUnavailable(
                f"the change stream on {self._orders.full_name} has stalled: no answer for "
                f"{self._limits.stall_timeout_seconds:g} s"
            )

    def pop_pending(self, seconds: float) -> PendingChanges:
        """Return the pending changes as soon as there are any, and after `seconds` at the latest.

        Raises what `check` raises.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._pending or self._error, seconds)
            self.check()
            popped = self._pending
            self._pending = PendingChanges(reported_until=popped.reported_until)
        return popped

    def _read(self) -> None:
        try:
            with self._stream, map_driver_errors("changeStream", self._orders):
                while not self._is_closed and self._stream.alive:
                    asked_at = time.monotonic()
                    event = self._stream.try_next()
                    self._answered_at = time.monotonic()
                    with self._condition:  # `pop_pending` needs an event and its watermark together
                        if event:
                            self._add(event)
                        watermark = read_watermark(self._stream.resume_token)
                        self._pending.reported_until = max(self._pending.reported_until, watermark)
                    if event is None and self._answered_at - asked_at < EMPTY_POLL_DELAY_SECONDS:
                        time.sleep(EMPTY_POLL_DELAY_SECONDS)
            self._fail(ResyncRequired(f"the change stream on {self._orders.full_name} has ended"))
        except ServiceError as error:
            self._fail(error)
        except Exception as error:
            log.exception("internal_error")
            self._fail(DatabaseUnavailable(f"the change stream ended: {type(error).__name__}"))

    def _add(self, event: Document) -> None:
        kind = event["operationType"]
        if not self._pending:
            self._oldest_at = time.monotonic()
        if kind == "update":
            self._pending.orders.append(event["documentKey"]["_id"])
        for name in ("fullDocument", "fullDocumentBeforeChange"):
            self._pending.add_customer(get_nested(event.get(name), self._customer_field))
        self._pending.cluster_time = max(self._pending.cluster_time, event["clusterTime"])
        self.last_event = event["clusterTime"].as_datetime()
        self._changed_at = time.monotonic()
        if kind in INVALIDATING_EVENTS:
            self._fail(ResyncRequired(f"{self._orders.full_name}: event {kind}"))
        if len(self._pending) > self._limits.max_pending:
            self._fail(
                ResyncRequired(f"more than {self._limits.max_pending:,} changes are pending")
            )
        self._condition.notify_all()

    def _fail(self, error: ServiceError) -> None:
        with self._condition:
            self._error = self._error or error
            self._is_closed = True
            self._condition.notify_all()
