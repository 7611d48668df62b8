"""Measures live updates: latency, rates, a burst, and CPU time.

`python -m bench.live --program A/loyalty_microservice.py B/loyalty_microservice.py` compares two
versions at 100 orders a second, in turn on one shop.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pymongo import UpdateOne

from bench.shop import DATABASE, Shop
from sandbox.mongod import Deployment, wait_until
from sandbox.relay import relay
from sandbox.service import PROGRAM, Process

_RATES = (250, 500, 1_000, 2_000, 4_000)  # changed orders a second
_RATE_SECONDS = 5.0  # for each rate
_BATCHES_PER_SECOND = 50
_MAX_ORDERS = 60_000  # unshipped orders, for all measurements
_BURST_CUSTOMERS = 10_000
_MAX_DELAY_SECONDS = 2  # after the last order, for a sustained rate
_FAR_MS = 20.0
_CPU_ORDERS = 1_000


@dataclass(frozen=True)
class Latency:
    """Milliseconds from the acknowledgement of a write until the points could be read."""

    p50: float
    p99: float
    worst: float


@dataclass(frozen=True)
class CpuTime:
    """Seconds of CPU time for 1,000 orders, 100 a second."""

    service: float
    server: float


@dataclass(frozen=True)
class LiveResult:
    """The measurements at one size of the shop."""

    orders: int
    single: float
    """Milliseconds from one change to the points without other changes; the median."""
    far: float
    """The same, with 20 ms to the server and back."""
    steady: Latency
    """At 100 orders a second."""
    cpu: CpuTime
    fast: Latency
    """At 1,000 orders a second, written in batches."""
    sustained: int
    """The highest rate at which the points were correct within 2 s after the last order."""
    delay: float
    """Seconds from the last order at that rate to the last points."""
    burst_customers: int
    """Customers with one new order each, inserted as fast as possible."""
    burst_seconds: float
    cpu_percent: float
    """CPU usage of the idle service, in percent of one core."""
    memory_mb: float


def measure(deployment: Deployment, shop: Shop, *, tiny: bool = False) -> LiveResult:
    """Run the service with live updates on one shop. Adds orders to it."""
    seconds = 1.0 if tiny else _RATE_SECONDS
    shop.restore("quiet")
    orders = _OrderWriter(shop)
    with (
        relay(deployment.servers[0].port, _FAR_MS / 1_000) as port,
        _start_service(deployment, shop, port=port),
    ):
        far = orders.measure_latency(5 if tiny else 20, pause=0.25).p50
    with _start_service(deployment, shop) as service:
        single = orders.measure_latency(10 if tiny else 40, pause=0.25).p50
        steady, cpu = orders.measure_cpu(service.pid, 100 if tiny else _CPU_ORDERS)
        fast = orders.measure_latency(3 if tiny else 250, pause=0.02, batch=20)
        sustained, delay = 0, 0.0
        for rate in _RATES[:1] if tiny else _RATES:
            done, behind = orders.measure_delay(rate, seconds)
            print(f"  live, {done:,}/s: {behind:.2f} s behind", file=sys.stderr, flush=True)
            if behind > _MAX_DELAY_SECONDS:
                break
            sustained, delay = done, behind
            if done < 0.9 * rate:  # the writer itself is at its limit
                break
        customers = min(_BURST_CUSTOMERS, shop.customers)
        burst = orders.measure_burst(customers)
        percent, memory = _measure_process(service.pid, 2 if tiny else 30)
        if service.stop():
            raise RuntimeError(service.output)
    return LiveResult(
        shop.size,
        single,
        far,
        steady,
        cpu,
        fast,
        sustained,
        delay,
        customers,
        burst,
        percent,
        memory,
    )


@contextmanager
def _start_service(
    deployment: Deployment, shop: Shop, *, program: Path = PROGRAM, port: int = 0
) -> Iterator[Process]:
    """Start the service, through `port` if given; return once live updates are running."""
    uri = deployment.uri_for(database=DATABASE)
    if port:  # direct: the addresses in the replica set's configuration would bypass the relay
        uri = f"mongodb://127.0.0.1:{port}/{DATABASE}?directConnection=true"
    log = deployment.folder / "live.log"
    recounts = shop.database.loyalty_recounts
    recounts.drop()
    arguments = ["--env-file", os.devnull]
    settings = {"MONGODB_URI": uri, "LIVE_UPDATES": "yes"}
    with Process(*arguments, log=log, program=program, **settings) as service:
        wait_until("live updates", lambda: recounts.find_one({"outcome": "live"}), seconds=600)
        yield service


class _OrderWriter:
    """Ships orders of a shop, and waits for the points of their customers."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self._orders, self._users = shop.database.orders, shop.database.users
        self._unshipped = iter(shop.find_unshipped(_MAX_ORDERS))
        self._touched: set[Any] = set()

    def _ship(self) -> tuple[Any, UpdateOne]:
        """Return the next customer, and the update that ships one of their orders."""
        order, customer = next(self._unshipped)
        self._shop.add_shipped_order(customer)
        self._touched.add(customer)
        return customer, UpdateOne({"_id": order}, {"$set": {"status": "Shipped"}})

    def _find_correct(self, customers: Iterable[Any]) -> list[Any]:
        """Return the customers whose stored points are correct."""
        found = self._users.find({"_id": {"$in": [*customers]}}, {"loyalty_points": 1})
        expected = self._shop.expected_points
        return [user["_id"] for user in found if user["loyalty_points"] == expected(user["_id"])]

    def measure_latency(self, number: int, pause: float, batch: int = 1) -> Latency:
        """Ship `batch` orders each `pause` seconds, and measure until each is in the points."""
        waiting: dict[Any, float] = {}
        times: list[float] = []
        due = started = time.monotonic()
        end = started + number * pause
        while number or waiting:
            if number and time.monotonic() >= due:
                due += pause
                number -= 1
                shipped = [self._ship() for _ in range(batch)]
                self._orders.bulk_write([update for _, update in shipped], ordered=False)
                # If a customer has several pending orders, the time of the newest is used.
                waiting.update(dict.fromkeys((c for c, _ in shipped), time.monotonic()))
                if not number and (late := time.monotonic() - end) > 1:
                    print(f"  live: {late:.1f} s late", file=sys.stderr, flush=True)
            correct, now = self._find_correct(waiting), time.monotonic()
            times += [1000 * (now - waiting.pop(customer)) for customer in correct]
            time.sleep(0.001)
        times.sort()
        return Latency(times[len(times) // 2], times[int(0.99 * len(times))], times[-1])

    def measure_cpu(self, pid: int, number: int) -> tuple[Latency, CpuTime]:
        """Ship orders, 100 a second. The server's CPU time includes the writes and the reads."""
        server = self._shop.status()["pid"]
        before = _cpu_seconds(pid), _cpu_seconds(server)
        latency = self.measure_latency(number, pause=0.01)
        return latency, CpuTime(_cpu_seconds(pid) - before[0], _cpu_seconds(server) - before[1])

    def measure_delay(self, rate: int, seconds: float) -> tuple[int, float]:
        """Ship orders at this rate, if possible.

        Returns the real rate, and the seconds from the last order until all points are correct.
        """
        batches = int(_BATCHES_PER_SECOND * seconds)
        started = time.monotonic()
        for n in range(batches):
            updates = [self._ship()[1] for _ in range(rate // _BATCHES_PER_SECOND)]
            self._orders.bulk_write(updates, ordered=False)
            time.sleep(max(0.0, started + (n + 1) / _BATCHES_PER_SECOND - time.monotonic()))
        duration = time.monotonic() - started
        done = batches * (rate // _BATCHES_PER_SECOND)
        return round(done / duration), self._wait_until_correct()

    def measure_burst(self, customers: int) -> float:
        """Insert one order for each of that many customers.

        Returns the seconds from the last insert until all points are correct.
        """
        chosen = [user["_id"] for user in self._users.find({}, {"_id": 1}).limit(customers)]
        for customer in chosen:
            self._shop.add_shipped_order(customer)
        self._touched.update(chosen)
        orders = ({"customer_id": str(customer), "status": "Shipped"} for customer in chosen)
        self._orders.insert_many(orders, ordered=False)
        return self._wait_until_correct()

    def _wait_until_correct(self) -> float:
        started = time.monotonic()
        wait_until("points", lambda: len(self._find_correct(self._touched)) == len(self._touched))
        return time.monotonic() - started


def _measure_process(pid: int, seconds: float) -> tuple[float, float]:
    """Return the CPU usage of a process in percent of one core, and its memory in MB."""
    before = _cpu_seconds(pid)
    time.sleep(seconds)
    percent = 100 * (_cpu_seconds(pid) - before) / seconds
    memory = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert memory
    return percent, int(memory[1]) / 1024


def _cpu_seconds(pid: int) -> float:
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Compare versions of the service at 100 orders a second, in turn on one shop."""
    parser = argparse.ArgumentParser(prog="python -m bench.live", description=main.__doc__)
    parser.add_argument("--program", type=Path, nargs="+", default=[PROGRAM])
    parser.add_argument("--orders", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    runs: dict[Path, list[tuple[float, Latency, CpuTime]]] = {p: [] for p in args.program}
    with (
        Deployment(cache_gb=1) as deployment,
        closing(Shop(deployment, args.orders, args.orders // 10)) as shop,
    ):
        shop.make_index()
        shop.restore("quiet")
        orders = _OrderWriter(shop)
        for _ in range(args.rounds):
            for program in args.program:
                with _start_service(deployment, shop, program=program) as service:
                    single = orders.measure_latency(20, pause=0.25).p50
                    runs[program].append((single, *orders.measure_cpu(service.pid, _CPU_ORDERS)))
    for program, results in runs.items():
        print(program)
        for single, latency, cpu in results:
            print(
                f"  one order {single:.1f} ms; 100/s p50 {latency.p50:.1f}, p99 {latency.p99:.1f} "
                f"ms; CPU service {cpu.service:.2f}, server {cpu.server:.2f} s"
            )
        median_cpu = median(cpu.service + cpu.server for _, _, cpu in results)
        print(f"  median of both CPU times: {median_cpu:.2f} s")


if __name__ == "__main__":
    main()
