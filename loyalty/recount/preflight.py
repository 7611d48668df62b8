"""What must hold before the first recount: a connection, access, and a server that can count."""

from __future__ import annotations

import logging
from contextlib import suppress

from bson import ObjectId

from config import Settings
from loyalty.concurrency import ignore_progress
from loyalty.errors import ConfigurationError, DatabaseUnavailable, NoPermission, ServiceError
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.mongo.error_codes import is_known
from loyalty.recount.change_log import check_change_log
from loyalty.recount.counter import Counter
from loyalty.recount.index import index_keys, missing_index_hint

log = logging.getLogger("loyalty")


def connect_and_verify(settings: Settings, *, writing: bool, recording: bool = True) -> Connection:
    """Connect, verify that the server can do what a recount needs, and log its limits.

    `recording`: for writing, the records must have a collection of their own.
    Raises ServiceError.
    """
    connection = connect(settings, writing=writing)
    log.info("connected %s", connection.description)
    if connection.snapshot_unsupported_reason:
        log.warning(
            "snapshot_unsupported %s cannot read at one cluster time: an order that changes during "
            "a recount may be missed or counted twice",
            connection.snapshot_unsupported_reason,
        )
    try:
        with suppress(DatabaseUnavailable):  # the first recount reports that, and retries
            _count_unused_customer(connection, settings)
        if hint := missing_index_hint(connection.orders, settings):
            fields = ", ".join(name for name, _ in index_keys(settings))
            log.warning("index_missing {%s} on %s: %s", fields, connection.orders.full_name, hint)
        if writing and recording:
            History(connection.recounts, settings).check()
            if connection.changes is not None:
                check_change_log(connection.changes)
    except BaseException:
        connection.client.close()
        raise
    return connection


def _count_unused_customer(connection: Connection, settings: Settings) -> None:
    """Let the server judge the aggregation, and ORDER_FILTER in it. Raises ServiceError."""
    unused = ObjectId()
    counter = Counter(connection, settings, ignore_progress)
    try:
        counter.count_customers(lambda _: None, [(unused, [unused])])
    except ServiceError as error:
        code = getattr(error.__cause__, "code", None)
        is_bad_query = isinstance(error, ConfigurationError) and not isinstance(error, NoPermission)
        # The parser of a condition has a code of its own for nearly every mistake.
        is_bad_query |= code is not None and not is_known(code)
        if settings.order_filter and is_bad_query:
            raise ConfigurationError(f"{error}; is ORDER_FILTER right?") from error
        raise
