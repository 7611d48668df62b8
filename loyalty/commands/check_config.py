"""`--check-config`: settings, access, collections, index, statuses, and a count like `--dry-run`.

It reads all orders and users, and changes no document.
"""

import argparse
from collections.abc import Sequence

from config import Settings
from loyalty.commands import dry_run
from loyalty.commands.once import print_totals
from loyalty.commands.output import (
    flush_results,
    format_cell,
    pluralize,
    print_json,
    print_line,
    print_table,
)
from loyalty.errors import ConfigurationError, Exit, MissingPrivilege
from loyalty.history import History
from loyalty.live.opening import describe_mixed_case, find_live_updates_problem, keeps_pre_images
from loyalty.metrics import Metrics
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.values import Document
from loyalty.recount.change_log import check_change_log
from loyalty.recount.index import index_keys, inspect_plan
from loyalty.recount.index_build import array_conditions
from loyalty.recount.order_filter import is_counted
from loyalty.recount.preflight import connect_and_verify
from loyalty.recount.result import Result
from loyalty.recount.safety import (
    MAX_STATUSES_SHOWN,
    StatusCounts,
    describe_uncounted,
    format_status,
)
from loyalty.recount.statuses import MAX_STATUSES, count_statuses, find_missing_collections

Rows = list[tuple[str, str]]


def run(args: argparse.Namespace, settings: Settings) -> Exit:
    """Check everything and print it. The exit code is FINDINGS if there is a problem.

    Each step prints its result before the next one, because reading all orders is slow.
    Raises ServiceError.
    """

    def print_rows(*rows: Sequence[str]) -> None:
        if not args.json:
            print_table(*rows)
            flush_results()

    with connect_and_verify(settings, writing=True, recording=False) as connection:
        missing, errors = _check_own_collections(connection, settings)
        missing_privileges = "; ".join(missing) or None
        privileges = missing_privileges or "sufficient for recounts"
        print_rows(*_build_settings_rows(settings, connection, privileges))
        index = _describe_index(connection, settings)
        statuses = count_statuses(connection, settings)
        print_rows(*_build_order_rows(settings, index, statuses))
        result, problems = _count_all(connection, settings, statuses)
        if settings.live_updates:
            problem = _find_live_updates_problem(connection, settings, result)
            problems += [f"live updates will not work: {problem}"] if problem else []
            print_rows(
                ("live updates", f"will NOT work: {problem}" if problem else "will work"),
                ("pre-images", _describe_pre_images(connection)),
            )
        if problem := Metrics(settings).find_problem():
            problems.append(problem)
        if not args.json:
            _print_count(result, problems)
        elif not errors:
            checks = {
                "problems": problems,
                "missing_privileges": missing_privileges,
                "index": index,
            }
            print_json({**checks, **_details_to_json(connection, settings, statuses, result)})
    if errors:
        raise ConfigurationError(*errors)
    return Exit.FINDINGS if problems or missing_privileges else Exit.OK


def _check_own_collections(
    connection: Connection, settings: Settings
) -> tuple[list[str], list[str]]:
    """Check the collections of records and changes. Raises DatabaseUnavailable.

    Return the missing privileges, and the errors that would prevent the start.
    """
    missing: list[str] = []
    errors: list[str] = []
    history = History(connection.recounts, settings)
    try:
        history.check_collection()
        history.check_privileges()
    except MissingPrivilege as error:  # the service would start, and not record
        missing.append(str(error))
    except ConfigurationError as error:
        errors.append(str(error))
    try:
        check_change_log(connection)
    except ConfigurationError as error:
        errors.append(str(error))
        if isinstance(error, MissingPrivilege):
            missing.append(str(error))
    return missing, errors


def _count_all(
    connection: Connection, settings: Settings, statuses: StatusCounts
) -> tuple[Result | None, list[str]]:
    """Count everything unless a collection is missing; return the result and the problems."""
    result, problems = None, list[str]()
    if missing := find_missing_collections(connection):
        problems.append(missing)
    else:
        result, problem = dry_run.make_dry_run(connection, settings)
        problems += [problem] if problem else []
    has_counted_orders = any(is_counted(status, settings) for status, _ in statuses)
    if result is not None and result.refusal:
        problems.append(f"the safety checks would refuse the recount: {result.refusal}")
    elif not has_counted_orders and 0 < len(statuses) < MAX_STATUSES:  # the list is complete
        problems.append(describe_uncounted(statuses, settings))
    return result, problems


