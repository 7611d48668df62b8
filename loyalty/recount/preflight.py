"""What must hold before the first recount: a connection, access, and a server that can count."""

from __future__ import annotations

import logging
from contextlib import suppress

from bson import ObjectId

from config import Settings
from loyalty.concurrency import ignore_progress
from loyalty.errors import DatabaseUnavailable
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.recount.change_log import check_change_log
from loyalty.recount.counter import Counter
from loyalty.recount.index import missing_index_hint

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
    if hint := missing_index_hint(connection.orders, settings):
        fields = f"{{{settings.status_field}, {settings.customer_field}}}"
        log.warning("index_missing %s on %s: %s", fields, connection.orders.full_name, hint)
    try:
        unused = ObjectId()
        with suppress(DatabaseUnavailable):  # the first recount reports that, and retries
            Counter(connection, settings, ignore_progress).count_customers(
                lambda _: None, [(unused, [unused])]
            )
        if writing and recording:
            History(connection.recounts, settings).check()
            if connection.changes is not None:
                check_change_log(connection.changes)
    except BaseException:
        connection.client.close()
        raise
    return connection
