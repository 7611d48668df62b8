"""One recount leaves every user up to date, and nothing else touched."""

from __future__ import annotations

import random
import re
import tempfile
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Any
from uuid import uuid4

import bson
import pytest
from boundaries import fixed_boundaries
from bson import Binary, Decimal128, ObjectId
from bson.raw_bson import RawBSONDocument
from conftest import examples, settings_for
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pymongo import MongoClient
from strategies import BOUNDARIES, OBJECT_IDS, SHOPS

from loyalty.errors import NoTempSpace
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.recount.customer_ids import all_forms, indexable_forms, parse_id_argument
from loyalty.recount.index import index_keys, inspect_plan
from loyalty.recount.index_build import create_index
from loyalty.recount.partitions import Partition, build_partitions, find_boundaries
from loyalty.recount.pipeline import Scope, build_pipeline
from loyalty.recount.result import Result
from loyalty.recount.runner import RecountRequest, run_recount
from loyalty.recount.statuses import count_customer_orders
from loyalty.recount.tally import Totals
from sandbox.mongod import Deployment
from sandbox.shop import Names, Shop, canonical_key, count_points, find_mismatches

Document = dict[str, Any]


@pytest.fixture(params=[True, False], ids=["index", "no_index"])
def connection(deployment: Deployment, request: pytest.FixtureRequest) -> Iterator[Connection]:
    name = f"shop_{uuid4().hex[:12]}"
    settings = settings_for(deployment.uri_for(database=name), BATCH_SIZE="3")
    connection = connect(settings, writing=True)
    if request.param:
        connection.orders.create_index(index_keys(settings))
    yield connection
    connection.client.drop_database(name)
    connection.client.close()


def recount(connection: Connection, cuts: list[Any] | None = None, **values: str) -> Result:
    """Recount, with boundaries at `cuts` or at every second id of a user."""
    settings = settings_for(f"mongodb://unused/{connection.users.database.name}", **values)
    boundaries = partial(find_boundaries, size=2) if cuts is None else fixed_boundaries(cuts)
    request = RecountRequest(force=True, find_boundaries=boundaries)
    return run_recount(connection, settings, History(None, settings), request)


def run(connection: Connection, cuts: list[Any] | None = None, **values: str) -> Totals:
    result = recount(connection, cuts, **values)
    assert result.failed_updates == 0
    assert result.written == result.totals.changed
    return result.totals


def read_users(connection: Connection) -> list[Document]:
    return sorted(connection.users.find({}), key=lambda user: bson.encode({"": user["_id"]}))


@settings(max_examples=examples(15, 200), suppress_health_check=list(HealthCheck))
@example(  # the sum of the points is no 64-bit integer, and nevertheless one user is up to date
    shop=(
        [{"_id": n, "loyalty_points": 2**62 if n else 1} for n in range(5)],
        [{"customer_id": 0, "status": "Shipped"}],
        [],
    ),
    cuts=[],
    workers="1",
)
@given(shop=SHOPS, cuts=st.lists(BOUNDARIES, max_size=8), workers=st.sampled_from(["1", "2", "4"]))
def test_after_a_recount_every_user_has_the_points_that_plain_python_counts(
    connection: Connection,
    shop: tuple[list[Document], list[Document], list[Document]],
    cuts: list[Any],
    workers: str,
) -> None:
    """Wherever the boundaries are: also between two forms of one id, or at existing ids."""
    users, orders, edits = shop
    connection.users.delete_many({})
    connection.orders.delete_many({})
    if users:
        connection.users.insert_many(users)
    if orders:
        connection.orders.insert_many(orders)

    check(connection, cuts, COUNT_WORKERS=workers)
    edit(connection, orders, edits)
    check(connection, cuts, COUNT_WORKERS=workers)
    assert find_mismatches(connection.users.database) == []


def edit(connection: Connection, orders: list[Document], edits: list[Document]) -> None:
    if edits:  # orders change, come and go
        connection.orders.insert_many(edits)
    for n, status in enumerate(("Shipped", "Paid", "Returned")):
        chosen = [order["_id"] for order in [*orders, *edits][n::4]]
        connection.orders.update_many({"_id": {"$in": chosen}}, {"$set": {"status": status}})
    connection.orders.delete_many({"status": "Delivered"})