def _describe_index(connection: Connection, settings: Settings) -> str:
    plan, orders = inspect_plan(connection.orders, settings), connection.orders
    if not plan.advice:
        return "usable"
    fields = (settings.status_field, settings.customer_field)
    arrays = {"$or": [condition for field in fields for condition in array_conditions(field)]}
    with map_driver_errors("find", orders, if_too_slow="raise COUNT_TIMEOUT"):
        number = orders.count_documents(arrays, maxTimeMS=settings.count_ms)
    if not number:
        return plan.advice
    orders_have = f"{pluralize(number, 'order')} {'has' if number == 1 else 'have'}"
    names = " or ".join(fields)
    return f"{plan.advice}; {orders_have} an array in {names}. Correct these orders first"


def _build_settings_rows(settings: Settings, connection: Connection, privileges: str) -> Rows:
    reason = connection.snapshot_unsupported_reason
    return [
        ("hosts", settings.hosts),
        ("server", f"{connection.server_version}, {connection.topology.replace('_', ' ')}"),
        ("snapshots", f"not supported: {reason}" if reason else "supported"),
        *((name, format_cell(value)) for name, value in settings.to_dict().items()),
        ("privileges", privileges),
    ]


def _find_live_updates_problem(
    connection: Connection, settings: Settings, result: Result | None
) -> str | None:
    problem = find_live_updates_problem(connection, settings)
    if problem is None and result is not None and result.count.has_mixed_case_ids:
        return describe_mixed_case(settings)
    return problem


def _describe_pre_images(connection: Connection) -> str:
    is_on = keeps_pre_images(connection)
    if is_on is None:
        return "unknown: to read the option, the service needs the privilege listCollections"
    if is_on:
        return "on"
    effect = (
        "after an order is deleted or its customer changes, points change only at the next full "
        "recount"
    )
    if not connection.supports_pre_images:
        return f"not supported before MongoDB 6.0: {effect}"
    option = "changeStreamPreAndPostImages: {enabled: true}"
    return (
        f"off: {effect}; to switch pre-images on: "
        f"db.runCommand({{collMod: '{connection.orders.name}', {option}}})"
    )


def _build_order_rows(settings: Settings, index: str, statuses: StatusCounts) -> Rows:
    """Return the index, and the number of orders by status, the most frequent first.

    Rare statuses are left out, except for counted ones.
    """
    frequent, rare = statuses[:MAX_STATUSES_SHOWN], statuses[MAX_STATUSES_SHOWN:]
    rare_counted = [row for row in rare if is_counted(row[0], settings)]
    found = [status for status, _ in statuses]
    absent = [status for status in settings.order_statuses if status not in found]
    is_complete = len(statuses) < MAX_STATUSES
    rows = [
        (f"index {', '.join(name for name, _ in index_keys(settings))}", index),
        ("orders by status", ""),
    ]
    for status, number in [*frequent, *rare_counted]:
        counted = ", counted" if is_counted(status, settings) else ""
        rows.append((f"  {format_status(status)}", f"{number:,}{counted}"))
    for status in absent:
        number_text = "0" if is_complete else f"not among the {MAX_STATUSES:,} most frequent"
        rows.append((f"  {format_status(status)}", f"{number_text}, counted"))
    if hidden := len(rare) - len(rare_counted):
        at_least = "" if is_complete else "at least "
        rows.append((f"  {at_least}{hidden:,} other statuses", ""))
    return rows


def _print_count(result: Result | None, problems: Sequence[str]) -> None:
    if result is not None:
        print_line("Full count: nothing is written")
        print_totals(result, is_dry_run=True)
        dry_run.print_unknown_customers(result)
        dry_run.print_warnings([text for text in result.warnings if text not in problems])
    for problem in problems:
        print_line(f"PROBLEM: {problem}")


def _details_to_json(
    connection: Connection, settings: Settings, statuses: StatusCounts, result: Result | None
) -> Document:
    return {
        "hosts": settings.hosts,
        "server": connection.server_version,
        "topology": connection.topology,
        "snapshot_unsupported_reason": connection.snapshot_unsupported_reason or None,
        "settings": settings.to_dict(),
        "statuses": [
            {"status": format_status(s), "orders": n, "counted": is_counted(s, settings)}
            for s, n in statuses
        ],
        "dry_run": dry_run.to_json(result) if result else None,
    }
