"""Mistakes that the safety checks refuse or warn about: nothing is written, and the text helps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from bson import ObjectId
from conftest import Command
from pymongo.database import Database

from sandbox.service import Process
from sandbox.shop import find_mismatches

Start = Callable[..., Process]
Capture = pytest.CaptureFixture[str]


def ship(shop: Database[Any], *customers: Any, status: Any = "Shipped") -> None:
    shop.orders.insert_many([{"customer_id": c, "status": status} for c in customers])


def fill(shop: Database[Any], users: int, points: int) -> None:
    """Insert users who each hold `points`, and as many counted orders."""
    shop.users.insert_many([{"_id": n, "loyalty_points": points} for n in range(users)])
    ship(shop, *(n for n in range(users) for _ in range(points)))


def rename_status(shop: Database[Any]) -> None:
    shop.orders.update_many({}, {"$set": {"status": "Sent"}})


def empty_orders(shop: Database[Any]) -> None:
    shop.orders.delete_many({})


def drop_orders(shop: Database[Any]) -> None:
    shop.orders.drop()


@pytest.mark.parametrize("mistake", [rename_status, empty_orders, drop_orders])
def test_a_recount_that_takes_points_from_all_users_is_refused(
    database: Database[Any], command: Command, mistake: Callable[[Any], None], capsys: Capture
) -> None:
    fill(database, 30, 2)
    assert command("--once") == 0
    mistake(database)

    assert command("--once") == 65

    assert "30 of the 30 users with points would lose points" in capsys.readouterr().err
    assert {u["loyalty_points"] for u in database.users.find()} == {2}
    (record,) = database.loyalty_recounts.find({"outcome": "refused"})
    assert (record["changed"], record["decreased"]) == (0, 30)
    assert "30 of the 30 users" in record["error"]
    assert database.loyalty_changes.count_documents({}) == 0
    assert command("--dry-run") == 1
    assert "The safety checks would refuse this recount: 30 of the 30" in capsys.readouterr().out
    assert command("--once", "--force") == 0
    assert find_mismatches(database) == []
    assert {u["loyalty_points"] for u in database.users.find()} == {0}


def test_orders_of_another_database_are_refused(database: Database[Any], command: Command) -> None:
    database.users.insert_many([{"_id": n, "loyalty_points": 3} for n in range(50)])
    database.other.insert_one({"customer_id": 1, "status": "Shipped"})
    assert command("--once", ORDERS_COLLECTION="other") == 65
    assert {u["loyalty_points"] for u in database.users.find()} == {3}


@pytest.mark.parametrize("holders", [1, 9, 30])
def test_a_missing_collection_of_orders_is_always_refused(
    database: Database[Any], command: Command, capsys: Capture, holders: int
) -> None:
    fill(database, holders, 2)
    assert command("--once", ORDERS_COLLECTION="Orders") == 65
    refusal = capsys.readouterr().err
    assert f"there is no collection {database.name}.Orders" in refusal
    assert "orders, users" in refusal
    assert {u["loyalty_points"] for u in database.users.find()} == {2}


def test_an_empty_database_is_refused(command: Command, capsys: Capture) -> None:
    assert command("--once") == 65
    assert "holds no users" in capsys.readouterr().err


def test_a_first_fill_is_not_refused(database: Database[Any], command: Command) -> None:
    fill(database, 40, 1)
    database.users.update_many({}, {"$unset": {"loyalty_points": 1}})
    assert command("--once", MAX_DECREASE_PERCENT="0") == 0
    assert find_mismatches(database) == []


@pytest.mark.parametrize(
    ("users", "losing", "percent", "code"), [(100, 90, 90, 0), (100, 91, 90, 65), (100, 10, 9, 65)]
)
def test_the_decrease_is_a_percentage_of_the_users_with_points(
    database: Database[Any], command: Command, users: int, losing: int, percent: int, code: int
) -> None:
    fill(database, users, 2)
    database.users.insert_many([{"_id": f"none {n}", "loyalty_points": 0} for n in range(500)])
    for n in range(losing):
        database.orders.delete_one({"customer_id": n})
    assert command("--once", MAX_DECREASE_PERCENT=str(percent)) == code
    assert len(find_mismatches(database)) == (losing if code else 0)


@pytest.mark.size(6_000, deep=60_000)
def test_changes_of_any_size_are_all_known_before_the_first_write(
    database: Database[Any], command: Command, size: int
) -> None:
    """They are larger than the memory of a spool."""
    points = [{"_id": f"{n:>400}", "loyalty_points": 1} for n in range(size)]
    database.users.insert_many(points, ordered=False)
    ship(database, "unknown")
    assert command("--once") == 65
    assert database.users.count_documents({"loyalty_points": 1}) == size
    assert command("--once", "--force") == 0
    assert database.users.count_documents({"loyalty_points": 0}) == size


def test_a_recount_in_the_middle_of_a_restore_is_refused(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    fill(database, 60, 2)
    assert command("--once") == 0
    database.orders.delete_many({"customer_id": {"$lt": 35}})
    assert command("--once") == 65
    assert "50 orders are counted, less than 50 % of the 120" in capsys.readouterr().err
    assert {u["loyalty_points"] for u in database.users.find()} == {2}


def test_another_number_of_points_per_order_causes_a_warning(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    fill(database, 30, 2)
    assert command("--once", POINTS_PER_ORDER="100") == 0
    warning = 'WARNING safety_warning text="30 of the 30 users with points get different'
    assert warning in capsys.readouterr().err


def test_lost_points_cause_a_warning_at_first_or_above_a_tenth(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_many([{"_id": n, "loyalty_points": 2} for n in range(100)])
    ship(database, *range(100), *range(97))
    assert command("--once") == 0
    warning = 'WARNING safety_warning text="{} of the 100 users with points lose points'
    assert warning.format(3) + " in the first recount" in capsys.readouterr().err
    for n, is_warned in ((10, False), (11, True)):
        for customer in range(n):
            database.orders.delete_one({"customer_id": customer})
        assert command("--dry-run") == 1
        assert (f"Warning: {n} of the 100 users" in capsys.readouterr().out) is is_warned
        assert command("--once") == 0
        log = capsys.readouterr().err
        assert (warning.format(n) in log) is is_warned
        assert "first recount" not in log
        ship(database, *range(n))
        assert command("--once") == 0
        capsys.readouterr()
    assert find_mismatches(database) == []


def test_numeric_strings_count_as_their_numbers_before_points_are_lost(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_many(
        [{"_id": n, "loyalty_points": "500" if n < 19 else 1} for n in range(40)]
    )
    ship(database, *range(40))
    assert command("--once") == 0
    assert "19 of the 40 users with points lose points" in capsys.readouterr().err


@pytest.mark.parametrize("holders", [0, 3])
@pytest.mark.parametrize("stored", ["SHIPPED", "Shipped\u200b"])
def test_a_status_that_differs_only_in_form_is_refused(
    database: Database[Any], command: Command, capsys: Capture, stored: str, holders: int
) -> None:
    database.users.insert_many([{"_id": n} for n in range(3)])
    database.users.update_many({"_id": {"$lt": holders}}, {"$set": {"loyalty_points": 1}})
    before = list(database.users.find())
    ship(database, 0, 1, 1, status=stored)
    for n in range(11):  # more frequent ones do not hide it
        ship(database, *range(4), status=f"other {n}")

    assert command("--once") == 65

    refusal = capsys.readouterr().err
    assert "no order has status Shipped; found: other 0 (4), " in refusal
    assert "Correct ORDER_STATUSES. If this is intended, run --once" in refusal
    assert list(database.users.find()) == before
    (record,) = database.loyalty_recounts.find()
    assert record["outcome"] == "refused"
    assert command("--once", "--force") == 0
    assert find_mismatches(database) == []


def test_a_status_that_is_stored_as_a_number_is_refused(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_one({"_id": 1, "loyalty_points": 1})
    ship(database, 1, status=2)
    assert command("--once", ORDER_STATUSES="2") == 65
    assert "no order has status '2'; found: 2 (1)" in capsys.readouterr().err
    assert list(database.users.find()) == [{"_id": 1, "loyalty_points": 1}]


def test_one_counted_order_is_enough_for_a_recount(
    database: Database[Any], command: Command
) -> None:
    database.users.insert_one({"_id": 1})
    ship(database, 1)
    ship(database, 1, 1, status="shipped")
    assert command("--once") == 0
    assert find_mismatches(database) == []


def test_the_warning_about_no_counted_order_lists_the_existing_statuses(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_one({"_id": 1})
    ship(database, 1, 1, status="Sent")
    ship(database, 1, status=None)
    assert command("--once", ORDER_STATUSES="Shipped,Done") == 0
    warning = "no order has status Shipped or Done; found: Sent (2), null (1)"
    assert f'WARNING safety_warning text="{warning}"' in capsys.readouterr().err
    assert find_mismatches(database) == []


def test_a_status_field_that_no_order_has_is_refused(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_many([{"_id": n} for n in range(20)])
    database.orders.insert_many([{"customer_id": n, "state": "Shipped"} for n in range(20)])
    assert command("--once") == 65
    assert "no order has a field status: is ORDER_STATUS_FIELD right?" in capsys.readouterr().err
    assert database.users.count_documents({"loyalty_points": {"$exists": True}}) == 0


def test_a_points_field_with_documents_is_not_overwritten(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    tier = {"points": 1, "tier": "gold"}
    database.users.insert_many([{"_id": n, "loyalty": tier} for n in range(20)])
    ship(database, *range(20))
    assert command("--once", USER_POINTS_FIELD="loyalty") == 65
    assert "20 of the 20 values in loyalty are not numbers" in capsys.readouterr().err
    assert database.users.count_documents({"loyalty": tier}) == 20
    assert command("--once", USER_POINTS_FIELD="loyalty.points") == 0
    assert database.users.count_documents({"loyalty": {"points": 1, "tier": "gold"}}) == 20


@pytest.mark.parametrize("other", ["+49 30", True, {"city": "Berlin"}])
def test_a_points_field_that_only_some_users_have_is_not_overwritten(
    database: Database[Any], command: Command, capsys: Capture, other: Any
) -> None:
    before: list[dict[str, Any]] = [{"_id": n} for n in range(30)]
    before += [{"_id": 30 + n, "phone": other} for n in range(12)]
    database.users.insert_many(before)
    ship(database, *range(42))
    assert command("--once", USER_POINTS_FIELD="phone") == 65
    assert "12 of the 12 values in phone" in capsys.readouterr().err
    assert list(database.users.find()) == before


def test_a_few_values_other_than_numbers_are_overwritten_with_a_warning(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    """The values may be personal data: they are logged at DEBUG only."""
    database.users.insert_many([{"_id": n, "phone": 0} for n in range(30)])
    database.users.insert_many([{"_id": 30 + n, "phone": "+49 30"} for n in range(12)])
    ship(database, *range(42))
    assert command("--once", USER_POINTS_FIELD="phone") == 0
    log = capsys.readouterr().err
    assert "non_numeric_points users=12 field=phone" in log
    assert "+49 30" not in log
    assert database.users.count_documents({"phone": 1}) == 42


def test_swapped_collections_are_refused(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_many([{"_id": n, "status": "active"} for n in range(20)])
    ship(database, *range(20))
    swapped = {"ORDERS_COLLECTION": "users", "USERS_COLLECTION": "orders"}
    assert command("--check-config", **swapped) == 1
    assert command("--once", **swapped) == 65
    assert "are ORDERS_COLLECTION and USERS_COLLECTION swapped?" in capsys.readouterr().err
    assert database.orders.count_documents({"loyalty_points": {"$exists": True}}) == 0


def test_orders_that_match_no_user_are_refused(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_many([{"_id": n} for n in range(20)])
    ship(database, *range(20))
    database.products.insert_one({"_id": "a"})
    for wrong in ({"ORDER_CUSTOMER_FIELD": "customerId"}, {"USERS_COLLECTION": "products"}):
        assert command("--check-config", **wrong) == 1
        capsys.readouterr()
        assert command("--once", **wrong) == 65
        assert "no counted order matches a user: are" in capsys.readouterr().err
    assert database.users.count_documents({"loyalty_points": {"$exists": True}}) == 0
    assert database.products.count_documents({"loyalty_points": {"$exists": True}}) == 0


def test_ids_of_unknown_customers_are_in_the_log_at_debug_only(
    database: Database[Any], command: Command, capsys: Capture
) -> None:
    database.users.insert_one({"_id": 1})
    ship(database, 1, "eve@example.com")
    for level in ("INFO", "DEBUG"):
        assert command("--once", LOG_LEVEL=level) == 0
        printed = capsys.readouterr()
        assert ("eve@example.com" in printed.err) is (level == "DEBUG")
        assert "eve@example.com" not in printed.out


def test_the_daemon_logs_and_records_a_refusal_and_recounts_again_on_schedule(
    database: Database[Any], uri: str, service: Start
) -> None:
    fill(database, 20, 1)
    rename_status(database)
    daemon = service(MONGODB_URI=uri, RECOUNT_INTERVAL="1s")
    daemon.wait_for('ERROR refused reason="20 of the 20 users', times=2)
    database.orders.update_many({}, {"$set": {"status": "Shipped"}})
    daemon.wait_for("outcome=succeeded")
    assert daemon.stop() == 0
    outcomes = [r["outcome"] for r in database.loyalty_recounts.find().sort("finished_at")]
    assert outcomes[:2] == ["refused", "refused"]
    assert outcomes[-1] == "succeeded"
    assert find_mismatches(database) == []


def test_a_failed_update_makes_a_recount_incomplete(
    database: Database[Any], uri: str, service: Start, command: Command, capsys: Capture
) -> None:
    locked = ObjectId()
    database.users.insert_many([{"_id": n} for n in range(4)])
    database.users.insert_one({"_id": locked, "locked": True})
    ship(database, *range(4), locked)
    rule = {"$or": [{"locked": {"$ne": True}}, {"loyalty_points": {"$exists": False}}]}
    database.command("collMod", "users", validator=rule)
    daemon = service(MONGODB_URI=uri, RECOUNT_INTERVAL="1s")
    daemon.wait_for("INFO recount outcome=incomplete", times=3)
    assert daemon.stop() == 0
    assert "WARNING incomplete failed_updates=1 updates=5 " in daemon.output
    assert "DocumentValidationFailure" in daemon.output
    assert str(locked) not in daemon.output
    assert "retry_in" not in daemon.output
    assert [mismatch.user for mismatch in find_mismatches(database)] == [locked]
    for record in database.loyalty_recounts.find():
        assert (record["outcome"], record["failed_updates"]) == ("incomplete", 1)
    assert command("--once") == 1
    assert "Recount incomplete in " in capsys.readouterr().out
    assert command("--once", "--customer", str(locked)) == 1
    database.command("collMod", "users", validator={})
    assert command("--once") == 0
    assert find_mismatches(database) == []
