"""One recount: count, check, write, record. Every command and the daemon use it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from bson import Timestamp

from config import Settings
from loyalty.concurrency import ProgressCallback, ignore_progress
from loyalty.errors import RecountRefused, ServiceError, SnapshotTooOld, TooManyFailedUpdates
from loyalty.history import History
from loyalty.mongo.connection import Connection
from loyalty.recount.change_log import ChangeLog
from loyalty.recount.counter import Counter, Customers, FindBoundaries
from loyalty.recount.look_alikes import UnknownCustomerList
from loyalty.recount.partitions import partition_boundaries
from loyalty.recount.pipeline import NonCanonicalIdFound
from loyalty.recount.result import CountResult, Result, build_record, log_result
from loyalty.recount.safety import PreviousRecounts, check_totals, has_too_many_failed_updates
from loyalty.recount.statuses import check_uncounted
from loyalty.recount.tally import CustomerCount, Tally, Totals, UpToDate
from loyalty.recount.updates import LogChanges, PendingUpdates
from loyalty.retry import SHORT_OUTAGE_RETRY, RetryPolicy, retry

log = logging.getLogger("loyalty")


@dataclass(frozen=True, kw_only=True)
class RecountRequest:
    """A recount of all customers, or of `customers`, at cluster time `not_before` or later."""

    customers: Customers | None = None
    not_before: Timestamp | None = None
    write: bool = True
    force: bool = False
    safety_check: Callable[[Totals], str | None] | None = None
    """Returns why it is refused; replaces the safety checks of a full recount."""
    unknown: UnknownCustomerList | None = None
    """Collects all unknown customers, if it is given."""
    rows: list[CustomerCount] | None = None
    """Collects the row of each customer, if it is given."""
    find_boundaries: FindBoundaries = partition_boundaries
    retry_policy: RetryPolicy = SHORT_OUTAGE_RETRY


FULL_RECOUNT = RecountRequest()


def run_recount(
    connection: Connection,
    settings: Settings,
    history: History,
    request: RecountRequest = FULL_RECOUNT,
    on_progress: ProgressCallback = ignore_progress,
) -> Result:
    """Do one recount.

    1. Count, and compare with the stored points.
    2. Check whether the changes are safe, unless forced.
    3. Log the changes and write them, if wanted.
    4. Record and log the result, if all customers were counted.

    Raises RecountRefused by the safety checks, and any ServiceError that ended it.
    """
    started_at = datetime.now(UTC)
    result = Result(started_at=started_at, count=CountResult(started_at))
    clock = time.monotonic()
    is_recorded = request.write and request.customers is None
    try:
        with PendingUpdates(settings.batch_size, settings.points_field) as updates:
            _count(connection, settings, request, updates, result, on_progress)
            _check(connection, settings, history, request, result)
            if request.write:
                log_changes = (
                    _open_change_log(connection, settings, result) if is_recorded else None
                )
                _write(connection, updates, log_changes, result, on_progress)
    except Exception as error:
        result.outcome = "refused" if isinstance(error, RecountRefused) else "failed"
        # The text of an exception that is not ours could contain anything.
        result.error = str(error) if isinstance(error, ServiceError) else type(error).__name__
        result.seconds = time.monotonic() - clock
        if is_recorded:
            history.write(build_record(result))
        raise
    result.seconds = time.monotonic() - clock
    if is_recorded:
        history.write(build_record(result))
        log_result(result)
        # After the writes: building an index waits for every voting member, also a dead one.
        if result.written and connection.changes is not None:
            history.create_expiry_index(connection.changes)
    return result


def _count(
    connection: Connection,
    settings: Settings,
    request: RecountRequest,
    updates: PendingUpdates,
    result: Result,
    on_progress: ProgressCallback,
) -> None:
    """Count, and collect the updates. A failed count starts again at a new cluster time."""
    started_at = result.started_at
    attempt = partial(
        _attempt_count, connection, settings, request, updates, started_at, on_progress
    )

    def count(*, use_snapshot: bool = True) -> tuple[CountResult, Totals]:
        try:
            return attempt(use_snapshot=use_snapshot)
        except NonCanonicalIdFound:
            log.info('single_query_count reason="upper-case or mixed-case hex ids"')
            return attempt(use_snapshot=use_snapshot, single_query=True)

    def report_retry(number: int, error: Exception) -> None:
        log.warning('count_retry attempt=%d error="%s"', number, error)
        on_progress("")

    try:
        # The driver does not retry a cursor that was lost with its primary.
        result.count, result.totals = retry(count, request.retry_policy, on_retry=report_retry)
    except SnapshotTooOld as error:
        if request.customers is not None:
            raise  # live updates must not write anything older than `not_before`
        log.warning('snapshot_unavailable error="%s"', error)
        result.count, result.totals = count(use_snapshot=False)


def _attempt_count(
    connection: Connection,
    settings: Settings,
    request: RecountRequest,
    updates: PendingUpdates,
    started_at: datetime,
    on_progress: ProgressCallback,
    *,
    use_snapshot: bool,
    single_query: bool = False,
) -> tuple[CountResult, Totals]:
    """Count once. Raises NonCanonicalIdFound if a single query is needed, and ServiceError."""
    updates.clear()
    on_unknown = None
    if request.unknown is not None:
        request.unknown.clear()
        on_unknown = request.unknown.add
    tally = Tally(settings, updates.add, on_unknown)
    if request.rows is not None:
        request.rows.clear()

    def on_row(row: CustomerCount | UpToDate) -> None:
        tally.add(row)
        if request.rows is not None and isinstance(row, CustomerCount):
            request.rows.append(row)

    counter = Counter(
        connection,
        settings,
        on_progress,
        started_at=started_at,
        not_before=request.not_before,
        find_boundaries=request.find_boundaries,
        use_snapshot=use_snapshot,
    )
    if request.customers is None:
        return counter.count_all(on_row, single_query=single_query), tally.totals
    return counter.count_customers(on_row, request.customers), tally.totals


def _check(
    connection: Connection,
    settings: Settings,
    history: History,
    request: RecountRequest,
    result: Result,
) -> None:
    """Let the safety checks judge the totals. Raises RecountRefused."""
    if request.safety_check is not None:
        result.refusal = request.safety_check(result.totals)
    elif request.customers is None:
        report = check_totals(result.totals, settings, _read_previous(history))
        if not result.totals.counted_orders or not result.totals.users:
            report.add(check_uncounted(connection, settings))
        result.refusal, result.warnings = report.refusal, report.warnings
    if not request.write:
        return
    if result.refusal and not request.force:
        raise RecountRefused(result.refusal)
    if request.customers is None:
        for warning in result.warnings:
            log.warning('safety_warning text="%s"', warning)
        if replaced := result.totals.non_numeric_values:
            log.warning("non_numeric_points users=%d field=%s", replaced, settings.points_field)
            log.debug("non_numeric_points sample=%s", result.totals.non_numeric_sample)


def _read_previous(history: History) -> PreviousRecounts:
    with suppress(ServiceError):
        last = history.last_success()
        counted_orders = last["counted_orders"] if last else None
        return PreviousRecounts(is_first=history.is_empty(), counted_orders=counted_orders)
    return PreviousRecounts()


def _open_change_log(
    connection: Connection, settings: Settings, result: Result
) -> LogChanges | None:
    if connection.changes is None or not result.totals.changed:
        return None
    change_log = ChangeLog(
        connection.changes,
        users=settings.users,
        points_field=settings.points_field,
        recount=result.id,
        at=result.started_at,
        cluster_time=result.count.cluster_time,
        expires_at=result.started_at + settings.retention,
    )
    return change_log.insert


def _write(
    connection: Connection,
    updates: PendingUpdates,
    log_changes: LogChanges | None,
    result: Result,
    on_progress: ProgressCallback,
) -> None:
    """Write the updates. Raises TooManyFailedUpdates, and other ServiceErrors."""
    try:
        updates.write(connection.users, on_progress, log_changes)
    finally:
        result.written, result.failed = updates.result.written, updates.result.failed
    if not result.failed:
        return
    failed, changed = result.failed_updates, result.totals.changed
    log.debug("failed_updates users=%s", ", ".join(result.failed.sample))
    if has_too_many_failed_updates(failed, result.totals.users):
        text = f"{failed:,} of {changed:,} updates failed ({result.failed})"
        raise TooManyFailedUpdates(text, failed)
    result.outcome = "incomplete"
    errors = str(result.failed)
    log.warning('incomplete failed_updates=%d changed=%d errors="%s"', failed, changed, errors)
