"""`--once`: one recount, and what it counted."""

import argparse

from config import Settings
from loyalty.commands import customer
from loyalty.commands.output import format_cell, pluralize, print_json, print_line, print_table
from loyalty.errors import Exit
from loyalty.history import History
from loyalty.metrics import Metrics
from loyalty.mongo.values import Document
from loyalty.recount.preflight import connect_and_verify
from loyalty.recount.result import Result, build_record
from loyalty.recount.runner import RecountRequest, run_recount
from loyalty.recount.tally import Totals


def run(args: argparse.Namespace, settings: Settings) -> Exit:
    """Do a full recount and print its result; FINDINGS if some users could not be updated."""
    if args.customer:
        return customer.run(args, settings, write=True)
    metrics = Metrics(settings)
    with metrics.count_failures(), connect_and_verify(settings, writing=True) as connection:
        history = History(connection.recounts, settings)
        result = run_recount(connection, settings, history, RecountRequest(force=args.force))
    metrics.record_recount(result)
    if args.json:
        print_json(result_to_json(result))
    else:
        print_line(f"Recount {result.outcome} in {result.seconds:.1f} s")
        print_totals(result)
    return Exit.OK if result.outcome == "succeeded" else Exit.FINDINGS


def result_to_json(result: Result) -> Document:
    """Return the record of a recount and the number of users."""
    return {**build_record(result), "users": result.totals.users}


def print_totals(result: Result, *, is_dry_run: bool = False) -> None:
    """Print what a recount counted, and how many users it wrote or, in a dry run, would write."""
    totals = result.totals
    unknown = f"{totals.unknown_customers:,}"
    if totals.unknown_customers:
        unknown += f" with {pluralize(totals.orders_of_unknown_customers, 'order')}"
    written = totals.changed if is_dry_run else result.written
    exactness = "exact: one snapshot" if result.count.exact else "not exact: no single snapshot"
    rows = [("users", f"{totals.users:,}")]
    if is_dry_run:
        rows.append(("users with points", f"{totals.users_with_points_before:,} before"))
    rows += [
        ("counted orders", f"{totals.counted_orders:,}"),
        ("changed users", _describe_changes(totals, written)),
        ("unknown customers", unknown),
        ("orders without customer", f"{totals.orders_without_customer:,}"),
        ("as of", f"{format_cell(result.as_of)} UTC ({exactness})"),
    ]
    if result.failed_updates:
        rows.append(("failed updates", f"{result.failed_updates:,}"))
    print_table(*rows)


def _describe_changes(totals: Totals, written: int) -> str:
    kinds = {
        "increased": totals.increased,
        "decreased": totals.decreased,
        "initialized to 0": totals.initialized_to_zero,
    }
    kinds["changed only in type"] = totals.changed - sum(kinds.values())
    always = ("increased", "decreased")
    parts = [f"{n:,} {kind}" for kind, n in kinds.items() if n or kind in always]
    share = "" if written == totals.changed else f" of {totals.changed:,}"
    return f"{written:,}{share} ({', '.join(parts)})"
