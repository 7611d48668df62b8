"""One recount: count, check, write, record. The daemon and all commands that count use it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from bson import Timestamp

from config import Settings
from loyalty.concurrency import ProgressCallback, ignore_progress
from loyalty.errors import RecountRefused, ServiceError, SnapshotTooOld, TooManyFailedUpdates
from loyalty.history import History
from loyalty.logs import log
from loyalty.mongo.connection import Connection
from loyalty.recount.change_log import open_change_log
from loyalty.recount.counter import Customers, FindBoundaries, OrderCounter
from loyalty.recount.partitions import find_boundaries
from loyalty.recount.pipeline import UpperCaseFound
from loyalty.recount.result import CountResult, Result, build_record, log_result
from loyalty.recount.safety import PreviousRecounts, check_totals, has_too_many_failed_updates
from loyalty.recount.statuses import check_uncounted
from loyalty.recount.tally import CustomerRows, Tally, Totals
from loyalty.recount.updates import LogChanges, PendingUpdates
from loyalty.retry import SHORT_OUTAGE_RETRY, RetryPolicy, retry


@dataclass(frozen=True, kw_only=True)
class RecountRequest:
    """A recount of all customers, or of `customers`, at cluster time `not_before` or later."""

    customers: Customers | None = None
    not_before: Timestamp | None = None
    write: bool = True
    force: bool = False
    safety_check: Callable[[Totals], str | None] | None = None
    """Returns why it is refused; replaces the safety checks of a full recount."""
    rows: CustomerRows | None = None
    """Collects a row for each customer whose users are not up to date, or who is in `customers`."""
    find_boundaries: FindBoundaries = find_boundaries
    retry_policy: RetryPolicy = SHORT_OUTAGE_RETRY

    @property
    def is_recorded(self) -> bool:
        """Whether it is a full recount that writes."""
        return self.write and self.customers is None


FULL_RECOUNT = RecountRequest()

_Counted = tuple[CountResult, Totals, PendingUpdates]


def run_recount(
    connection: Connection,
    settings: Settings,
    history: History,
    request: RecountRequest = FULL_RECOUNT,
    on_progress: ProgressCallback = ignore_progress,
) -> Result:
    """Do one recount.

    1. Count, and compare with the stored points.
    2. Check whether the changes are safe.
    3. Write the changes, if `write`; before, add them to the change log, if `is_recorded`.
    4. Record and log the result, if `is_recorded`.

    Raises RecountRefused if a safety check refuses it, and any other ServiceError that ended it.
    """
    result = Result(started_at=datetime.now(UTC))
    recount = _Recount(connection, settings, history, request, on_progress, result)
    clock = time.monotonic()
    try:
        updates = recount.count()
        recount.check()
        if request.write:
            recount.write(updates)
        result.outcome = "incomplete" if result.failed_updates else "succeeded"
    except Exception as error:
        result.outcome = "refused" if isinstance(error, RecountRefused) else "failed"
        # The text of an exception that is not ours could contain anything.
        result.error = str(error) if isinstance(error, ServiceError) else type(error).__name__
        raise
    finally:
        result.seconds = time.monotonic() - clock
        if request.is_recorded and result.outcome is not None:  # None: Ctrl-C
            history.write(build_record(result))
    if request.is_recorded:
        log_result(result)
        # After the writes: the build waits for every voting member, even if it is down.
        if result.written and connection.changes is not None:
            history.create_expiry_index(connection.changes)
    return result


@dataclass(frozen=True)
class _Recount:
    """The steps of one recount; each adds to `result`."""

    connection: Connection
    settings: Settings
    history: History
    request: RecountRequest
    on_progress: ProgressCallback
    result: Result

    def count(self) -> PendingUpdates:
        """Count, and return the updates. A failed count starts again at a new cluster time."""
        result, request = self.result, self.request

        def report_retry(attempt: int, error: Exception) -> None:
            log.warning('count_retry attempt=%d error="%s"', attempt, error)
            self.on_progress("")

        try:
            # The driver does not retry a cursor that was lost with its primary.
            counted = retry(self._attempt_count, request.retry_policy, on_retry=report_retry)
        except SnapshotTooOld as error:
            if request.customers is not None and request.not_before is not None:
                raise  # live updates must not write anything older than `not_before`
            log.warning('snapshot_unavailable error="%s"', error)
            counted = self._attempt_count(use_snapshot=False)
        result.count, result.totals, updates = counted
        return updates

    def _attempt_count(self, *, use_snapshot: bool = True) -> _Counted:
        try:
            return self._count(use_snapshot=use_snapshot)
        except UpperCaseFound:
            log.info('single_query_count reason="upper-case or mixed-case hex ids"')
        return self._count(use_snapshot=use_snapshot, single_query=True)

    def _count(self, *, use_snapshot: bool, single_query: bool = False) -> _Counted:
        request, settings = self.request, self.settings
        updates = PendingUpdates(settings.batch_size, settings.points_field)
        if request.rows is not None:
            request.rows.clear()
        tally = Tally(settings, updates.add, request.rows)
        counter = OrderCounter(
            self.connection,
            settings,
            self.on_progress,
            not_before=request.not_before,
            find_boundaries=request.find_boundaries,
            use_snapshot=use_snapshot,
        )
        if request.customers is None:
            count = counter.count_all(tally.add, single_query=single_query)
        else:
            count = counter.count_customers(tally.add, request.customers)
        return count, tally.totals, updates

    def check(self) -> None:
        """Run the safety checks on the totals. Raises RecountRefused."""
        result, request, settings = self.result, self.request, self.settings
        if request.safety_check is not None:
            result.refusal = request.safety_check(result.totals)
        elif request.customers is None:
            report = check_totals(result.totals, settings, _read_previous(self.history))
            if not result.totals.counted_orders or not result.totals.users:
                report += check_uncounted(self.connection, settings, self.on_progress)
            result.refusal, result.warnings = report.refusal, report.warnings
        if not request.write:
            return
        if result.refusal:
            if not request.force:
                raise RecountRefused(result.refusal)
            log.warning('safety_check_overridden reason="%s"', result.refusal)
        for warning in result.warnings:
            log.warning('safety_warning text="%s"', warning)
        if request.is_recorded and (replaced := result.totals.non_numeric_values):
            log.warning("non_numeric_points users=%d field=%s", replaced, settings.points_field)
            log.debug("non_numeric_points sample=%s", result.totals.non_numeric_sample)

    def write(self, updates: PendingUpdates) -> None:
        """Write the updates. Raises TooManyFailedUpdates, and other ServiceErrors."""
        totals = self.result.totals
        # Before the writes, so that the record has their numbers also after an error.
        done = self.result.updates = updates.result
        updates.write(self.connection.users, self.on_progress, self._open_change_log())
        if not done.failed:
            return
        log.debug("failed_updates user_ids=%s", ", ".join(done.failed_sample))
        errors = done.describe_failures()
        if has_too_many_failed_updates(done.failed, totals.users):
            raise TooManyFailedUpdates(
                f"{done.failed:,} of {totals.changed:,} updates failed ({errors})", done.failed
            )
        log.warning(
            'incomplete failed_updates=%d updates=%d errors="%s"',
            *(done.failed, totals.changed, errors),
        )

    def _open_change_log(self) -> LogChanges | None:
        """Return the function that logs changes; None if they are not logged."""
        if self.connection.changes is None or not self.request.is_recorded:
            return None
        return open_change_log(
            self.connection.changes,
            self.settings,
            recount=self.result.id,
            started_at=self.result.started_at,
            cluster_time=self.result.count.cluster_time,
        )


def _read_previous(history: History) -> PreviousRecounts:
    try:
        last = history.find_last_success()
    except ServiceError:
        return PreviousRecounts()
    return PreviousRecounts(
        is_first=last is None, counted_orders=last["counted_orders"] if last else None
    )
