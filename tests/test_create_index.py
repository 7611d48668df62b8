"""`--create-index`: creates the index, and nothing else is needed for it."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Command, settings_for
from pymongo.database import Database
from small_shop import fill

from loyalty.errors import QueryTimeout
from loyalty.mongo.connection import connect
from loyalty.recount.index_build import create_index
from loyalty.recount.similar_ids import find_similar_ids

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def shop(database: Database[Any]) -> Database[Any]:
    return fill(database)


def test_a_large_collection_without_the_index_causes_a_warning(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    assert command("--once") == 0
    assert "--create-index" not in capsys.readouterr().err  # a small collection needs none
    shop.orders.insert_many([{} for _ in range(100_001)])
    assert command("--once") == 0
    said = capsys.readouterr().err
    (warning,) = (line for line in said.splitlines() if "--create-index" in line)
    assert " WARNING " in warning
    assert command("--create-index") == 0
    assert capsys.readouterr().out == f"{shop.name}.orders has the index status_1_customer_id_1\n"
    assert command("--create-index") == 0
    capsys.readouterr()
    assert command("--once") == 0
    assert "--create-index" not in capsys.readouterr().err


def test_a_missing_collection_gets_no_index(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    assert command("--create-index", ORDERS_COLLECTION="Orders") == 78
    assert f"{shop.name}.Orders does not exist" in capsys.readouterr().err
    assert set(shop.list_collection_names()) == {"orders", "users"}


def test_arrays_in_two_fields_of_the_index_are_reported(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    shop.orders.insert_one({"status": ["x"], "tags": ["a"]})
    assert command("--create-index", ORDER_FILTER='{"tags": {"$ne": "test"}}') == 78
    said = capsys.readouterr().err
    assert f"createIndex on {shop.name}.orders failed" in said
    assert "parallel arrays" in said
    assert "[status]" in said
    assert "[tags]" in said


@pytest.mark.parametrize("field", ["customer_id", "customer_id.ref"])
def test_no_index_is_created_while_an_order_holds_an_array_of_customers(
    shop: Database[Any], command: Command, capsys: Capture, field: str
) -> None:
    inserted = shop.orders.insert_one({"customer_id": [{"ref": 2}]}).inserted_id
    assert command("--create-index", ORDER_CUSTOMER_FIELD=field) == 78
    text = f"documents hold an array in {field}, such as those with _id {inserted}. Correct them"
    assert text in capsys.readouterr().err
    assert list(shop.orders.index_information()) == ["_id_"]
    shop.orders.delete_one({"_id": inserted})
    assert command("--create-index", ORDER_CUSTOMER_FIELD=field) == 0


def test_no_index_is_created_while_a_user_holds_an_array_in_its_key(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    shop.users.insert_one({"_id": 1, "email": ["a", "b"]})
    assert command("--create-index", USER_KEY_FIELD="email") == 78
    assert "documents hold an array in email, such as those with _id 1." in capsys.readouterr().err
    assert list(shop.users.index_information()) == ["_id_"]


def test_an_index_is_created_also_if_the_search_for_arrays_takes_too_long(
    shop: Database[Any], uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings, point = settings_for(uri), ("configureFailPoint", "maxTimeAlwaysTimeOut")
    with connect(settings) as connection:  # which has a time limit of its own
        shop.client.admin.command(*point, mode="alwaysOn")
        try:
            name = create_index(connection.orders, settings)
            with pytest.raises(QueryTimeout, match="raise COUNT_TIMEOUT"):
                find_similar_ids(connection.users, "_id", "ada", max_time_ms=1_000)
        finally:
            shop.client.admin.command(*point, mode="off")
    assert name in shop.orders.index_information()
    (message,) = caplog.messages
    assert message.startswith("arrays_not_checked")
    assert "if customer_id holds an array, recounts cannot use the index" in message
