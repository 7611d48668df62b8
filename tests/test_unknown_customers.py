"""Unknown customers: reported by kind, listed as JSON lines, and beside users that look alike."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from bson import DBRef, ObjectId
from conftest import Command
from pymongo.database import Database

from sandbox.shop import find_mismatches

Capture = pytest.CaptureFixture[str]
Shop = Database[Any]

ADA = ObjectId("66abcdefabcdefabcdefabcd")
USERS: list[Any] = [17, 18, ADA, "bob@example.com", "42"]
# The id in orders, the text of it, the kind, and the user that it may mean.
UNKNOWN: list[tuple[Any, str, str, str | None]] = [
    (DBRef("users", ADA), f"DBRef('users', {ADA!r})", "DBRef", str(ADA)),
    (DBRef("users", 17), "DBRef('users', 17)", "DBRef", "17"),
    ("42 ", "'42 '", "whitespace around", "'42'"),
    ("\tbob@example.com\n", r"'\tbob@example.com\n'", "whitespace around", "'bob@example.com'"),
    (" 18", "' 18'", "whitespace around", "18"),
    ("17", "'17'", "number as string", "17"),
    (f'ObjectId("{ADA}")', f"'ObjectId(\"{ADA}\")'", "ObjectId as string", str(ADA)),
    (f"ObjectId('{ADA}')", f"\"ObjectId('{ADA}')\"", "ObjectId as string", str(ADA)),
    ("Bob@Example.com", "'Bob@Example.com'", "no such user", "'bob@example.com'"),
    (42, "42", "no such user", "'42'"),
    ("stranger", "'stranger'", "no such user", None),
    ([17], "[17]", "array", None),
]


@pytest.fixture
def shop(database: Shop) -> Shop:
    """5 users with an order each; unknown customers with 2, 3, … orders."""
    database.users.insert_many([{"_id": own, "loyalty_points": 1} for own in USERS])
    orders = [{"customer_id": own, "status": "Shipped"} for own in USERS]
    for number, (customer, *_) in enumerate(UNKNOWN, start=2):
        orders += [{"customer_id": customer, "status": "Shipped"} for _ in range(number)]
    database.orders.insert_many(orders)
    return database


def test_all_unknown_customers_are_listed_with_their_orders_and_kind(
    shop: Shop, command: Command, capsys: Capture
) -> None:
    shop.orders.insert_many([{"customer_id": f"u{n}", "status": "Shipped"} for n in range(3_000)])
    names = set(shop.list_collection_names())
    assert command("--unknown-customers") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [
        {"customer": text, "orders": number, "kind": kind}
        for number, (_, text, kind, _) in enumerate(UNKNOWN, start=2)
    ]
    expected += [{"customer": f"'u{n}'", "orders": 1, "kind": "no such user"} for n in range(3_000)]
    assert sorted(rows, key=str) == sorted(expected, key=str)
    assert set(shop.list_collection_names()) == names
    assert find_mismatches(shop) == []  # they earn nothing, and nothing was written


@pytest.mark.parametrize("option", ["--dry-run", "--check-config"])
def test_unknown_customers_are_shown_by_kind_with_those_that_have_most_orders(
    shop: Shop, command: Command, capsys: Capture, option: str
) -> None:
    shop.orders.insert_many([{"customer_id": f"u{n}", "status": "Shipped"} for n in range(20)])
    assert command(option) == 0
    out = capsys.readouterr().out
    assert "\n  unknown customers        32 with 110 orders\n" in out
    assert (
        "\nWarning: 110 of the 115 counted orders earn nothing: 110 of unknown customers, 0" in out
    )
    table = out.split("Unknown customers: their orders earn nothing\n")[1].splitlines()
    assert table[0].split() == ["kind", "customers", "orders", "largest"]
    for kind in {kind for _, _, kind, _ in UNKNOWN}:
        rows = [
            (number, text)
            for number, (_, text, its_kind, _) in enumerate(UNKNOWN, start=2)
            if its_kind == kind
        ]
        others = 20 if kind == "no such user" else 0
        largest = [f"{text} ({number})" for number, text in reversed(rows)]
        cells = f"{len(rows) + others} +{sum(n for n, _ in rows) + others}"
        (found,) = re.findall(rf"^  {kind} +{cells} +(.*)$", "\n".join(table), re.MULTILINE)
        shown = ", ".join(largest)
        assert found == shown or (others and found.startswith(shown) and "'u" in found)


@pytest.mark.parametrize(
    ("customer", "similar_id"),
    [(customer, user) for customer, _, _, user in UNKNOWN if isinstance(customer, str | int)],
    ids=repr,
)
def test_an_unknown_customer_is_shown_with_similar_ids_of_users(
    shop: Shop, command: Command, capsys: Capture, customer: Any, similar_id: str | None
) -> None:
    if customer in ("17", 42):  # an argument finds the user with the number and with the string
        shop.users.delete_many({"_id": {"$in": [int(customer), str(customer)]}})
        shop.orders.delete_many({"customer_id": 17 if customer == "17" else "42"})
        similar_id = None
    argument = f"--customer={customer}"
    assert command("--once", argument, "--json") == 1
    (found,) = json.loads(capsys.readouterr().out)["customers"]
    assert found["users"] == []
    assert found["similar_ids"] == ([similar_id] if similar_id else [])
    assert {row["points"] for row in found["orders"]} == {0}
    assert {row["why"] for row in found["orders"]} == {f"no user has the _id {customer!r}"}
    assert command("--once", argument) == 1
    out = capsys.readouterr().out
    assert ("\n  users with a similar id: " in out) is (similar_id is not None)
