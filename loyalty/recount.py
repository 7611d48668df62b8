"""One recount: count the orders, compare with the stored points, write the differences.

The server counts and compares; only users whose points differ come back. They are spooled to a
temporary file, so that all of them are known before the first write, in constant memory.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from itertools import repeat
from typing import Any, Self

from bson import ObjectId
from pymongo.client_session import ClientSession

from config import Settings
from loyalty.counting import COLLATION, NO_CUSTOMER, USER, Document, customer_orders, pipeline
from loyalty.ids import Odd, decoded, number_in, shown, value_of
from loyalty.mongo import Connection, ServiceError, TooSlow, Unavailable, sorted_errors
from loyalty.writer import Changes, overlapping

log = logging.getLogger("loyalty")

_ROWS = 10_000  # in one answer of the server; its own limit of 16 MB becomes 100 MB in Python
_COUNT_ATTEMPTS = 3
_GUARD_USERS = 10
_SAMPLES = 5
_LARGEST = 10


class Refused(ServiceError):
    """The guard: this recount would take points from too many users. Nothing was written."""

    exit_code = 65  # EX_DATAERR


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
        self.started_at = started_at
        self._connection = connection
        self._settings = settings
        self._customer = customer
        self._on_progress = on_progress
        self._begin()

    def _begin(self) -> None:
        self.totals = Totals()
        self._sums: Document | None = None  # over all users
        self._plausible_points = 0  # of the users who came back
        self._changes = Changes(self._settings.batch_size)

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
        self._changes.close()
        self._begin()
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
            with overlapping(lambda _: next(answers, None), repeat(None), 1) as ahead:
                for answer in iter(lambda: next(ahead), None):
                    for row in decoded(answer):
                        self._take(row)
                    self._on_progress()
        if self._sums is not None:
            self.totals.users, self.totals.holders = self._sums["users"], self._sums["holders"]
            # All who did not come back are right: their points are what their orders earn.
            self._add_orders(self._sums["points"] - self._plausible_points)

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
        totals, key, earned = self.totals, row["k"], 0
        users: list[tuple[Document, Any]] = []
        for value in row["v"]:
            if isinstance(value, float):
                users.append((key, Odd("none")))
            elif isinstance(value, int) and value < 0:
                users.append((key, -USER - value))
            elif isinstance(value, int):
                earned += value
            elif "users" in value:
                self._sums = value
            else:
                users.append((value["k"], value["p"]))
        orders = self._add_orders(earned)
        for own, stored in users:
            self._take_user(own, stored, earned)
        if users or not orders:
            return
        if value_of(key, "_id") == NO_CUSTOMER:
            totals.orders_without_customer += orders
        else:
            totals.unknown_customers += 1
            totals.orders_of_unknown_customers += orders
            if len(totals.unknown_sample) < _SAMPLES:
                totals.unknown_sample.append(shown(value_of(key, "_id")))

    def _add_orders(self, earned: int) -> int:
        orders = earned // self._settings.points_per_order
        self.totals.counted_orders += orders
        return orders

    def _take_user(self, own: Document, stored: Any, after: int) -> None:
        totals = self.totals
        if isinstance(stored, int):
            self._plausible_points += stored
        elif not isinstance(stored, Odd):
            stored = value_of(stored, "w")
        before = number_in(stored)
        totals.users += 1
        totals.increased += after > before
        totals.decreased += after < before
        size = abs(after - before)
        if len(totals.largest) < _LARGEST or size > totals.largest[0].size:
            change = Change(size, shown(value_of(own, "_id")), shown(stored), after)
            heapq.heappush(totals.largest, change)
            if len(totals.largest) > _LARGEST:
                heapq.heappop(totals.largest)
        # Of two users with one customer's id, one may be right.
        if stored != after or isinstance(stored, bool | float):
            totals.changed += 1
            self._changes.add(own, after)

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
        self._changes.write(self._connection.users, self._on_progress)


def orders_by_status(connection: Connection, customer: str) -> dict[str, int]:
    """Return how many orders a customer has in each status."""
    orders = connection.orders
    with sorted_errors("find in", orders.full_name):
        found = customer_orders(customer, orders.distinct("status"))
        return {str(row["_id"]): row["n"] for row in orders.aggregate(found, collation=COLLATION)}
