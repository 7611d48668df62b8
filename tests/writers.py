"""Processes that write orders without a pause, while a test recounts.

Each process imports this module, so that it holds nothing else.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event, Semaphore
from typing import Any

from bson import ObjectId
from pymongo import DeleteOne, MongoClient, ReplaceOne, UpdateOne
from pymongo.client_session import ClientSession

USERS, ORDERS = 1_000, 20_000
STATUSES = {"move": ["Shipped", "Delivered"], "change": ["Shipped", "Delivered", "Returned"]}
ID_SECONDS = 1_700_000_000
START_OR_STOP_SECONDS = 120.0


def object_id(number: int) -> ObjectId:
    """Return the id of a user, which the writers know without reading it."""
    return ObjectId(f"{ID_SECONDS + number:08x}{number:016x}")


def choose_write(rng: random.Random, number: int, upper_case: float) -> Any:
    """Return a random write to an order; a share of `upper_case` has an upper-case customer id."""
    customer = str(object_id(rng.randrange(USERS)))
    if rng.random() < upper_case:
        customer = customer.upper()
    status, order_id = rng.choice(STATUSES["change"]), {"_id": number}
    order = {"customer_id": customer, "status": status}
    return rng.choice(
        [
            UpdateOne(order_id, {"$set": {"status": status}}),
            UpdateOne(order_id, {"$set": {"customer_id": customer}}),
            ReplaceOne(order_id, order, upsert=True),
            DeleteOne(order_id),
        ]
    )


def write_until(stop: Event, kind: str, uri: str, seed: int, started: Semaphore) -> None:
    """Write with w=1, as fast as the server allows, until `stop` is set.

    `move` changes orders between the two counted statuses, and `swap` swaps the customers of two
    orders: neither changes the points of a user. `change` also uses another status. `all` makes
    writes of every type, and `all_upper` some of them with upper-case customer ids.
    """
    rng = random.Random(seed)
    with MongoClient[Any](uri, w=1) as client, client.start_session() as session:
        orders = client.get_default_database().orders

        def swap(session: ClientSession) -> None:
            one, other = orders.find(
                {"_id": {"$in": rng.sample(range(ORDERS), 2)}}, session=session
            )
            for to, source in ((one, other), (other, one)):
                change = {"$set": {"customer_id": source["customer_id"]}}
                orders.update_one({"_id": to["_id"]}, change, session=session)

        def write() -> None:
            if kind == "swap":
                session.with_transaction(swap)
                return
            chosen = rng.sample(range(ORDERS), 100)
            if kind.startswith("all"):
                upper_case = 0.02 if kind == "all_upper" else 0
                writes = [choose_write(rng, n, upper_case) for n in chosen]
                orders.bulk_write(writes, ordered=False)
                return
            updates = [
                UpdateOne({"_id": n}, {"$set": {"status": rng.choice(STATUSES[kind])}})
                for n in chosen
            ]
            orders.bulk_write(updates, ordered=False)

        write()
        started.release()
        while not stop.is_set():
            write()


@contextmanager
def writers(uri: str, *kinds: str) -> Iterator[None]:
    """Run one writer of each kind; all of them write from the start of the block to its end."""
    context = multiprocessing.get_context("spawn")
    started, stop = context.Semaphore(0), context.Event()
    running = [
        context.Process(target=write_until, args=(stop, kind, uri, n, started), daemon=True)
        for n, kind in enumerate(kinds)
    ]
    for process in running:
        process.start()
    try:
        assert all(started.acquire(timeout=START_OR_STOP_SECONDS) for _ in running)
        yield
    finally:
        stop.set()
        for process in running:
            process.join(START_OR_STOP_SECONDS)
    assert all(process.exitcode == 0 for process in running)
