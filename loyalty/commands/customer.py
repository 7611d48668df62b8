"""`--customer`, with `--once` or `--dry-run`: the orders and points of some customers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from config import Settings
from loyalty.commands.changes import change_json
from loyalty.commands.output import format_cell, print_json, print_line, print_table
from loyalty.errors import Exit
from loyalty.history import History
from loyalty.mongo.connection import Connection
from loyalty.mongo.values import Document, format_value
from loyalty.recount.change_log import find_user_changes
from loyalty.recount.customer_ids import all_forms, indexable_forms, parse_id_argument
from loyalty.recount.look_alikes import find_look_alikes, find_user_ids
from loyalty.recount.order_filter import is_counted
from loyalty.recount.points import points_for
from loyalty.recount.preflight import connect_and_verify
from loyalty.recount.runner import RecountRequest, run_recount
from loyalty.recount.safety import format_status
from loyalty.recount.statuses import CustomerOrders, count_customer_orders
from loyalty.recount.tally import Change, CustomerCount


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
    """All users with the id; `before` and `after` are equal if nothing changes."""
    look_alikes: Sequence[str]
    """Ids of users that an unknown id may mean."""
    changes: Sequence[Document]
    """Logged changes `{at, recount, user, from, to}`, the newest first."""


def run(args: argparse.Namespace, settings: Settings, *, write: bool) -> Exit:
    """Recount each customer, and print the orders and the points.

    The exit code is FINDINGS if an id matches no user, points would change, or an update failed.
    """
    code, documents = Exit.OK, []
    with connect_and_verify(settings, writing=write) as connection:
        for argument in args.customer:
            report, is_finding = _recount_customer(connection, settings, argument, write=write)
            if is_finding:
                code = Exit.FINDINGS
            if args.json:
                documents.append(_to_json(report))
            else:
                _print_customer(report, settings)
    if args.json:
        print_json({"customers": documents})
    return code


def _recount_customer(
    connection: Connection, settings: Settings, argument: str, *, write: bool
) -> tuple[CustomerReport, bool]:
    """Recount the customers that `argument` may mean; return the report, and if it is a finding."""
    ids, key = parse_id_argument(argument), settings.user_key_field
    rows: list[CustomerCount] = []
    customers = [(id_, all_forms(id_)) for id_ in ids]
    request = RecountRequest(customers=customers, rows=rows, write=write)
    result = run_recount(connection, settings, History(None), request)
    orders: list[OrderBreakdown] = []
    users: list[Change] = []
    for id_ in ids:
        found = [row for row in rows if row.customer == id_]
        users += [change for row in found for change in _list_users(row, settings)]
        counted = count_customer_orders(connection, settings, id_)
        orders += _explain(settings, counted, user_exists=any(row.users for row in found))
    look_alikes: list[str] = []
    if not users:
        found_users = [user for id_ in ids for user in find_look_alikes(connection.users, key, id_)]
        look_alikes = list(dict.fromkeys(map(format_value, found_users)))
    logged: list[Document] = []
    if connection.changes is not None:
        keys = [form for id_ in ids for form in indexable_forms(id_)]
        user_ids = find_user_ids(connection.users, key, keys)
        target = {"users": settings.users, "points_field": settings.points_field}
        logged = find_user_changes(connection.changes, target, user_ids)
    history = [_change_json(row) for row in logged]
    would_change = result.totals.changed > 0 and not write
    is_finding = not users or would_change or result.outcome != "succeeded"
    return CustomerReport(argument, orders, users, look_alikes, history), is_finding


def _list_users(row: CustomerCount, settings: Settings) -> list[Change]:
    points = points_for(row.orders, settings)
    return [
        Change(0, format_value(user.id), format_value(user.points), points) for user in row.users
    ]


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
            points = points_for(number, settings)
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
