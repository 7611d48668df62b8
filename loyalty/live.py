"""The change stream on orders: which customers' orders have changed, and when.

It only marks them. Whoever recounts takes the marks, and counts at the time of the newest or later.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import bson
from bson import ObjectId, Timestamp
from bson.codec_options import CodecOptions, DatetimeConversion
from pymongo.change_stream import ChangeStream

from config import Settings
from loyalty.errors import ServiceError, Unavailable
from loyalty.ids import Document, canonical_of, is_hex_id, spellings
from loyalty.mongo import Connection
from loyalty.sorting import sorted_errors

log = logging.getLogger("loyalty")

MOST = 20_000  # changes that wait; beyond that, everyone is recounted

_SETTLE = 0.03  # seconds from the first change of a burst, to gather what comes with it
_SETTLE_LONGEST = 0.5  # while many come
_MANY = 10
_AWAIT_MS = 1_000  # the server answers a stream at least this often
_SILENT = 30.0
_BATCH = 1_000
# What has no Python value must not end the stream; full recounts count such ids.
_ANYTHING: CodecOptions[dict[str, Any]] = CodecOptions(
    datetime_conversion=DatetimeConversion.DATETIME_AUTO, unicode_decode_error_handler="replace"
)
_ENDS = ["drop", "rename", "dropDatabase", "invalidate"]


@dataclass(slots=True)
class Marks:
    """Customers to be recounted as of `time` or later, and updated orders whose customers are."""

    time: Timestamp = field(default_factory=lambda: Timestamp(0, 0))
    customers: dict[bytes, Any] = field(default_factory=dict)
    orders: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.customers) + len(self.orders)

    def add(self, customer: Any) -> None:
        """Mark a customer, by the id as it stands in an order."""
        if customer is not None and customer != "" and not isinstance(customer, list):
            self.customers[bson.encode({"": customer})] = customer

    def forms(self, odd_forms: dict[ObjectId, set[str]]) -> list[tuple[Any, list[Any]]]:
        """Return each customer's canonical id, with all forms of it; new odd ones are added."""
        own = {}
        for customer in self.customers.values():
            canonical = canonical_of(customer)
            own[bson.encode({"": canonical})] = canonical
            if is_hex_id(customer) and customer not in spellings(canonical):
                odd_forms.setdefault(canonical, set()).add(customer)
        return [(one, [*spellings(one), *_odd(one, odd_forms)]) for one in own.values()]


