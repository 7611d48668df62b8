"""`--once`: one recount, and what it prints."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from conftest import Command, settings_for
from pymongo.database import Database
from small_shop import fill

from loyalty.history import History
from loyalty.recount.preflight import connect_and_verify
from loyalty.recount.runner import FULL_RECOUNT, run_recount

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def shop(database: Database[Any]) -> Database[Any]:
    return fill(database)


def test_once_prints_the_totals_on_stdout(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    assert command("--once") == 0
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Recount succeeded in \d+\.\d s", out[0])
    assert out[1:6] == [
        "  users                    2",
        "  counted orders           5",
        "  changed users            2 (1 increased, 1 decreased)",
        "  unknown customers        1 with 1 order",
        "  orders without customer  1",
    ]
    assert re.fullmatch(
        r"  as of +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC \(exact: one snapshot\)", out[6]
    )


def test_an_error_before_the_recount_prints_no_result(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    shop.create_collection("seen", viewOn="users", pipeline=[])
    assert command("--once", USERS_COLLECTION="seen") == 78
    said = capsys.readouterr()
    assert "is a view" in said.err
    assert said.out == ""


def test_a_refused_recount_is_logged_as_refused_and_ends_with_65(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    shop.users.insert_many([{"_id": n, "loyalty_points": 1} for n in range(20)])
    assert command("--once") == 65
    said = capsys.readouterr()
    assert 'ERROR refused reason="21 of the 21 users with points would lose points' in said.err
    assert said.out == ""
    assert command("--once", "--force") == 0


def test_the_record_of_an_internal_error_has_only_the_exception_name(
    shop: Database[Any], uri: str
) -> None:
    def fail(_: str) -> None:
        raise ZeroDivisionError("mongodb://u:secret@h")

    settings = settings_for(uri)
    with connect_and_verify(settings, writing=True) as connection:
        history = History(connection.recounts, settings)
        with pytest.raises(ZeroDivisionError):
            run_recount(connection, settings, history, FULL_RECOUNT, fail)
    (record,) = shop.loyalty_recounts.find()
    assert (record["outcome"], record["error"]) == ("failed", "ZeroDivisionError")
    assert "secret" not in str(record)


def test_changed_is_the_number_of_users_that_are_written(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    shop.users.insert_many([{"_id": n, "loyalty_points": -1} for n in range(3)])
    shop.command("collMod", "users", validator={"loyalty_points": {"$ne": 0}})
    assert command("--dry-run", "--json") == 1
    assert json.loads(capsys.readouterr().out)["changed"] == 5
    assert command("--dry-run") == 1
    assert "  changed users            5 (4 in" in capsys.readouterr().out

    assert command("--once", "--json") == 1  # only Ada gets other points than 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    (record,) = shop.loyalty_recounts.find()
    assert (result["outcome"], result["changed"], result["failed_updates"]) == ("incomplete", 1, 4)
    assert (record["changed"], record["failed_updates"]) == (1, 4)
    assert " changed=1 " in said.err
    assert command("--once") == 1
    out = capsys.readouterr().out
    assert "  changed users            0 of 4 (3 in" in out
    assert "  failed updates           4\n" in out


def test_ids_that_look_like_expressions_are_counted_as_ids(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    ids = ("$name", "$$ROOT", "$$foo")
    database.users.insert_many([{"_id": i} for i in ids])
    database.orders.insert_many([{"customer_id": i, "status": "Shipped"} for i in ids])
    assert command("--once") == 0
    assert {u["_id"]: u["loyalty_points"] for u in database.users.find()} == dict.fromkeys(ids, 1)
