"""`--customer`, with `--once` or `--dry-run`: the orders and points of some customers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from config import Settings
from loyalty.commands.changes import change_json
from loyalty.commands.output import format_cell, print_json, print_line, print_table
from loyalty.errors import Exit
from loyalty.history import History
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.values import (
    LENIENT_CODEC,
    SIMPLE_COLLATION,
    Document,
    format_value,
    get_nested,
    is_integer,
)
from loyalty.recount.change_log import find_user_changes
from loyalty.recount.customer_ids import all_variants, indexable_variants, parse_id_argument
from loyalty.recount.look_alikes import find_look_alikes, find_user_ids
from loyalty.recount.order_filter import is_counted
from loyalty.recount.preflight import connect_and_verify
from loyalty.recount.result import Result
from loyalty.recount.runner import RecountRequest, run_recount
from loyalty.recount.safety import format_status
from loyalty.recount.statuses import CustomerOrders, count_customer_orders
from loyalty.recount.tally import Change


class OrderBreakdown(NamedTuple):
    """A customer's orders with one form of the id and one status."""

    id: str
    status: str
    orders: int
    points: int
    why: str
    """Why there are no points, or ""."""


class CustomerReport(NamedTuple):
    """What is printed about one `--customer`."""

    argument: str
    orders: Sequence[OrderBreakdown]
    users: Sequence[Change]
    """All users with the id; `before` and `after` are equal where nothing changes."""
    look_alikes: Sequence[str]
    """Ids of users that an unknown id may mean."""
    changes: Sequence[Document]
    """Logged changes `{at, recount, user, from, to}`, the newest first."""


def run(args: argparse.Namespace, settings: Settings, *, write: bool) -> Exit:
    """Recount each customer, and print the orders and the points.

    The exit code is FINDINGS if an id matches no user, points would change, or an update failed.
    """
    code, documents = Exit.OK, []
    target = {"users": settings.users, "points_field": settings.points_field}
    with connect_and_verify(settings, writing=write) as connection:
        for argument in args.customer:
            orders: list[OrderBreakdown] = []
            users: list[Change] = []
            ids = parse_id_argument(argument)
            for customer in ids:
                request = RecountRequest(
                    customers=[(customer, all_variants(customer))], write=write
                )
                result = run_recount(connection, settings, History(None), request)
                if result.totals.users:
                    users += _find_users(connection, settings, customer, result)
                if result.outcome != "succeeded" or (result.totals.changed and not write):
                    code = Exit.FINDINGS
                found = count_customer_orders(connection, settings, customer)
                orders += _explain(settings, found, user_exists=result.totals.users > 0)
            look_alikes: list[str] = []
            if not users:
                code = Exit.FINDINGS
                key = settings.user_key_field
                found_users = [u for i in ids for u in find_look_alikes(connection.users, key, i)]
                look_alikes = list(dict.fromkeys(map(format_value, found_users)))
            logged: list[Document] = []
            if connection.changes is not None:
                keys = [form for id_ in ids for form in indexable_variants(id_)]
                user_ids = find_user_ids(connection.users, settings.user_key_field, keys)
                logged = find_user_changes(connection.changes, target, user_ids)
            history = [_change_json(row) for row in logged]
            report = CustomerReport(argument, orders, users, look_alikes, history)
            if args.json:
                documents.append(_to_json(report))
            else:
                _print_customer(report, settings)
    if args.json:
        print_json({"customers": documents})
    return code


def _find_users(
    connection: Connection, settings: Settings, customer: Any, result: Result
) -> list[Change]:
    """Return the users with this id: those that the recount changes, and those up to date."""
    changed = {change.user for change in result.totals.largest}
    users = connection.users.with_options(codec_options=LENIENT_CODEC)
    up_to_date = []
    with map_driver_errors("find", users):
        key = {settings.user_key_field: {"$in": all_variants(customer)}}
        for user in users.find(key, {settings.points_field: 1}, collation=SIMPLE_COLLATION):
            text, points = format_value(user["_id"]), get_nested(user, settings.points_field)
            if text not in changed and is_integer(points):
                up_to_date.append(Change(0, text, format_value(points), points))
    return [*result.totals.largest, *up_to_date]


def _explain(
    settings: Settings, orders: Sequence[CustomerOrders], *, user_exists: bool
) -> list[OrderBreakdown]:
    """Return what a customer's orders earn, and why some earn nothing."""
    rows = []
    for form, status, number, matches_filter in orders:
        points, why = 0, ""
        if not matches_filter:
            why = "not in ORDER_FILTER"
        elif not is_counted(status, settings):
            counted = " and ".join(map(format_status, settings.order_statuses))
            why = f"only {counted} {'counts' if len(settings.order_statuses) == 1 else 'count'}"
        elif form is None or form == "":
            why = "an order without customer"
        elif not user_exists:
            why = f"no user has the {settings.user_key_field} {format_value(form)}"
        else:
            points = number * settings.points_per_order
        rows.append(OrderBreakdown(format_value(form), format_status(status), number, points, why))
    return rows


def _change_json(row: Document) -> Document:
    return {"at": row["at"], "recount": row["recount"], **change_json(row["change"])}


def _print_customer(customer: CustomerReport, settings: Settings) -> None:
    print_line(customer.argument or '""')
    if customer.orders:
        names = (settings.customer_field, settings.status_field, "orders", "points", "")
        orders = ((id_, s, f"{n:,}", f"{p:,}", why) for id_, s, n, p, why in customer.orders)
        print_table(names, *orders)
    else:
        print_line("  no orders")
    if customer.users:
        users = ((c.user, c.before, f"{c.after:,}") for c in customer.users)
        print_table(("user", "from", "to"), *users)
    else:
        name = "id" if settings.user_key_field == "_id" else settings.user_key_field
        print_line(f"  no user has this {name}, as a string, number, UUID or ObjectId")
    if customer.look_alikes:
        print_line(f"  users with a similar id: {', '.join(customer.look_alikes)}")
    if customer.changes:
        columns = ("at", "recount", "user", "from", "to")
        print_line("  changes by full recounts, the newest first (times are UTC)")
        print_table(
            columns, *([format_cell(c[name]) for name in columns] for c in customer.changes)
        )


def _to_json(customer: CustomerReport) -> Document:
    return {
        "customer": customer.argument,
        "orders": [row._asdict() for row in customer.orders],
        "users": [{"user": c.user, "from": c.before, "to": c.after} for c in customer.users],
        "look_alikes": customer.look_alikes,
        "changes": customer.changes,
    }
