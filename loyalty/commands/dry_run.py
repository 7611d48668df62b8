"""`--dry-run`: what a recount would change."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from config import Settings
from loyalty.commands import customer
from loyalty.commands.once import of_recount, print_totals
from loyalty.commands.output import print_json, print_table
from loyalty.errors import Exit
from loyalty.history import History
from loyalty.recount.customer_ids import Document
from loyalty.recount.runner import RecountRequest, connect_and_verify, run_recount
from loyalty.recount.tally import Change, Result

_CHANGE = ("user", "from", "to")


def run(args: argparse.Namespace, settings: Settings) -> int:
    if args.customer:
        return customer.run(args, settings, write=False)
    with connect_and_verify(settings, writing=False) as connection:
        result = run_recount(connection, settings, History(None), RecountRequest(write=False))
    if args.json:
        print_json(of_dry_run(result))
    else:
        print_dry_run(result)
    return Exit.FINDINGS if result.totals.changed else Exit.OK


def print_dry_run(result: Result) -> None:
    """Print what a recount would do, with its largest changes first."""
    print("Dry run: nothing is written")
    print_totals(result, names=True)
    if result.totals.largest:
        print("Largest changes")
        ranked = sorted(result.totals.largest, reverse=True)
        print_table(_CHANGE, *((c.user, c.before, f"{c.after:,}") for c in ranked))
    if result.refusal:
        print(f"The guard would refuse this: {result.refusal}")
    for warning in result.warnings:
        print(f"Warning: {warning}")


def of_dry_run(result: Result) -> Document:
    """Return what a recount would do; nothing has come of it."""
    nothing = ("outcome", "error", "failed_updates")
    return {
        **{name: value for name, value in of_recount(result).items() if name not in nothing},
        "refusal": result.refusal,
        "warnings": result.warnings,
        "unknown_sample": result.totals.unknown_sample,
        "largest_changes": _changes(sorted(result.totals.largest, reverse=True)),
    }


def _changes(changes: Sequence[Change]) -> list[Document]:
    return [{"user": c.user, "from": c.before, "to": c.after} for c in changes]
