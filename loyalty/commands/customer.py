"""`--customer`: the orders and points of some customers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from config import Settings
from loyalty.commands.output import print_json, print_table
from loyalty.errors import Exit
from loyalty.history import History
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.recount.customer_ids import (
    NO_CUSTOMER,
    Document,
    canonical,
    format_value,
    parse_id_argument,
)
from loyalty.recount.index import COLLATION
from loyalty.recount.runner import RecountRequest, connect_and_verify, run_recount
from loyalty.recount.statuses import is_counted, shown_status
from loyalty.recount.tally import Change

_CHANGE = ("user", "from", "to")


def run(args: argparse.Namespace, settings: Settings, *, write: bool) -> int:
    code, documents = Exit.OK, []
    with connect_and_verify(settings, writing=write) as connection:
        for text in args.customer:
            orders, changes, users = [], [], 0
            for customer, forms in parse_id_argument(text):
                task = RecountRequest(customers=[(customer, forms)], write=write)
                result = run_recount(connection, settings, History(None), task)
                changes += result.totals.largest
                users += result.totals.users
                if result.outcome != "succeeded" or (result.totals.changed and not write):
                    code = Exit.FINDINGS
                found = orders_of(connection, settings, customer, forms)
                orders += explained(settings, found, user_exists=result.totals.users > 0)
            if args.json:
                documents.append(of_customer(text, orders, changes))
            else:
                print_customer(text, settings, orders, changes)
            if not users:
                code = Exit.FINDINGS
    if args.json:
        print_json({"customers": documents})
    return code


def print_customer(
    customer: str, settings: Settings, orders: Sequence[OrderBreakdown], users: Sequence[Change]
) -> None:
    """Print a customer's orders and points."""
    print(customer)
    if orders:
        names = (settings.customer_field, settings.status_field, "orders", "points", "")
        print_table(names, *((form, s, f"{n:,}", f"{p:,}", why) for form, s, n, p, why in orders))
    else:
        print("  no orders")
    if users:
        print_table(_CHANGE, *((c.user, c.before, f"{c.after:,}") for c in users))
    else:
        print("  no user has this id, be it text, number, UUID or ObjectId")


def orders_of(
    connection: Connection, settings: Settings, customer: Any, forms: Sequence[Any]
) -> list[tuple[Any, Any, int]]:
    """Return a customer's orders by the form of the id and the status: how many there are.

    `forms` find all orders of the canonical id, and may find others.
    """
    orders, status = connection.orders, settings.status_field
    key = {"form": f"${settings.customer_field}", "status": f"${status}"}
    with map_driver_errors("find", orders):
        # To name every status makes the index's second field reachable; null is none, too.
        every = {"$in": [*orders.distinct(status, collation=COLLATION), None]}
        grouped: list[Document] = [
            {"$match": {status: every, settings.customer_field: {"$in": list(forms)}}},
            {"$group": {"_id": key, "n": {"$sum": 1}}},
            {
                "$match": {
                    "$expr": {"$eq": [canonical("$_id.form", NO_CUSTOMER), {"$literal": customer}]}
                }
            },
            {"$sort": {"n": -1, "_id": 1}},
        ]
        found = orders.aggregate(grouped, collation=COLLATION, maxTimeMS=settings.count_ms)
        return [(row["_id"]["form"], row["_id"].get("status"), row["n"]) for row in found]


class OrderBreakdown(NamedTuple):
    """A customer's orders by the form of the id and the status; `why` there are no points."""

    id: str
    status: str
    orders: int
    points: int
    why: str


def explained(
    settings: Settings, orders: Sequence[tuple[Any, Any, int]], *, user_exists: bool
) -> list[OrderBreakdown]:
    """Say of a customer's orders what they earn; `of_a_user`: whether the id refers to one."""
    rows = []
    for form, status, n in orders:
        points, why = 0, ""
        if not is_counted(status, settings):
            why = f"only {' and '.join(settings.order_statuses)} counts"
        elif not user_exists:
            why = f"no user has the _id {format_value(form)}"
        else:
            points = n * settings.points_per_order
        rows.append(OrderBreakdown(format_value(form), shown_status(status), n, points, why))
    return rows


def of_customer(
    customer: str, orders: Sequence[OrderBreakdown], users: Sequence[Change]
) -> Document:
    rows = [row._asdict() for row in orders]
    return {
        "customer": customer,
        "orders": rows,
        "users": [{"user": c.user, "from": c.before, "to": c.after} for c in users],
    }
