"""Measure the service beside what else a shop could do, and write bench/RESULTS.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from bench import pictures, report
from bench.live import Live, measure
from bench.measure import ALONE, OURS, Bench, Failed, Results, worst
from bench.neighbour import felt
from bench.relay import relay
from bench.shop import STATES, Shop, Wrong
from sandbox.mongod import Deployment, NoMongod

RIVALS = ["floor", OURS, "merge", "bulk"]
GROWN = ["floor", OURS, "merge"]
LOOP_ORDERS = 1_000_000  # beyond that, an update_one for each customer takes many minutes
FOLDER = Path(__file__).parent
SIZES = (100_000, 1_000_000, 3_000_000, 10_000_000)


def main() -> int:
    args = _parse()
    try:
        sections, picture, runs = _bench(args)
    except (NoMongod, Failed) as error:
        print(error, file=sys.stderr)
        return 1
    text = "\n\n".join(sections) + "\n"
    print(text)
    if not args.no_results:
        FOLDER.joinpath("RESULTS.md").write_text(text, encoding="utf-8")
        if picture:
            FOLDER.joinpath("growth.svg").write_text(picture, encoding="utf-8")
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


def _bench(args: argparse.Namespace) -> tuple[list[str], str, list[Results]]:
    """Return the sections of the results, the picture if there is one, and all that was run."""
    rounds, picture = args.rounds, ""
    with _shop(args.orders, args.users) as (bench, shop):
        bare = bench.rounds(1, RIVALS, "quiet")
        shop.make_index()
        states = {state: bench.rounds(rounds, RIVALS, state) for state in STATES}
        states["quiet"] |= bench.rounds(rounds, [ALONE], "quiet")
        if args.orders <= LOOP_ORDERS:
            states["first"] |= bench.rounds(1, ["loop"], "first")
        sections = [report.head(shop, rounds)]
        sections += [report.state_table(STATES[state], runs) for state, runs in states.items()]
        sections.append(report.profile_table(shop.profile()))
        sections.append(report.state_table("The quiet pass without the index, once", bare))
        sections.append(report.neighbour_table(felt(bench.deployment, shop)))
        runs = [bare, *states.values()]
        if args.latency_ms:
            sections.append(report.FAR.format(args.latency_ms))
            for state in ("first", "ordinary"):
                near, far = (_far(bench, rounds, state, ms) for ms in (0, args.latency_ms))
                sections.append(report.latency_table(STATES[state], near, far))
                runs += [near, far]
        live = {args.orders: measure(bench.deployment, shop, tiny=args.tiny)}
    if args.growth:
        known = {args.orders: states} if args.orders == 10 * args.users else {}
        grown = {size: known.get(size) or _grown(size) for size in sorted(args.sizes)}
        sections.append(report.GROWTH)
        for state in STATES:
            sizes = {size: _some(results[state]) for size, results in grown.items()}
            sections.append(report.growth_table(STATES[state], sizes))
            runs += sizes.values()
            if state == "quiet":
                picture = pictures.growth(sizes)
        live |= {size: _grown_live(size, tiny=args.tiny) for size in args.sizes if size not in live}
    sections.append(report.live_table(live[size] for size in sorted(live)))
    return sections, picture, runs


def _far(bench: Bench, rounds: int, state: str, milliseconds: float) -> Results:
    with relay(bench.port, milliseconds / 1000) as port:
        return bench.rounds(rounds, [OURS], state, port=port)


def _grown(orders: int) -> dict[str, Results]:
    with _shop(orders, orders // 10) as (bench, shop):
        shop.make_index()
        # One run each: at the larger sizes it is long enough for its own noise.
        return {state: bench.rounds(1, GROWN, state) for state in STATES}


def _grown_live(orders: int, *, tiny: bool) -> Live:
    with _shop(orders, orders // 10) as (bench, shop):
        shop.make_index()
        return measure(bench.deployment, shop, tiny=tiny)


def _some(results: Results) -> Results:
    return {name: results[name] for name in GROWN}


@contextmanager
def _shop(orders: int, users: int) -> Iterator[tuple[Bench, Shop]]:
    print(f"{orders:,} orders, {users:,} users", file=sys.stderr, flush=True)
    with Deployment(cache_gb=4) as deployment, closing(Shop(deployment, orders, users)) as shop:
        yield Bench(deployment, shop), shop


if __name__ == "__main__":
    sys.exit(main())
