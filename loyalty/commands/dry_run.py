"""`--dry-run`: what a recount would change. It writes nothing."""

import argparse
from collections.abc import Sequence

from config import Settings
from loyalty.commands import customer
from loyalty.commands.once import print_totals, result_to_json
from loyalty.commands.output import pluralize, print_json, print_line, print_table
from loyalty.errors import Exit
from loyalty.history import History
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.values import Document
from loyalty.recount.preflight import connect_and_verify
from loyalty.recount.result import Result
from loyalty.recount.runner import RecountRequest, run_recount
from loyalty.recount.safety import has_too_many_failed_updates


def run(args: argparse.Namespace, settings: Settings) -> Exit:
    """Print what a recount would change; FINDINGS if anything, or if it would be refused."""
    if args.customer:
        return customer.run(args, settings, write=False)
    with connect_and_verify(settings, writing=False) as connection:
        result, _ = make_dry_run(connection, settings)
    if args.json:
        print_json(to_json(result))
    else:
        _print_result(result)
    return Exit.FINDINGS if result.totals.changed or result.refusal else Exit.OK


def make_dry_run(connection: Connection, settings: Settings) -> tuple[Result, str | None]:
    """Count and check everything, and write nothing. Raises ServiceError.

    Return the result, and why the recount would fail, if it would.
    """
    history = History(connection.recounts, settings)  # only read
    result = run_recount(connection, settings, history, RecountRequest(write=False))
    failing = _count_failing_updates(connection, settings)
    if not failing:
        return result, None
    users = pluralize(failing, "user")
    warning = (
        f"{users} cannot be updated: a parent field of {settings.points_field} is not a document"
    )
    result.warnings.append(warning)
    would_fail = has_too_many_failed_updates(failing, result.totals.users)
    return result, f"the recount would fail: {warning}" if would_fail else None


def _count_failing_updates(connection: Connection, settings: Settings) -> int:
    """Return how many users have a value that is not a document in a parent of the points field.

    Updates that a validator does not accept also fail, but only a write shows them.
    """
    parts = settings.points_field.split(".")
    parents = [".".join(parts[:n]) for n in range(1, len(parts))]
    if not parents:
        return 0
    types = [{"$in": [{"$type": f"${path}"}, ["object", "missing"]]} for path in parents]
    with map_driver_errors("find", connection.users):
        return connection.users.count_documents(
            {"$expr": {"$not": {"$and": types}}}, maxTimeMS=settings.count_ms
        )


def _print_result(result: Result) -> None:
    print_line("Dry run: nothing is written")
    print_totals(result, is_dry_run=True)
    print_unknown_customers(result)
    if largest := sorted(result.totals.largest, reverse=True):
        print_line("Largest changes")
        print_table(("user", "from", "to"), *((c.user, c.before, f"{c.after:,}") for c in largest))
    print_warnings(result.warnings)
    if result.refusal:
        print_line(f"The safety checks would refuse this recount: {result.refusal}")


def print_unknown_customers(result: Result) -> None:
    """Print the unknown customers by kind, each kind with those that have most orders."""
    kinds = sorted(result.totals.unknown_by_kind.items(), key=lambda item: -item[1].orders)
    if not kinds:
        return
    print_line("Unknown customers: their orders earn nothing")
    rows = [("kind", "customers", "orders", "largest")]
    for kind, unknown in kinds:
        largest = ", ".join(f"{text} ({n:,})" for n, text in sorted(unknown.largest, reverse=True))
        rows.append((kind, f"{unknown.customers:,}", f"{unknown.orders:,}", largest))
    print_table(*rows)


def print_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print_line(f"Warning: {warning}")


def to_json(result: Result) -> Document:
    """Return what a recount would change; it has no outcome and no record."""
    unused = ("_id", "outcome", "error", "failed_updates")
    totals = result.totals
    return {
        **{name: value for name, value in result_to_json(result).items() if name not in unused},
        "changed": totals.changed,
        "refusal": result.refusal,
        "warnings": result.warnings,
        "unknown_customers_by_kind": [
            {
                "kind": kind,
                "customers": unknown.customers,
                "orders": unknown.orders,
                "largest": [
                    {"customer": text, "orders": orders}
                    for orders, text in sorted(unknown.largest, reverse=True)
                ],
            }
            for kind, unknown in totals.unknown_by_kind.items()
        ],
        "largest_changes": [
            {"user": c.user, "from": c.before, "to": c.after}
            for c in sorted(totals.largest, reverse=True)
        ],
    }
