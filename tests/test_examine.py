"""The look at the data before the first write: what `--check-config` finds in a shop."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from bson import ObjectId
from conftest import ROOT, Command
from pymongo.database import Database

from loyalty import examine
from loyalty.errors import QueryTimeout
from loyalty_microservice import main
from sandbox import faults
from sandbox.mongod import Deployment
from sandbox.shop import disagreements

ADA = ObjectId("66abcdefabcdefabcdefabcd")


@pytest.fixture
def shop(database: Database[Any]) -> Database[Any]:
    """20 users keyed by numbers and Ada, who hold a point too many; 3 orders of each."""
    database.users.insert_many([{"_id": n, "loyalty_points": 4} for n in range(20)])
    database.users.insert_one({"_id": ADA})
    customers = [*range(20), str(ADA)]
    orders = [{"customer_id": c, "status": s} for c in customers for s in ("Shipped", "Paid")]
    database.orders.insert_many(
        [*orders, *({"customer_id": c, "status": "Shipped"} for c in customers)]
    )
    return database


@pytest.fixture
def check(command: Command, capsys: pytest.CaptureFixture[str]) -> Any:
    """Give the exit code of `--check-config`, what it prints, and what it logs."""

    def run(**values: str) -> tuple[int, str, str]:
        code = command("--check-config", **values)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a shop be large from 10 orders on."""
    monkeypatch.setattr(examine, "_SMALL", 10)


def line(what: str, out: str) -> str:
    (found,) = re.findall(rf"^  +{re.escape(what)}  +(.*)$", out, re.MULTILINE)
    return str(found)


def test_a_small_shop_is_looked_at_whole(shop: Database[Any], check: Any) -> None:
    shop.orders.insert_many(
        [{"status": "Shipped"}, {"status": "Shipped", "customer_id": "gone@example.com"}]
        + [{"status": s, "customer_id": 1} for s in (" Shipped", 3, ["Shipped"], None)]
    )
    before = list(shop.users.find())
    code, out, _ = check(MAX_DECREASE_PERCENT="100")
    assert code == 0
    assert line("users", out) == "21: _id is int 20, objectId 1"
    assert line("orders", out) == "69"
    assert line("Shipped", out) == "44, counts"
    assert line("Paid", out) == "21"
    assert line("' Shipped'", out) == "1"
    assert line("['Shipped']", out) == "1"
    assert line("none", out) == "1"
    assert line("that count, without customer", out) == "1"
    assert line("that count, of no user", out) == "1, such as 'gone@example.com'"
    assert line("users with points", out) == "20"
    assert line("who would lose some", out) == "20"
    useless = "of little use: 1 order holds an array in status or customer_id"
    assert line("index status, customer_id", out).startswith(f"not there, and would be {useless}")
    assert "about" not in out
    assert list(shop.users.find()) == before
    assert set(shop.list_collection_names()) == {"orders", "users"}
    shop.orders.create_index([("status", 1), ("customer_id", 1)])
    _, out, _ = check(MAX_DECREASE_PERCENT="100")
    assert line("index status, customer_id", out).startswith(f"there, but {useless}")


@pytest.mark.parametrize("with_index", [True, False])
def test_a_large_shop_is_estimated_and_that_is_said(
    shop: Database[Any], check: Any, command: Command, large: None, with_index: bool
) -> None:
    shop.orders.insert_one({"status": "Shipped", "customer_id": "gone"})
    shop.orders.insert_one({"status": "Shipped", "customer_id": ""})
    if with_index:
        assert command("--create-index") == 0
    code, out, err = check()
    assert "about: an estimate" in out
    assert line("users", out) == "about 21: _id is int about 20, objectId about 1"
    assert line("Shipped", out) == "about 44, counts"
    assert line("that count, without customer", out) == "about 1"
    assert line("that count, of no user", out) == "about 1, such as 'gone'"
    unknown = "not known; --dry-run counts them all"
    assert line("users with points", out) == "about 20"
    assert line("who would lose some", out) == ("about 20" if with_index else unknown)
    assert ("PROBLEM: the guard would refuse" in out) is with_index
    assert code == int(with_index)
    assert "not_examined" not in err
    index = line("index status, customer_id", out)
    assert index.startswith("there" if with_index else "none that serves a recount")


