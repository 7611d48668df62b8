"""Writers that never rest, each a process of its own.

A module of its own, as all of it is imported by each of them.
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

USERS, ORDERS = 2_000, 40_000
STATUSES = {"move": ["Shipped", "Delivered"], "change": ["Shipped", "Delivered", "Returned"]}
ID_SECONDS = 1_700_000_000
PATIENCE = 120.0


def object_id(number: int) -> ObjectId:
    """Make the id of a user, so that the writers know it without reading."""
    return ObjectId(f"{ID_SECONDS + number:08x}{number:016x}")


def any_write(rng: random.Random, number: int) -> Any:
    """Return one of all the things that happen to an order, sometimes under odd forms of an id."""
    customer = str(object_id(rng.randrange(USERS)))
    if rng.random() < 0.02:
        customer = customer.upper()
    status, own = rng.choice(STATUSES["change"]), {"_id": number}
    order = {"customer_id": customer, "status": status}
    return rng.choice(
        [
            UpdateOne(own, {"$set": {"status": status}}),
            UpdateOne(own, {"$set": {"customer_id": customer}}),
            ReplaceOne(own, order, upsert=True),
            DeleteOne(own),
        ]
    )


def write_forever(kind: str, uri: str, seed: int, at_work: Semaphore, stop: Event) -> None:
    """Be one of the writers, with w=1: as fast as the server allows.

    Who moves orders between the two counted statuses, or swaps the customers of two orders,
    changes nobody's count.
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
            if kind == "all":
                orders.bulk_write([any_write(rng, n) for n in chosen], ordered=False)
                return
            updates = [
                UpdateOne({"_id": n}, {"$set": {"status": rng.choice(STATUSES[kind])}})
                for n in chosen
            ]
            orders.bulk_write(updates, ordered=False)

        write()
        at_work.release()
        while not stop.is_set():
            write()


@contextmanager
def writers(uri: str, *kinds: str) -> Iterator[None]:
    """Let one writer of each kind write, all of them from the beginning of the block to its end."""
    context = multiprocessing.get_context("spawn")
    at_work, stop = context.Semaphore(0), context.Event()
    running = [
        context.Process(target=write_forever, args=(kind, uri, n, at_work, stop), daemon=True)
        for n, kind in enumerate(kinds)
    ]
    for process in running:
        process.start()
    try:
        assert all(at_work.acquire(timeout=PATIENCE) for _ in running)
        yield
    finally:
        stop.set()
        for process in running:
            process.join(PATIENCE)
    assert all(process.exitcode == 0 for process in running)