class Live:
    """An open stream, and a thread that drains it; close it at the end."""

    def __init__(self, connection: Connection, settings: Settings, after: Timestamp) -> None:
        """Open it for whatever comes after a cluster time. Raises ServiceError."""
        self.since = datetime.now(UTC)
        self.last_event: datetime | None = None
        self._field = settings.customer_field
        self._orders = connection.orders.with_options(codec_options=_ANYTHING)
        self._marks = Marks()
        self._lock = threading.Condition()  # of an RLock
        self._problem: ServiceError | None = None
        self._closed = False
        self._answered = self._marked = time.monotonic()
        with sorted_errors("watch", connection.orders.full_name):
            self._stream: ChangeStream[Any] = self._orders.watch(
                stages(settings),
                # A count at a time sees all that was done at it.
                start_at_operation_time=Timestamp(after.time, after.inc + 1),
                max_await_time_ms=_AWAIT_MS,
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

    def quiet_for(self) -> float:
        """Return the seconds since the last change."""
        return time.monotonic() - self._marked

    def take(self, seconds: float) -> Marks | None:
        """Return what is marked, as soon as there is something; None after `seconds`.

        Raises ServiceError if the stream has died, is silent or has marked too many.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._marks or self._problem, seconds)
            if self._marks:
                self._settle()
            if self._problem:
                raise self._problem
            if time.monotonic() - self._answered > _SILENT:
                raise Unavailable(f"the change stream on {self._orders.full_name} is silent")
            taken, self._marks = self._marks, Marks()
        self._look_up(taken)
        return taken if taken.customers else None

    def _settle(self) -> None:
        """Wait for what comes together: a moment, or a longer one while many come."""
        until, before = time.monotonic() + _SETTLE_LONGEST, 0
        while before < len(self._marks) and time.monotonic() < until and not self._problem:
            before = len(self._marks)
            self._lock.wait_for(lambda: self._problem, _SETTLE)
            if len(self._marks) <= _MANY:
                return

    def _look_up(self, marks: Marks) -> None:
        """Mark the customers of updated orders. An order that is gone has another event to come."""
        with sorted_errors("find in", self._orders.full_name):
            for start in range(0, len(marks.orders), _BATCH):
                some = {"$in": marks.orders[start : start + _BATCH]}
                for order in self._orders.find({"_id": some}, {self._field: 1}):
                    marks.add(value_at(order, self._field))
        marks.orders.clear()

    def forget(self, until: Timestamp) -> None:
        """Drop all marks, unless one is newer than a count of everyone."""
        with self._lock:
            if self._marks.time <= until:
                self._marks = Marks()

    def _drain(self) -> None:
        try:
            with self._stream, sorted_errors("watch", self._orders.full_name):
                while not self._closed:
                    event = self._stream.try_next()
                    self._answered = time.monotonic()
                    if event:
                        self._mark(event)
        except ServiceError as problem:
            self._end(problem)
        except Exception as error:
            log.exception("bug")
            self._end(Unavailable(f"the change stream ended: {type(error).__name__}"))

    def _mark(self, event: Document) -> None:
        kind = event["operationType"]
        with self._lock:
            if kind == "update":
                self._marks.orders.append(event["documentKey"]["_id"])
            for name in ("fullDocument", "fullDocumentBeforeChange"):
                self._marks.add(value_at(event.get(name), self._field))
            self._marks.time = max(self._marks.time, event["clusterTime"])
            self.last_event = event["clusterTime"].as_datetime()
            self._marked = time.monotonic()
            if kind in _ENDS:
                self._end(Unavailable(f"{self._orders.full_name} was changed as a whole: {kind}"))
            if len(self._marks) > MOST:
                self._end(Unavailable(f"more than {MOST:,} changes at a time"))
            self._lock.notify_all()

    def _end(self, problem: ServiceError) -> None:
        with self._lock:
            self._problem = self._problem or problem
            self._closed = True
            self._lock.notify_all()


def stages(settings: Settings) -> list[Document]:
    """Return the stages that let through what may change a count, and of that only the ids."""
    fields = [settings.status_field, settings.customer_field]
    changed = {
        "$concatArrays": [
            {"$map": {"input": _pairs("updatedFields"), "in": "$$this.k"}},
            {"$ifNull": ["$updateDescription.removedFields", []]},
        ]
    }
    # A change of `a.b` concerns the fields `a` and `a.b.c`, too.
    concerns = [
        {"$eq": [{"$indexOfBytes": [{"$concat": [one, "."]}, {"$concat": [other, "."]}]}, 0]}
        for name in fields
        for one, other in (("$$this", name), (name, "$$this"))
    ]
    is_ours = {"$anyElementTrue": [{"$map": {"input": changed, "in": {"$or": concerns}}}]}
    shipped = {f"fullDocument.{settings.status_field}": {"$in": list(settings.order_statuses)}}
    customer = settings.customer_field
    return [
        {
            "$match": {
                "$or": [
                    {"operationType": {"$in": ["delete", "replace", *_ENDS]}},
                    {"operationType": "insert", **shipped},
                    {"operationType": "update", "$expr": is_ours},
                ]
            }
        },
        {
            "$project": {
                "operationType": 1,
                "clusterTime": 1,
                "documentKey": 1,
                f"fullDocument.{customer}": 1,
                f"fullDocumentBeforeChange.{customer}": 1,
            }
        },
    ]


def _pairs(name: str) -> Document:
    return {"$objectToArray": {"$ifNull": [f"$updateDescription.{name}", {}]}}


def _odd(customer: Any, odd_forms: dict[ObjectId, set[str]]) -> set[str]:
    return odd_forms.get(customer, set()) if isinstance(customer, ObjectId) else set()


def value_at(document: Document | None, path: str) -> Any:
    """Return the value at a dotted path; None if there is none."""
    value: Any = document
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
