"""One recount leaves every user right, and nothing else touched."""

from __future__ import annotations

import errno
import io
import os
import random
import re
import tempfile
import uuid
from datetime import UTC, datetime
from typing import Any
from unittest import mock
from uuid import uuid4

import bson
import pytest
from bson import Binary, Decimal128, Int64, ObjectId
from bson.raw_bson import RawBSONDocument
from conftest import examples, settings_for
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pymongo import MongoClient

from loyalty import concurrency as overlap
from loyalty.errors import NoTempSpace
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.recount import counter as count_failures
from loyalty.recount import spool
from loyalty.recount.customer_ids import parse_id_argument
from loyalty.recount.index import Plan, create_index, index_keys, inspect_plan
from loyalty.recount.partitions import Range, edges, ranges
from loyalty.recount.pipeline import Scope, pipeline
from loyalty.recount.runner import RecountRequest, run_recount
from loyalty.recount.statuses import orders_of
from loyalty.recount.tally import Result, Totals
from sandbox.mongod import Deployment
from sandbox.shop import Names, Shop, count, disagreements, key

Document = dict[str, Any]

# Few enough that orders and users meet; of each kind one more that no user has.
OBJECT_IDS = [ObjectId(f"{n:x}".rjust(2, "b") * 12) for n in (0xAB, 0xCD, 0x12, 0xFE)]
UUIDS = [Binary.from_uuid(uuid.UUID(int=n)) for n in (1, 2)]


def object_id_forms(oid: ObjectId) -> st.SearchStrategy[Any]:
    mixed = st.randoms(use_true_random=False).map(
        lambda rng: "".join(rng.choice((c, c.upper())) for c in str(oid))
    )
    return st.one_of(st.sampled_from([oid, str(oid), str(oid).upper()]), mixed)


PLAIN_IDS = st.sampled_from(
    [0, 1, 5, 5.0, Int64(5), Decimal128("5"), 5.5, float("nan"), -0.0, True, False]
    + ["5", "ada", " ada", "Ada", "é", "x" * 24, "b" * 23, *UUIDS, {"a": 1, "b": "x"}, {"b": "x"}]
    + [datetime(2026, 1, 2, tzinfo=UTC), bson.Timestamp(1, 1)]
)
IDS = st.one_of(st.sampled_from(OBJECT_IDS).flatmap(object_id_forms), PLAIN_IDS)
EDGES = st.one_of(IDS, st.sampled_from(["", "g", "bb", "ab ", "c" * 30, "é", b"", b"x" * 16]))
USER_IDS = st.one_of(IDS, st.sampled_from([None, ""]))
NOT_THERE = object()
CUSTOMER_IDS = st.one_of(
    IDS, IDS, st.sampled_from([NOT_THERE, None, "", [], [5], [str(OBJECT_IDS[0])], {"$gt": 1}])
)
STATUSES = st.sampled_from(
    ["Shipped"] * 6
    + ["Delivered", "shipped", "Shipped ", ["Shipped"], ["x", "Shipped"], 1, None]
    + [NOT_THERE, {"Shipped": 1}]
)
POINTS = st.one_of(
    st.integers(0, 4),
    st.integers(0, 4),
    st.sampled_from([NOT_THERE, None, "3", 0.0, 1.0, 2.5, float("nan"), float("inf"), -1, True])
    | st.sampled_from([[1], [0], {}, {"w": 1}, Int64(2), 2**40 - 1, 2**40, 2**63 - 1, Binary(b"")])
    | st.sampled_from([Decimal128(text) for text in ("1", "0", "-2.5", "NaN", "sNaN", "Infinity")]),
)


def present(**fields: Any) -> Document:
    return {name: value for name, value in fields.items() if value is not NOT_THERE}


USERS = st.lists(
    st.builds(lambda i, p: present(_id=i, loyalty_points=p, name="n", tags=[1]), USER_IDS, POINTS),
    max_size=12,
    unique_by=lambda user: _own(user["_id"]),
)
ORDERS = st.lists(
    st.builds(lambda c, s: present(customer_id=c, status=s), CUSTOMER_IDS, STATUSES).filter(
        # no index takes two arrays in one document
        lambda o: not (isinstance(o.get("customer_id"), list) and isinstance(o.get("status"), list))
    ),
    max_size=40,
)


def _own(value: Any) -> Any:
    """What MongoDB's unique index on _id tells apart: hex strings are no ObjectIds to it."""
    return ("text", value) if isinstance(value, str) else key(value)