def to_number(points: Any) -> Decimal:
    """Return stored points as a number; anything that is none as 0."""
    if isinstance(points, bool):
        return Decimal(0)
    if isinstance(points, str):
        if re.search("[^0-9.+ -]", points):
            return Decimal(0)
        try:
            return Decimal(points.strip())
        except InvalidOperation:
            return Decimal(0)
    if isinstance(points, Decimal128):
        points = points.to_decimal()
    number = Decimal(points) if isinstance(points, int | float | Decimal) else Decimal(0)
    return Decimal(0) if number.is_nan() else number


def check(connection: Connection, cuts: list[Any], **values: str) -> None:
    shop = connection.users.database
    mismatches = find_mismatches(shop)
    before = read_users(connection)
    numbers = [to_number(user.get("loyalty_points")) for user in before]
    expected = count_points(shop)

    totals = run(connection, cuts, **values)

    assert find_mismatches(shop) == []
    after = read_users(connection)
    for old, new in zip(before, after, strict=True):
        old.pop("loyalty_points", None)
        points = new.pop("loyalty_points")
        assert points == expected[canonical_key(new["_id"])]
        assert bson.encode(new) == bson.encode(old)
    right = [expected[canonical_key(user["_id"])] for user in before]
    assert len(after) == totals.users
    assert totals.changed == len(mismatches)
    assert totals.users_with_points_before == sum(number > 0 for number in numbers)
    assert totals.users_with_points_after == sum(number > 0 for number in right)
    pairs = list(zip(numbers, right, strict=True))
    assert totals.increased == sum(new > old for old, new in pairs)
    assert totals.decreased == sum(new < old for old, new in pairs)
    counted = [o for o in connection.orders.find() if o.get("status") == "Shipped"]
    without = [o for o in counted if o.get("customer_id") in (None, "", [])]
    unknown = [
        o for o in counted if o not in without and canonical_key(o["customer_id"]) not in expected
    ]
    assert totals.counted_orders == len(counted)
    assert totals.orders_without_customer == len(without)
    assert totals.orders_of_unknown_customers == len(unknown)
    assert totals.unknown_customers == len({canonical_key(o["customer_id"]) for o in unknown})

    again = run(connection, cuts, **values)
    assert (again.changed, again.increased, again.decreased) == (0, 0, 0)
    assert again.counted_orders == len(counted)
    assert again.users_with_points_before == sum(number > 0 for number in right)


def raw_document(**fields: bytes) -> RawBSONDocument:
    """Return a document of BSON values that Python cannot hold: type byte, then the value."""
    body = b"".join(value[:1] + name.encode() + b"\0" + value[1:] for name, value in fields.items())
    return RawBSONDocument((len(body) + 5).to_bytes(4, "little") + body + b"\0")


NOT_UTF_8 = b"\x02\x03\x00\x00\x00\xff\xfe\x00"
FAR_DATE = b"\x09\xff\xff\xff\xff\xff\xff\xff\x7f"  # in the year 292277026
SHIPPED = b"\x02\x08\x00\x00\x00Shipped\x00"


def test_a_user_with_an_unrepresentable_id_is_a_failed_update(connection: Connection) -> None:
    connection.users.insert_many([raw_document(_id=value) for value in (NOT_UTF_8, FAR_DATE)])
    connection.users.insert_one({"_id": 1})
    unknown = NOT_UTF_8.replace(b"\xfe", b"\xfd")
    connection.orders.insert_many(
        [raw_document(status=SHIPPED, customer_id=c) for c in (NOT_UTF_8, FAR_DATE, unknown)]
    )
    connection.orders.insert_one({"customer_id": 1, "status": "Shipped"})

    result = recount(connection)

    assert result.outcome == "incomplete"
    assert result.updates.failures == {"UnsupportedValue": 1}
    assert (result.totals.users, result.totals.counted_orders) == (3, 4)
    assert (result.totals.changed, result.written) == (3, 2)
    assert (result.totals.unknown_customers, result.totals.orders_of_unknown_customers) == (1, 1)
    (mismatch,) = find_mismatches(connection.users.database)
    assert (mismatch.user, mismatch.stored) == ("\udcff\udcfe", None)


