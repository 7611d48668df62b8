"""Measure the service beside what else a shop could do, and write bench/RESULTS.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from bench import day, pictures, report
from bench.live import ChangeStreamWatcher, measure
from bench.measure import ALONE, OURS, Bench, MeasurementError, Results, worst
from bench.neighbour import felt
from bench.relay import relay
from bench.shop import STATES, Shop, Wrong
from sandbox.mongod import Deployment, NoMongod

RIVALS = ["floor", OURS, "merge", "bulk"]
GROWN = ["floor", OURS, "merge"]
CLIENT_ORDERS = 1_000_000  # beyond that, what counts or writes everyone in the client takes long
LARGE_ORDERS = 10_000_000  # beyond that, only quiet passes: the rest would take an hour
FOLDER = Path(__file__).parent
SIZES = (100_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000)


def main() -> int:
    args = _parse()
    paper = Paper(None if args.no_results else FOLDER)
    try:
        runs = _bench(args, paper)
    except (NoMongod, MeasurementError) as error:
        print(error, file=sys.stderr)
        return 1
    print(paper)
    if any(worst(results[OURS]) != Wrong() for results in runs):
        print("The service left users with wrong points.", file=sys.stderr)
        return 1
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--orders", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", action="store_true", help="also at other sizes, with a chart")
    sizes = "orders, for --growth; ten orders a user"
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", default=SIZES, help=sizes)
    far = "round trip of a far server, 0 for none (default: 20)"
    parser.add_argument("--latency-ms", type=float, metavar="MS", default=20, help=far)
    parser.add_argument("--no-results", action="store_true", help="print only, write no files")
    parser.add_argument("--tiny", action="store_true", help="all of it at 10,000 orders")
    args = parser.parse_args()
    if args.tiny:
        args.orders, args.users, args.rounds, args.sizes = 10_000, 1_000, 1, [1_000, 10_000]
        args.growth = args.no_results = True
    return args


class Paper:
    """The results so far. Each section is printed and written at once: an end may come early."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._sections: dict[str, str] = {}

    def put(self, name: str, section: str) -> None:
        """Add a section, or one that is longer now in the place of the one before."""
        self._sections[name] = section
        print(f"\n{section}\n", file=sys.stderr, flush=True)
        if self._folder:
            self._folder.joinpath("RESULTS.md").write_text(str(self), encoding="utf-8")

    def draw(self, name: str, picture: str) -> None:
        if self._folder:
            self._folder.joinpath(name).write_text(picture, encoding="utf-8")

    def __str__(self) -> str:
        return "\n\n".join(self._sections.values()) + "\n"


def _bench(args: argparse.Namespace, paper: Paper) -> list[Results]:
    """Put everything on paper, and return all that was run."""
    rounds, in_client = args.rounds, args.orders <= CLIENT_ORDERS
    rivals = RIVALS if in_client else GROWN
    states: dict[str, Results] = {}
    with _shop(args.orders, args.users) as (bench, shop):
        paper.put("head", report.head(shop, rounds))
        bare = bench.rounds(1, rivals, "quiet")
        shop.make_index()
        for state, title in STATES.items():
            states[state] = bench.rounds(rounds, rivals, state)
            if state == "quiet":
                states[state] |= bench.rounds(rounds, [ALONE], state)
            if state == "first" and in_client:
                states[state] |= bench.rounds(1, ["loop"], state)
            paper.put(state, report.state_table(title, states[state]))
        paper.put("profile", report.profile_table(shop.profile()))
        paper.put("bare", report.state_table("The quiet pass without the index, once", bare))
        paper.put("neighbour", report.neighbour_table(felt(bench.deployment, shop)))
        runs = [bare, *states.values()]
        if args.latency_ms:
            paper.put("far", report.FAR.format(args.latency_ms))
            for state in ("first", "ordinary"):
                near, far = (_far(bench, rounds, state, ms) for ms in (0, args.latency_ms))
                paper.put(f"far, {state}", report.latency_table(STATES[state], near, far))
                runs += [near, far]
        live = {args.orders: measure(bench.deployment, shop, tiny=args.tiny)}
        paper.put("live", report.live_table(live))
    one_day = day.measure(tiny=args.tiny)
    paper.put("day", report.day_section(one_day))
    paper.draw("day.svg", pictures.day(one_day))
    if args.growth:
        known = {args.orders: states} if args.orders == 10 * args.users else {}
        runs += _growth(args, paper, known, live)
    return runs


def _far(bench: Bench, rounds: int, state: str, milliseconds: float) -> Results:
    with relay(bench.port, milliseconds / 1000) as port:
        return bench.rounds(rounds, [OURS], state, port=port)


def _growth(
    args: argparse.Namespace,
    paper: Paper,
    known: dict[int, dict[str, Results]],
    live: dict[int, ChangeStreamWatcher],
) -> list[Results]:
    """Put other sizes on paper, one after another, and return all that was run for it."""
    grown: dict[int, dict[str, Results]] = {}
    for size in sorted({*args.sizes}):
        if size in known:
            grown[size] = known[size]
            _put_growth(paper, grown)
            continue
        with _shop(size, size // 10) as (bench, shop):
            shop.make_index()
            # One run each: at the larger sizes it is long enough for its own noise.
            states = STATES if size <= LARGE_ORDERS else ["quiet"]
            grown[size] = {state: bench.rounds(1, GROWN, state) for state in states}
            _put_growth(paper, grown)
            if size not in live and size <= LARGE_ORDERS:
                # The last, since it ships orders of the shop.
                live[size] = measure(bench.deployment, shop, tiny=args.tiny)
                paper.put("live", report.live_table(live))
    return [results for states in grown.values() for results in states.values()]


def _put_growth(paper: Paper, grown: dict[int, dict[str, Results]]) -> None:
    sizes = {
        state: {
            size: {name: states[state][name] for name in GROWN}
            for size, states in grown.items()
            if state in states
        }
        for state in STATES
    }
    tables = [report.growth_table(title, sizes[state]) for state, title in STATES.items()]
    paper.put("growth", "\n\n".join([report.GROWTH, *tables]))
    paper.draw("growth.svg", pictures.growth(sizes["quiet"]))


@contextmanager
def _shop(orders: int, users: int) -> Iterator[tuple[Bench, Shop]]:
    print(f"{orders:,} orders, {users:,} users", file=sys.stderr, flush=True)
    with Deployment(cache_gb=4) as deployment, closing(Shop(deployment, orders, users)) as shop:
        yield Bench(deployment, shop), shop


if __name__ == "__main__":
    sys.exit(main())
