"""Live updates measured: how soon points are right, how many a second, what idling costs."""

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
_SECONDS = 5.0  # for each of these
_PORTIONS = 50  # a second
_POOL = 50_000  # orders that are not shipped, for all of it
_AT_ONCE = 10_000


@dataclass(frozen=True)
class Latency:
    """Milliseconds from the acknowledgement of a write until the points could be read."""

    p50: float
    p99: float
    worst: float


@dataclass(frozen=True)
class ChangeStreamWatcher:
    """What was measured at one size of the shop."""

    orders: int
    single: float
    """Milliseconds from one change, while nothing else happens, to the points; the median."""
    steady: Latency
    sustained: int
    """The highest rate at which the points were right within 2 s after the last order."""
    lag: float
    """Seconds from the last order at that rate to the last points."""
    at_once: int
    """Customers changed by as many orders, inserted as fast as possible."""
    at_once_seconds: float
    cpu_percent: float
    """Of a core, of the idle service, in percent; and its memory, in MB."""
    memory: float


def measure(deployment: Deployment, shop: Shop, *, tiny: bool = False) -> ChangeStreamWatcher:
    """Run the service with live updates beside one shop; its orders grow by that."""
    seconds = 1.0 if tiny else _SECONDS
    shop.restore("quiet")
    with _service(deployment) as service:
        bench = _Bench(shop)
        single = bench.latency(10 if tiny else 40, pause=0.25).p50
        steady = bench.latency(int(100 * seconds), pause=0.01)
        sustained, lag = 0, 0.0
        for rate in _RATES[:1] if tiny else _RATES:
            done, behind = bench.behind_after(rate, seconds)
            print(f"  live, {done:,}/s: {behind:.2f} s behind", file=sys.stderr, flush=True)
            if behind > 2:
                break
            sustained, lag = done, behind
            if done < 0.9 * rate:  # the writers themselves come no further
                break
        customers = min(_AT_ONCE, shop.customers)
        at_once = bench.at_once(customers)
        cpu, memory = _idle(service.pid, 2 if tiny else 30)
        if service.stop():
            raise RuntimeError(service.output)
    return ChangeStreamWatcher(
        shop.size, single, steady, sustained, lag, customers, at_once, cpu, memory
    )


@contextmanager
def _service(deployment: Deployment) -> Iterator[Process]:
    uri = deployment.uri_for(database=DATABASE)
    log = deployment.folder / "live.log"
    with Process(log=log, MONGODB_URI=uri, LIVE_UPDATES="yes") as service:
        service.wait_for("outcome=succeeded")
        yield service


class _Bench:
    """Ships orders of a shop, and waits for the points."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self._orders, self._users = shop.database.orders, shop.database.users
        self._unshipped = iter(shop.unshipped(_POOL))
        self._touched: set[Any] = set()

    def _ship(self) -> tuple[Any, UpdateOne]:
        """Return the next customer, and what ships an order of theirs."""
        order, customer = next(self._unshipped)
        self._shop.ship_to(customer)
        self._touched.add(customer)
        return customer, UpdateOne({"_id": order}, {"$set": {"status": "Shipped"}})

    def _right(self, customers: Iterable[Any]) -> list[Any]:
        """Return those of the customers who hold the right points."""
        found = self._users.find({"_id": {"$in": [*customers]}}, {"loyalty_points": 1})
        right = self._shop.right
        return [user["_id"] for user in found if user["loyalty_points"] == right(user["_id"])]

    def latency(self, number: int, pause: float) -> Latency:
        """Ship single orders, one each `pause` seconds, and follow all of them."""
        waiting: dict[Any, float] = {}
        took: list[float] = []
        due = started = time.monotonic()
        end = started + number * pause
        while number or waiting:
            if number and time.monotonic() >= due:
                due += pause
                number -= 1
                customer, update = self._ship()
                self._orders.bulk_write([update])
                waiting[customer] = time.monotonic()  # again, if there is an order on the way
                if not number and (late := time.monotonic() - end) > 1:
                    print(f"  live: {late:.1f} s late", file=sys.stderr, flush=True)
            right, now = self._right(waiting), time.monotonic()
            took += [1000 * (now - waiting.pop(customer)) for customer in right]
            time.sleep(0.001)
        took.sort()
        return Latency(took[len(took) // 2], took[int(0.99 * len(took))], took[-1])

    def behind_after(self, rate: int, seconds: float) -> tuple[int, float]:
        """Ship orders at this rate, if possible.

        Returns the rate that it was, and how long after the last order everyone is right.
        """
        portions = int(_PORTIONS * seconds)
        started = time.monotonic()
        for n in range(portions):
            updates = [self._ship()[1] for _ in range(rate // _PORTIONS)]
            self._orders.bulk_write(updates, ordered=False)
            time.sleep(max(0.0, started + (n + 1) / _PORTIONS - time.monotonic()))
        took = time.monotonic() - started
        return round(portions * (rate // _PORTIONS) / took), self._until_right()

    def at_once(self, customers: int) -> float:
        """Insert an order each of so many; return the seconds until all are right."""
        chosen = [user["_id"] for user in self._users.find({}, {"_id": 1}).limit(customers)]
        for customer in chosen:
            self._shop.ship_to(customer)
        self._touched.update(chosen)
        orders = ({"customer_id": str(customer), "status": "Shipped"} for customer in chosen)
        self._orders.insert_many(orders, ordered=False)
        return self._until_right()

    def _until_right(self) -> float:
        started = time.monotonic()
        wait_until("points", lambda: len(self._right(self._touched)) == len(self._touched))
        return time.monotonic() - started


def _idle(pid: int, seconds: float) -> tuple[float, float]:
    """Return how much of a core a process takes, in percent, and its memory in MB."""

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
