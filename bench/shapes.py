"""Measure recounts without changes of one shop with several settings: `python -m bench.shapes`.

The shop has one order in two counted; its documents have a field for each of the shapes.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
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
    "numeric _id": {"ORDER_CUSTOMER_FIELD": "number", "USERS_COLLECTION": "numbered_users"},
    "customer number": {"ORDER_CUSTOMER_FIELD": "number", "USER_KEY_FIELD": "customer_no"},
    "DBRef": {"ORDER_CUSTOMER_FIELD": "customer.$id"},
    "not deleted": {"ORDER_FILTER": '{"deleted": {"$ne": true}}'},
    "one store": {"ORDER_FILTER": '{"store": "berlin"}'},
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
        # A points field for each shape, so that only the first recount of each changes points.
        fields = {name: {"USER_POINTS_FIELD": f"points.shape{n}"} for n, name in enumerate(SHAPES)}
        every = {
            name: load({"MONGODB_URI": uri, **values, **fields[name]})
            for name, values in SHAPES.items()
        }
        with ExitStack() as stack:
            shops = {
                name: (stack.enter_context(connect(settings)), settings)
                for name, settings in every.items()
            }
            connection, _ = shops["default"]
            _fill(connection, args.orders, args.users)
            server = int(connection.client.admin.command("serverStatus")["pid"])
            _measure(shops, args.rounds, server)


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

    numbered_users = connection.users.database["numbered_users"]
    for collection, documents in (
        (connection.users, new_users()),
        (numbered_users, ({"_id": n} for n in range(users))),
        (connection.orders, new_orders()),
    ):
        while batch := list(islice(documents, _BATCH)):
            collection.insert_many(batch, ordered=False)


def _measure(shops: dict[str, tuple[Connection, Settings]], rounds: int, server: int) -> None:
    """Measure all shapes in each round, as other programs may slow down some rounds.

    The CPU time of the server hardly depends on other programs.
    """
    passes: dict[str, list[tuple[float, float]]] = {name: [] for name in shops}
    for name, (connection, settings) in shops.items():
        create_index(connection.orders, settings)
        if settings.user_key_field != "_id":
            create_user_index(connection.users, settings)
        run_recount(connection, settings, History(None, settings), RecountRequest(force=True))
        plan = inspect_plan(connection.orders, settings)
        print(f"{name}: index {plan.index_name}, fetch={plan.needs_fetch}", flush=True)
    for _ in range(rounds):
        for name, (connection, settings) in shops.items():
            started, processor = time.perf_counter(), _read_processor_seconds(server)
            result = run_recount(connection, settings, History(None, settings))
            seconds = time.perf_counter() - started
            passes[name].append((seconds, _read_processor_seconds(server) - processor))
            if result.totals.changed:
                raise AssertionError(f"{name}: {result.totals.changed} users changed")
        default = statistics.median(processor for _, processor in passes["default"])
        print("shape | best wall s | server processor s, median | x default", flush=True)
        for name, measured in passes.items():
            wall = min(seconds for seconds, _ in measured)
            processor = statistics.median(processor for _, processor in measured)
            print(f"{name} | {wall:.2f} | {processor:.2f} | {processor / default:.2f}", flush=True)


def _read_processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
