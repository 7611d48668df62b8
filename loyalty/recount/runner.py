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
from loyalty import report
from loyalty.concurrency import Moved, still
from loyalty.errors import Refused, ServiceError, TooSlow, Unavailable
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.recount.counter import Count, Customers, TooManyOddForms
from loyalty.recount.index import advice_on_index
from loyalty.recount.statuses import mistaken_status
from loyalty.recount.tally import Recount, Result, Totals
from loyalty.recount.updates import Changes

log = logging.getLogger("loyalty")

_COUNT_ATTEMPTS = 3


def open_shop(settings: Settings, *, writing: bool, recording: bool = True) -> Connection:
    """Connect, prove that the server can do what a recount needs, and say what is to be known.

    `recording`: if it is for writing, then records must have a place of their own, too.
    """
    connection = connect(settings, writing=writing)
    log.info("connected %s", connection.description)
    if connection.inexact:
        log.warning(
            "not_exact %s cannot read as of one point in time: an order that changes during a "
            "recount may be missed or counted twice",
            connection.inexact,
        )
    if advice := advice_on_index(connection.orders, settings):
        fields = f"{{{settings.status_field}, {settings.customer_field}}}"
        log.warning("no_index %s on %s: %s", fields, connection.orders.full_name, advice)
    try:
        nobody = ObjectId()
        with suppress(Unavailable):  # the first recount will say that, and try again
            list(Count(connection, settings, datetime.now(UTC)).of_customers([(nobody, [nobody])]))
        if writing and recording:
            History(connection.recounts).check()
    except BaseException:
        connection.client.close()
        raise
    return connection


@dataclass(frozen=True, kw_only=True)
class Task:
    """A recount that is wanted: of everyone, or of some `customers`; as of `at` or later."""

    customers: Customers | None = None
    at: Timestamp | None = None
    write: bool = True
    force: bool = False
    guard: Callable[[Totals], str | None] | None = None
    """Says why it is refused, in place of the guard of full recounts."""


EVERYONE = Task()


def perform(
    connection: Connection,
    settings: Settings,
    history: History,
    task: Task = EVERYONE,
    moved: Moved = still,
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
            _count(connection, settings, task, changes, result, moved)
            if task.write and result.refusal and not task.force:
                raise Refused(result.refusal)
            totals = result.totals
            if totals.other_values and task.customers is None:
                log.warning(
                    "values_replaced %d users hold something else in %s, such as %s",
                    *(totals.other_values, settings.points_field, totals.other_value),
                )
            if recorded and totals.decreased and history.is_empty():
                result.warning = f"from {totals.losers}, as this is the first recount"
            if recorded and result.warning:  # before it happens
                log.warning("points_taken %s", result.warning)
            if task.write:
                result.refusing = changes.write(connection.users, moved)
        result.outcome = "incomplete" if result.refusing.reasons else "succeeded"
    except Exception as error:
        result.outcome = "refused" if isinstance(error, Refused) else "failed"
        # The text of an exception that is not ours could hold anything.
        result.error = str(error) if isinstance(error, ServiceError) else type(error).__name__
        result.seconds = time.monotonic() - clock
        if recorded:
            history.write(result)
        raise
    result.seconds = time.monotonic() - clock
    if recorded:
        history.write(result)
        report.log_result(result)
    elif result.refusing.reasons:
        log.warning("incomplete %s", result.refusing)
    return result


def _count(
    connection: Connection,
    settings: Settings,
    task: Task,
    changes: Changes,
    result: Result,
    moved: Moved,
) -> None:
    """Fill `result` and `changes`. Whatever fails in the middle: all again at a new time."""
    attempt, in_one_piece = 1, False
    while True:
        changes.clear()
        recount = Recount(settings, changes.add)
        count = Count(connection, settings, result.started_at, moved)
        if task.customers is None:
            rows = count.of_everyone(at=task.at, in_one_piece=in_one_piece)
        else:
            rows = count.of_customers(task.customers, at=task.at, with_right=True)
        result.totals = recount.totals
        try:
            for row in rows:
                recount.take(row)
            break
        except TooManyOddForms:
            in_one_piece = True
            log.info("counting_in_one_piece many ids are in capitals or mixed case")
        except TooSlow:
            raise
        except Unavailable as error:
            # The driver does not retry a cursor that died under it: the primary was killed, say.
            if attempt == _COUNT_ATTEMPTS:
                raise
            attempt += 1
            log.warning('counting_again attempt=%d error="%s"', attempt, error)
            moved("")
    totals = recount.totals
    result.as_of, result.exact, result.first_time = count.as_of, count.exact, count.first_time
    result.cluster_time = count.cluster_time if count.exact else None
    result.odd_forms = count.odd_forms if count.knows_odd_forms else None
    result.finds_customers = count.finds_customers
    result.refusal = task.guard(totals) if task.guard else recount.refusal()
    result.warning = recount.warning()
    if task.customers is None and not totals.counted_orders:
        reasons = [result.refusal, mistaken_status(connection, settings)]
        result.refusal = "; ".join(filter(None, reasons)) or None