def test_a_user_whose_old_points_python_cannot_hold_is_a_failed_update(
    connection: Connection,
) -> None:
    connection.users.insert_many(
        [
            raw_document(_id=b"\x10" + n.to_bytes(4, "little"), loyalty_points=value)
            for n, value in enumerate((NOT_UTF_8, FAR_DATE))
        ]
    )
    connection.users.insert_one({"_id": 2})
    connection.orders.insert_many([{"customer_id": n, "status": "Shipped"} for n in range(3)])

    result = recount(connection)

    assert result.outcome == "incomplete"
    assert result.updates.failures == {"UnsupportedValue": 1}
    (mismatch,) = find_mismatches(connection.users.database)
    assert (mismatch.user, mismatch.stored) == (0, "\udcff\udcfe")


def test_an_up_to_date_user_with_an_unrepresentable_id_succeeds(connection: Connection) -> None:
    zero = b"\x10\x00\x00\x00\x00"
    connection.users.insert_one(raw_document(_id=NOT_UTF_8, loyalty_points=zero))
    assert recount(connection).outcome == "succeeded"


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
    run_recount(connection, settings, History(None, settings))
    points = {user["_id"]: user["loyalty_points"] for user in shop.people.find()}
    assert points == {0: 160, 1: 160, 2: 140, 3: 140, 4: 0}
    assert not find_mismatches(shop, ("Sent", "Arrived"), 10, Names("sales", "people"))
    connection.client.close()
    client.drop_database(shop.name)


def test_one_recount_makes_a_dirty_shop_up_to_date(connection: Connection) -> None:
    shop = connection.users.database
    generated = Shop(shop, random.Random(7))
    generated.fill(600, 5_000, dirty=0.2)
    assert find_mismatches(shop)
    assert run(connection).changed > 100
    assert find_mismatches(shop) == []
    assert run(connection).changed == 0
    assert generated.ship_orders(200) + generated.return_orders(200) == 400
    assert find_mismatches(shop)
    assert run(connection).changed > 50
    assert find_mismatches(shop) == []


def test_a_recount_of_unchanged_data_sends_no_update(connection: Connection) -> None:
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


def test_a_failed_update_does_not_prevent_other_updates(connection: Connection) -> None:
    shop = connection.users.database
    shop.users.insert_many([{"_id": n, "locked": n in (3, 8)} for n in range(10)])
    shop.orders.insert_many([{"customer_id": n, "status": "Shipped"} for n in range(10)])
    rule = {"$or": [{"locked": False}, {"loyalty_points": {"$exists": False}}]}
    shop.command("collMod", "users", validator=rule)

    result = recount(connection, BATCH_SIZE="4")

    assert result.outcome == "incomplete"
    assert (result.totals.changed, result.written, result.failed_updates) == (10, 8, 2)
    assert sorted(result.updates.failed_sample) == ["3", "8"]
    assert result.updates.describe_failures() == "code 121, DocumentValidationFailure: 2"
    stored = {u["_id"]: u.get("loyalty_points") for u in shop.users.find()}
    assert stored == {n: None if n in (3, 8) else 1 for n in range(10)}
    shop.command("collMod", "users", validator={})
    assert run(connection).changed == 2
    assert find_mismatches(shop) == []


