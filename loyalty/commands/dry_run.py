"""`--dry-run`: what a recount would change. It writes nothing."""

from __future__ import annotations

import argparse

from config import Settings
from loyalty.commands import customer
from loyalty.commands.once import print_totals, result_json
from loyalty.commands.output import print_json, print_line, print_table
from loyalty.errors import Exit
from loyalty.history import History
from loyalty.recount.customer_ids import Document
from loyalty.recount.runner import RecountRequest, connect_and_verify, run_recount
from loyalty.recount.tally import Result


def run(args: argparse.Namespace, settings: Settings) -> Exit:
    if args.customer:
        return customer.run(args, settings, write=False)
    with connect_and_verify(settings, writing=False) as connection:
        result = run_recount(connection, settings, History(None), RecountRequest(write=False))
    if args.json:
        print_json(dry_run_json(result))
    else:
        _print_result(result)
    return Exit.FINDINGS if result.totals.changed or result.refusal else Exit.OK


def _print_result(result: Result) -> None:
    print_line("Dry run: nothing is written")
    print_totals(result, details=True)
    if largest := sorted(result.totals.largest, reverse=True):
        print_line("Largest changes")
        print_table(("user", "from", "to"), *((c.user, c.before, f"{c.after:,}") for c in largest))
    print_warnings(result)
    if result.refusal:
        print_line(f"The safety check would refuse this recount: {result.refusal}")


def print_warnings(result: Result) -> None:
    for warning in result.warnings:
        print_line(f"Warning: {warning}")


def dry_run_json(result: Result) -> Document:
    """Return what a recount would change; it has no outcome."""
    unused = ("outcome", "error", "failed_updates")
    totals = result.totals
    return {
        **{name: value for name, value in result_json(result).items() if name not in unused},
        "refusal": result.refusal,
        "warnings": result.warnings,
        "unknown_sample": totals.unknown_sample,
        "largest_changes": [
            {"user": c.user, "from": c.before, "to": c.after}
            for c in sorted(totals.largest, reverse=True)
        ],
    }
