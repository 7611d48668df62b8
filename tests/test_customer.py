"""`--customer`: every form of an id is found, and the orders are explained."""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

import bson
import pytest
from bson import Binary, Decimal128, ObjectId
from bson.binary import UuidRepresentation
from bson.raw_bson import RawBSONDocument
from conftest import Command
from pymongo.database import Database
from small_shop import ADA, fill

from sandbox.shop import find_mismatches

Capture = pytest.CaptureFixture[str]
UUID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")


@pytest.fixture
def shop(database: Database[Any]) -> Database[Any]:
    return fill(database)


def test_one_customer_is_shown_and_written_and_no_other(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    assert command("--dry-run", "--customer", str(ADA)) == 1
    assert shop.users.find_one({"_id": ADA}) == {"_id": ADA, "name": "Ada"}
    assert command("--once", "--customer", str(ADA).upper(), "--customer", "nobody") == 1
    out = capsys.readouterr().out
    assert f"{str(ADA).upper()}\n  customer_id " in out
    assert "  66abcdefabcdefabcdefabcd  null  3\n" in out
    assert "nobody\n  no orders of this customer, as a string, number, UUID or ObjectId\n" in out
    assert "\n  no user has this id, as a string, number, UUID or ObjectId\n" in out
    assert {u["_id"]: u["loyalty_points"] for u in shop.users.find()} == {ADA: 3, "bob": 9}
    assert command("--once", "--customer", str(ADA)) == 0
    assert "  66abcdefabcdefabcdefabcd  3     3\n" in capsys.readouterr().out
    assert command("--dry-run", "--customer", str(ADA)) == 0
    assert "loyalty_recounts" not in shop.list_collection_names()


@pytest.mark.parametrize(
    ("argument", "stored"),
    [
        ("7", 7),
        ("-7", -7),
        ("7", 7.0),
        ("7", Decimal128("7")),
        ("7", Decimal128("7.00")),
        ("1.5", Decimal128("1.5")),
        ("7", "7"),
        ("1.5", 1.5),
        ("1234567890123456789", 1234567890123456789),
        (str(2**63 - 1), 2**63 - 1),
        (str(-(2**63)), -(2**63)),
        ("9" * 19, "9" * 19),
        ("9" * 40, "9" * 40),
        ("-abc", "-abc"),
        ("--once", "--once"),
        ("$$ROOT", "$$ROOT"),
        (" ", " "),
        (str(UUID), str(UUID)),
        *((str(UUID), Binary.from_uuid(UUID, form)) for form in (3, 4, 5, 6)),
        (str(UUID).upper(), Binary.from_uuid(UUID, UuidRepresentation.STANDARD)),
        ("66ABCDEFabcdefabcdefabcd", ObjectId("66abcdefabcdefabcdefabcd")),
        ("66abcdefabcdefabcdefabcd", "66ABCDEFabcdefabcdefabcd"),
    ],
    ids=str,
)
def test_an_id_of_any_type_is_found(
    database: Database[Any], command: Command, capsys: Capture, argument: str, stored: Any
) -> None:
    database.users.insert_one({"_id": stored})
    database.orders.insert_many([{"customer_id": stored, "status": "Shipped"} for _ in range(2)])
    assert command("--once", f"--customer={argument}", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["customers"]
    assert found["customer"] == argument
    assert [(row["orders"], row["points"], row["why"]) for row in found["orders"]] == [(2, 2, None)]
    assert [change["to"] for change in found["users"]] == [2]
    assert find_mismatches(database) == []


def test_an_order_with_a_status_in_an_array_of_documents_is_shown(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    states: list[Any] = [{"now": "Shipped"}, {"now": "Shipped"}, [{"now": "Lost"}]]
    database.orders.insert_many([{"customer_id": 7, "state": state} for state in states])
    database.users.insert_one({"_id": 7, "loyalty_points": 2})
    arguments = ("--dry-run", "--customer", "7", "--json")
    assert command(*arguments, ORDER_STATUS_FIELD="state.now") == 0
    (found,) = json.loads(capsys.readouterr().out)["customers"]
    assert [(row["status"], row["orders"], row["points"]) for row in found["orders"]] == [
        ("Shipped", 2, 2),
        ("['Lost']", 1, 0),
    ]


def test_a_user_whose_id_is_not_utf_8_is_found_by_another_key(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    user = bson.encode({"_id": "5?", "email": "ada@example.com"}).replace(b"5?", b"5\xfe")
    database.users.insert_one(RawBSONDocument(user))
    database.orders.insert_one({"customer_id": "ada@example.com", "status": "Shipped"})
    for argument in ("ada@example.com", "ADA@example.com"):
        assert command("--once", "--customer", argument, USER_KEY_FIELD="email") == 1
    out = capsys.readouterr().out
    assert "  '5\\udcfe'  null  1\n" in out
    assert "users with a similar id: 'ada@example.com'" in out


def test_an_empty_id_shows_the_orders_without_customer(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    ids: list[Any] = ["", None, []]
    shop.orders.insert_many(
        [{"customer_id": c, "status": s} for c in ids for s in ("Shipped", "Paid")]
    )
    shop.orders.insert_many([{"status": "Shipped"}, {"customer_id": None}])
    assert command("--dry-run", "--customer", "", "--json") == 1
    (found,) = json.loads(capsys.readouterr().out)["customers"]
    labels = [(row["id"], row["status"]) for row in found["orders"]]
    assert len(set(labels)) == len(labels)
    shipped = [row for row in found["orders"] if row["status"] == "Shipped"]
    assert sum(row["orders"] for row in shipped) == 5
    assert {row["why"] for row in shipped} == {"an order without customer"}
    assert {row["points"] for row in found["orders"]} == {0}
    assert command("--dry-run", "--customer", "") == 1
    out = capsys.readouterr().out
    assert out.startswith('""\n')
    assert re.search(r"^  '' +Shipped +1 +0 +an order without customer$", out, re.MULTILINE)
    assert re.search(r"^  null +Shipped +\d +0 +an order without customer$", out, re.MULTILINE)


def test_orders_without_customer_earn_nothing_for_an_empty_user_id(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    shop.users.insert_one({"_id": "", "loyalty_points": 0})
    shop.orders.insert_one({"customer_id": "", "status": "Shipped"})
    assert command("--once", "--customer", "") == 0
    assert "  ''    0     0\n" in capsys.readouterr().out
    assert shop.users.find_one({"_id": ""}) == {"_id": "", "loyalty_points": 0}


def test_orders_that_earn_nothing_are_explained(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    shop.orders.insert_many(
        [{"customer_id": "bob", "status": s} for s in ("Ship\nped", "\x1b[31mred", 3, ["Shipped"])]
    )
    assert command("--dry-run", "--customer", "bob", "--customer", "stranger") == 1
    out = capsys.readouterr().out
    for status in (r"'Ship\nped'", r"'\x1b[31mred'", "3", "['Shipped']"):
        assert re.search(
            rf"^  'bob' +{re.escape(status)} +1 +0 +only Shipped counts$", out, re.MULTILINE
        )
    assert re.search(
        "^  'stranger' +Shipped +1 +0 +no user has the _id 'stranger'$", out, re.MULTILINE
    )
    assert command("--dry-run", "--customer", "bob", ORDER_STATUSES="Shipped,Sent") == 1
    assert "only Shipped and Sent count\n" in capsys.readouterr().out
    assert command("--once", "--customer", "x\n\x1b[2J") == 1
    assert capsys.readouterr().out.startswith("x\\n\\x1b[2J\n")


def test_up_to_date_users_are_found_by_their_key_and_shown(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_many([{"_id": n, "no": f"c{n % 2}"} for n in range(3)])
    database.orders.insert_many([{"customer_id": "c0", "status": "Shipped"} for _ in range(2)])
    key = {"USER_KEY_FIELD": "no"}
    expected = [("0", 2), ("2", 2)]
    for before in ("null", "2"):
        assert command("--once", "--customer", "c0", "--json", **key) == 0
        (found,) = json.loads(capsys.readouterr().out)["customers"]
        assert sorted((row["user"], row["to"]) for row in found["users"]) == expected
        assert {row["from"] for row in found["users"]} == {before}
    assert command("--once", "--customer", "c0", **key) == 0
    assert "no user has" not in capsys.readouterr().out
    assert command("--once", "--customer", "c2", **key) == 1
    assert "no user has this no, as a string" in capsys.readouterr().out


def test_logged_changes_of_a_user_with_a_mixed_case_id_are_shown(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    mixed = "66ABCDEFabcdefabcdefabcd"
    shop.users.insert_one({"_id": mixed, "loyalty_points": 1})
    assert command("--once") == 0
    capsys.readouterr()
    assert command("--dry-run", "--customer", str(ADA), "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["customers"]
    changes = sorted((row["user"], row["from"], row["to"]) for row in found["changes"])
    assert changes == [(repr(mixed), "1", 3), (str(ADA), "no field", 3)]
