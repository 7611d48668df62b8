"""One count: of everyone in ranges, or of some customers, as of one point in time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from bson import ObjectId, Timestamp

from config import Settings
from loyalty.concurrency import Progress, ProgressCallback, ignore_progress, map_ordered
from loyalty.errors import SnapshotTooOld
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.recount.customer_ids import indexable_variants
from loyalty.recount.index import COLLATION, Plan, inspect_plan
from loyalty.recount.partitions import Range, edges, ranges
from loyalty.recount.pipeline import CustomerCount, OddForm, Scope, UpToDate, pipeline, rows
from loyalty.recount.spool import Spool

log = logging.getLogger("loyalty")

ROWS_PER_BATCH = (
    5_000  # in one answer of the server; its own limit of 16 MB becomes 100 MB in Python
)
PREFETCH = 8  # ranges: where a few customers order a lot, one takes several times as long as others
_ODD_CUSTOMERS = 10_000
MAX_IDS_PER_QUERY = 4_000  # in one aggregation, the canonical ids among them


Customers = Sequence[tuple[Any, Sequence[Any]]]
"""Canonical ids, each with the forms of it that an index finds; without any, all is read."""


class TooManyOddForms(Exception):
    """So many that everyone is to be counted in one piece, where all forms of an id meet."""


def pin_cluster_time(connection: Connection, at: Timestamp | None = None) -> Timestamp | None:
    """Return the newest time that everything can be read at, or `at` once it can be read at that.

    None if the server has no such thing.
    """
    users = connection.users
    if not connection.snapshots:
        return None
    concern = {"level": "snapshot"} if at is None else {"level": "snapshot", "atClusterTime": at}
    read = {"find": users.name, "filter": {"_id": ObjectId()}, "singleBatch": True}
    with map_driver_errors("find", users):
        reply = users.database.command({**read, "readConcern": concern})
        moment: Timestamp | None = reply["cursor"].get("atClusterTime")
        # A collection that does not exist has no snapshot, only a last operation before it. If
        # there are users, this server has not done what it was asked for.
        if moment is None and users.find_one({}, {"_id": 1}) is None:
            moment = reply.get("operationTime")
    return moment


class Count:
    """One count: `of_everyone` or `of_customers`, once. Both raise ServiceError.

    What they yield was read as of `cluster_time`, where the server can do that. Should that have
    changed in between, `exact` is no longer true; `first_time`, or `as_of`, is the oldest.
    """

    def __init__(
        self,
        connection: Connection,
        settings: Settings,
        started_at: datetime,
        on_progress: ProgressCallback = ignore_progress,
    ) -> None:
        self.as_of = started_at
        self.cluster_time: Timestamp | None = None
        self.oldest_snapshot: Timestamp | None = None
        self.exact = False
        self.odd_forms: dict[ObjectId, set[str]] = {}
        self.knows_odd_forms = True
        self.has_customer_index = False
        self._connection = connection
        self._settings = settings
        self._moved = on_progress
        self._plan = Plan()

    def count_all(
        self, *, at: Timestamp | None = None, single_query: bool = False
    ) -> Iterator[CustomerCount | UpToDate]:
        """Count everyone, in ranges where the index allows it. Raises TooManyOddForms then."""
        self._pin_snapshot(at)
        self.exact = self.cluster_time is not None
        # After that: no array has been in an index at the pinned time if none has been by now.
        self._plan = inspect_plan(self._connection.orders, self._settings)
        self.has_customer_index = self._plan.supports_partitions
        if self._plan.supports_partitions and not single_query:
            yield from self._in_ranges(ranges(self._edges()))
        else:
            self.knows_odd_forms = False
            yield from self._in_scope(Scope())

    def count_customers(
        self, customers: Customers, *, at: Timestamp | None = None, include_up_to_date: bool = False
    ) -> Iterator[CustomerCount | UpToDate]:
        """Count some customers, as of `at` or later.

        With `with_right`, those who are right come as rows, too.
        """
        self._pin_snapshot(at)
        self.exact = self.cluster_time is not None
        yield from self._of_customers(customers, include_up_to_date=include_up_to_date)

    def _pin_snapshot(self, at: Timestamp | None) -> None:
        """Let everything from now on be read as of one point in time: `at`, or later."""
        moment = pin_cluster_time(self._connection)
        if at is not None and moment is not None and moment < at:  # a new primary may be behind
            moment = pin_cluster_time(self._connection, at)
        if self.cluster_time is None and moment is not None:
            self.as_of = moment.as_datetime()
            self.oldest_snapshot = moment
        self.cluster_time = moment

    def _edges(self) -> list[Any]:
        with map_driver_errors("find", self._connection.users):
            return edges(self._connection.users)

    def _in_ranges(self, cut: Sequence[Range]) -> Iterator[CustomerCount | UpToDate]:
        progress = Progress("counting", len(cut), self._moved)
        done = done_at_pin = 0
        while done < len(cut):
            scopes = (Scope(part, apart=part.is_string_partition) for part in cut[done:])
            try:
                workers = self._settings.count_workers
                with map_ordered(self._aggregate, scopes, workers, prefetch=PREFETCH) as answers:
                    for answer in answers:
                        with answer:
                            yield from self._rows_of_range(answer)
                        done += 1
                        progress.add(1)
            except SnapshotTooOld as error:
                if done == done_at_pin:
                    raise  # one range alone takes longer than the server keeps a snapshot
                log.warning('counting_on done=%d total=%d error="%s"', done, len(cut), error)
                done_at_pin = done
                self._restart_snapshot()
        try:  # as a list: all of them, or none
            odd = list(self._rows_of_odd_customers())
        except SnapshotTooOld:
            self._restart_snapshot()
            odd = list(self._rows_of_odd_customers())
        yield from odd

    def _restart_snapshot(self) -> None:
        """Count each customer as of one point in time still, but not all as of the same."""
        self.exact = False
        self._pin_snapshot(self.cluster_time)

    def _rows_of_range(self, spool: Spool) -> Iterator[CustomerCount | UpToDate]:
        """Yield the rows of a range, but for the customers of whom odd forms are known.

        An odd form is never in a later range than its customer, and in the same it comes first.
        """
        for answer in spool:
            for row in rows(answer):
                if isinstance(row, OddForm):
                    self.odd_forms.setdefault(ObjectId(row.text), set()).add(row.text)
                    if len(self.odd_forms) > _ODD_CUSTOMERS:
                        raise TooManyOddForms
                elif isinstance(row, UpToDate) or not self._has_odd_forms(row.customer):
                    yield row

    def _has_odd_forms(self, customer: Any) -> bool:
        return isinstance(customer, ObjectId) and customer in self.odd_forms

    def _rows_of_odd_customers(self) -> Iterator[CustomerCount | UpToDate]:
        """Count the customers with odd forms by themselves, and take back what is in the sums."""
        counted = [(customer, [customer, str(customer)]) for customer in self.odd_forms]
        for row in self._of_customers(counted):
            if isinstance(row, UpToDate):
                yield UpToDate(-row.orders, -row.users, -row.users_with_points_before)
        whole = [(own, [*indexable_variants(own), *forms]) for own, forms in self.odd_forms.items()]
        yield from self._of_customers(whole)

    def _of_customers(
        self, customers: Customers, *, include_up_to_date: bool = False
    ) -> Iterator[CustomerCount | UpToDate]:
        for chosen in _chunks(customers):
            forms = [form for _, forms in chosen for form in forms]
            found = Range([[{"$in": forms}]] if forms else [[]])
            own = [customer for customer, _ in chosen]
            yield from self._in_scope(
                Scope(found, customers=own, include_up_to_date=include_up_to_date)
            )

    def _in_scope(self, scope: Scope) -> Iterator[CustomerCount | UpToDate]:
        with self._aggregate(scope) as spool:
            for answer in spool:
                for row in rows(answer):
                    assert not isinstance(row, OddForm)  # that is for ranges
                    yield row

    def _aggregate(self, scope: Scope) -> Spool:
        """Return all answers of the server, so that a range is counted as a whole or not at all."""
        orders, spool = self._connection.orders, Spool()
        concern: dict[str, Any] = {}
        if self.cluster_time is not None:
            # Not a snapshot session: that is not for several threads.
            snapshot = {"level": "snapshot", "atClusterTime": self.cluster_time}
            concern = {"readConcern": snapshot}
        advice = "raise COUNT_TIMEOUT"
        if not self._plan.supports_partitions:
            advice += ", or make the index with --create-index"
        with map_driver_errors("find", orders, if_too_slow=advice):
            answers = orders.aggregate_raw_batches(
                pipeline(self._settings, scope, arrays=self._plan.status_is_multikey),
                allowDiskUse=True,
                batchSize=ROWS_PER_BATCH,
                collation=COLLATION,
                maxTimeMS=self._settings.count_ms,
                **concern,
            )
            for answer in answers:
                spool.add(answer)
                self._moved("")
        return spool


def _chunks(customers: Customers) -> Iterator[Customers]:
    """Cut so that no aggregation asks for many more than so many forms."""
    portion: list[tuple[Any, Sequence[Any]]] = []
    size = 0
    for customer, forms in customers:
        portion.append((customer, forms))
        size += 1 + len(forms)
        if size >= MAX_IDS_PER_QUERY and forms:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion
