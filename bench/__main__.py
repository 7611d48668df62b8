"""Measure the service and its alternatives, and write bench/RESULTS.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from bench import freshness, live, pictures, report, undo
from bench.interference import measure_interference
from bench.measure import ONE_WORKER, SERVICE, Bench, MeasurementError, Results, max_mismatches
from bench.shop import STATES, MismatchCount, Shop
from sandbox.mongod import Deployment, NoMongod
from sandbox.relay import relay

BASELINES = ["count_only", SERVICE, "merge", "bulk"]
GROWTH_BASELINES = ["count_only", SERVICE, "merge"]
MAX_CLIENT_ORDERS = 1_000_000  # above, no baselines that count in the client
MAX_ORDERS = 10_000_000  # above, only recounts without changes: the others would take an hour
FOLDER = Path(__file__).parent
SIZES = (100_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000)


def main() -> int:
    args = _parse()
    results = Report(None if args.no_results else FOLDER)
    try:
        runs = _run(args, results)
    except (NoMongod, MeasurementError) as error:
        print(error, file=sys.stderr)
        return 1
    print(results)
    if any(max_mismatches(run[SERVICE]) != MismatchCount() for run in runs):
        print("The service left users with wrong points.", file=sys.stderr)
        return 1
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--orders", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", action="store_true", help="measure other sizes as well")
    sizes = "numbers of orders for --growth, with ten orders for each user"
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", default=SIZES, help=sizes)
    far = "round trip to a distant server, 0 for none (default: 20)"
    parser.add_argument("--latency-ms", type=float, metavar="MS", default=20, help=far)
    parser.add_argument("--no-results", action="store_true", help="write no files")
    parser.add_argument("--tiny", action="store_true", help="run everything with 10,000 orders")
    args = parser.parse_args()
    if args.tiny:
        args.orders, args.users, args.rounds, args.sizes = 10_000, 1_000, 1, [1_000, 10_000]
        args.growth = args.no_results = True
    return args


class Report:
    """The sections so far. Each is printed and written at once, in case a later one fails."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._sections: dict[str, str] = {}

    def set_section(self, name: str, section: str) -> None:
        """Add a section, or replace it at its place."""
        self._sections[name] = section
        print(f"\n{section}\n", file=sys.stderr, flush=True)
        if self._folder:
            self._folder.joinpath("RESULTS.md").write_text(str(self), encoding="utf-8")

    def write_picture(self, name: str, picture: str) -> None:
        if self._folder:
            self._folder.joinpath(name).write_text(picture, encoding="utf-8")

    def __str__(self) -> str:
        return "\n\n".join(self._sections.values()) + "\n"


def _run(args: argparse.Namespace, results: Report) -> list[Results]:
    """Measure everything for the report, and return all runs."""
    rounds, in_client = args.rounds, args.orders <= MAX_CLIENT_ORDERS
    names = BASELINES if in_client else GROWTH_BASELINES
    states: dict[str, Results] = {}
    with _shop(args.orders, args.users) as (bench, shop):
        results.set_section("title", report.title_section(shop, rounds))
        no_index = bench.rounds(1, names, "quiet")
        shop.make_index()
        for state, title in STATES.items():
            states[state] = bench.rounds(rounds, names, state)
            if state == "quiet":
                states[state] |= bench.rounds(rounds, [ONE_WORKER], state)
            if state == "first" and in_client:
                states[state] |= bench.rounds(1, ["loop"], state)
            results.set_section(state, report.state_table(title, states[state]))
        changes = undo.measure(bench, shop, rounds)
        results.set_section("change log", report.change_log_table(args.orders, *changes))
        results.set_section("profile", report.profile_table(shop.profile_recount()))
        title = "recount without changes, without the index, once"
        results.set_section("no index", report.state_table(title, no_index))
        times = measure_interference(bench.deployment, shop)
        results.set_section("interference", report.interference_table(times))
        runs = [no_index, *states.values()]
        if args.latency_ms:
            results.set_section("latency", report.LATENCY.format(args.latency_ms))
            for state in ("first", "ordinary"):
                near, far = (
                    _run_with_latency(bench, rounds, state, ms) for ms in (0, args.latency_ms)
                )
                results.set_section(
                    f"latency, {state}", report.latency_table(STATES[state], near, far)
                )
                runs += [near, far]
        live_results = {args.orders: live.measure(bench.deployment, shop, tiny=args.tiny)}
        results.set_section("live", report.live_table(live_results))
    one_day = freshness.measure(tiny=args.tiny)
    results.set_section("freshness", report.freshness_section(one_day))
    results.write_picture("day.svg", pictures.draw_freshness(one_day))
    if args.growth:
        known = {args.orders: states} if args.orders == 10 * args.users else {}
        runs += _measure_growth(args, results, known, live_results)
    return runs


def _run_with_latency(bench: Bench, rounds: int, state: str, milliseconds: float) -> Results:
    with relay(bench.port, milliseconds / 1000) as port:
        return bench.rounds(rounds, [SERVICE], state, port=port)


def _measure_growth(
    args: argparse.Namespace,
    results: Report,
    known: dict[int, dict[str, Results]],
    live_results: dict[int, live.LiveResult],
) -> list[Results]:
    """Measure other sizes for the report, and return all runs."""
    grown: dict[int, dict[str, Results]] = {}
    for size in sorted({*args.sizes}):
        if size in known:
            grown[size] = known[size]
            _report_growth(results, grown)
            continue
        with _shop(size, size // 10) as (bench, shop):
            shop.make_index()
            # One run each: runs of the larger sizes are long, so their noise is small.
            states = STATES if size <= MAX_ORDERS else ["quiet"]
            grown[size] = {state: bench.rounds(1, GROWTH_BASELINES, state) for state in states}
            _report_growth(results, grown)
            if size not in live_results and size <= MAX_ORDERS:
                # Last, since it changes the orders of the shop.
                live_results[size] = live.measure(bench.deployment, shop, tiny=args.tiny)
                results.set_section("live", report.live_table(live_results))
    return [runs for states in grown.values() for runs in states.values()]


def _report_growth(results: Report, grown: dict[int, dict[str, Results]]) -> None:
    sizes = {
        state: {
            size: {name: states[state][name] for name in GROWTH_BASELINES}
            for size, states in grown.items()
            if state in states
        }
        for state in STATES
    }
    tables = [report.growth_table(title, sizes[state]) for state, title in STATES.items()]
    results.set_section("growth", "\n\n".join([report.GROWTH, *tables]))
    results.write_picture("growth.svg", pictures.draw_growth(sizes["quiet"]))


@contextmanager
def _shop(orders: int, users: int) -> Iterator[tuple[Bench, Shop]]:
    print(f"{orders:,} orders, {users:,} users", file=sys.stderr, flush=True)
    with Deployment(cache_gb=4) as deployment, closing(Shop(deployment, orders, users)) as shop:
        yield Bench(deployment, shop), shop


if __name__ == "__main__":
    sys.exit(main())
