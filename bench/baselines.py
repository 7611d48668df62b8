"""Simple scripts that a shop could run instead of the service: `python -m bench.baselines NAME`.

MONGODB_URI is the connection string, as for the service.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from bson import ObjectId
from pymongo import MongoClient, UpdateOne
from pymongo.database import Database

SHIPPED: dict[str, Any] = {"$match": {"status": "Shipped"}}
COUNT: dict[str, Any] = {"$group": {"_id": "$customer_id", "n": {"$sum": 1}}}


def count_only(database: Database[Any]) -> None:
    """Count the orders of each customer and write nothing."""
    print(*database.orders.aggregate([SHIPPED, COUNT, {"$count": "customers"}]))


def loop(database: Database[Any]) -> None:
    """Read the orders, count in Python, and update one user at a time."""
    orders = database.orders.find({"status": "Shipped"})
    counts = Counter(order["customer_id"] for order in orders)
    for customer, n in counts.items():
        database.users.update_one({"_id": ObjectId(customer)}, {"$set": {"loyalty_points": n}})


def bulk(database: Database[Any]) -> None:
    """Count on the server, and write all users in one bulk_write."""
    updates = [
        UpdateOne({"_id": ObjectId(row["_id"])}, {"$set": {"loyalty_points": row["n"]}})
        for row in database.orders.aggregate([SHIPPED, COUNT])
    ]
    database.users.bulk_write(updates, ordered=False)


def merge(database: Database[Any]) -> None:
    """Count and write on the server."""
    points = {"_id": {"$toObjectId": "$_id"}, "loyalty_points": "$n"}
    into = {"into": "users", "whenMatched": "merge", "whenNotMatched": "discard"}
    database.orders.aggregate([SHIPPED, COUNT, {"$project": points}, {"$merge": into}])


BASELINES: dict[str, Callable[[Database[Any]], None]] = {
    "count_only": count_only,
    "loop": loop,
    "bulk": bulk,
    "merge": merge,
}

if __name__ == "__main__":
    client = MongoClient[Any](os.environ["MONGODB_URI"])
    BASELINES[sys.argv[1]](client.get_default_database())
    sys.stdout.flush()
    os._exit(0)  # as the service does: the driver's exit handler takes half a second
