"""One recount: count the orders, compare with the stored points, write the differences.

The server counts and compares; only users whose points differ come back. They are spooled to a
temporary file, so that all of them are known before the first write, in constant memory.
"""

from __future__ import annotations

import heapq
import logging
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self

import bson
from bson import ObjectId
from pymongo.client_session import ClientSession

from config import Settings
from database import Connection, ServiceError, TooSlow, Unavailable, sorted_errors
from pipeline import COLLATION, NO_CUSTOMER, Document, customer_orders, pipeline
from values import decoded, number_in, shown, value_of
from writer import write

log = logging.getLogger("loyalty")

_SPOOL_BYTES = 4 * 1024 * 1024
_ROWS = 10_000  # in one answer of the server; its own limit of 16 MB becomes 100 MB in Python
_COUNT_ATTEMPTS = 3
_GUARD_USERS = 10
_SAMPLES = 5
_LARGEST = 10


class Refused(ServiceError):
    """The guard: this recount would take points from too many users. Nothing was written."""

    exit_code = 65  # EX_DATAERR


class SpoolFailed(ServiceError):
    """There is no room for the changes; nothing was written."""

    exit_code = 69  # EX_UNAVAILABLE


@dataclass(frozen=True, slots=True, order=True)
class Change:
    """A user whose stored points differ from the counted ones."""

    size: float
    user: str
    before: str
    after: int


@dataclass(slots=True)
class Totals:
    """What a recount counted: orders, users, and as of when."""

    as_of: datetime | None = None
    exact: bool = False
    users: int = 0
    holders: int = 0  # users who held points before
    counted_orders: int = 0
    changed: int = 0
    increased: int = 0
    decreased: int = 0
    unknown_customers: int = 0
    orders_of_unknown_customers: int = 0
    orders_without_customer: int = 0
    unknown_sample: list[str] = field(default_factory=list)
    largest: list[Change] = field(default_factory=list)  # a heap


class Recount:
    """One pass over everyone, or over one `customer`: `count`, then `write`; close it at the end.

    Both call `on_progress` whenever they have moved on, and raise ServiceError. What had been
    written by then is right, and the next recount does the rest.
    """

    def __init__(
        self,
        connection: Connection,
        settings: Settings,
        started_at: datetime,
        *,
        customer: str | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.totals = Totals()
        self.started_at = started_at
        self._connection = connection
        self._settings = settings
        self._customer = customer
        self._on_progress = on_progress
        self._changes = tempfile.SpooledTemporaryFile(  # noqa: SIM115 -- __exit__ closes it
            max_size=_SPOOL_BYTES
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._changes.close()

    def count(self) -> None:
        """Fill `totals`, and find out what to write."""
        for attempt in range(1, _COUNT_ATTEMPTS + 1):
            try:
                self._count()
            except TooSlow:
                raise
            except Unavailable as error:
                # The driver does not retry a cursor that died under it (the primary was killed,
                # the snapshot became too old), and a snapshot belongs to its session.
                if attempt == _COUNT_ATTEMPTS:
                    raise
                log.warning('counting_again attempt=%d error="%s"', attempt + 1, error)
                self._on_progress()
            else:
                return

    def _count(self) -> None:
        self.totals = Totals()
        self._changes.seek(0)
        self._changes.truncate()
        orders = self._connection.orders
        with sorted_errors("find in", orders.full_name), self._session() as session:
            self.totals.exact = session is not None
            self.totals.as_of = self._point_in_time(session) if session else self.started_at
            answers = orders.aggregate_raw_batches(
                pipeline(self._settings, self._customer),
                session=session,
                allowDiskUse=True,
                batchSize=_ROWS,
                collation=COLLATION,
                maxTimeMS=int(self._settings.count_timeout.total_seconds() * 1000),
            )
            for answer in answers:
                for row in decoded(answer):
                    self._take(row)
                self._on_progress()

    def _session(self) -> AbstractContextManager[ClientSession | None]:
        if self._connection.snapshots:
            return self._connection.client.start_session(snapshot=True)
        return nullcontext()

    def _point_in_time(self, session: ClientSession) -> datetime:
        """Pin the session to a point in time and return it: the driver keeps it to itself."""
        users = self._connection.users
        read = {"find": users.name, "filter": {"_id": ObjectId()}, "singleBatch": True}
        reply = users.database.command(read, session=session)
        # A collection that does not exist has no snapshot, only a last operation before it.
        moment = reply["cursor"].get("atClusterTime", reply["operationTime"])
        as_of: datetime = moment.as_datetime()
        return as_of

    def _take(self, row: Document) -> None:
        """Add one row of the pipeline to the totals, and what is to be written to the changes."""
        totals, key, orders, users = self.totals, row["_id"], row["n"], row["c"]
        totals.counted_orders += orders
        totals.users += users
        held = value_of(key, "held")
        if isinstance(held, bool):
            totals.holders += users if held else 0
        elif users:
            self._take_users(row["u"], orders * self._settings.points_per_order)
        elif value_of(key, "id") == NO_CUSTOMER:
            totals.orders_without_customer += orders
        elif orders:
            totals.unknown_customers += 1
            totals.orders_of_unknown_customers += orders
            if len(totals.unknown_sample) < _SAMPLES:
                totals.unknown_sample.append(shown(key, "id"))

    def _take_users(self, users: list[Document], after: int) -> None:
        totals = self.totals
        for user in users:
            stored = user["p"]
            before = number_in(stored)
            totals.holders += before > 0
            totals.changed += stored != after  # of two users with one customer id, one may be right
            totals.increased += after > before
            totals.decreased += after < before
            size = abs(after - before)
            if len(totals.largest) < _LARGEST or size > totals.largest[0].size:
                text = str(stored) if isinstance(stored, int) else shown(stored, "w")
                heapq.heappush(totals.largest, Change(size, shown(user["k"], "_id"), text, after))
                if len(totals.largest) > _LARGEST:
                    heapq.heappop(totals.largest)
            if stored != after:
                self._spool(bson.encode({"k": user["k"], "n": after}))

    def _spool(self, change: bytes) -> None:
        try:
            self._changes.write(change)
        except OSError as error:
            where = tempfile.gettempdir()
            raise SpoolFailed(f"cannot keep the changes in {where}: {error.strerror}") from error

    def refusal(self) -> str | None:
        """Return why the guard refuses to write what was counted, or None if it does not."""
        totals, limit = self.totals, self._settings.max_decrease_percent
        few = totals.decreased < _GUARD_USERS
        if few or limit == 100 or totals.decreased * 100 <= limit * totals.holders:
            return None
        return (
            f"{totals.decreased:,} of the {totals.holders:,} users with points would lose some, "
            f"more than MAX_DECREASE_PERCENT={limit} allows: are ORDER_STATUSES and the database "
            "right? If so, let one recount through with --once --force"
        )

    def write(self) -> None:
        """Write what was counted. Raises Incomplete if the server refused some users."""
        self._changes.seek(0)
        users, total = self._connection.users, self.totals.changed
        write(users, self._changes, total, self._settings.batch_size, self._on_progress)


def orders_by_status(connection: Connection, customer: str) -> dict[str, int]:
    """Return how many orders a customer has in each status."""
    orders = connection.orders
    with sorted_errors("find in", orders.full_name):
        found = customer_orders(customer, orders.distinct("status"))
        return {str(row["_id"]): row["n"] for row in orders.aggregate(found, collation=COLLATION)}
