"""Measures the freshness of one customer's points over a day, with and without live updates."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pymongo import MongoClient

from bench.measure import MeasurementError
from sandbox.mongod import DEADLINE_SECONDS, Deployment
from sandbox.service import Process
from sandbox.shop import Document, Shop

RECOUNTS_PER_DAY = 12  # one every two hours
_INTERVAL_SECONDS = 5  # represents two hours
_CHANGES = 12  # changes of the customer's orders: all but one ship an order
_RETURN = 8  # the number of the change that returns an order
_CUSTOMER = 500  # the number of a customer with a few orders, of 1,000
_POLL_SECONDS = 0.01
_SEED = 58


@dataclass
class Timeline:
    """Points over time: the seconds since the start of the day at which they changed."""

    steps: list[tuple[float, int]] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    """For each change of an order, the seconds until it was in the points."""

    def append(self, now: float, points: int) -> None:
        if not self.steps or self.steps[-1][1] != points:
            self.steps.append((now, points))


@dataclass(frozen=True)
class FreshnessResult:
    """The measurement; `interval` is the number of seconds that represents two hours."""

    interval: int
    expected: Timeline = field(default_factory=Timeline)
    recounts: Timeline = field(default_factory=Timeline)
    live: Timeline = field(default_factory=Timeline)

    @property
    def seconds(self) -> int:
        return RECOUNTS_PER_DAY * self.interval

    @property
    def is_complete(self) -> bool:
        """Whether all changes are in the points."""
        return len(self.recounts.lags) == len(self.live.lags) == _CHANGES

    def hours(self, seconds: float) -> float:
        """Convert measured seconds into hours of the day."""
        return 24 * seconds / self.seconds


def measure(*, tiny: bool = False) -> FreshnessResult:
    """Make the same changes in two equal shops, and follow the points of one customer in both."""
    result = FreshnessResult(1 if tiny else _INTERVAL_SECONDS)
    with Deployment() as deployment, deployment.client() as client:
        recounts, live = _Shop(client, "recounts"), _Shop(client, "live")
        # The service without live updates starts last: the times of its recounts are visible in the
        # result, and must start with the day.
        with (
            _start_service(deployment, live, result.interval, live_updates="yes"),
            _start_service(deployment, recounts, result.interval, live_updates="no"),
        ):
            _follow(result, recounts, live)
    return result


class _Shop:
    """A shop and the customer who is observed. The seed is fixed, so all shops are equal."""

    def __init__(self, client: MongoClient[Document], name: str) -> None:
        self.name = name
        self._users, self._orders = client[name].users, client[name].orders
        Shop(client[name], random.Random(_SEED)).fill(dirty=0)  # noqa: S311 -- not a secret
        self._orders.create_index([("status", 1), ("customer_id", 1)])
        (user,) = self._users.find().sort("_id", 1).skip(_CUSTOMER).limit(1)
        self._customer = user["_id"]
        order = {"customer_id": str(self._customer), "status": "Paid"}
        self._orders.insert_many({"_id": -n, **order} for n in range(_CHANGES))

    def change_order(self, change: int) -> None:
        """Ship the next order of the customer, or return the previous one."""
        order, status = (change - 1, "Returned") if change == _RETURN else (change, "Shipped")
        self._orders.update_one({"_id": -order}, {"$set": {"status": status}})

    def count_points(self) -> int:
        shipped = {"status": "Shipped", "customer_id": str(self._customer)}
        return self._orders.count_documents(shipped)

    def read_points(self) -> Any:
        (user,) = self._users.find({"_id": self._customer}, {"loyalty_points": 1})
        return user["loyalty_points"]


@contextmanager
def _start_service(
    deployment: Deployment, shop: _Shop, interval: int, *, live_updates: str
) -> Iterator[None]:
    with Process(
        log=deployment.folder / f"{shop.name}.log",
        MONGODB_URI=deployment.uri_for(database=shop.name),
        RECOUNT_INTERVAL=f"{interval}s",
        LIVE_UPDATES=live_updates,
    ) as service:
        service.wait_for("outcome=succeeded")
        yield
        if service.stop():
            raise MeasurementError(service.output)


def _follow(result: FreshnessResult, recounts: _Shop, live: _Shop) -> None:
    """Change orders at random times and record all points, until every change is in the points."""
    rng = random.Random(_SEED)  # noqa: S311 -- not a secret
    times = sorted(rng.uniform(0, result.seconds) for _ in range(_CHANGES))
    changed = [0.0]  # when the orders changed
    expected = [recounts.count_points()]  # the points from that time on
    result.expected.append(0, expected[0])
    started = time.monotonic()
    while (now := time.monotonic() - started) < result.seconds or not result.is_complete:
        if now > result.seconds + DEADLINE_SECONDS:
            raise MeasurementError("the points of a customer did not become correct")
        if len(expected) <= _CHANGES and now >= times[len(expected) - 1]:
            for shop in (recounts, live):
                shop.change_order(len(expected) - 1)
            changed.append(time.monotonic() - started)
            expected.append(recounts.count_points())
            result.expected.append(changed[-1], expected[-1])
        for shop, line in ((recounts, result.recounts), (live, result.live)):
            stored, now = shop.read_points(), time.monotonic() - started
            line.append(now, stored)
            # Points that were correct after a change include all changes before it.
            newest = max((n for n, points in enumerate(expected) if points == stored), default=0)
            line.lags += [now - then for then in changed[len(line.lags) + 1 : newest + 1]]
        time.sleep(_POLL_SECONDS)
