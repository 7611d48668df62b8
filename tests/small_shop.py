"""A small shop for the tests of the commands."""

from __future__ import annotations

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
