"""What the daemon repeats: a whole recount, and the connection that it keeps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from bson import ObjectId

from config import Settings
from loyalty import report
from loyalty.counting import Count, TooManyOddForms
from loyalty.errors import ConfigError, Misconfigured, Refused, ServiceError, TooSlow, Unavailable
from loyalty.history import History
from loyalty.index import index_is_missing
from loyalty.mongo import Connection, connect
from loyalty.overlap import Moved, still
from loyalty.recount import Recount
from loyalty.result import Result
from loyalty.statuses import mistaken_status
from loyalty.writer import Changes

log = logging.getLogger("loyalty")

_COUNT_ATTEMPTS = 3

Customers = Mapping[Any, Sequence[Any]]
"""Canonical ids, each with the forms that an index finds."""


def open_shop(settings: Settings, *, writing: bool) -> Connection:
    """Connect, prove that the server can do what a recount needs, and say what is to be known."""
    connection = connect(settings, writing=writing)
    log.info("connected %s", connection.description)
    if connection.inexact:
        log.warning(
            "not_exact %s cannot read as of one point in time: an order that changes during a "
            "recount may be missed or counted twice",
            connection.inexact,
        )
    if index_is_missing(connection.orders, settings):
        fields = f"{{{settings.status_field}, {settings.customer_field}}}"
        orders = connection.orders.full_name
        log.warning("no_index %s on %s: make it with --create-index", fields, orders)
    try:
        nobody = ObjectId()
        list(Count(connection, settings, _now()).of_customers({nobody: [nobody]}))
        if writing:
            History(connection.recounts).check()
    except BaseException:
        connection.client.close()
        raise
    return connection


def perform(
    connection: Connection,
    settings: Settings,
    history: History,
    *,
    customers: Customers | None = None,
    write: bool = True,
    force: bool = False,
    moved: Moved = still,
) -> Result:
    """Do one recount, of everyone or of some customers.

    1. Count, and compare with the stored points.
    2. Let the guard judge what would change, unless `force`.
    3. Write what has changed, if `write`.
    4. Record and log it, if it was about everyone.

    Raises Refused by the guard, and whatever else ended it.
    """
    result = Result(_now(), _now())
    clock = time.monotonic()
    recorded = write and customers is None
    try:
        with Changes(settings.batch_size, settings.points_field) as changes:
            _count(connection, settings, changes, result, customers, moved)
            if write and result.refusal and not force:
                raise Refused(result.refusal)
            if recorded and result.totals.decreased and history.is_empty():
                result.warning = f"from {result.totals.losers}, as this is the first recount"
            if recorded and result.warning:  # before it happens
                log.warning("points_taken %s", result.warning)
            if write:
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
    return result


def _count(
    connection: Connection,
    settings: Settings,
    changes: Changes,
    result: Result,
    customers: Customers | None,
    moved: Moved,
) -> None:
    """Fill `result` and `changes`. Whatever fails in the middle: all again at a new time."""
    attempt, in_one_piece = 1, False
    while True:
        changes.clear()
        recount = Recount(settings, changes.add)
        count = Count(connection, settings, result.started_at, moved)
        if customers is None:
            rows = count.of_everyone(in_one_piece=in_one_piece)
        else:
            rows = count.of_customers(customers, everyone=True)
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
    result.as_of, result.exact = count.as_of, count.exact
    result.cluster_time = count.cluster_time if count.exact else None
    result.refusal, result.warning = recount.refusal(), recount.warning()
    if customers is None and not recount.totals.counted_orders:
        result.refusal = mistaken_status(connection, settings) or result.refusal


class Service:
    """Keeps a connection for the daemon, and makes a new one when that is rejected."""

    def __init__(self, settings: Settings, reload: Callable[[], Settings]) -> None:
        self._settings = settings
        self._reload = reload
        self._connection: Connection | None = None
        self._history = History(None)

    def connect(self) -> None:
        """Connect for the first time. Raises ServiceError."""
        self._connection = open_shop(self._settings, writing=True)
        self._history = History(self._connection.recounts)

    def recount(self, moved: Moved) -> str:
        """Recount everyone, and return how it went, for a person. Raises ServiceError."""
        if self._connection is None:
            self._reconnect()
        assert self._connection is not None
        try:
            result = perform(self._connection, self._settings, self._history, moved=moved)
        except Refused as error:  # to try again soon would not help; the next is on schedule
            log.error("refused %s", error)
            return f"refused: {error}"
        except Misconfigured:
            self._connection.client.close()
            self._connection = None
            raise
        return report.status_of(result)

    def _reconnect(self) -> None:
        try:
            self._settings = self._reload()  # the password may have changed, and the file with it
        except ConfigError as error:
            raise Misconfigured(str(error)) from error
        self.connect()


def _now() -> datetime:
    return datetime.now(UTC)