def test_without_temporary_disk_space_nothing_is_written(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The changes are larger than what a spool keeps in memory."""
    connection.users.insert_many([{"_id": f"{n:0100000}"} for n in range(30)])
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(NoTempSpace, match="no temporary disk space: No such file"):
        recount(connection)
    assert connection.users.count_documents({"loyalty_points": {"$exists": True}}) == 0


def test_changes_larger_than_the_memory_of_a_spool_are_all_written(connection: Connection) -> None:
    connection.users.insert_many([{"_id": f"{n:0100000}"} for n in range(60)])
    connection.orders.insert_one({"customer_id": f"{7:0100000}", "status": "Shipped"})
    assert run(connection).changed == 60
    assert find_mismatches(connection.users.database) == []


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("5", [5, "5", 5.0]),
        ("5.5", [5.5, "5.5"]),
        ("-3", [-3]),
        ("1234567890123456789", [1234567890123456789]),
        ("ada", ["ada"]),
        (str(uuid.UUID(int=9)), [Binary.from_uuid(uuid.UUID(int=9)), str(uuid.UUID(int=9))]),
        (str(uuid.UUID(int=9)), [Binary(uuid.UUID(int=9).bytes, 3)]),
        ("66aBcDeFaBcDeFaBcDeFaBcD", [ObjectId("66abcdefabcdefabcdefabcd")]),
    ],
)
def test_a_customer_argument_finds_ids_of_each_type(
    connection: Connection, text: str, ids: list[Any]
) -> None:
    shop = connection.users.database
    users = {canonical_key(user_id): user_id for user_id in reversed(ids)}.values()
    connection.users.insert_many([{"_id": user_id} for user_id in users])
    connection.users.insert_one({"_id": "another", "loyalty_points": 77})
    forms: list[Any] = [text, text.upper(), text.lower(), *ids, "another"]
    forms += ["66abcdefabcdefabcdefabce"]  # has a prefix in common with one of them
    connection.orders.insert_many(
        [{"customer_id": f, "status": s} for f in forms for s in ("Shipped", "Lost")]
    )
    expected = count_points(shop)
    settings = settings_for("mongodb://unused/x")
    customers = [(customer, all_forms(customer)) for customer in parse_id_argument(text)]
    request = RecountRequest(customers=customers)
    result = run_recount(connection, settings, History(None, settings), request)
    stored = {canonical_key(u["_id"]): u["loyalty_points"] for u in connection.users.find()}
    assert stored.pop("another") == 77
    del expected["another"]
    assert stored == expected
    found = [
        row
        for customer in parse_id_argument(text)
        for row in count_customer_orders(connection, settings, customer)
    ]
    keys = {canonical_key(form) for form in (text, *ids)}
    n = sum(canonical_key(form) in keys for form in forms)
    for status in ("Shipped", "Lost"):
        assert sum(orders.number for orders in found if orders.status == status) == n
    assert len(result.totals.largest) == len(expected)


def explain(connection: Connection, pipeline: list[Any]) -> Any:
    command = {"aggregate": "orders", "pipeline": pipeline, "cursor": {}, "allowDiskUse": True}
    command["collation"] = {"locale": "simple"}
    return connection.orders.database.command("explain", command, verbosity="executionStats")


def find_values(plan: Any, name: str) -> list[Any]:
    """Return all values of that name in a plan, however deep."""
    if isinstance(plan, dict):
        values = [plan[name]] if name in plan else []
        return values + [value for part in plan.values() for value in find_values(part, name)]
    return [v for part in plan for v in find_values(part, name)] if isinstance(plan, list) else []


ALL_TYPES: list[Any] = [ObjectId(f"{n:024x}") for n in range(0, 2000, 7)]
ALL_TYPES += [f"customer-{n}" for n in range(90)] + [str(i).upper() for i in OBJECT_IDS]
ALL_TYPES += [*range(50), 0.5, True, None, "", datetime(2026, 1, 1, tzinfo=UTC), {"a": 1}]
ALL_TYPES += [Binary.from_uuid(uuid.UUID(int=n)) for n in range(30)]


@pytest.mark.parametrize("fields", [("status", "customer_id"), ("state.now", "customer.id")])
def test_with_the_index_no_partition_fetches_an_order_or_needs_the_disk(
    uri: str, fields: tuple[str, str]
) -> None:
    status, customer = fields
    settings = settings_for(
        uri,
        ORDER_STATUSES="Shipped,Delivered",
        ORDER_STATUS_FIELD=status,
        ORDER_CUSTOMER_FIELD=customer,
    )
    with connect(settings, writing=True) as connection:
        connection.users.insert_many([{"_id": user_id} for user_id in ALL_TYPES])
        connection.orders.insert_many(
            [nest({status: "Shipped", customer: i}) for i in ALL_TYPES for _ in range(3)]
        )
        assert not inspect_plan(connection.orders, settings).supports_partitions
        create_index(connection.orders, settings)
        found = inspect_plan(connection.orders, settings)
        assert found.supports_partitions
        assert not found.status_is_multikey
        assert not found.needs_fetch
        cut = list(build_partitions(partial(find_boundaries, connection.users, "_id", size=40)))
        assert len(cut) > 10
        for partition in cut:
            pipeline = build_pipeline(settings, Scope(partition, status_may_be_array=False))
            plan = explain(connection, pipeline)
            stages = set(find_values(plan, "stage"))
            assert "IXSCAN" in stages
            assert "COLLSCAN" not in stages
            assert count_fetched_orders(connection, pipeline) == 0, partition
            assert not any(find_values(plan, "usedDisk"))
            assert sum(find_values(plan, "spills")) == 0


def nest(values: dict[str, Any]) -> Document:
    document: Document = {}
    for path, value in values.items():
        *outer, last = path.split(".")
        inner = document
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return document


def count_fetched_orders(connection: Connection, pipeline: list[Any]) -> int:
    """Return how many orders were fetched, from a plan for each scan of the orders."""
    unions = [stage["$unionWith"] for stage in pipeline if "$unionWith" in stage]
    scans = [union["pipeline"] for union in unions if union["coll"] == "orders"]
    first = pipeline[: next(n for n, stage in enumerate(pipeline) if "$unionWith" in stage)]
    plans = [explain(connection, scan) for scan in [first, *scans]]
    return sum(sum(find_values(plan, "totalDocsExamined")) for plan in plans)


@pytest.mark.parametrize("customer", [str(OBJECT_IDS[0]), str(OBJECT_IDS[0]).upper(), "5", "ada"])
def test_one_customer_is_counted_without_a_collection_scan(uri: str, customer: str) -> None:
    settings = settings_for(uri)
    with connect(settings, writing=True) as connection:
        Shop(connection.users.database, random.Random(2)).fill(100, 1_000)
        connection.orders.create_index(index_keys(settings))
        customers = parse_id_argument(customer)
        variants = [variant for c in customers for variant in indexable_forms(c)]
        partition = Partition([[{"$in": variants}]])
        scope = Scope(partition, customers, status_may_be_array=False)
        pipeline = build_pipeline(settings, scope)
        stages = find_values(explain(connection, pipeline), "stage")
        assert "IXSCAN" in stages
        assert "COLLSCAN" not in stages


@pytest.mark.parametrize("digits", ["66", "6abcdefabcdefa"])
def test_a_mixed_case_id_is_found_without_a_scan_of_the_index(uri: str, digits: str) -> None:
    settings, rng = settings_for(uri), random.Random(3)
    customer = ObjectId(f"{digits:a<24}")
    text = str(customer)
    mixed = [rng.choice([c.upper(), c]) for c in text[:-1]]
    forms = ["".join(mixed) + case for case in "aA"]
    forms += [text, text.upper(), text[:12] + text[12:].upper(), text[:12].upper() + text[12:]]
    others = [f"{n:024x}" for n in range(0, 16**24, 16**24 // 2_000)]
    others += [text[:-1] + "b", text + "a", text[:-1], f" {text}"]
    with connect(settings, writing=True) as connection:
        connection.users.insert_one({"_id": customer})
        connection.orders.insert_many([{"customer_id": id_, "status": "Shipped"} for id_ in forms])
        connection.orders.insert_many([{"customer_id": id_, "status": "Shipped"} for id_ in others])
        connection.orders.create_index(index_keys(settings))
        found = {"status": "Shipped", "customer_id": {"$in": all_forms(customer)}}
        stored = [order["customer_id"] for order in connection.orders.find(found)]
        assert sorted(stored) == sorted(forms)
        plan = explain(connection, [{"$match": found}])
        assert sum(find_values(plan, "totalKeysExamined")) < 150


def test_the_index_is_used_for_a_collection_with_a_collation(uri: str) -> None:
    with connect(settings_for(uri), writing=True) as connection:
        shop = connection.orders.database
        shop.create_collection("orders", collation={"locale": "en", "strength": 2})
        connection.orders.insert_many([{"customer_id": 1, "status": "Shipped"} for _ in range(9)])
        pipeline = build_pipeline(settings_for(uri), Scope())
        assert "COLLSCAN" in find_values(explain(connection, pipeline), "stage")
        create_index(connection.orders, settings_for(uri))
        assert "IXSCAN" in find_values(explain(connection, pipeline), "stage")
