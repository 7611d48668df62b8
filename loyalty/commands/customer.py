"""`--customer`, with `--once` or `--dry-run`: the orders and points of some customers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from config import Settings
from loyalty.commands.output import print_json, print_line, print_table
from loyalty.errors import Exit
from loyalty.history import History
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.recount.customer_ids import (
    NO_CUSTOMER,
    Document,
    all_variants,
    canonical,
    format_value,
    parse_id_argument,
)
from loyalty.recount.index import COLLATION
from loyalty.recount.runner import RecountRequest, connect_and_verify, run_recount
from loyalty.recount.statuses import format_status, is_counted
from loyalty.recount.tally import Change


class OrderBreakdown(NamedTuple):
    """A customer's orders with one form of the id and one status."""

    id: str
    status: str
    orders: int
    points: int
    why: str
    """Why there are no points, or ""."""


def run(args: argparse.Namespace, settings: Settings, *, write: bool) -> Exit:
    """Recount each customer, and print the orders and the points.

    The exit code is FINDINGS if an id matches no user, points would change, or an update failed.
    """
    code, documents = Exit.OK, []
    with connect_and_verify(settings, writing=write) as connection:
        for argument in args.customer:
            orders: list[OrderBreakdown] = []
            changes: list[Change] = []
            users = 0
            for customer in parse_id_argument(argument):
                request = RecountRequest(
                    customers=[(customer, all_variants(customer))], write=write
                )
                result = run_recount(connection, settings, History(None), request)
                changes += result.totals.largest
                users += result.totals.users
                if result.outcome != "succeeded" or (result.totals.changed and not write):
                    code = Exit.FINDINGS
                found = count_orders_by_status(connection, settings, customer)
                orders += _explain(settings, found, user_exists=result.totals.users > 0)
            if not users:
                code = Exit.FINDINGS
            if args.json:
                documents.append(_customer_json(argument, orders, changes))
            else:
                _print_customer(argument, settings, orders, changes)
    if args.json:
        print_json({"customers": documents})
    return code


def count_orders_by_status(
    connection: Connection, settings: Settings, customer: Any
) -> list[tuple[Any, Any, int]]:
    """Return a customer's orders as (id as stored, status, number of orders).

    `customer` is a canonical id; "" stands for the orders without customer. Raises ServiceError.
    """
    orders, status = connection.orders, settings.status_field
    key = {"form": f"${settings.customer_field}", "status": f"${status}"}
    variants = all_variants(customer)
    if customer == "":
        customer, variants = NO_CUSTOMER, ["", None]
    is_the_customer = {"$eq": [canonical("$_id.form", NO_CUSTOMER), {"$literal": customer}]}
    with map_driver_errors("find", orders):
        # A condition on every status lets the server use the index {status, customer_id}.
        every = {"$in": [*orders.distinct(status, collation=COLLATION), None]}
        stages: list[Document] = [
            {"$match": {status: every, settings.customer_field: {"$in": variants}}},
            {"$group": {"_id": key, "n": {"$sum": 1}}},
            {"$match": {"$expr": is_the_customer}},
            {"$sort": {"n": -1, "_id": 1}},
        ]
        found = orders.aggregate(stages, collation=COLLATION, maxTimeMS=settings.count_ms)
        return [(row["_id"].get("form"), row["_id"].get("status"), row["n"]) for row in found]


def _explain(
    settings: Settings, orders: Sequence[tuple[Any, Any, int]], *, user_exists: bool
) -> list[OrderBreakdown]:
    """Return what a customer's orders earn, and why some earn nothing."""
    rows = []
    for form, status, number in orders:
        points, why = 0, ""
        if not is_counted(status, settings):
            counted = " and ".join(map(format_status, settings.order_statuses))
            why = f"only {counted} {'counts' if len(settings.order_statuses) == 1 else 'count'}"
        elif form is None or form == "":
            why = "an order without customer"
        elif not user_exists:
            why = f"no user has the _id {format_value(form)}"
        else:
            points = number * settings.points_per_order
        rows.append(OrderBreakdown(format_value(form), format_status(status), number, points, why))
    return rows


def _print_customer(
    argument: str, settings: Settings, orders: Sequence[OrderBreakdown], changes: Sequence[Change]
) -> None:
    print_line(argument or '""')
    if orders:
        names = (settings.customer_field, settings.status_field, "orders", "points", "")
        print_table(names, *((id_, s, f"{n:,}", f"{p:,}", why) for id_, s, n, p, why in orders))
    else:
        print_line("  no orders")
    if changes:
        print_table(("user", "from", "to"), *((c.user, c.before, f"{c.after:,}") for c in changes))
    else:
        print_line("  no user has this id, as a string, number, UUID or ObjectId")


def _customer_json(
    argument: str, orders: Sequence[OrderBreakdown], changes: Sequence[Change]
) -> Document:
    return {
        "customer": argument,
        "orders": [row._asdict() for row in orders],
        "users": [{"user": c.user, "from": c.before, "to": c.after} for c in changes],
    }