def test_every_form_of_an_id_is_found_in_a_large_shop(
    database: Database[Any], check: Any, large: None
) -> None:
    database.create_collection("orders", collation={"locale": "en", "strength": 1})
    database.orders.insert_one({"customer_id": "stranger", "status": "SHIPPED"})
    database.users.insert_many([{"_id": i} for i in (ADA, "b" * 24, "C" * 24, 7, "é")])
    forms = [ADA, str(ADA), str(ADA).upper(), ObjectId("b" * 24), "B" * 24, ObjectId("c" * 24), 7.0]
    database.orders.insert_many(
        [{"customer_id": f, "status": "Shipped"} for f in [*forms, "é", "7"]]
    )
    database.orders.insert_many([{"customer_id": f, "status": "x"} for f in [[1], {"a": 1}]])
    _, out, err = check()
    assert line("that count, of no user", out) == "about 1, such as '7'"
    assert "not_examined" not in err


def test_the_guards_verdict_is_known_before(shop: Database[Any], check: Any) -> None:
    code, out, _ = check()
    assert code == 1
    assert "PROBLEM: the guard would refuse the recount: 20 of the 20 users with points" in out


def test_missing_collections_are_named_with_those_that_are_there(
    shop: Database[Any], check: Any, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = check(ORDERS_COLLECTION="Orders", USERS_COLLECTION="User")
    assert code == 1
    for name in ("Orders", "User"):
        assert f"PROBLEM: there is no collection {shop.name}.{name}; found" in out
    assert "found in this database: orders, users\n" in out
    code, out, _ = check(MONGODB_DATABASE="no_such_shop")
    assert code == 1
    assert "there is no collection no_such_shop.users; found in this database: none" in out
    assert command("--create-index", ORDERS_COLLECTION="Orders") == 78
    assert f"there is no collection {shop.name}.Orders" in capsys.readouterr().err
    assert set(shop.list_collection_names()) == {"orders", "users"}
    assert "no_such_shop" not in shop.client.list_database_names()


def test_arrays_that_spoil_the_index_are_counted_and_named(
    shop: Database[Any], check: Any, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.orders.insert_many([{"status": "Paid", "customer_id": [n]} for n in range(3)])
    assert command("--create-index") == 78  # it is created, but only part of it can be used
    assert "is multikey: an order holds" in capsys.readouterr().err
    _, out, _ = check()
    assert "3 orders hold an array in status or customer_id, so that every order is fetched" in out
    shop.orders.delete_many({"customer_id": {"$type": "array"}})
    _, out, _ = check()
    assert "is multikey: an order holds, or once held, an array in customer_id. Correct" in out
    shop.orders.drop_indexes()
    for field in ("customer_id", "customer_id.ref"):
        both = shop.orders.insert_one({"status": ["x"], "customer_id": [{"ref": 2}]}).inserted_id
        assert command("--create-index", ORDER_CUSTOMER_FIELD=field) == 78
        said = capsys.readouterr().err
        assert "while an order holds arrays in both status and customer_id" in said
        assert f"such as the order with _id {both}\n" in said
        shop.orders.delete_one({"_id": both})


def test_what_takes_too_long_is_left_out(
    shop: Database[Any], check: Any, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faults.failing(deployment.servers[0], "count", 9, errorCode=50):
        _, out, err = check()
    assert 'WARNING not_examined error="listCollections on' in err
    assert "took too long" in err
    for what in ("users", "orders", "who would lose some"):
        assert line(what, out) == "not known; --dry-run counts them all"

    def too_slow(*_: object, **__: object) -> None:
        raise QueryTimeout("could not group in time")

    monkeypatch.setattr(examine, "statuses", too_slow)
    _, out, err = check()
    assert 'WARNING not_examined error="could not group in time"' in err
    assert line("who would lose some", out) == "20"


def test_five_mistakes_are_found_one_and_all(
    database: Database[Any], check: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    database.users.insert_many([{"_id": n, "loyalty_points": 9} for n in range(30)])
    database.orders.insert_many([{"customer": n % 30, "state": "shipped"} for n in range(60)])
    database.jobs.insert_one({"finished_at": 1})
    names = {"ORDER_STATUS_FIELD": "state"}
    code, _, err = check(**names, mongodb_datbase="webshop")
    assert (code, "did you mean MONGODB_DATABASE?" in err) == (78, True)
    code, out, err = check(**names, RECOUNTS_COLLECTION="jobs")
    assert (code, ".jobs holds documents that are not this service's" in err) == (78, True)
    assert "PROBLEM: no order has status Shipped" in out  # nor does it hide the others
    code, out, _ = check(**names, USERS_COLLECTION="clients")
    assert code == 1
    assert f"PROBLEM: there is no collection {database.name}.clients" in out
    assert (
        "PROBLEM: no order has status Shipped; found: shipped (60): correct ORDER_STATUSES" in out
    )
    names["ORDER_STATUSES"] = "shipped"
    code, out, _ = check(**names)
    assert code == 1
    assert "no order that counts refers to a user: are ORDER_CUSTOMER_FIELD=customer_id" in out
    names["ORDER_CUSTOMER_FIELD"] = "customer"
    code, out, _ = check(**names, MAX_DECREASE_PERCENT="100")
    assert (code, "PROBLEM" in out) == (0, False)


PASSWORD = "s3cr/et"


@pytest.fixture
def limited(authenticating: Deployment) -> Iterator[Any]:
    """Let a database user do this and no more: actions by collection; give its URI."""
    with authenticating.client() as client:
        client.examined.users.insert_one({"_id": 1})
        client.examined.orders.insert_one({"customer_id": 1, "status": "Shipped"})

        def allow(**actions: list[str]) -> str:
            privileges = [
                {"resource": {"db": "examined", "collection": name}, "actions": allowed}
                for name, allowed in actions.items()
            ]
            client.admin.command("createRole", "limited", privileges=privileges, roles=[])
            client.admin.command("createUser", "limited", pwd=PASSWORD, roles=["limited"])
            return authenticating.uri_for("limited", PASSWORD, "examined")

        yield allow
        client.admin.command("dropUser", "limited")
        client.admin.command("dropRole", "limited")
        client.drop_database("examined")


@pytest.mark.xdist_group("auth")
def test_a_missing_create_index_on_the_records_is_found_and_nothing_else_is_needed(
    limited: Any, command: Command, capsys: pytest.CaptureFixture[str], authenticating: Deployment
) -> None:
    uri = limited(orders=["find"], users=["find", "update"], loyalty_recounts=["find", "insert"])
    assert command("--check-config", MONGODB_URI=uri) == 1
    said = capsys.readouterr()
    assert "no permission for createIndex on examined.loyalty_recounts" in said.out
    assert "put a user name" not in said.out + said.err  # there is one
    assert line("users", said.out) == "1: _id is int 1"
    assert "PROBLEM" not in said.out
    assert "WARNING" not in said.err
    with authenticating.client() as client:
        assert set(client.examined.list_collection_names()) == {"orders", "users"}


@pytest.mark.xdist_group("auth")
def test_to_make_the_index_takes_no_other_permission(limited: Any, command: Command) -> None:
    uri = limited(orders=["find", "createIndex"], users=["find", "update"])
    assert command("--create-index", MONGODB_URI=uri) == 0


def test_the_readmes_copy_of_the_points_brings_them_back(
    shop: Database[Any], command: Command
) -> None:
    """Its two commands, as a mongosh would run them."""
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"--eval 'db\.(\w+)\.aggregate\((\[.*\])\)'", text)
    assert [name for name, _ in found] == ["users", "points_before"]
    refresh_if_due, bring_back = (
        (shop[name], json.loads(change_stream_pipeline)) for name, change_stream_pipeline in found
    )
    before = list(shop.users.find({"loyalty_points": {"$exists": True}}))
    refresh_if_due[0].aggregate(refresh_if_due[1])
    assert command("--once", "--force") == 0
    assert disagreements(shop) == []
    shop.users.update_one({"_id": 3}, {"$set": {"name": "Eve"}})
    shop.users.delete_one({"_id": 4})
    bring_back[0].aggregate(bring_back[1])
    kept = list(shop.users.find({"_id": {"$ne": ADA}}))
    assert kept == [u | ({"name": "Eve"} if u["_id"] == 3 else {}) for u in before if u["_id"] != 4]


def test_check_config_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "look at the data" in " ".join(capsys.readouterr().out.split())


def test_a_counted_status_too_rare_for_a_sample_is_not_taken_for_none(
    database: Database[Any], check: Any, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine, "_ORDERS", 1)
    database.users.insert_one({"_id": 1})
    database.orders.insert_many([{"customer_id": 1, "status": "shipped"} for _ in range(200)])
    code, out, _ = check()
    assert (code, "PROBLEM: no order has status Shipped; found: shipped (" in out) == (1, True)
    database.orders.insert_one({"customer_id": 1, "status": "Shipped"})
    code, out, _ = check()
    assert (code, "no order has status" in out) == (0, False)
