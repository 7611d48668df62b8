"""One count: of all customers in partitions, or of some customers, at one cluster time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bson import Timestamp
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from pymongo.collection import Collection

from config import Settings
from loyalty.concurrency import Progress, ProgressCallback, map_ordered
from loyalty.errors import ConfigurationError, DatabaseUnavailable, SnapshotTooOld
from loyalty.logs import log
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.values import SIMPLE_COLLATION, split_ids
from loyalty.recount.customer_ids import MIXED_CASE_HEX_ID
from loyalty.recount.index import OrdersPlan, inspect_plan
from loyalty.recount.order_filter import counted_orders
from loyalty.recount.partitions import (
    EVERYTHING,
    USERS_PER_PARTITION,
    Partition,
    build_partitions,
    find_boundaries,
)
from loyalty.recount.pipeline import Scope, build_pipeline, parse_rows
from loyalty.recount.result import CountResult
from loyalty.recount.snapshot import pin_cluster_time
from loyalty.recount.spool import Spool
from loyalty.recount.tally import Row

ROWS_PER_BATCH = 5_000
"""Rows in one reply, which has at most 16 MB of BSON."""
MAX_BATCH_BYTES = 1024 * 1024
"""Rows that are decoded together; they need about seven times as much in Python."""
PREFETCH = 20
"""Partitions counted before their turn: if a few customers order a lot, their partition takes
several times as long as the others."""
MAX_CUSTOMERS_PER_QUERY = 1_000
_RAW_CODEC = CodecOptions(document_class=RawBSONDocument)

Customers = Sequence[tuple[Any, Sequence[Any] | None]]
"""Canonical ids, each with the forms to look up in an index. If None, a query reads all orders."""

OnRow = Callable[[Row], None]
FindBoundaries = Callable[[Collection[Any], str, str], Iterable[Any]]
"""Returns keys of one type from the index on a field of users, as `find_boundaries`."""


@dataclass
class OrderCounter:
    """Makes one count, at one cluster time if the server can, and hands each row to a callback."""

    connection: Connection
    settings: Settings
    on_progress: ProgressCallback
    not_before: Timestamp | None = None
    """No query reads at an earlier cluster time."""
    find_boundaries: FindBoundaries = find_boundaries
    use_snapshot: bool = True
    _snapshots: list[Timestamp] = field(default_factory=list, init=False)
    """The cluster times that were pinned; queries read at the last one."""

    def count_all(self, on_row: OnRow, *, single_query: bool = False) -> CountResult:
        """Count all customers, in partitions if the index allows it.

        Raises ServiceError, and UpperCaseFound if a single query is needed instead.
        """
        self._pin_snapshot()
        # After pinning: an index that has no array now had none at that time.
        plan = inspect_plan(self.connection.orders, self.settings)
        if plan.supports_partitions and not single_query:
            self._count_partitions(on_row, plan)
        else:
            scope = Scope(status_may_be_array=plan.status_is_multikey)
            _handle_rows(self._aggregate(scope, plan.advice), on_row)
        # Only live updates need this, and only after the partitions contained an id in upper or
        # mixed case. If the index supports no partitions, live updates look up no ids in it.
        check_case = single_query and self.settings.live_updates
        return CountResult(
            tuple(self._snapshots),
            has_usable_indexes=plan.supports_partitions,
            has_mixed_case_ids=check_case and self._find_mixed_case_ids(),
        )

    def count_customers(self, on_row: OnRow, customers: Customers) -> CountResult:
        """Count some customers, with a row for each that has orders or users.

        Raises ServiceError.
        """
        if self.not_before:  # to pin a newer time would cost a round trip
            self._snapshots.append(self.not_before)
        else:
            self._pin_snapshot()
        # A query that reads all orders is for as many customers as one command can contain.
        reads_all_orders = any(forms is None for _, forms in customers)
        size = len(customers) if reads_all_orders else MAX_CUSTOMERS_PER_QUERY
        for chunk in split_ids(customers, size):
            ids = [form for _, forms in chunk for form in forms or ()]
            partition = EVERYTHING if reads_all_orders else Partition([[{"$in": ids}]])
            scope = Scope(partition, [customer for customer, _ in chunk])
            try:
                batches = self._aggregate(scope)
            except SnapshotTooOld:
                # For example, after an index was created, no older snapshot can be read.
                self._pin_snapshot()
                batches = self._aggregate(scope)
            _handle_rows(batches, on_row)
            self.on_progress("")
        return CountResult(tuple(self._snapshots))

    def _pin_snapshot(self) -> None:
        """Read at the newest cluster time from now on, if the server has snapshots."""
        if self.use_snapshot:
            not_before = self._snapshots[-1] if self._snapshots else self.not_before
            if pinned := pin_cluster_time(self.connection, not_before):
                self._snapshots.append(pinned)

    def _count_partitions(self, on_row: OnRow, plan: OrdersPlan) -> None:
        users, key = self.connection.users, self.settings.user_key_field
        partitions = build_partitions(partial(self.find_boundaries, users, key))
        count = partial(self._aggregate, index_advice=plan.advice)
        workers = self.settings.count_workers
        progress = Progress("counting", self._estimate_partitions(), self.on_progress)
        started: deque[Scope] = deque()  # partitions that are not counted yet

        def take() -> Iterator[Scope]:
            yield from tuple(started)
            try:
                for partition in partitions:
                    started.append(Scope(partition, status_may_be_array=plan.status_is_multikey))
                    yield started[-1]
            except SnapshotTooOld as error:  # of a boundary: no partition follows, so count again
                raise DatabaseUnavailable(str(error)) from error

        done = done_at_pin = 0
        while True:
            try:
                with map_ordered(count, take(), workers, prefetch=PREFETCH) as results:
                    for batches in results:
                        _handle_rows(batches, on_row)
                        started.popleft()
                        done += 1
                        progress.add(1)
            except SnapshotTooOld as error:
                if done == done_at_pin:
                    raise  # one partition alone takes longer than the server keeps a snapshot
                log.warning('snapshot_restarted done=%d error="%s"', done, error)
                done_at_pin = done
                # Each customer is still counted at one time, but not all of them at the same.
                self._pin_snapshot()
                if inspect_plan(self.connection.orders, self.settings) != plan:
                    raise  # an order holds an array now, or the index was dropped
            else:
                return

    def _estimate_partitions(self) -> int:
        users = self.connection.users
        with suppress(ConfigurationError), map_driver_errors("count", users):
            return users.estimated_document_count() // USERS_PER_PARTITION + 2
        return 0

    def _aggregate(self, scope: Scope, index_advice: str = "") -> Spool:
        """Return all batches of the result, so that a partition is counted whole or not at all."""
        orders, spool = self.connection.orders, Spool()
        pipeline = build_pipeline(self.settings, scope)
        options: dict[str, Any] = {
            "allowDiskUse": True,
            "batchSize": ROWS_PER_BATCH,
            "collation": SIMPLE_COLLATION,
            "maxTimeMS": self.settings.count_ms,
        }
        if self._snapshots:
            # Not a snapshot session, which several threads cannot share.
            options["readConcern"] = {"level": "snapshot", "atClusterTime": self._snapshots[-1]}
        advice = "; ".join(filter(None, ["raise COUNT_TIMEOUT", index_advice]))
        with map_driver_errors("find", orders, if_too_slow=advice):
            # Not `aggregate_raw_batches`, which requests an empty first batch: one round trip more.
            rows = orders.with_options(codec_options=_RAW_CODEC).aggregate(pipeline, **options)
            batch = bytearray()
            for row in rows:
                batch += row.raw
                if len(batch) >= MAX_BATCH_BYTES:
                    spool.add(bytes(batch))
                    batch.clear()
                    self.on_progress("")
        if batch:
            spool.add(bytes(batch))
            self.on_progress("")
        return spool

    def _find_mixed_case_ids(self) -> bool:
        """Return whether a counted order or a user has a hex id in mixed case."""
        connection, settings = self.connection, self.settings
        in_orders = {**counted_orders(settings), settings.customer_field: MIXED_CASE_HEX_ID}
        in_users = {settings.user_key_field: MIXED_CASE_HEX_ID}
        options = {"collation": SIMPLE_COLLATION, "max_time_ms": settings.count_ms}
        for collection, query in ((connection.orders, in_orders), (connection.users, in_users)):
            self.on_progress("")
            with map_driver_errors("find", collection):
                if collection.find_one(query, {"_id": 1}, **options) is not None:
                    return True
        return False


def _handle_rows(batches: Spool, on_row: OnRow) -> None:
    for batch in batches:
        for row in parse_rows(batch):
            on_row(row)
