"""`--dry-run`: what it prints; it writes nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import Command
from pymongo.database import Database
from small_shop import fill

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def shop(database: Database[Any]) -> Database[Any]:
    return fill(database)


def test_a_dry_run_shows_the_largest_changes_and_writes_nothing(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    before = list(shop.users.find())
    assert command("--dry-run") == 1
    out = capsys.readouterr().out
    assert "\n  unknown customers        1 with 1 order\n" in out
    assert "  'bob'                     9     0\n" in out
    assert "  66abcdefabcdefabcdefabcd  null  3\n" in out
    assert out.index("bob") < out.index("66abc")
    assert list(shop.users.find()) == before
    assert set(shop.list_collection_names()) == {"orders", "users"}
    assert command("--once") == 0
    capsys.readouterr()
    assert command("--dry-run") == 0
    assert "Largest" not in capsys.readouterr().out


def test_a_dry_run_says_that_the_safety_checks_would_refuse(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    shop.users.insert_many([{"_id": n, "loyalty_points": 1} for n in range(20)])
    assert command("--dry-run") == 1
    out = capsys.readouterr().out
    assert "\nThe safety checks would refuse this recount: 21 of the 21 users with points" in out
    assert "\n  users with points        21 before\n" in out


def test_a_dry_run_counts_users_whose_nested_points_field_cannot_be_created(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    shop.users.delete_many({})
    values: list[Any] = ["text", 5, None, [], [{"b": {}}], {"b": "text"}, {"b": [1]}, {}, {"b": {}}]
    shop.users.insert_many([{"_id": n, "a": value} for n, value in enumerate(values)])
    shop.users.insert_one({"_id": "none"})
    nested = {"USER_POINTS_FIELD": "a.b.points"}
    assert command("--dry-run", "--json", **nested) == 1
    (warning,) = (w for w in json.loads(capsys.readouterr().out)["warnings"] if "a.b" in w)
    assert warning.startswith("7 users cannot be updated: a parent field of a.b.points ")
    assert command("--dry-run", **nested) == 1
    assert f"\nWarning: {warning}\n" in capsys.readouterr().out
    assert command("--once", "--json", **nested) == 1
    assert json.loads(capsys.readouterr().out)["failed_updates"] == 7
    assert command("--once", **nested) == 1
    out = capsys.readouterr().out
    assert "\n  changed users " in out
    assert "  0 of 7 (0 increased, 0 decreased, " in out
    assert command("--dry-run") == 1
    assert "cannot be updated" not in capsys.readouterr().out


def test_control_characters_of_stored_values_are_escaped(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    shop.users.insert_one({"_id": "x\x1b[2J\ny", "loyalty_points": "\u202e9\n"})
    shop.orders.insert_one({"customer_id": "gone\r\x1b]0;", "status": "Shipped"})
    assert command("--dry-run", LOG_LEVEL="DEBUG") == 1
    said = capsys.readouterr()
    assert r"'x\x1b[2J\ny'" in said.out
    assert r"'gone\r\x1b]0;'" in said.out
    assert command("--once", LOG_LEVEL="DEBUG") == 0
    said_once = capsys.readouterr()
    for text in (said.out, said.err, said_once.out, said_once.err):
        assert all(character.isprintable() for character in text.replace("\n", ""))
