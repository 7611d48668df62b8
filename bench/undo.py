"""Measures first fills with and without the change log, `--dry-run --customer`, and `--undo`."""

from __future__ import annotations

from bench.measure import NO_CHANGE_LOG, SERVICE, Bench, MeasurementError, Results
from bench.shop import Shop

CUSTOMER, UNDO = "customer", "undo"


def measure(bench: Bench, shop: Shop, rounds: int) -> tuple[Results, int]:
    """Fill, show one customer's changes, and undo the fill, `rounds` times.

    Returns the runs, and how many changes the log holds at the end.
    """
    results: Results = {NO_CHANGE_LOG: [], SERVICE: [], CUSTOMER: [], UNDO: []}
    for _ in range(rounds):
        for name in (NO_CHANGE_LOG, SERVICE):
            results[name] += bench.rounds(1, [name], "first")[name]
        results[CUSTOMER].append(
            bench.run_service("--dry-run", "--customer", str(shop.find_customer()))
        )
        results[UNDO].append(bench.run_service("--undo", "last"))
        if users := shop.count_users_with_points():
            raise MeasurementError(f"After the undo of a first fill, {users:,} users have points.")
    return results, shop.count_logged_changes()
