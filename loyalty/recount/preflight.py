"""Verifies what a recount needs: a connection, access, and a server that can count."""

from contextlib import suppress

from bson import ObjectId

from config import Settings
from loyalty.concurrency import ignore_progress
from loyalty.errors import ConfigurationError, DatabaseUnavailable, MissingPrivilege, ServiceError
from loyalty.history import History
from loyalty.logs import log
from loyalty.mongo.connection import Connection, connect
from loyalty.recount.change_log import check_change_log
from loyalty.recount.counter import OrderCounter
from loyalty.recount.index import find_index_problem


def connect_and_verify(settings: Settings, *, writing: bool, recording: bool = True) -> Connection:
    """Connect, verify that the server can do what a recount needs, and log its limits.

    If `writing` and `recording`, also verify that no other program uses the collections of records
    and changes. Raises ServiceError.
    """
    connection = connect(settings, writing=writing)
    log.info(
        "connected host=%s database=%s server=%s topology=%s",
        *(settings.hosts, settings.database, connection.server_version, connection.topology),
    )
    if connection.snapshot_unsupported_reason:
        log.warning(
            'snapshot_unsupported reason="%s" effect="an order that changes during a recount may '
            'be missed or counted twice"',
            connection.snapshot_unsupported_reason,
        )
    try:
        with suppress(DatabaseUnavailable):  # the first recount reports that, and retries
            _probe_aggregation(connection, settings)
        with suppress(DatabaseUnavailable):
            if problem := find_index_problem(connection.orders, settings):
                log.warning('index_missing reason="%s"', problem)
        if writing and recording:
            with suppress(MissingPrivilege):  # a missing record is a warning, not an error
                History(connection.recounts, settings).check_collection()
            check_change_log(connection)
    except BaseException:
        connection.client.close()
        raise
    return connection


def _probe_aggregation(connection: Connection, settings: Settings) -> None:
    """Count a customer who does not exist, so that the server checks the aggregation.

    Raises ServiceError; ConfigurationError if ORDER_FILTER is not a valid query.
    """
    unused = ObjectId()
    counter = OrderCounter(connection, settings, ignore_progress)
    try:
        counter.count_customers(lambda _: None, [(unused, [unused])])
    except ServiceError as error:
        if settings.order_filter and _is_bad_query(error):
            raise ConfigurationError(f"{error}; is ORDER_FILTER right?") from error
        raise


def _is_bad_query(error: ServiceError) -> bool:
    # The parser of conditions reports nearly every mistake with a code that has no name.
    details = getattr(error.__cause__, "details", None) or {}
    has_unnamed_code = str(details.get("codeName", "")).startswith("Location")
    return has_unnamed_code or type(error) is ConfigurationError  # not its subclasses
