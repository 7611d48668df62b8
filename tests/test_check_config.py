"""`--check-config`: what it finds in settings, access, collections, index, statuses and counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import Command
from pymongo.database import Database
from small_shop import ADA

from sandbox import faults
from sandbox.mongod import Deployment

Capture = pytest.CaptureFixture[str]
Check = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shop(database: Database[Any]) -> Database[Any]:
    """20 users with 4 points, and Ada; each has 2 shipped orders and a paid one."""
    database.users.insert_many([{"_id": n, "loyalty_points": 4} for n in range(20)])
    database.users.insert_one({"_id": ADA})
    statuses = ("Shipped", "Shipped", "Paid")
    database.orders.insert_many(
        [{"customer_id": c, "status": s} for c in [*range(20), str(ADA)] for s in statuses]
    )
    return database


@pytest.fixture
def check(command: Command, capsys: Capture) -> Check:
    """Run `--check-config`; return its exit code, stdout and stderr."""

    def run(**values: str) -> tuple[int, str, str]:
        code = command("--check-config", **values)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def cell(name: str, out: str) -> str:
    (found,) = re.findall(rf"^  +{re.escape(name)}  +(.*)$", out, re.MULTILINE)
    return str(found)


def test_settings_access_index_statuses_and_the_full_count_are_printed(
    shop: Database[Any], check: Check
) -> None:
    shop.orders.insert_many(
        [{"status": "Shipped"}, {"status": "Shipped", "customer_id": "gone@example.com"}]
        + [{"status": s, "customer_id": 1} for s in (" Shipped", 3, ["Shipped"], None, "Ship\nped")]
    )
    before = list(shop.users.find())
    code, out, _ = check(MAX_DECREASE_PERCENT="100")
    assert code == 0
    assert cell("ORDER_STATUSES", out) == "Shipped"
    assert cell("privileges", out) == "sufficient for recounts"
    assert cell("Shipped", out) == "44, counted"
    assert cell("Paid", out) == "21"
    assert cell("' Shipped'", out) == "1"
    assert cell(r"'Ship\nped'", out) == "1"
    assert cell("['Shipped']", out) == "1"
    assert cell("3", out) == "1"
    assert cell("null", out) == "1"
    assert cell("users", out) == "21"
    assert cell("users with points", out) == "20 before"
    assert cell("counted orders", out) == "44"
    assert cell("changed users", out) == "21 (1 increased, 20 decreased)"
    assert cell("unknown customers", out) == "1 with 1 order"
    assert re.search("^  no such user  1 +1 +'gone@example.com' .1.$", out, re.MULTILINE)
    assert cell("orders without customer", out) == "1"
    assert "about" not in out
    assert "mongodb://" not in out
    assert list(shop.users.find()) == before
    assert set(shop.list_collection_names()) == {"orders", "users"}


def test_a_counted_status_is_shown_even_if_it_is_rare_or_absent(
    shop: Database[Any], check: Check
) -> None:
    shop.orders.insert_many([{"status": f"s{n % 30:02}"} for n in range(1_500)])
    shop.orders.insert_one({"status": "Sent", "customer_id": 1})
    _, out, _ = check(ORDER_STATUSES="Shipped,Sent,Lost", MAX_DECREASE_PERCENT="100")
    assert cell("Shipped", out) == "42, counted"
    assert cell("Sent", out) == "1, counted"
    assert cell("Lost", out) == "0, counted"
    assert "\n    21 other statuses\n" in out


def test_the_number_of_a_counted_status_beyond_the_most_frequent_is_not_shown_as_zero(
    shop: Database[Any], check: Check
) -> None:
    shop.orders.insert_many([{"status": f"s{n % 1_000:04}"} for n in range(2_000)])
    shop.orders.insert_one({"status": "Sent", "customer_id": 1})
    _, out, _ = check(ORDER_STATUSES="Shipped,Sent", MAX_DECREASE_PERCENT="100")
    assert cell("Shipped", out) == "42, counted"
    assert cell("Sent", out) == "not among the 1,000 most frequent, counted"


def test_a_count_that_the_safety_checks_would_refuse_is_a_problem(
    shop: Database[Any], check: Check
) -> None:
    code, out, err = check()
    assert code == 1
    problem = "PROBLEM: the safety checks would refuse the recount: 20 of the 20 users with points"
    assert problem in out
    assert "Traceback" not in err


def test_a_warning_of_the_safety_checks_is_not_a_problem(shop: Database[Any], check: Check) -> None:
    shop.users.update_many({"_id": {"$lt": 10}}, {"$set": {"loyalty_points": 2}})
    code, out, _ = check()
    assert code == 0
    assert re.search(
        "^Warning: 10 of the 20 users with points lose points in the first recount$",
        out,
        re.MULTILINE,
    )


@pytest.mark.parametrize(("failing", "code"), [(9, 0), (10, 1)])
def test_so_many_failing_updates_that_the_recount_would_fail_are_a_problem(
    shop: Database[Any], check: Check, failing: int, code: int
) -> None:
    shop.users.update_many({"_id": {"$lt": failing}}, {"$set": {"name": "Ada"}})
    found, out, _ = check(USER_POINTS_FIELD="name.points")
    warning = f"{failing} users cannot be updated: a parent field of name.points is not a document"
    assert f"\nWarning: {warning}\n" in out
    assert (f"PROBLEM: the recount would fail: {warning}" in out) is bool(code)
    assert found == code


def test_missing_collections_are_named_with_those_that_exist(
    shop: Database[Any], check: Check
) -> None:
    code, out, _ = check(ORDERS_COLLECTION="Orders", USERS_COLLECTION="User")
    assert code == 1
    missing = f"{shop.name}.Orders, {shop.name}.User"
    assert f"PROBLEM: there is no collection {missing}; this database has: orders, users\n" in out
    code, out, _ = check(MONGODB_DATABASE="no_such_shop")
    assert code == 1
    assert (
        "there is no collection no_such_shop.orders, no_such_shop.users; this database has: none"
        in out
    )
    assert set(shop.list_collection_names()) == {"orders", "users"}
    assert "no_such_shop" not in shop.client.list_database_names()


def test_orders_with_arrays_are_counted_by_a_single_query(
    shop: Database[Any], check: Check, command: Command
) -> None:
    name = "index status, customer_id"
    _, out, _ = check()
    assert "--create-index" in cell(name, out)
    assert "array in" not in cell(name, out)
    shop.orders.insert_one({"status": ["Paid"], "customer_id": 1})
    _, out, _ = check()
    assert "; 1 order has an array in status or customer_id" in cell(name, out)
    shop.orders.insert_many([{"status": "Paid", "customer_id": [n]} for n in range(2)])
    shop.orders.create_index([("status", 1), ("customer_id", 1)])
    assert command("--create-index") == 78  # this index is multikey
    _, out, _ = check()
    assert "; 3 orders have an array in status or customer_id" in cell(name, out)
    shop.orders.delete_many({"$or": [{"customer_id": {"$type": 4}}, {"status": {"$type": 4}}]})
    _, out, _ = check()
    assert "drop the index" in cell(name, out)
    assert "have an array in" not in cell(name, out)
    shop.orders.drop_indexes()
    assert command("--create-index") == 0
    _, out, _ = check()
    assert cell(name, out) == "usable"


def test_a_slow_count_ends_with_69_after_printing_the_settings(
    shop: Database[Any], check: Check, deployment: Deployment
) -> None:
    counts = {"errorCode": 50, "namespace": f"{shop.name}.orders"}
    with faults.fail_command(deployment.servers[0], "aggregate", 9, **counts):
        code, out, err = check()
    assert code == 69
    assert cell("privileges", out) == "sufficient for recounts"
    assert "took too long" in err


def test_each_mistake_is_found_and_does_not_hide_the_others(
    database: Database[Any], check: Check
) -> None:
    database.users.insert_many([{"_id": n, "loyalty_points": 9} for n in range(30)])
    database.orders.insert_many([{"customer": n % 30, "state": "shipped"} for n in range(60)])
    database.jobs.insert_one({"finished_at": 1})
    names = {"ORDER_STATUS_FIELD": "state"}
    code, _, err = check(**names, mongodb_datbase="webshop")
    assert (code, "did you mean MONGODB_DATABASE?" in err) == (78, True)
    code, out, err = check(**names, RECOUNTS_COLLECTION="jobs")
    assert (code, ".jobs holds documents of other programs" in err) == (78, True)
    assert cell("privileges", out) == "sufficient for recounts"
    assert re.search("^PROBLEM: the safety checks .*no order has status Shipped", out, re.MULTILINE)
    code, out, _ = check(**names, USERS_COLLECTION="clients")
    assert code == 1
    assert f"PROBLEM: there is no collection {database.name}.clients" in out
    names["ORDER_STATUSES"] = "shipped"
    code, out, _ = check(**names)
    assert code == 1
    assert "ORDER_CUSTOMER_FIELD=customer_id" in out
    names["ORDER_CUSTOMER_FIELD"] = "customer"
    code, out, _ = check(**names, MAX_DECREASE_PERCENT="100")
    assert (code, "PROBLEM" in out) == (0, False)


def test_a_status_that_no_order_has_is_a_problem(database: Database[Any], check: Check) -> None:
    database.users.insert_one({"_id": 1})
    database.orders.insert_one({"customer_id": 1, "status": "Delivered"})
    code, out, _ = check()
    assert code == 1
    assert out.count("PROBLEM: no order has status Shipped; found: Delivered (1)\n") == 1
    assert "Warning: no order has status" not in out


PASSWORD = "s3cr/et"


@pytest.fixture
def limited(authenticated_deployment: Deployment) -> Iterator[Callable[..., str]]:
    """Create a database user with some actions on some collections; return its URI."""
    with authenticated_deployment.client() as client:
        client.examined.users.insert_one({"_id": 1})
        client.examined.orders.insert_one({"customer_id": 1, "status": "Shipped"})

        def allow(**actions: list[str]) -> str:
            privileges = [
                {"resource": {"db": "examined", "collection": name}, "actions": allowed}
                for name, allowed in actions.items()
                if allowed
            ]
            client.admin.command("createRole", "limited", privileges=privileges, roles=[])
            client.admin.command("createUser", "limited", pwd=PASSWORD, roles=["limited"])
            return authenticated_deployment.uri_for("limited", PASSWORD, "examined")

        yield allow
        client.admin.command("dropUser", "limited")
        client.admin.command("dropRole", "limited")
        client.drop_database("examined")


@pytest.mark.xdist_group("auth")
def test_check_config_finds_a_missing_privilege_on_the_records(
    limited: Callable[..., str], check: Check, authenticated_deployment: Deployment
) -> None:
    uri = limited(
        orders=["find"],
        users=["find", "update"],
        loyalty_recounts=["find", "insert"],
        loyalty_changes=["find", "insert"],
    )
    code, out, err = check(MONGODB_URI=uri)
    assert code == 1
    assert "no privilege for createIndex on examined.loyalty_recounts" in cell("privileges", out)
    assert "add a user name" not in out + err  # there is one
    assert cell("users", out) == "1"
    assert "PROBLEM" not in out
    assert "WARNING" not in err
    with authenticated_deployment.client() as client:
        assert set(client.examined.list_collection_names()) == {"orders", "users"}


@pytest.mark.xdist_group("auth")
@pytest.mark.parametrize("actions", [["insert"], ["find"], []], ids=str)
def test_a_missing_privilege_on_the_change_log_ends_with_78(
    limited: Callable[..., str], check: Check, command: Command, actions: list[str]
) -> None:
    uri = limited(
        orders=["find"],
        users=["find", "update"],
        loyalty_recounts=["find", "insert", "createIndex"],
        loyalty_changes=actions,
    )
    code, out, err = check(MONGODB_URI=uri)
    missing = "insert" if "find" in actions else "find"
    text = f"no privilege for {missing} on examined.loyalty_changes"
    assert code == 78
    assert cell("privileges", out).startswith(text)
    assert text in err
    assert "CHANGES_COLLECTION=none" in err
    assert cell("users", out) == "1"
    assert command("--once", MONGODB_URI=uri) == 78
    assert check(MONGODB_URI=uri, CHANGES_COLLECTION="none")[0] == 0


@pytest.mark.xdist_group("auth")
def test_creating_the_index_needs_no_other_privilege(
    limited: Callable[..., str], command: Command
) -> None:
    uri = limited(orders=["find", "createIndex"], users=["find", "update"])
    assert command("--create-index", MONGODB_URI=uri) == 0