@pytest.fixture(params=[True, False], ids=["index", "no_index"])
def connection(deployment: Deployment, request: pytest.FixtureRequest) -> Any:
    name = f"shop_{uuid4().hex[:12]}"
    settings = settings_for(deployment.uri_for(database=name), BATCH_SIZE="3")
    connection = connect(settings, writing=True)
    if request.param:
        connection.orders.create_index(index_keys(settings))
    yield connection
    connection.client.drop_database(name)
    connection.client.close()


def recount(connection: Connection, **values: str) -> Result:
    name = connection.users.database.name
    settings = settings_for(f"mongodb://unused/{name}", **values)
    return run_recount(connection, settings, History(None), RecountRequest(force=True))


def run(connection: Connection, **values: str) -> Totals:
    return recount(connection, **values).totals


def everything(connection: Connection) -> list[Document]:
    found = connection.users.find({}, sort=[("name", 1)])
    return sorted(found, key=lambda user: bson.encode({"": user["_id"]}))


@settings(max_examples=examples(25, 200), suppress_health_check=list(HealthCheck))
@example(  # the sum of the points is no 64-bit integer, and nevertheless one user is right
    users=[{"_id": n, "loyalty_points": 2**62 if n else 1} for n in range(5)],
    orders=[{"customer_id": 0, "status": "Shipped"}],
    edits=[],
    cuts=[],
    workers="1",
)
@given(
    users=USERS,
    orders=ORDERS,
    edits=ORDERS,
    cuts=st.lists(EDGES, max_size=8),
    workers=st.sampled_from(["1", "2", "4"]),
)
def test_after_a_recount_every_user_has_the_points_that_plain_python_counts(
    connection: Connection,
    users: list[Document],
    orders: list[Document],
    edits: list[Document],
    cuts: list[Any],
    workers: str,
) -> None:
    """Wherever the ranges are cut: also between two forms of one id, or at ids that are there."""
    shop = connection.users.database
    connection.users.delete_many({})
    connection.orders.delete_many({})
    if users:
        connection.users.insert_many(users)
    if orders:
        connection.orders.insert_many(orders)

    with mock.patch.object(count_failures, "edges", return_value=cuts):
        check(connection, users, COUNT_WORKERS=workers)
        edit(connection, orders, edits)
        check(connection, users, COUNT_WORKERS=workers)
    assert disagreements(shop) == []


def edit(connection: Connection, orders: list[Document], edits: list[Document]) -> None:
    if edits:  # orders change, come and go
        connection.orders.insert_many(edits)
    for n, status in enumerate(("Shipped", "Paid", "Returned")):
        chosen = [order["_id"] for order in [*orders, *edits][n::4]]
        connection.orders.update_many({"_id": {"$in": chosen}}, {"$set": {"status": status}})
    connection.orders.delete_many({"status": "Delivered"})


def holds(user: Document) -> bool:
    points = user.get("loyalty_points")
    if isinstance(points, Decimal128):
        return not points.to_decimal().is_nan() and points.to_decimal() > 0
    return isinstance(points, int | float) and points is not True and points > 0


def check(connection: Connection, users: list[Document], **values: str) -> None:
    shop = connection.users.database
    wrong = disagreements(shop)
    before = everything(connection)
    holders = sum(map(holds, before))

    totals = run(connection, **values)

    assert disagreements(shop) == []
    after = everything(connection)
    strip = [{k: v for k, v in user.items() if k != "loyalty_points"} for user in after]
    rest = [{k: v for k, v in user.items() if k != "loyalty_points"} for user in before]
    assert [bson.encode(user) for user in strip] == [bson.encode(user) for user in rest]
    assert len(after) == len(users) == totals.users
    assert totals.changed == len(wrong)
    assert totals.users_with_points_before == holders
    counted = [o for o in connection.orders.find() if o.get("status") == "Shipped"]
    customers = count(shop)
    without = [o for o in counted if o.get("customer_id") in (None, "", [])]
    unknown = [o for o in counted if o not in without and key(o["customer_id"]) not in customers]
    assert totals.counted_orders == len(counted)
    assert totals.orders_without_customer == len(without)
    assert totals.orders_of_unknown_customers == len(unknown)
    assert totals.unknown_customers == len({key(o["customer_id"]) for o in unknown})

    again = run(connection, **values)
    assert (again.changed, again.increased, again.decreased) == (0, 0, 0)
    # Now everyone is right, and the sum of the points is the count.
    assert again.counted_orders == len(counted)
    assert again.users_with_points_before == sum(map(holds, after))


