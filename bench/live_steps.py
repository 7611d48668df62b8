"""Measures the steps of one live update: `python -m bench.live_steps --orders 1000000`.

The service runs in a thread of this process, and the driver reports its commands.
"""

from __future__ import annotations

import argparse
import threading
import time
from contextlib import closing
from statistics import median

from pymongo import monitoring

from bench.shop import DATABASE, Shop
from config import load
from loyalty.concurrency import ignore_progress
from loyalty.service import Service
from sandbox.mongod import Deployment

_NUMBER = 200
_PAUSE_SECONDS = 0.1
_COMMANDS = {
    "getMore": "event: from the acknowledgement of the order",
    "find": "look-up of the customer, and of the newest cluster time",
    "aggregate": "count and comparison, one aggregation",
    "update": "write with `w: majority`",
}


class _Recorder(monitoring.CommandListener):
    """Records when each command of the service succeeds, and its duration."""

    def __init__(self) -> None:
        self.replies: list[tuple[str, float, float]] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None: ...

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        reply = event.command_name, time.monotonic(), event.duration_micros / 1_000
        self.replies.append(reply)

    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


def main() -> None:
    """Ship single orders, and print the median of each step as a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.live_steps", description=main.__doc__)
    parser.add_argument("--orders", type=int, default=100_000)
    size = parser.parse_args().orders
    with Deployment(cache_gb=2) as deployment, closing(Shop(deployment, size, size // 10)) as shop:
        shop.make_index()
        shop.restore("quiet")
        uri = deployment.uri_for(database=DATABASE)
        settings = load({"MONGODB_URI": uri, "LIVE_UPDATES": "yes"})
        recorder = _Recorder()
        monitoring.register(recorder)  # the shop's client is older, and not recorded
        service = Service(settings, lambda: settings)
        service.connect()
        service.recount(ignore_progress)
        steps = _measure(shop, service, recorder)
        service.disconnect()
    print(f"| step, {size:,} orders | ms |\n|---|---:|")
    for name, times in steps.items():
        print(f"| {name} | {median(times):.1f} |")


def _measure(shop: Shop, service: Service, recorder: _Recorder) -> dict[str, list[float]]:
    orders = shop.find_unshipped(_NUMBER)
    steps: dict[str, list[float]] = {name: [] for name in _COMMANDS.values()}
    steps |= {"Python, threads": [], "**total**": []}
    has_ended = threading.Event()

    def work() -> None:
        while not has_ended.is_set():
            service.run_between(1, ignore_progress)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for order, _ in orders:
            time.sleep(_PAUSE_SECONDS)
            recorder.replies.clear()
            shop.orders.update_one({"_id": order}, {"$set": {"status": "Shipped"}})
            acknowledged_at = time.monotonic()
            while "update" not in (names := [name for name, _, _ in recorder.replies]):
                time.sleep(0.0005)
            if sorted(names) != sorted(_COMMANDS):  # a heartbeat came between
                continue
            known = 0.0
            for name, at, duration in recorder.replies:
                total = 1_000 * (at - acknowledged_at)
                milliseconds = max(0.0, total) if name == "getMore" else duration
                steps[_COMMANDS[name]].append(milliseconds)
                known += milliseconds
            steps["Python, threads"].append(total - known)
            steps["**total**"].append(total)
    finally:
        has_ended.set()
        worker.join()
    return steps


if __name__ == "__main__":
    main()
