"""Live updates on a real replica set: right a moment after the orders change, whatever happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
from bson import ObjectId
from conftest import settings_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymongo import MongoClient
from pymongo.database import Database

from loyalty.overlap import still
from loyalty.service import Service
from sandbox.mongod import SECONDS, Deployment
from sandbox.service import Process
from sandbox.shop import disagreements

IDS = [ObjectId(f"{n:x}".rjust(2, "b") * 12) for n in (0xAB, 0xCD, 0xFE)]
Start = Callable[..., Process]


@dataclass
class Stage:
    """A shop, and a service that does live updates in this process."""

    shop: Database[Any]
    service: Service

    def settle(self) -> None:
        """Do live updates until everyone is right; fail after a while."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            self.service.meanwhile(0.05, still)
            if not disagreements(self.shop):
                return
        assert disagreements(self.shop) == []


@pytest.fixture
def start(deployment: Deployment) -> Iterator[Callable[..., Stage]]:
    started: list[Service] = []

    def start(shop: Database[Any], **values: str) -> Stage:
        uri = deployment.uri_for(database=shop.name)
        settings = settings_for(uri, LIVE_UPDATES="yes", **values)
        service = Service(settings, lambda: settings)
        started.append(service)
        service.connect()
        service.recount(still)
        assert service._live
        return Stage(shop, service)

    yield start
    for service in started:
        close(service)


def close(service: Service) -> None:
    service._stop_watching()
    if service._connection:
        service._connection.client.close()


def customer_forms() -> st.SearchStrategy[Any]:
    texts = st.sampled_from(IDS).flatmap(
        lambda own: st.sampled_from(
            [own, str(own), str(own).upper(), str(own).title(), str(own)[:9].upper() + str(own)[9:]]
        )
    )
    return st.one_of(texts, texts, st.sampled_from([None, "", 5, 5.0, "5", "ada", {"a": 1}, [1]]))


STATUSES = st.sampled_from(["Shipped", "Shipped", "Paid", "shipped", None])
EDITS = st.lists(
    st.tuples(
        st.sampled_from(
            ["insert", "update", "replace", "delete", "reassign", "many", "transaction"]
        ),
        st.integers(0, 30),
        customer_forms(),
        STATUSES,
    ),
    min_size=1,
    max_size=12,
)


def edit(shop: Database[Any], kind: str, number: int, customer: Any, status: Any) -> None:
    orders = shop.orders
    order = {"customer_id": customer, "status": status}
    chosen = orders.find_one({}, {"_id": 1}, skip=number % max(orders.count_documents({}), 1))
    one = {"_id": chosen["_id"] if chosen else None}
    if kind == "insert":
        orders.insert_one(order)
    elif kind == "update":
        orders.update_one(one, {"$set": {"status": status}})
    elif kind == "replace":
        orders.replace_one(one, order)
    elif kind == "delete":
        orders.delete_one(one)
    elif kind == "reassign":
        orders.update_one(one, {"$set": {"customer_id": customer}})
    elif kind == "many":
        orders.update_many({"customer_id": customer}, {"$set": {"status": status}})
    else:
        with shop.client.start_session() as session, session.start_transaction():
            orders.insert_one(order, session=session)
            orders.update_one(one, {"$unset": {"status": 1}}, session=session)


@pytest.mark.parametrize("pre_images", [True, False], ids=["pre_images", "no_pre_images"])
@given(edits=EDITS)
@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_moment_after_any_edits_everyone_is_right(
    client: MongoClient[Any], start: Callable[..., Stage], pre_images: bool, edits: list[Any]
) -> None:
    """Without pre-images nothing tells whose an order was: then the next full recount does."""
    shop = client[f"live_{uuid4().hex[:12]}"]
    shop.create_collection("orders", changeStreamPreAndPostImages={"enabled": pre_images})
    users = [
        IDS[0],
        str(IDS[0]).upper(),
        IDS[1],
        str(IDS[2]),
        str(IDS[2]).title(),
        5,
        "5",
        {"a": 1},
    ]
    shop.users.insert_many([{"_id": own} for own in users])
    for n, own in enumerate(users):
        shop.orders.insert_one({"customer_id": own, "status": "Shipped" if n % 2 else "Paid"})
    stage = start(shop)
    try:
        for kind, number, customer, status in edits:
            edit(shop, kind, number, customer, status)
        if pre_images:
            stage.settle()
        else:
            stage.service.meanwhile(0.3, still)
            stage.service.recount(still)
            assert disagreements(shop) == []
    finally:
        close(stage.service)
        client.drop_database(shop.name)
