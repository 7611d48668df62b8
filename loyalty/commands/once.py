"""`--once`: one recount, and its totals."""

from __future__ import annotations

import argparse

from config import Settings
from loyalty.commands import customer
from loyalty.commands.output import counted, format_cell, format_sample, print_json, print_table
from loyalty.errors import Exit
from loyalty.history import History, record_of
from loyalty.metrics import Metrics
from loyalty.recount.customer_ids import Document
from loyalty.recount.runner import RecountRequest, connect_and_verify, run_recount
from loyalty.recount.tally import Result, Totals


def run(args: argparse.Namespace, settings: Settings) -> int:
    if args.customer:
        return customer.run(args, settings, write=True)
    metrics = Metrics(settings)
    with metrics.count_failures(), connect_and_verify(settings, writing=True) as connection:
        result = run_recount(
            connection, settings, History(connection.recounts), RecountRequest(force=args.force)
        )
    metrics.record_recount(result)
    if args.json:
        print_json(of_recount(result))
    else:
        print(f"Recount {result.outcome} in {result.seconds:.1f} s")
        print_totals(result)
    return Exit.OK if result.outcome == "succeeded" else Exit.FINDINGS


def print_totals(result: Result, *, names: bool = False) -> None:
    """Print what a recount found; with `names`, ids of unknown customers, too."""
    totals = result.totals
    unknown = f"{totals.unknown_customers:,}"
    if totals.unknown_customers:
        unknown += f" with {counted(totals.orders_of_unknown_customers, 'order')}"
    if names:
        unknown += format_sample(totals.unknown_sample)
    rows = [
        ("users", f"{totals.users:,}"),
        ("counted orders", f"{totals.counted_orders:,}"),
        ("changed", _changed(totals)),
        ("unknown customers", unknown),
        ("orders without customer", f"{totals.orders_without_customer:,}"),
        ("as of", f"{format_cell(result.as_of)} UTC ({_exactness(result)})"),
    ]
    if result.failed_updates:
        rows.append(("refused the update", f"{result.failed_updates:,}"))
    print_table(*rows)


def _changed(totals: Totals) -> str:
    parts = {
        "up": totals.increased,
        "down": totals.decreased,
        "set to 0": totals.initialized_to_zero,
    }
    parts["only in type"] = totals.changed - sum(parts.values())
    kinds = [f"{n:,} {kind}" for kind, n in parts.items() if n or kind in ("up", "down")]
    return f"{totals.changed:,} ({', '.join(kinds)})"


def _exactness(result: Result) -> str:
    if result.exact:
        # On an idle server that may be some seconds before the recount began.
        return "one point in time: the last that a majority of the servers had confirmed"
    return "not one point in time"


def of_recount(result: Result) -> Document:
    """Return the record of a recount, and the number of users."""
    return {**record_of(result), "users": result.totals.users}
