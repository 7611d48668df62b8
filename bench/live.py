"""Measures live updates: latency, sustained rate, a burst, and the cost of the idle service."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymongo import UpdateOne

from bench.shop import DATABASE, Shop
from sandbox.mongod import Deployment, wait_until
from sandbox.service import Process

_RATES = (250, 500, 1_000, 2_000, 4_000)  # changed orders a second
_RATE_SECONDS = 5.0  # for each rate
_BATCHES_PER_SECOND = 50
_MAX_ORDERS = 50_000  # unshipped orders, for all measurements
_BURST_CUSTOMERS = 10_000
_MAX_DELAY_SECONDS = 2  # behind the writers, for a rate that is sustained


@dataclass(frozen=True)
class Latency:
    """Milliseconds from the acknowledgement of a write until the points could be read."""

    p50: float
    p99: float
    worst: float


@dataclass(frozen=True)
class LiveResult:
    """The measurements at one size of the shop."""

    orders: int
    single: float
    """Milliseconds from one change to the points without other changes; the median."""
    steady: Latency
    sustained: int
    """The highest rate at which the points were correct within 2 s after the last order."""
    delay: float
    """Seconds from the last order at that rate to the last points."""
    burst_customers: int
    """Customers with one new order each, inserted as fast as possible."""
    burst_seconds: float
    cpu_percent: float
    """Of one core, by the idle service."""
    memory_mb: float


def measure(deployment: Deployment, shop: Shop, *, tiny: bool = False) -> LiveResult:
    """Run the service with live updates on one shop. Adds orders to it."""
    seconds = 1.0 if tiny else _RATE_SECONDS
    shop.restore("quiet")
    with _start_service(deployment) as service:
        orders = _OrderWriter(shop)
        single = orders.measure_latency(10 if tiny else 40, pause=0.25).p50
        steady = orders.measure_latency(int(100 * seconds), pause=0.01)
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
        cpu, memory = _measure_process(service.pid, 2 if tiny else 30)
        if service.stop():
            raise RuntimeError(service.output)
    return LiveResult(shop.size, single, steady, sustained, delay, customers, burst, cpu, memory)


@contextmanager
def _start_service(deployment: Deployment) -> Iterator[Process]:
    uri = deployment.uri_for(database=DATABASE)
    log = deployment.folder / "live.log"
    with Process(log=log, MONGODB_URI=uri, LIVE_UPDATES="yes") as service:
        service.wait_for("outcome=succeeded")
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

    def measure_latency(self, number: int, pause: float) -> Latency:
        """Ship single orders, one each `pause` seconds, and measure until each is in the points."""
        waiting: dict[Any, float] = {}
        times: list[float] = []
        due = started = time.monotonic()
        end = started + number * pause
        while number or waiting:
            if number and time.monotonic() >= due:
                due += pause
                number -= 1
                customer, update = self._ship()
                self._orders.bulk_write([update])
                # Of several pending orders of one customer, the newest counts.
                waiting[customer] = time.monotonic()
                if not number and (late := time.monotonic() - end) > 1:
                    print(f"  live: {late:.1f} s late", file=sys.stderr, flush=True)
            correct, now = self._find_correct(waiting), time.monotonic()
            times += [1000 * (now - waiting.pop(customer)) for customer in correct]
            time.sleep(0.001)
        times.sort()
        return Latency(times[len(times) // 2], times[int(0.99 * len(times))], times[-1])

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

    def ticks() -> int:
        return sum(
            map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
        )

    before = ticks()
    time.sleep(seconds)
    percent = 100 * (ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds
    memory = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert memory
    return percent, int(memory[1]) / 1024
