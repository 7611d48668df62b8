"""A customer's day: their points with recounts every two hours, and with live updates, too."""

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

RECOUNTS = 12  # a day has, at one every two hours
_INTERVAL = 5  # seconds that stand for two hours
_CHANGES = 12  # of the customer's orders: all are shipped, and one of them is taken back
_TAKEN_BACK = 8
_CUSTOMER = 500  # of a thousand: one with a few orders
_PAUSE = 0.01  # seconds between two looks at the points
_SEED = 58

Steps = list[tuple[float, int]]


@dataclass
class Line:
    """Points over seconds since the start of the day: where they changed, and to what."""

    steps: Steps = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    """For each change of an order, how many seconds later it was in the points."""

    def note(self, now: float, points: int) -> None:
        if not self.steps or self.steps[-1][1] != points:
            self.steps.append((now, points))


@dataclass(frozen=True)
class Day:
    """What was measured; `interval` is how many seconds stood for two hours."""

    interval: int
    right: Line = field(default_factory=Line)
    record_recount: Line = field(default_factory=Line)
    live: Line = field(default_factory=Line)

    @property
    def seconds(self) -> int:
        return RECOUNTS * self.interval

    @property
    def complete(self) -> bool:
        """Whether all changes are in the points."""
        return len(self.record_recount.lags) == len(self.live.lags) == _CHANGES

    def hours(self, seconds: float) -> float:
        return 24 * seconds / self.seconds


def measure(*, tiny: bool = False) -> Day:
    """Write the same orders to two equal shops, and follow the points of one customer in both."""
    day = Day(1 if tiny else _INTERVAL)
    with Deployment() as deployment, deployment.client() as client:
        record_recount, live = _Shop(client, "recounted"), _Shop(client, "live")
        # Both recount from the start of the day on; the one without live updates starts last, since
        # the hours of its recounts are what can be seen.
        with (
            _service(deployment, live, day.interval, live_updates="yes"),
            _service(deployment, record_recount, day.interval, live_updates="no"),
        ):
            _follow(day, record_recount, live)
    return day


class _Shop:
    """A shop of which one customer is watched; the same each time."""

    def __init__(self, client: MongoClient[Document], name: str) -> None:
        self.name = name
        self._users, self._orders = client[name].users, client[name].orders
        Shop(client[name], random.Random(_SEED)).fill(dirty=0)  # noqa: S311 -- no secret
        self._orders.create_index([("status", 1), ("customer_id", 1)])
        (user,) = self._users.find().sort("_id", 1).skip(_CUSTOMER).limit(1)
        self._customer = user["_id"]
        own = {"customer_id": str(self._customer), "status": "Paid"}
        self._orders.insert_many({"_id": -n, **own} for n in range(_CHANGES))

    def move(self, change: int) -> None:
        """Ship the next order of the customer, or take back the one before."""
        taken_back = change == _TAKEN_BACK
        order, status = (change - 1, "Returned") if taken_back else (change, "Shipped")
        self._orders.update_one({"_id": -order}, {"$set": {"status": status}})

    def right(self) -> int:
        mine = {"status": "Shipped", "customer_id": str(self._customer)}
        return self._orders.count_documents(mine)

    def stored(self) -> Any:
        (user,) = self._users.find({"_id": self._customer}, {"loyalty_points": 1})
        return user["loyalty_points"]


@contextmanager
def _service(
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


def _follow(day: Day, record_recount: _Shop, live: _Shop) -> None:
    """Move orders at random moments, and note all points, until the day is over and all right."""
    rng = random.Random(_SEED)  # noqa: S311 -- no secret
    moments = sorted(rng.uniform(0, day.seconds) for _ in range(_CHANGES))
    changed = [0.0]  # when the orders changed
    right = [record_recount.right()]  # and the right points from then on
    day.right.note(0, right[0])
    started = time.monotonic()
    while (now := time.monotonic() - started) < day.seconds or not day.complete:
        if now > day.seconds + DEADLINE_SECONDS:
            raise MeasurementError("the points of a customer do not become right")
        if len(right) <= _CHANGES and now >= moments[len(right) - 1]:
            for shop in (record_recount, live):
                shop.move(len(right) - 1)
            changed.append(time.monotonic() - started)
            right.append(record_recount.right())
            day.right.note(changed[-1], right[-1])
        for shop, line in ((record_recount, day.record_recount), (live, day.live)):
            stored, now = shop.stored(), time.monotonic() - started
            line.note(now, stored)
            # Points that are those of an earlier moment have all the changes before it.
            newest = max((n for n, points in enumerate(right) if points == stored), default=0)
            line.lags += [now - then for then in changed[len(line.lags) + 1 : newest + 1]]
        time.sleep(_PAUSE)
