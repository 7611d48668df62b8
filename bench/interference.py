"""Interference: the latency of the shop's own reads and writes during a recount."""

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

_PAUSE_SECONDS = 0.005  # between two pairs of requests: the shop is not saturated
_IDLE_SECONDS = 10.0  # of the measurement without a recount


@dataclass
class RequestTimes:
    """Milliseconds of each `find_one` and each `insert_one` of an order."""

    finds: list[float] = field(default_factory=list)
    inserts: list[float] = field(default_factory=list)


def p50_and_p99(times: list[float]) -> tuple[float, float]:
    """Return the 50th and the 99th percentile."""
    cuts = quantiles(times, n=100)
    return cuts[49], cuts[98]


def measure_interference(deployment: Deployment, shop: Shop) -> dict[str, RequestTimes]:
    """Measure requests without a recount, then during recounts with 1, 2 and 4 workers."""
    shop.restore("quiet")
    results = {"none": _send_requests(deployment, shop, 0)}
    for workers in (1, 2, 4):
        results[f"COUNT_WORKERS={workers}"] = _send_requests(deployment, shop, workers)
    return results


def _send_requests(deployment: Deployment, shop: Shop, workers: int) -> RequestTimes:
    uri = deployment.uri_for(database=DATABASE)
    result, rng = RequestTimes(), random.Random(workers)  # noqa: S311 -- not a secret
    service = None
    if workers:
        once = ["loyalty_microservice.py", "--once", "--env-file", os.devnull]
        env = {"MONGODB_URI": uri, "COUNT_WORKERS": str(workers)}
        service = Popen([sys.executable, *once], cwd=ROOT, env=env, stderr=DEVNULL, stdout=DEVNULL)
    ends = time.monotonic() + _IDLE_SECONDS
    run_id = ObjectId()
    with MongoClient[dict[str, object]](uri) as client:
        orders = client[DATABASE].orders
        while service.poll() is None if service else time.monotonic() < ends:
            one = {"_id": _random_order_id(rng, shop)}
            order = {"customer_id": str(ObjectId()), "status": "Paid", "run_id": run_id}
            result.finds.append(_measure_ms(partial(orders.find_one, one)))
            result.inserts.append(_measure_ms(partial(orders.insert_one, order)))
            time.sleep(_PAUSE_SECONDS)
        orders.delete_many({"status": "Paid", "run_id": run_id})
    return result


def _random_order_id(rng: random.Random, shop: Shop) -> ObjectId:
    return ObjectId(rng.randrange(shop.size).to_bytes(12, "big"))


def _measure_ms(request: Callable[[], object]) -> float:
    started = time.perf_counter()
    request()
    return 1000 * (time.perf_counter() - started)
