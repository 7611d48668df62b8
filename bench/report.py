"""The results as Markdown."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import pymongo

from bench.day import RECOUNTS, Day
from bench.live import ChangeStreamWatcher
from bench.measure import ALONE, OURS, ROOT, Results, middle, worst
from bench.neighbour import Felt, middle_and_tail
from bench.shop import Shop, Stage

NAMES = {
    "floor": "the floor: count, write nothing",
    OURS: "this service",
    ALONE: "this service, `COUNT_WORKERS=1`",
    "merge": "aggregate, `$merge`",
    "bulk": "aggregate, `bulk_write` everyone",
    "loop": "find, count in Python, `update_one` each",
}


FAR = """## A server that is {:g} ms away

A relay in front of the server adds that to each round trip; near is the same relay without."""
PROFILE = """## Where the server's time goes in a quiet pass

From its own `explain`, which slows it down somewhat; the sums over all ranges, counted one after
another. The index and the first `$group` are the count that everyone pays."""
NEIGHBOUR = """## What the shop feels meanwhile

Milliseconds of the shop's own requests, one after another with pauses of 5 ms, alone and beside a
quiet pass."""
GROWTH = """## Growth

Ten orders a user, with the index, one run each except at the size above; seconds, and peak memory
of the client.

![Seconds over orders](growth.svg)"""


LIVE = """## Live updates

With `LIVE_UPDATES=yes`; the writers, and those who wait for the points, on the same machine. From
the acknowledgement of a shipped order (`w: majority`) until its customer's points could be read:
of one order while nothing else happens (median), and of each at 100 orders a second. Then the
highest rate that was tried (250 to 4,000 orders a second for 5 s, or as many as the writer managed)
after which everyone was right within 2 s; an order each of many customers, inserted at once, until
all were right; and the idle service."""

DAY = """## A customer's day

![A customer's points over a day](day.svg)

Two equal shops of 1,000 customers, in which one writer does the same: {changes} changes of one
customer's orders at random moments, one of them an order that is taken back. {recounts} intervals
of {interval} s stand for two hours each, so the day took {seconds} s. How long after each change
it was in the points: with recounts alone as hours of such a day; with live updates as measured,
since that has nothing to do with the interval."""


def head(shop: Shop, rounds: int) -> str:
    git = shutil.which("git") or "git"
    asked = [[git, "rev-parse", "--short", "HEAD"], [git, "status", "--porcelain"]]
    commit, changes = (
        subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        for ask in asked
    )
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in cpuinfo if "model name" in line), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        "# What a recount costs\n\nMade by `python -m bench`. Each line is the median of processes "
        "of its own, run in turns; seconds are\nof the whole process, start and connection "
        "included. Server and client share the machine.\n\n"
        f"- {os.cpu_count()} cores ({model}), {memory:.0f} GB of memory\n"
        f"- MongoDB {shop.version()} (one node, 4 GB cache), Python {platform.python_version()}, "
        f"pymongo {pymongo.version}\n"
        f"- {shop.size:,} orders of {shop.order_bytes()} bytes, {shop.customers:,} users; "
        f"rounds: {rounds}\n"
        f"- {datetime.now(UTC):%Y-%m-%d}, commit {commit or '?'}"
        + (" with changes" if changes else "")
    )


def state_table(title: str, results: Results) -> str:
    floor, ours = middle(results["floor"]), middle(results[OURS])
    rows = []
    for name, runs in results.items():
        label, seconds = NAMES[name], middle(runs)
        if name == OURS:
            label = f"**{label}** (the recount alone: {middle(runs, lambda r: r.recount):.1f} s)"
        rows.append(
            [
                label,
                f"{seconds:.2f}",
                f"{seconds / floor:.2f}",
                f"{seconds / ours:.2f}",
                f"{middle(runs, lambda r: r.written_mb):,.0f}",
                f"{middle(runs, lambda r: r.client_mb):.0f}",
                f"{middle(runs, lambda r: r.server_cpu):.2f}",
                f"{middle(runs, lambda r: r.wire_mb):.2f}",
                "" if name == "floor" else str(worst(runs)),
            ]
        )
    columns = ["", "seconds", "of floor", "of ours", "users written", "client, MB", "server CPU, s"]
    return f"## {title.capitalize()}\n\n" + _table(
        [*columns, "wire, MB", "users wrong after it"], rows
    )


def profile_table(change_stream_pipeline: Iterable[Stage]) -> str:
    rows = [
        [f"`{stage.name}`", f"{stage.seconds:.2f}", f"{stage.rows:,}", str(stage.spills)]
        for stage in change_stream_pipeline
    ]
    return PROFILE + "\n\n" + _table(["stage", "seconds", "rows out", "spills to disk"], rows)


def neighbour_table(results: Mapping[str, Felt]) -> str:
    rows = []
    for beside, felt in results.items():
        numbers = (*middle_and_tail(felt.finds), *middle_and_tail(felt.inserts))
        rows.append([beside, *(f"{n:.2f}" for n in numbers), f"{len(felt.finds):,}"])
    names = ["find_one, p50", "p99", "insert_one, p50", "p99", "requests of each"]
    return NEIGHBOUR + "\n\n" + _table(["beside", *names], rows)


def growth_table(title: str, sizes: Mapping[int, Results]) -> str:
    names = list(next(iter(sizes.values())))
    rows = [
        [f"{size:,}"]
        + [
            f"{middle(r):.2f} s, {middle(r, lambda r: r.client_mb):.0f} MB"
            for r in results.values()
        ]
        for size, results in sizes.items()
    ]
    return f"### {title[0].upper()}{title[1:]}\n\n" + _table(
        ["orders", *(NAMES[name] for name in names)], rows
    )


def latency_table(title: str, near: Results, far: Results) -> str:
    rows = []
    for name in near:
        a, b = middle(near[name]), middle(far[name])
        rows.append([NAMES[name], f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}"])
    return f"### {title[0].upper()}{title[1:]}\n\n" + _table(
        ["", "seconds, near", "seconds, far", "ratio"], rows
    )


def live_table(sizes: Mapping[int, ChangeStreamWatcher]) -> str:
    rows = [
        [
            f"{live.orders:,}",
            f"{live.single:.0f}",
            f"{live.steady.p50:.0f}, {live.steady.p99:.0f}, {live.steady.worst:.0f}",
            f"{live.sustained:,} ({live.lag:.1f} s)",
            f"{live.at_once_seconds:.1f} ({live.at_once:,})",
            f"{live.cpu_percent:.1f} %, {live.memory:.0f} MB",
        ]
        for _, live in sorted(sizes.items())
    ]
    columns = ["orders", "one order, ms", "at 100 a second: p50, p99, worst, ms"]
    columns += ["sustained, orders a second (behind at the end)", "customers at once, s", "idle"]
    return LIVE + "\n\n" + _table(columns, rows)


def day_section(day: Day) -> str:
    record_recount, live = (
        [median(line.lags), max(line.lags)] for line in (day.record_recount, day.live)
    )
    rows = [
        ["a recount every 2 hours", *(_hours(day.hours(lag)) for lag in record_recount)],
        ["and live updates", *(f"{1000 * lag:.0f} ms" for lag in live)],
    ]
    head = DAY.format(
        changes=len(day.live.lags), recounts=RECOUNTS, interval=day.interval, seconds=day.seconds
    )
    return head + "\n\n" + _table(["in the points after", "median", "worst"], rows)


def _hours(hours: float) -> str:
    minutes = round(60 * hours)
    return f"{minutes // 60} h {minutes % 60} min"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *rows])
