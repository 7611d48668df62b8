"""A small shop for the tests of the commands."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from bson import ObjectId
from pymongo.database import Database

ADA = ObjectId("66abcdefabcdefabcdefabcd")


def fill(database: Database[Any]) -> Database[Any]:
    """Fill `database`: Ada has 3 shipped orders and no points, Bob has 9 points and no order.

    One shipped order has no customer, and one an unknown customer; Ada has a pending one.
    """
    database.users.insert_many([{"_id": ADA, "name": "Ada"}, {"_id": "bob", "loyalty_points": 9}])
    customers = [str(ADA), str(ADA).upper(), ADA, None, "stranger"]
    database.orders.insert_many([{"customer_id": c, "status": "Shipped"} for c in customers])
    database.orders.insert_one({"customer_id": str(ADA), "status": "Pending"})
    return database


def make_change_log_older(database: Database[Any], by: timedelta) -> None:
    """Move the time of all logged changes, which is in their ids, into the past."""
    for document in list(database.loyalty_changes.find()):
        seconds = int((document["_id"].generation_time - by).timestamp())
        older = ObjectId(seconds.to_bytes(4, "big") + document["_id"].binary[4:])
        database.loyalty_changes.insert_one({**document, "_id": older})
        database.loyalty_changes.delete_one({"_id": document["_id"]})
