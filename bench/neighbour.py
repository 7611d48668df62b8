"""What the shop feels while a recount is at work: the time of its own reads and writes."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import quantiles
from subprocess import DEVNULL, Popen

from bson import ObjectId
from pymongo import MongoClient

from bench.measure import ROOT
from bench.shop import DATABASE, Shop
from sandbox.mongod import Deployment

_PAUSE = 0.005  # seconds between two of the shop's requests: it is open, not busy
_ALONE = 10.0


@dataclass
class Felt:
    """Milliseconds of each `find_one` and each `insert_one` of an order."""

    finds: list[float] = field(default_factory=list)
    inserts: list[float] = field(default_factory=list)


def middle_and_tail(times: list[float]) -> tuple[float, float]:
    """Return the 50th and the 99th percentile."""
    cuts = quantiles(times, n=100)
    return cuts[49], cuts[98]


def felt(deployment: Deployment, shop: Shop) -> dict[str, Felt]:
    """Let the shop work alone, then beside a quiet pass for each number of workers."""
    shop.restore("quiet")
    results = {"nothing": _work(deployment, shop, 0)}
    for workers in (1, 2, 4):
        results[f"COUNT_WORKERS={workers}"] = _work(deployment, shop, workers)
    return results


def _work(deployment: Deployment, shop: Shop, workers: int) -> Felt:
    uri = deployment.uri_for(database=DATABASE)
    result, rng = Felt(), random.Random(workers)  # noqa: S311 -- no secret
    service = None
    if workers:
        once = ["loyalty_microservice.py", "--once", "--env-file", os.devnull]
        env = {"MONGODB_URI": uri, "COUNT_WORKERS": str(workers)}
        service = Popen([sys.executable, *once], cwd=ROOT, env=env, stderr=DEVNULL, stdout=DEVNULL)
    ends = time.monotonic() + _ALONE
    mark = ObjectId()
    with MongoClient[dict[str, object]](uri) as client:
        orders = client[DATABASE].orders
        while service.poll() is None if service else time.monotonic() < ends:
            one = {"_id": _some(rng, shop)}
            order = {"customer_id": str(ObjectId()), "status": "Paid", "mark": mark}
            result.finds.append(_timed(partial(orders.find_one, one)))
            result.inserts.append(_timed(partial(orders.insert_one, order)))
            time.sleep(_PAUSE)
        orders.delete_many({"status": "Paid", "mark": mark})
    return result


def _some(rng: random.Random, shop: Shop) -> ObjectId:
    return ObjectId(rng.randrange(shop.size).to_bytes(12, "big"))


def _timed(do: Callable[[], object]) -> float:
    started = time.perf_counter()
    do()
    return 1000 * (time.perf_counter() - started)
