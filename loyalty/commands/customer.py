"""`--customer`, with `--once` or `--dry-run`: the orders and points of some customers."""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from bson import Decimal128

from config import Settings
from loyalty.commands.changes import change_to_json, print_outcomes
from loyalty.commands.output import format_cell, print_json, print_line, print_table
from loyalty.errors import Exit, MissingPrivilege
from loyalty.history import UNKNOWN, History
from loyalty.mongo.connection import Connection
from loyalty.mongo.values import Document, format_value
from loyalty.recount.change_log import find_user_changes, logged_target
from loyalty.recount.customer_ids import NO_CUSTOMER, all_forms, indexable_forms, parse_id_argument
from loyalty.recount.order_filter import is_counted
from loyalty.recount.preflight import connect_and_verify
from loyalty.recount.runner import RecountRequest, run_recount
from loyalty.recount.safety import format_status
from loyalty.recount.similar_ids import find_similar_ids, find_user_ids
from loyalty.recount.statuses import CustomerOrders, count_customer_orders
from loyalty.recount.tally import CustomerCount

_FORMS = ", as a string, number, UUID or ObjectId"


def run(args: argparse.Namespace, settings: Settings, *, write: bool) -> Exit:
    """Recount each customer, and print the orders and the points.

    The exit code is FINDINGS if an id matches no user, points would change, or an update failed.
    """
    code, documents = Exit.OK, []
    with connect_and_verify(settings, writing=write) as connection:
        for argument in args.customer:
            ids = parse_id_argument(argument)
            rows, is_up_to_date = _recount(connection, settings, ids, write=write)
            users = _list_users(rows)
            document = {
                "customer": argument,
                "orders": _find_orders(connection, settings, ids, rows),
                "users": users,
                "similar_ids": [] if users else _find_similar_ids(connection, settings, ids),
                "changes": _find_changes(connection, settings, ids, rows),
            }
            if not users or not is_up_to_date:
                code = Exit.FINDINGS
            if args.json:
                documents.append(document)
            else:
                _print_customer(document, settings)
    if args.json:
        print_json({"customers": documents})
    return code


def _recount(
    connection: Connection, settings: Settings, ids: Sequence[Any], *, write: bool
) -> tuple[Sequence[CustomerCount], bool]:
    """Recount some customers; return what was counted, and whether all points are now correct."""
    rows: list[CustomerCount] = []
    customers = [(id_, all_forms(id_)) for id_ in ids]
    request = RecountRequest(customers=customers, rows=rows, write=write)
    result = run_recount(connection, settings, History(connection.recounts, settings), request)
    return rows, result.outcome == "succeeded" and (write or not result.totals.changed)


def _list_users(rows: Sequence[CustomerCount]) -> list[Document]:
    """Return `{user, from, to}` for all users with the ids, also those that do not change."""
    return [
        {"user": format_value(user.id), "from": format_value(user.points), "to": row.points}
        for row in rows
        for user in row.users
    ]


def _find_orders(
    connection: Connection, settings: Settings, ids: Sequence[Any], rows: Sequence[CustomerCount]
) -> list[Document]:
    """Return `{id, status, orders, points, why}` for each form of an id and each status.

    `why` is the reason if there are no points.
    """
    customers_with_users = [_to_comparable(row.customer) for row in rows if row.users]
    documents: list[Document] = []
    for id_ in ids:
        for orders in count_customer_orders(connection, settings, id_):
            why = _explain(orders, settings, user_exists=id_ in customers_with_users)
            documents.append(
                {
                    "id": format_value(orders.form),
                    "status": format_status(orders.status),
                    "orders": orders.number,
                    "points": 0 if why else orders.points,
                    "why": why,
                }
            )
    return documents


def _to_comparable(customer: Any) -> Any:
    """Return a Decimal128, which equals no number in Python, as a decimal."""
    return customer.to_decimal() if isinstance(customer, Decimal128) else customer


def _explain(orders: CustomerOrders, settings: Settings, *, user_exists: bool) -> str | None:
    """Return why orders earn nothing; None if they earn points."""
    if not orders.matches_filter:
        return "does not match ORDER_FILTER"
    if not is_counted(orders.status, settings):
        counted = " and ".join(map(format_status, settings.order_statuses))
        return f"only {counted} {'counts' if len(settings.order_statuses) == 1 else 'count'}"
    if orders.form in (None, "", NO_CUSTOMER):
        return "an order without customer"
    if not user_exists:
        return f"no user has the {settings.user_key_field} {format_value(orders.form)}"
    return None


def _find_similar_ids(connection: Connection, settings: Settings, ids: Sequence[Any]) -> list[str]:
    """Return ids of users that an unknown id may mean."""
    users, key, limit = connection.users, settings.user_key_field, settings.count_ms
    found = [user for id_ in ids for user in find_similar_ids(users, key, id_, max_time_ms=limit)]
    return list(dict.fromkeys(map(format_value, found)))


def _find_changes(
    connection: Connection, settings: Settings, ids: Sequence[Any], rows: Sequence[CustomerCount]
) -> list[Document]:
    """Return the logged changes, `{at, recount, outcome, user, from, to}`, the newest first."""
    if connection.changes is None:
        return []
    keys = [form for id_ in ids for form in indexable_forms(id_)]
    users = find_user_ids(connection.users, settings.user_key_field, keys)
    users += [user.id for row in rows for user in row.users]  # also those with a mixed-case id
    logged = find_user_changes(connection.changes, logged_target(settings), users)
    recounts = [row["recount"] for row in logged]
    outcomes = dict.fromkeys(recounts, UNKNOWN)
    with suppress(MissingPrivilege):  # a service that only appends records works without `find`
        outcomes = History(connection.recounts, settings).find_outcomes(recounts)
    return [
        {
            "at": row["at"],
            "recount": row["recount"],
            "outcome": outcomes[row["recount"]],
            **change_to_json(row["change"]),
        }
        for row in logged
    ]


def _print_customer(customer: Document, settings: Settings) -> None:
    print_line(customer["customer"] or '""')
    if customer["orders"]:
        names = (settings.customer_field, settings.status_field, "orders", "points", "")
        _print_rows(names, customer["orders"])
    else:
        print_line(f"  no orders of this customer{_FORMS}")
    if customer["users"]:
        _print_rows(("user", "from", "to"), customer["users"])
    else:
        name = "id" if settings.user_key_field == "_id" else settings.user_key_field
        print_line(f"  no user has this {name}{_FORMS}")
    if customer["similar_ids"]:
        print_line(f"  users with a similar id: {', '.join(customer['similar_ids'])}")
    if customer["changes"]:
        print_line("  changes by full recounts, the newest first (times are UTC)")
        _print_rows(("at", "recount", "outcome", "user", "from", "to"), customer["changes"])
    print_outcomes({change["outcome"] for change in customer["changes"]})


def _print_rows(header: Sequence[str], documents: Sequence[Document]) -> None:
    print_table(header, *(list(map(format_cell, row.values())) for row in documents))