def test_ids_that_python_cannot_hold_are_counted_too(connection: Connection) -> None:
    odd = [
        b"\x12\x00\x00\x00\x02_id\x00\x03\x00\x00\x00\xff\xfe\x00\x00",  # text that is not UTF-8
        b"\x12\x00\x00\x00\x09_id\x00\xff\xff\xff\xff\xff\xff\xff\x7f\x00",  # a date, far away
    ]
    odd = [len(raw).to_bytes(4, "little") + raw[4:] for raw in odd]
    for raw in odd:
        connection.users.insert_one(RawBSONDocument(raw))
        order = bson.encode({"status": "Shipped"})[4:-1] + raw[4:-1].replace(b"_id", b"customer_id")
        order = (len(order) + 5).to_bytes(4, "little") + order + b"\0"
        connection.orders.insert_many([RawBSONDocument(order)])
    stray = odd[0][4:-1].replace(b"_id", b"customer_id").replace(b"\xfe", b"\xfd")
    stray = bson.encode({"status": "Shipped"})[4:-1] + stray
    connection.orders.insert_one(
        RawBSONDocument((len(stray) + 5).to_bytes(4, "little") + stray + b"\0")
    )

    totals = run(connection)

    assert [u["loyalty_points"] for u in connection.users.find({}, {"_id": 0})] == [1, 1]
    assert totals.unknown_sample == ["(unreadable)"]
    assert run(connection).changed == 0


def test_other_names_statuses_and_points_per_order_are_settings(
    deployment: Deployment, client: MongoClient[Any]
) -> None:
    shop = client[f"warehouse_{uuid4().hex[:12]}"]
    shop.people.insert_many([{"_id": n, "loyalty_points": 1} for n in range(5)])
    shop.sales.insert_many(
        [{"customer_id": n % 4, "status": s} for n in range(30) for s in ("Sent", "Arrived", "New")]
    )
    settings = settings_for(
        deployment.uri,
        MONGODB_DATABASE=shop.name,
        ORDERS_COLLECTION="sales",
        USERS_COLLECTION="people",
        ORDER_STATUSES="Sent,Arrived",
        POINTS_PER_ORDER="10",
    )
    connection = connect(settings, writing=True)
    run_recount(connection, settings, History(None))
    points = {user["_id"]: user["loyalty_points"] for user in shop.people.find()}
    assert points == {0: 160, 1: 160, 2: 140, 3: 140, 4: 0}
    assert not disagreements(shop, ("Sent", "Arrived"), 10, Names("sales", "people"))
    connection.client.close()
    client.drop_database(shop.name)


def test_a_dirty_shop_is_right_after_one_recount_and_quiet_after_that(
    connection: Connection,
) -> None:
    shop = connection.users.database
    shop_floor = Shop(shop, random.Random(7))
    shop_floor.fill(600, 5_000, dirty=0.2)
    assert disagreements(shop)
    assert run(connection).changed > 100
    assert disagreements(shop) == []
    assert run(connection).changed == 0
    assert shop_floor.ship(200) + shop_floor.return_(200) == 400
    assert disagreements(shop)
    assert run(connection).changed > 50
    assert disagreements(shop) == []


def test_a_recount_of_unchanged_data_sends_no_write(connection: Connection) -> None:
    Shop(connection.users.database, random.Random(3)).fill(50, 500)
    assert run(connection).changed
    before = connection.client.admin.command("serverStatus")["opcounters"]["update"]
    run(connection)
    assert connection.client.admin.command("serverStatus")["opcounters"]["update"] == before


def test_collections_with_a_collation_are_compared_exactly(
    deployment: Deployment, client: MongoClient[Any]
) -> None:
    shop = client[f"shop_{uuid4().hex[:12]}"]
    for name in ("orders", "users"):
        shop.create_collection(name, collation={"locale": "en", "strength": 1})
    shop.users.insert_many([{"_id": "ada"}, {"_id": "bob"}])
    shop.orders.insert_many(
        [{"customer_id": c, "status": s} for c in ("ada", "ADA") for s in ("Shipped", "SHIPPED")]
    )
    connection = connect(settings_for(deployment.uri_for(database=shop.name)), writing=True)
    run(connection)
    assert {u["_id"]: u["loyalty_points"] for u in shop.users.find()} == {"ada": 1, "bob": 0}
    connection.client.close()
    client.drop_database(shop.name)


