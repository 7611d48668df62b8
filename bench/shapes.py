"""Measure quiet passes of one shop by several settings: `python -m bench.shapes`.

The shop has one order in two counted; its documents have a field for each of the shapes.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from bson import DBRef, ObjectId

from config import Settings, load
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.recount.index import inspect_plan
from loyalty.recount.index_build import create_index, create_user_index
from loyalty.recount.runner import RecountRequest, run_recount
from sandbox.mongod import Deployment

SHAPES: dict[str, dict[str, str]] = {
    "default": {},
    "customer number": {"ORDER_CUSTOMER_FIELD": "number", "USER_KEY_FIELD": "customer_no"},
    "e-mail": {"ORDER_CUSTOMER_FIELD": "email", "USER_KEY_FIELD": "email"},
    "DBRef": {"ORDER_CUSTOMER_FIELD": "customer.$id"},
    "not deleted": {"ORDER_FILTER": '{"deleted": {"$ne": true}}'},
    "one store": {"ORDER_FILTER": '{"store": "berlin"}'},
    "one year": {"ORDER_FILTER": '{"created": {"$gte": 500000}}'},
    "all three": {
        "ORDER_FILTER": '{"deleted": {"$ne": true}, "store": "berlin", "created": {"$gte": 500000}}'
    },
}
_BATCH = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orders", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parent", type=Path, help="the folder for the server's data")
    args = parser.parse_args()
    with Deployment(parent=args.parent) as deployment:
        uri = deployment.uri_for(database="shapes")
        every = {name: load({"MONGODB_URI": uri, **values}) for name, values in SHAPES.items()}
        with connect(every["default"], writing=True) as connection:
            _fill(connection, args.orders, args.users)
            _measure(connection, every, args.rounds)


def _fill(connection: Connection, orders: int, users: int) -> None:
    rng = random.Random(1)  # noqa: S311 -- reproducible, not secret
    ids = [
        ObjectId(f"{1_600_000_000 + 60 * n:08x}{rng.getrandbits(64):016x}") for n in range(users)
    ]

    def new_users() -> Iterator[dict[str, Any]]:
        for n, user_id in enumerate(ids):
            yield {
                "_id": user_id,
                "customer_no": n,
                "email": f"user{n:07}@example.com",
                "name": "x",
            }

    def new_orders() -> Iterator[dict[str, Any]]:
        for n in range(orders):
            user = int(users * rng.random() ** 1.5)
            yield {
                "_id": n,
                "customer_id": str(ids[user]),
                "number": user,
                "email": f"user{user:07}@example.com",
                "customer": DBRef("users", ids[user]),
                "status": rng.choice(["Shipped", "Pending"]),
                "store": "berlin" if rng.random() < 0.9 else "hamburg",
                "created": rng.randrange(orders) if rng.random() < 0.2 else 500_000 + n,
                **({"deleted": True} if rng.random() < 0.1 else {}),
            }

    for collection, documents in (
        (connection.users, new_users()),
        (connection.orders, new_orders()),
    ):
        while batch := list(islice(documents, _BATCH)):
            collection.insert_many(batch, ordered=False)


def _measure(connection: Connection, every: dict[str, Settings], rounds: int) -> None:
    """Measure each shape in turn, as otherwise other programs would slow down only some."""
    request = RecountRequest(write=True, force=True)
    seconds: dict[str, list[float]] = {name: [] for name in every}
    for settings in every.values():
        create_index(connection.orders, settings)
        if settings.user_key_field != "_id":
            create_user_index(connection.users, settings)
    for number in range(rounds):
        for name, settings in every.items():
            run_recount(connection, settings, History(None), request)
            started = time.perf_counter()
            result = run_recount(connection, settings, History(None), request)
            seconds[name].append(time.perf_counter() - started)
            assert not result.totals.changed
            if number == 0:
                plan = inspect_plan(connection.orders, settings)
                counted = result.totals.counted_orders
                print(f"{name}: {counted:,} orders, {plan.index_name}, fetch={plan.needs_fetch}")
    default = seconds["default"]
    for name, times in seconds.items():
        ratio = statistics.median(t / d for t, d in zip(times, default, strict=True))
        print(
            f"{name:16} {min(times):.2f} s at best, median {statistics.median(times):.2f} s,"
            f" {ratio:.2f} x default"
        )


if __name__ == "__main__":
    main()
