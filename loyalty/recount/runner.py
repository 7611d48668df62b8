"""A whole recount: connect; count, guard, write, record. Everything that recounts comes here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from bson import ObjectId, Timestamp

from config import Settings
from loyalty.concurrency import ProgressCallback, ignore_progress
from loyalty.errors import DatabaseUnavailable, QueryTimeout, RecountRefused, ServiceError
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.recount.counter import Count, Customers, TooManyOddForms
from loyalty.recount.index import missing_index_hint
from loyalty.recount.result_log import log_result
from loyalty.recount.statuses import check_statuses
from loyalty.recount.tally import Result, Tally, Totals
from loyalty.recount.updates import Changes

log = logging.getLogger("loyalty")

_COUNT_ATTEMPTS = 3


def connect_and_verify(settings: Settings, *, writing: bool, recording: bool = True) -> Connection:
    """Connect, prove that the server can do what a recount needs, and say what is to be known.

    `recording`: if it is for writing, then records must have a place of their own, too.
    """
    connection = connect(settings, writing=writing)
    log.info("connected %s", connection.description)
    if connection.snapshot_unsupported_reason:
        log.warning(
            "not_exact %s cannot read as of one point in time: an order that changes during a "
            "recount may be missed or counted twice",
            connection.snapshot_unsupported_reason,
        )
    if advice := missing_index_hint(connection.orders, settings):
        fields = f"{{{settings.status_field}, {settings.customer_field}}}"
        log.warning("no_index %s on %s: %s", fields, connection.orders.full_name, advice)
    try:
        nobody = ObjectId()
        with suppress(DatabaseUnavailable):  # the first recount will say that, and try again
            list(
                Count(connection, settings, datetime.now(UTC)).count_customers([(nobody, [nobody])])
            )
        if writing and recording:
            History(connection.recounts).check()
    except BaseException:
        connection.client.close()
        raise
    return connection


@dataclass(frozen=True, kw_only=True)
class RecountRequest:
    """A recount that is wanted: of everyone, or of some `customers`; as of `at` or later."""

    customers: Customers | None = None
    at: Timestamp | None = None
    write: bool = True
    force: bool = False
    guard: Callable[[Totals], str | None] | None = None
    """Says why it is refused, in place of the guard of full recounts."""


FULL_RECOUNT = RecountRequest()


def run_recount(
    connection: Connection,
    settings: Settings,
    history: History,
    task: RecountRequest = FULL_RECOUNT,
    on_progress: ProgressCallback = ignore_progress,
) -> Result:
    """Do one recount.

    1. Count, and compare with the stored points.
    2. Let the guard judge what would change, unless forced.
    3. Write what has changed, if wanted.
    4. Record and log it, if it was about everyone.

    Raises Refused by the guard, and whatever else ended it.
    """
    now = datetime.now(UTC)
    result = Result(now, now)
    clock = time.monotonic()
    recorded = task.write and task.customers is None
    try:
        with Changes(settings.batch_size, settings.points_field) as changes:
            _count(connection, settings, task, changes, result, on_progress)
            if task.write and result.refusal and not task.force:
                raise RecountRefused(result.refusal)
            totals = result.totals
            if totals.non_numeric_values and task.customers is None:
                log.warning(
                    "values_replaced %d users hold something else in %s, such as %s",
                    *(totals.non_numeric_values, settings.points_field, totals.other_value),
                )
            if recorded and totals.decreased and history.is_empty():
                result.warnings = [f"{totals.losers} would lose some in the first recount"]
            for warning in result.warnings if recorded else []:  # before it happens
                log.warning('points_decrease reason="%s"', warning)
            if task.write:
                result.failed = changes.write(connection.users, on_progress)
        result.outcome = "incomplete" if result.failed.reasons else "succeeded"
    except Exception as error:
        result.outcome = "refused" if isinstance(error, RecountRefused) else "failed"
        # The text of an exception that is not ours could hold anything.
        result.error = str(error) if isinstance(error, ServiceError) else type(error).__name__
        result.seconds = time.monotonic() - clock
        if recorded:
            history.write(result)
        raise
    result.seconds = time.monotonic() - clock
    if recorded:
        history.write(result)
        log_result(result)
    elif result.failed.reasons:
        log.warning("incomplete %s", result.failed)
    return result


def _count(
    connection: Connection,
    settings: Settings,
    task: RecountRequest,
    changes: Changes,
    result: Result,
    on_progress: ProgressCallback,
) -> None:
    """Fill `result` and `changes`. Whatever fails in the middle: all again at a new time."""
    attempt, single_query = 1, False
    while True:
        changes.clear()
        recount = Tally(settings, changes.add)
        count = Count(connection, settings, result.started_at, on_progress)
        if task.customers is None:
            rows = count.count_all(at=task.at, single_query=single_query)
        else:
            rows = count.count_customers(task.customers, at=task.at, include_up_to_date=True)
        result.totals = recount.totals
        try:
            for row in rows:
                recount.pop_pending(row)
            break
        except TooManyOddForms:
            single_query = True
            log.info("counting_in_one_piece many ids are in capitals or mixed case")
        except QueryTimeout:
            raise
        except DatabaseUnavailable as error:
            # The driver does not retry a cursor that died under it: the primary was killed, say.
            if attempt == _COUNT_ATTEMPTS:
                raise
            attempt += 1
            log.warning('counting_again attempt=%d error="%s"', attempt, error)
            on_progress("")
    totals = recount.totals
    result.as_of, result.exact, result.oldest_snapshot = (
        count.as_of,
        count.exact,
        count.oldest_snapshot,
    )
    result.cluster_time = count.cluster_time if count.exact else None
    result.odd_forms = count.odd_forms if count.knows_odd_forms else None
    result.has_customer_index = count.has_customer_index
    result.refusal = task.guard(totals) if task.guard else recount.refusal()
    result.warnings = recount.warnings()
    if task.customers is None and not totals.counted_orders:
        reasons = [result.refusal, check_statuses(connection, settings)]
        result.refusal = "; ".join(filter(None, reasons)) or None