def test_users_that_the_server_refuses_are_named_and_all_others_written(
    connection: Connection,
) -> None:
    shop = connection.users.database
    shop.users.insert_many([{"_id": n, "locked": n in (3, 8)} for n in range(10)])
    shop.orders.insert_many([{"customer_id": n, "status": "Shipped"} for n in range(10)])
    rule = {"$or": [{"locked": False}, {"loyalty_points": {"$exists": False}}]}
    shop.command("collMod", "users", validator=rule)

    result = recount(connection, BATCH_SIZE="4")

    assert result.outcome == "incomplete"
    assert result.totals.changed == 10
    assert re.search("refused: (3, 8|8, 3);", str(result.refusing))
    assert "code 121, DocumentValidationFailure (2 times)" in str(result.refusing)
    stored = {u["_id"]: u.get("loyalty_points") for u in shop.users.find()}
    assert stored == {n: None if n in (3, 8) else 1 for n in range(10)}
    shop.command("collMod", "users", validator={})
    assert run(connection).changed == 2
    assert disagreements(shop) == []


class FullDisk(io.BytesIO):
    def flush(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_room_for_the_changes_is_said_and_nothing_is_written(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.users.insert_many([{"_id": n} for n in range(10)])
    monkeypatch.setattr(spool, "MEMORY_BYTES", 100)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(NoTempSpace, match="in /nowhere: No such file"):
        run(connection)
    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", lambda **_: FullDisk())
    with pytest.raises(NoTempSpace, match="No space left on device"):
        run(connection)
    assert connection.users.count_documents({"loyalty_points": {"$exists": True}}) == 0


def test_a_long_write_shows_its_progress(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(overlap, "REPORT_SECONDS", 0.0)
    connection.users.insert_many([{"_id": n, "loyalty_points": 1} for n in range(10)])
    with caplog.at_level("INFO", "loyalty"):
        run(connection, BATCH_SIZE="4")
    done = [m.split(" rate")[0] for m in caplog.messages if m.startswith("writing ")]
    assert done == [f"writing done={n} total=10 percent={n}0" for n in (4, 8, 10)][:2] + [
        "writing done=10 total=10 percent=100"
    ]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("5", [5, "5", 5.0]),
        ("5.5", [5.5, "5.5"]),
        ("-3", [-3]),
        ("ada", ["ada"]),
        (str(uuid.UUID(int=9)), [Binary.from_uuid(uuid.UUID(int=9)), str(uuid.UUID(int=9))]),
        ("66aBcDeFaBcDeFaBcDeFaBcD", [ObjectId("66abcdefabcdefabcdefabcd")]),
    ],
)
def test_one_customer_is_found_whatever_the_type_of_the_id(
    connection: Connection, text: str, ids: list[Any]
) -> None:
    shop = connection.users.database
    users = [i for n, i in enumerate(ids) if key(i) not in [key(j) for j in ids[:n]]]
    users += [ObjectId("66abcdefabcdefabcdefabcd")] if isinstance(ids[0], ObjectId) else []
    connection.users.insert_many([{"_id": i} for i in {str(key(u)): u for u in users}.values()])
    connection.users.insert_one({"_id": "somebody else", "loyalty_points": 77})
    forms: list[Any] = [text, text.upper(), text.lower(), *ids, "somebody else"]
    forms += ["66abcdefabcdefabcdefabce"]  # shares the prefix that the index is asked for
    connection.orders.insert_many(
        [{"customer_id": f, "status": s} for f in forms for s in ("Shipped", "Lost")]
    )
    right = count(shop)
    settings = settings_for("mongodb://unused/x")
    result = run_recount(
        connection, settings, History(None), RecountRequest(customers=parse_id_argument(text))
    )
    stored = {key(u["_id"]): u["loyalty_points"] for u in connection.users.find()}
    assert stored.pop("somebody else") == 77
    del right["somebody else"]
    assert stored == right
    found = [o for own in parse_id_argument(text) for o in orders_of(connection, settings, *own)]
    asked = {key(form) for form in (text, *ids)}
    n = sum(key(form) in asked for form in forms)
    for status in ("Shipped", "Lost"):
        assert sum(n for _, s, n in found if s == status) == n
    assert len(result.totals.largest) == len(right)


def change_stream_pipeline(plan: Any) -> set[str]:
    if isinstance(plan, dict):
        own = {plan["stage"]} if isinstance(plan.get("stage"), str) else set()
        return own.union(*map(change_stream_pipeline, plan.values()))
    return set().union(*map(change_stream_pipeline, plan)) if isinstance(plan, list) else set()


def explained(connection: Connection, asked: list[Any]) -> Any:
    command = {"aggregate": "orders", "pipeline": asked, "cursor": {}, "allowDiskUse": True}
    command["collation"] = {"locale": "simple"}
    return connection.orders.database.command("explain", command, verbosity="executionStats")


def values_at(plan: Any, name: str) -> list[Any]:
    """All values of that name, however deep."""
    if isinstance(plan, dict):
        own = [plan[name]] if name in plan else []
        return own + [found for part in plan.values() for found in values_at(part, name)]
    return [f for part in plan for f in values_at(part, name)] if isinstance(plan, list) else []


ALL_KINDS: list[Any] = [ObjectId(f"{n:024x}") for n in range(0, 2000, 7)]
ALL_KINDS += [f"customer-{n}" for n in range(90)] + [str(i).upper() for i in OBJECT_IDS]
ALL_KINDS += [*range(50), 0.5, True, None, "", datetime(2026, 1, 1, tzinfo=UTC), {"a": 1}]
ALL_KINDS += [Binary.from_uuid(uuid.UUID(int=n)) for n in range(30)]


@pytest.mark.parametrize("fields", [("status", "customer_id"), ("state.now", "customer.id")])
def test_with_the_index_a_range_of_any_kind_fetches_no_order_and_needs_no_disk(
    deployment: Deployment, uri: str, fields: tuple[str, str]
) -> None:
    status, customer = fields
    settings = settings_for(
        uri,
        ORDER_STATUSES="Shipped,Delivered",
        ORDER_STATUS_FIELD=status,
        ORDER_CUSTOMER_FIELD=customer,
    )
    with connect(settings, writing=True) as connection:
        connection.users.insert_many([{"_id": own} for own in ALL_KINDS])
        connection.orders.insert_many(
            [nested({status: "Shipped", customer: own}) for own in ALL_KINDS for _ in range(3)]
        )
        assert not inspect_plan(connection.orders, settings).supports_partitions
        create_index(connection.orders, settings)
        assert inspect_plan(connection.orders, settings) == Plan(
            supports_partitions=True, status_is_multikey=False, needs_fetch=False
        )
        cut = ranges(edges(connection.users, 40))
        assert len(cut) > 10
        for part in cut:
            scope = Scope(part, apart=part.is_string_partition)
            plan = explained(connection, pipeline(settings, scope, arrays=False))
            change_stream_pipeline = set(values_at(plan, "stage"))
            assert "IXSCAN" in change_stream_pipeline
            assert "COLLSCAN" not in change_stream_pipeline
            looked = explained_orders(connection, pipeline(settings, scope, arrays=False))
            assert looked == 0, part
            assert not any(values_at(plan, "usedDisk"))
            assert sum(values_at(plan, "spills")) == 0


def nested(values: dict[str, Any]) -> Document:
    document: Document = {}
    for path, value in values.items():
        *outer, last = path.split(".")
        inner = document
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return document


def explained_orders(connection: Connection, asked: list[Any]) -> int:
    """How many orders were fetched: of each scan of the orders, by itself."""
    inner = [s["$unionWith"] for s in asked if "$unionWith" in s]
    scans = [u["pipeline"] for u in inner if u["coll"] == "orders"]
    first = asked[: next(n for n, s in enumerate(asked) if "$unionWith" in s)]
    fetched = 0
    for scan in [first, *scans]:
        fetched += sum(values_at(explained(connection, scan), "totalDocsExamined"))
    return fetched


@pytest.mark.parametrize("customer", [str(OBJECT_IDS[0]), str(OBJECT_IDS[0]).upper(), "5", "ada"])
def test_one_customer_is_counted_without_a_scan(uri: str, customer: str) -> None:
    settings = settings_for(uri)
    with connect(settings, writing=True) as connection:
        Shop(connection.users.database, random.Random(2)).fill(100, 1_000)
        connection.orders.create_index(index_keys(settings))
        forms = parse_id_argument(customer)
        found = Range([[{"$in": [form for _, each in forms for form in each]}]])
        scope = Scope(found, customers=[own for own, _ in forms])
        change_stream_pipeline = values_at(
            explained(connection, pipeline(settings, scope, arrays=False)), "stage"
        )
        assert "IXSCAN" in change_stream_pipeline
        assert "COLLSCAN" not in change_stream_pipeline
        asked = {"distinct": "orders", "key": "status"}
        plan = connection.orders.database.command("explain", asked)
        assert "DISTINCT_SCAN" in values_at(plan, "stage")


def test_the_index_serves_a_collection_with_a_collation_too(uri: str) -> None:
    with connect(settings_for(uri), writing=True) as connection:
        shop = connection.orders.database
        shop.create_collection("orders", collation={"locale": "en", "strength": 2})
        connection.orders.insert_many([{"customer_id": 1, "status": "Shipped"} for _ in range(9)])
        asked = pipeline(settings_for(uri), Scope(), arrays=True)
        assert "COLLSCAN" in values_at(explained(connection, asked), "stage")
        create_index(connection.orders, settings_for(uri))
        assert "IXSCAN" in values_at(explained(connection, asked), "stage")
