"""`--undo` and `--changes`: what they print, write and record, also after a kill."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import bson
import pytest
from bson import Decimal128, Int64, ObjectId
from bson.raw_bson import RawBSONDocument
from conftest import Command
from pymongo.database import Database
from small_shop import make_change_log_older

from sandbox import faults
from sandbox.mongod import Deployment, wait_until
from sandbox.service import Process

Capture = pytest.CaptureFixture[str]
Shop = Database[Any]
Start = Callable[..., Process]

ADVICE = (
    "The next recount counts again, and may repeat the change. Before the next recount, stop the "
    "service, correct the settings or the orders, and check with --dry-run."
)


@pytest.fixture
def shop(database: Shop) -> Shop:
    """A shop with points of its own: 9 users with 5 points and one order, one without points."""
    database.users.insert_many([{"_id": n, "loyalty_points": 5} for n in range(9)])
    database.users.insert_one({"_id": "new"})
    ship(database, *range(9), "new")
    return database


def ship(shop: Shop, *customers: Any, status: str = "Shipped") -> None:
    shop.orders.insert_many([{"customer_id": c, "status": status} for c in customers])


def read_users(shop: Shop) -> dict[Any, bytes]:
    raw = shop.users.with_options(codec_options=bson.CodecOptions(RawBSONDocument))
    return {user["_id"]: bytes(user.raw) for user in raw.find()}


def recount_id(shop: Shop) -> ObjectId:
    """Return the id of the newest recount that changed something."""
    (newest,) = shop.loyalty_changes.find().sort("_id", -1).limit(1)
    return ObjectId(newest["recount"])


@pytest.mark.parametrize("by_id", [False, True], ids=["last", "by id"])
def test_undo_restores_what_its_dry_run_showed(
    shop: Shop, command: Command, capsys: Capture, by_id: bool
) -> None:
    before = read_users(shop)
    assert command("--once") == 0
    written = read_users(shop)
    recount = recount_id(shop)
    argument = str(recount) if by_id else "last"
    capsys.readouterr()

    assert command("--undo", argument, "--dry-run") == 0
    first, *shown = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"Recount {recount} of .* UTC wrote users\.loyalty_points", first)
    assert shown == ["10 users would be restored; nothing is written", ADVICE]
    assert read_users(shop) == written
    assert shop.loyalty_recounts.count_documents({"outcome": "undone"}) == 0

    assert command("--undo", argument) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["10 users restored", ADVICE]
    assert read_users(shop) == before
    record = shop.loyalty_recounts.find_one({"outcome": "undone"})
    assert record is not None
    assert (record["undone_recount"], record["changed"]) == (recount, 10)
    # Once more by its id changes nothing; the next recount counts again.
    assert command("--undo", str(recount)) == 0
    assert "\n0 users restored\n10 users already had the old points\n" in capsys.readouterr().out
    assert command("--once") == 0
    assert read_users(shop) == written


def test_users_whose_points_have_changed_since_are_listed_and_not_changed(
    shop: Shop, command: Command, capsys: Capture
) -> None:
    assert command("--once") == 0
    shop.users.update_one({"_id": 3}, {"$set": {"loyalty_points": "x\n"}})
    shop.users.update_one({"_id": 4}, {"$unset": {"loyalty_points": 1}})
    shop.users.delete_one({"_id": "new"})
    capsys.readouterr()
    assert command("--undo", "last", "--dry-run") == 1
    out = capsys.readouterr().out
    assert "\n  would not be restored: 4  5 -> 1, now no field (points changed since" in out
    assert "\n1 user would not be restored: deleted\n" in out
    assert " not restored" not in out
    assert command("--undo", "last") == 1
    out = capsys.readouterr().out
    assert r"  not restored: 3  5 -> 1, now 'x\n' (points changed since the recount)" in out
    assert "  not restored: 4  5 -> 1, now no field (points changed since the recount)\n" in out
    assert "  not restored: 'new'  no field -> 1, now no user (deleted)\n" in out
    assert "\n7 users restored\n" in out
    assert "\n2 users not restored: points changed since the recount\n" in out
    assert "\n1 user not restored: deleted\n" in out
    assert shop.users.find_one({"_id": 3}) == {"_id": 3, "loyalty_points": "x\n"}
    assert shop.users.find_one({"_id": 4}) == {"_id": 4}
    assert shop.users.count_documents({"loyalty_points": 5}) == 7


def test_changes_lists_what_one_recount_changed(
    shop: Shop, command: Command, capsys: Capture
) -> None:
    assert command("--once") == 0
    first = recount_id(shop)
    ship(shop, 3)
    assert command("--once") == 0
    capsys.readouterr()
    assert command("--changes", "last") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith(f"Recount {recount_id(shop)} of ")
    assert lines == ["  3  1 -> 2", "1 change"]
    assert command("--changes", str(first)) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[-1] == "10 changes"
    assert "  'new'  no field -> 1" in lines
    assert "  3  5 -> 1" in lines
    shop.loyalty_recounts.update_one({"_id": first}, {"$set": {"outcome": "incomplete"}})
    assert command("--changes", str(first)) == 0
    assert capsys.readouterr().out.endswith(
        "\n10 changes\n  incomplete: some of the changes were perhaps not made\n"
    )


def test_the_id_of_an_undo_names_the_recount_to_give_instead(
    shop: Shop, command: Command, capsys: Capture
) -> None:
    assert command("--once") == 0
    assert command("--undo", "last") == 0
    undo = shop.loyalty_recounts.find_one({"outcome": "undone"})
    assert undo is not None
    capsys.readouterr()
    assert command("--undo", str(undo["_id"])) == 1
    said = capsys.readouterr().err
    assert f"{undo['_id']} is the undo of recount {recount_id(shop)}, and an undo cannot" in said
    assert f"To repeat the undo, give {recount_id(shop)}" in said


@pytest.mark.parametrize("option", ["--changes", "--undo"])
def test_a_recount_that_is_not_in_the_change_log_ends_with_1(
    shop: Shop, command: Command, capsys: Capture, option: str
) -> None:
    before = read_users(shop)
    for argument, text in (
        ("last", "holds no recount that changed users.loyalty_points and is not undone"),
        ("5" * 24, f"holds no recount {'5' * 24}"),
    ):
        assert command(option, argument) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert text in said.err
    assert command(option, "last", CHANGES_COLLECTION="none") == 78
    assert "CHANGES_COLLECTION is none" in capsys.readouterr().err
    for argument in ("first", "", "5" * 23):
        with pytest.raises(SystemExit) as ended:
            command(option, argument)
        assert ended.value.code == 2
        assert "is neither the id of a recount nor last" in capsys.readouterr().err
    assert read_users(shop) == before


def test_a_recount_into_a_wrong_field_is_undone_by_its_id(
    shop: Shop, command: Command, capsys: Capture
) -> None:
    shop.users.update_many({}, {"$set": {"age": 40}})
    shop.staff.insert_many([{"_id": n, "age": 50} for n in range(3)])
    before, staff = read_users(shop), list(shop.staff.find())
    mistakes = []
    for values in ({}, {"USERS_COLLECTION": "staff"}):
        assert command("--once", "--force", USER_POINTS_FIELD="age", **values) == 0
        mistakes.append(recount_id(shop))
    assert command("--once") == 0
    for mistake in mistakes:
        assert command("--undo", str(mistake)) == 0
    assert {user["age"] for user in shop.users.find()} == {40}
    assert list(shop.staff.find()) == staff
    # The points that the settings are about were not touched, so they are still fresh.
    capsys.readouterr()
    assert command("--status") == 0
    assert "undone" not in capsys.readouterr().out
    assert command("--status", USER_POINTS_FIELD="age") == 1
    assert f"Recount {mistakes[0]} was undone: 10 users restored" in capsys.readouterr().out
    assert command("--undo", "last") == 0
    assert read_users(shop) == before


def test_after_an_undo_the_points_are_stale_until_the_next_recount(
    shop: Shop, command: Command, capsys: Capture
) -> None:
    assert command("--once") == 0
    first = recount_id(shop)
    ship(shop, 3)
    assert command("--once") == 0
    undone = recount_id(shop)
    assert command("--undo", "last") == 0
    capsys.readouterr()
    assert command("--status") == 1
    *table, last = capsys.readouterr().out.splitlines()
    assert [re.split("  +", row.strip())[1] for row in table[1:4]] == [
        "undone",
        "succeeded",
        "succeeded",
    ]
    assert last == (
        f"Recount {undone} was undone: 1 user restored. "
        "The points are STALE until the next successful recount"
    )
    # A refused recount makes the points no fresher.
    shop.users.insert_many([{"_id": n, "loyalty_points": 1} for n in range(100, 300)])
    assert command("--once") == 65
    capsys.readouterr()
    assert command("--status") == 1
    assert "was undone: 1 user restored" in capsys.readouterr().out
    shop.users.delete_many({"_id": {"$gte": 100}})

    assert command("--undo", "last") == 0  # the recount before, as that one is undone
    capsys.readouterr()
    assert command("--status") == 1
    assert f"Recount {first} was undone: 10 users" in capsys.readouterr().out
    assert command("--once") == 0
    capsys.readouterr()
    assert command("--status") == 0
    assert "old: fresh" in capsys.readouterr().out


def test_the_safety_checks_compare_with_the_last_recount_that_was_not_undone(
    shop: Shop, command: Command, capsys: Capture
) -> None:
    ship(shop, *list(range(9)) * 10)
    ship(shop, *list(range(9)) * 30, status="Paid")
    assert command("--once") == 0
    mistake = {"ORDER_STATUSES": "Shipped,Paid"}
    assert command("--once", **mistake) == 0
    assert command("--dry-run") == 1
    assert "less than 50 % of the 370 in the last" in capsys.readouterr().out
    assert command("--once") == 65
    assert command("--undo", "last") == 0
    assert command("--once") == 0


OLD_POINTS: list[Any] = [None, 0, 7, Int64(2), 2.5, float("nan"), "5", "gold", True, [1], {"a": 1}]
OLD_POINTS += [Decimal128("2.00"), ObjectId("5" * 24), b"x"]


@pytest.mark.parametrize(
    "batches_are_lost", [False, True], ids=["batches are written", "batches are lost"]
)
@pytest.mark.parametrize("path", ["loyalty_points", "loyalty.points"])
def test_after_a_kill_while_writing_undo_restores_every_user_bit_for_bit(
    shop: Shop, uri: str, deployment: Deployment, service: Start, path: str, batches_are_lost: bool
) -> None:
    """The server may still write the batches of the killed process, for which undo waits.

    The time until the recount counts as interrupted is skipped.
    """
    shop.users.delete_many({})
    outer, _, inner = path.partition(".")
    users: list[dict[str, Any]] = []
    for n in range(600):
        user: dict[str, Any] = {"_id": n, "name": "Ada"}
        kind = n % (len(OLD_POINTS) + 2)
        if kind < len(OLD_POINTS):
            user[outer] = {inner: OLD_POINTS[kind], "tier": "gold"} if inner else OLD_POINTS[kind]
        elif kind == len(OLD_POINTS) and inner:
            user[outer] = {"tier": "gold"}
        users.append({**user, "tail": n})
    shop.users.insert_many(users)
    before = read_users(shop)
    values = {"MONGODB_URI": uri, "USER_POINTS_FIELD": path, "BATCH_SIZE": "10"}

    with faults.pause_at(deployment.servers[0], shop.name, faults.WRITING) as wait_until_reached:
        killed = service("--once", "--force", **values)
        wait_until_reached()
        killed.kill()
        if batches_are_lost:
            for operation in shop.client.admin.aggregate(
                [{"$currentOp": {}}, {"$match": {"ns": f"{shop.name}.users", "op": "update"}}]
            ):
                shop.client.admin.command("killOp", op=operation["opid"])
        inserts: list[dict[str, Any]] = [
            {"$currentOp": {}},
            {"$match": {"ns": f"{shop.name}.loyalty_changes", "op": "insert"}},
        ]
        wait_until("no insert", lambda: not list(shop.client.admin.aggregate(inserts)))
        make_change_log_older(shop, timedelta(minutes=11))
        undo = service("--undo", "last", **values)
        deadline = time.monotonic() + 2
        while undo.exit_code is None and time.monotonic() < deadline:
            time.sleep(0.05)  # it waits for the server
    assert undo.wait() == 0, undo.output
    restored, *unchanged = map(int, re.findall(r"^(\d+) users", undo.output, re.MULTILINE))
    logged = sum(len(document["changes"]) for document in shop.loyalty_changes.find())
    assert restored + sum(unchanged) == logged
    assert 0 < restored < 600
    if batches_are_lost:
        assert unchanged  # without that, a writer may also be killed between log and update
    assert read_users(shop) == before


def test_a_customer_is_shown_with_the_changes_by_all_recounts(
    shop: Shop, command: Command, capsys: Capture
) -> None:
    ids = []
    for _ in range(2):
        assert command("--once") == 0
        ids.append(recount_id(shop))
        ship(shop, "new", 3)
    capsys.readouterr()
    assert command("--dry-run", "--customer", "new") == 1
    out = capsys.readouterr().out
    table = [re.split("  +", line.strip()) for line in out.splitlines()]
    changes = table[table.index(["at", "recount", "outcome", "user", "from", "to"]) + 1 :]
    assert [row[1:] for row in changes] == [
        [str(ids[1]), "succeeded", "'new'", "1", "2"],
        [str(ids[0]), "succeeded", "'new'", "no field", "1"],
    ]
    assert command("--undo", "last") == 0
    capsys.readouterr()
    assert command("--once", "--customer", "new") == 0
    assert "  'new'  1     3\n" in capsys.readouterr().out
    # A recount of one customer is not logged.
    assert command("--dry-run", "--customer", "new", CHANGES_COLLECTION="none") == 0
    assert "changes by full recounts" not in capsys.readouterr().out


def test_the_changes_of_a_customer_have_the_outcome_of_their_recount(
    shop: Shop, command: Command, capsys: Capture
) -> None:
    for _ in range(4):
        assert command("--once") == 0
        ship(shop, 3)
    ids = [row["_id"] for row in shop.loyalty_recounts.find().sort("_id", 1)]
    shop.loyalty_recounts.update_one({"_id": ids[1]}, {"$set": {"outcome": "incomplete"}})
    shop.loyalty_recounts.delete_one({"_id": ids[2]})
    assert command("--undo", str(ids[3])) == 0
    capsys.readouterr()
    assert command("--dry-run", "--customer", "3", "--json") == 1
    (customer,) = json.loads(capsys.readouterr().out)["customers"]
    outcomes = ["undone", "no record", "incomplete", "succeeded"]
    assert [change["outcome"] for change in customer["changes"]] == outcomes
    assert command("--dry-run", "--customer", "3") == 1
    assert capsys.readouterr().out.endswith(
        "\n  undone: the points were restored, unless they had changed meanwhile"
        "\n  incomplete: some of the changes were perhaps not made"
        "\n  no record: some of the changes were perhaps not made\n"
    )


def test_an_undo_that_was_killed_is_reported_until_it_is_repeated(
    shop: Shop, uri: str, deployment: Deployment, service: Start, command: Command, capsys: Capture
) -> None:
    shop.users.insert_many([{"_id": n, "loyalty_points": 5} for n in range(100, 390)])
    before = read_users(shop)
    assert command("--once", "--force", BATCH_SIZE="10") == 0
    recount = recount_id(shop)
    with faults.pause_at(deployment.servers[0], shop.name, faults.WRITING) as wait_until_reached:
        killed = service("--undo", "last", MONGODB_URI=uri)
        wait_until_reached()
        killed.kill()
    assert 0 < shop.users.count_documents({"loyalty_points": 5}) < 299
    capsys.readouterr()
    assert command("--status") == 1
    assert capsys.readouterr().out.endswith(
        f"\nThe undo of recount {recount} has not finished: repeat --undo {recount}. "
        "The points are STALE until the next successful recount\n"
    )
    assert command("--status", "--json") == 1
    assert json.loads(capsys.readouterr().out)["undone_recount"] == str(recount)
    assert command("--undo", "last") == 0
    assert read_users(shop) == before
    capsys.readouterr()
    assert command("--status") == 1
    assert f"\nRecount {recount} was undone: " in capsys.readouterr().out
    assert command("--once", "--force") == 0
    assert command("--status") == 0


def test_an_undo_that_restores_no_user_leaves_the_points_fresh(
    shop: Shop, command: Command, capsys: Capture
) -> None:
    assert command("--once") == 0
    shop.users.update_many({}, {"$set": {"loyalty_points": 77}})
    capsys.readouterr()
    assert command("--undo", "last") == 1
    assert "\n0 users restored\n" in capsys.readouterr().out
    assert shop.loyalty_recounts.count_documents({}) == 1
    assert command("--status") == 0


@pytest.mark.parametrize("minutes", [-5, 180])
@pytest.mark.parametrize(("position", "code"), [(0, 1), (1, 0)], ids=["first", "last"])
def test_an_undo_is_known_whatever_the_clock_of_its_machine(
    shop: Shop, command: Command, position: int, code: int, minutes: int
) -> None:
    ids = []
    for _ in range(2):
        assert command("--once") == 0
        ids.append(recount_id(shop))
        ship(shop, 3)
    assert command("--undo", str(ids[position])) == code  # the second one has changed user 3
    for record in shop.loyalty_recounts.find({"undone_recount": {"$exists": True}}):
        at = record["finished_at"] + timedelta(minutes=minutes)
        shop.loyalty_recounts.update_one({"_id": record["_id"]}, {"$set": {"finished_at": at}})
    assert command("--status") == 1
    assert command("--once") == 0
    assert command("--status") == 0


def test_a_recount_that_may_still_be_writing_is_not_undone(
    shop: Shop, command: Command, capsys: Capture
) -> None:
    before = read_users(shop)
    assert command("--once") == 0
    written = read_users(shop)
    shop.loyalty_recounts.delete_many({})  # a recount inserts its record after the last update
    capsys.readouterr()
    assert command("--undo", "last") == 1
    said = capsys.readouterr()
    assert f"recount {recount_id(shop)} has no record and logged changes at " in said.err
    assert "it is still writing, or it was interrupted. Stop the service; --undo is" in said.err
    assert said.out == ""
    assert read_users(shop) == written
    assert shop.loyalty_recounts.count_documents({}) == 0
    assert command("--undo", "last", "--dry-run") == 0
    make_change_log_older(shop, timedelta(minutes=11))
    assert command("--undo", "last") == 0
    assert read_users(shop) == before


def test_without_records_outcomes_are_unknown_and_undo_waits_for_silence(
    shop: Shop, command: Command, capsys: Capture
) -> None:
    none = {"RECOUNTS_COLLECTION": "none"}
    before = read_users(shop)
    assert command("--once", **none) == 0
    for arguments in (["--changes", "last"], ["--dry-run", "--customer", "3"]):
        capsys.readouterr()
        assert command(*arguments, **none) == 0
        assert capsys.readouterr().out.endswith(
            "\n  unknown: without the record of the recount, its outcome is not known\n"
        )
    written = read_users(shop)
    assert command("--undo", "last", **none) == 1
    assert read_users(shop) == written
    make_change_log_older(shop, timedelta(minutes=3))
    assert command("--undo", "last", **none) == 0
    assert read_users(shop) == before
