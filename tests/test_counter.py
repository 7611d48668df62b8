"""One count on a real server: each customer once, at one cluster time, also after errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from boundaries import fixed_boundaries
from bson import Binary, ObjectId
from conftest import MEMORY, settings_for
from pymongo import MongoClient
from pymongo.errors import OperationFailure

from loyalty.concurrency import ignore_progress
from loyalty.errors import SnapshotTooOld
from loyalty.history import History
from loyalty.mongo.connection import Connection, connect
from loyalty.mongo.values import SIMPLE_COLLATION
from loyalty.recount.counter import OrderCounter
from loyalty.recount.customer_ids import indexable_forms
from loyalty.recount.index_build import create_index
from loyalty.recount.pipeline import UpperCaseFound
from loyalty.recount.result import CountResult, Result
from loyalty.recount.runner import RecountRequest, run_recount
from loyalty.recount.snapshot import pin_cluster_time
from loyalty.recount.statuses import check_uncounted
from loyalty.recount.tally import CustomerCount, Row, UpToDateTotals
from sandbox import faults
from sandbox.mongod import Deployment, wait_until
from sandbox.shop import find_mismatches

ADA, BOB, EVE = (ObjectId(f"{digit}{'ab' * 11}{digit}") for digit in "abc")
MIXED_ADA = str(ADA)[:9].upper() + str(ADA)[9:]
SETTINGS = settings_for("mongodb://unused/")


@pytest.fixture
def connection(deployment: Deployment) -> Iterator[Connection]:
    """A shop with the index, one order of no status, and no user."""
    settings = settings_for(deployment.uri_for(database=f"shop_{uuid4().hex[:12]}"))
    with connect(settings, writing=True) as connection:
        connection.orders.insert_one({})
        create_index(connection.orders, settings)
        yield connection
        connection.client.drop_database(connection.users.database.name)


def ship(connection: Connection, *customers: Any) -> None:
    connection.orders.insert_many([{"customer_id": c, "status": "Shipped"} for c in customers])


def count_all(
    connection: Connection, cuts: Sequence[Any] = (), *, single_query: bool = False
) -> tuple[list[Row], CountResult]:
    rows: list[Row] = []
    counter = OrderCounter(
        connection, SETTINGS, ignore_progress, find_boundaries=fixed_boundaries(cuts)
    )
    return rows, counter.count_all(rows.append, single_query=single_query)


def recount(connection: Connection, cuts: Sequence[Any] = (), **values: str) -> Any:
    settings = settings_for("mongodb://unused/", **{"LIVE_UPDATES": "yes", **values})
    request = RecountRequest(force=True, find_boundaries=fixed_boundaries(cuts))
    return run_recount(connection, settings, History(None, settings), request)


CUTS: list[list[Any]] = [[], [ADA, BOB, EVE], [str(ADA).upper(), "a", "b", "c", EVE]]
CUT_NAMES = ["one partition", "object ids", "upper-case and short strings"]


@pytest.mark.parametrize("cuts", CUTS, ids=CUT_NAMES)
def test_each_customer_has_one_row_with_the_orders_of_both_canonical_forms(
    connection: Connection, cuts: list[Any]
) -> None:
    up_to_date = {"_id": BOB, "loyalty_points": 1}
    connection.users.insert_many([{"_id": ADA}, up_to_date, {"_id": EVE}, {"_id": str(EVE)}])
    ship(connection, ADA, str(ADA), str(ADA), str(BOB), "ada")
    rows, result = count_all(connection, cuts)
    found = [row for row in rows if isinstance(row, CustomerCount)]
    assert sorted((str(row.customer), row.orders, len(row.users)) for row in found) == [
        (str(ADA), 3, 1),
        ("ada", 1, 0),
        (str(EVE), 0, 2),
    ]
    rest = [row for row in rows if isinstance(row, UpToDateTotals)]
    assert sum(row.users for row in rest) == sum(row.users_with_points for row in rest) == 1
    assert sum(row.orders for row in rest) == 1
    assert result.exact
    assert result.has_usable_indexes
    assert not result.has_mixed_case_ids


@pytest.mark.parametrize(
    ("cuts", "workers"), list(zip(CUTS, ["1", "4", "4"], strict=True)), ids=CUT_NAMES
)
@pytest.mark.parametrize("form", [str(ADA).upper(), MIXED_ADA], ids=["upper", "mixed"])
@pytest.mark.parametrize("is_user", [False, True], ids=["order", "user"])
def test_an_id_with_upper_case_causes_a_single_exact_query(
    connection: Connection,
    cuts: list[Any],
    workers: str,
    form: str,
    is_user: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    connection.users.insert_many(
        [{"_id": form if is_user else ADA}, {"_id": BOB, "loyalty_points": 1}, {"_id": EVE}]
    )
    ship(connection, ADA, str(ADA), ADA if is_user else form, str(BOB), "nobody")
    with caplog.at_level("INFO", "loyalty"):
        result = recount(connection, cuts, COUNT_WORKERS=workers)
    assert caplog.text.count("single_query_count") == 1
    assert find_mismatches(connection.users.database) == []
    assert (result.totals.users, result.totals.counted_orders) == (3, 5)
    assert (result.totals.changed, result.totals.unknown_customers) == (2, 1)
    assert result.count.exact
    assert result.count.has_mixed_case_ids is (form == MIXED_ADA)


@pytest.mark.parametrize("cuts", CUTS, ids=CUT_NAMES)
def test_users_with_orders_under_both_forms_are_counted_once(
    connection: Connection, cuts: list[Any]
) -> None:
    two = [{"_id": user_id, "loyalty_points": 2} for user_id in (ADA, str(ADA).upper())]
    connection.users.insert_many([*two, {"_id": BOB, "loyalty_points": 1}])
    ship(connection, ADA, str(ADA), str(BOB), str(BOB).upper())
    totals = recount(connection, cuts).totals
    assert (totals.users, totals.counted_orders, totals.changed) == (3, 4, 1)
    assert (totals.users_with_points_before, totals.users_with_points_after) == (3, 3)
    assert find_mismatches(connection.users.database) == []


def test_a_partition_with_an_upper_case_id_is_not_counted(connection: Connection) -> None:
    ship(connection, str(ADA).upper())
    with pytest.raises(UpperCaseFound):
        count_all(connection, [BOB])


@pytest.mark.parametrize(
    ("customer", "status"),
    [
        ("5" * 24, "Shipped"),  # only digits have no case
        ("G" * 24, "Shipped"),  # no hex digits
        ("AB", "Shipped"),
        (str(ADA).upper(), "Paid"),  # not counted
    ],
)
def test_no_other_id_makes_the_count_start_over(
    connection: Connection, customer: str, status: str, caplog: pytest.LogCaptureFixture
) -> None:
    connection.orders.insert_one({"customer_id": customer, "status": status})
    connection.users.insert_one({"_id": customer if status == "Shipped" else 1})
    with caplog.at_level("INFO", "loyalty"):
        result = recount(connection, [BOB])
    assert "single_query_count" not in caplog.text
    assert find_mismatches(connection.users.database) == []
    assert not result.count.has_mixed_case_ids


def test_only_mixed_case_ids_of_counted_orders_are_reported_to_live_updates(
    connection: Connection,
) -> None:
    connection.orders.insert_one({"customer_id": MIXED_ADA, "status": "Paid"})
    connection.users.insert_one({"_id": str(ADA).upper()})
    assert not recount(connection).count.has_mixed_case_ids
    ship(connection, MIXED_ADA)
    assert recount(connection).count.has_mixed_case_ids
    assert not recount(connection, LIVE_UPDATES="no").count.has_mixed_case_ids


def test_a_user_with_an_upper_case_key_gets_the_orders_of_the_lower_case_id(
    connection: Connection,
) -> None:
    connection.users.create_index("key", collation=SIMPLE_COLLATION)
    connection.users.insert_many([{"key": str(ADA).upper()}, {"key": str(BOB)}])
    ship(connection, str(ADA), BOB)
    result = recount(connection, [BOB], USER_KEY_FIELD="key")
    assert result.count.has_usable_indexes
    assert result.totals.unknown_customers == 0
    assert connection.users.count_documents({"loyalty_points": 1}) == 2


@pytest.mark.parametrize("subtype", [3, 4])
@pytest.mark.parametrize("length", [16, 36, 0])
def test_a_binary_of_any_length_is_an_id_like_any_other(
    connection: Connection, subtype: int, length: int
) -> None:
    user_id, other = Binary(b"7" * length, subtype), Binary(b"8" * 36, subtype)
    points = Binary(b"9" * 36, subtype)
    connection.users.insert_many([{"_id": user_id, "loyalty_points": points}, {"_id": 1}])
    ship(connection, user_id, user_id, 1, other)
    for cuts in ([], [user_id, other]):
        result = recount(connection, cuts)
        assert find_mismatches(connection.users.database) == []
        assert (result.totals.users, result.totals.counted_orders) == (2, 4)
        assert (result.totals.unknown_customers, result.failed_updates) == (1, 0)


def test_binaries_of_every_subtype_are_divided_in_the_order_of_the_server(
    connection: Connection,
) -> None:
    """The length of subtype 2 includes that of an inner length, 4 bytes."""
    ids = [b"5" * 5, b"6" * 6, Binary(b"7" * 3, 2)]
    connection.users.insert_many([{"_id": user_id} for user_id in ids])
    ship(connection, *ids)
    result = recount(connection, [ids[2], ids[0]])
    assert (result.totals.users, result.totals.counted_orders) == (3, 3)
    assert find_mismatches(connection.users.database) == []


def test_users_with_upper_case_ids_may_be_larger_than_a_document(connection: Connection) -> None:
    ids = [f"A{n:023X}" for n in range(20)]
    connection.users.insert_many([{"_id": i, "loyalty_points": "x" * 1_000_000} for i in ids])
    ship(connection, *ids)
    assert recount(connection, ids).outcome == "succeeded"
    assert find_mismatches(connection.users.database) == []


def test_a_customer_id_that_is_an_array_is_counted_once(connection: Connection) -> None:
    """A multikey index leads one order into several partitions, so it is not used for them."""
    ship(connection, ["a", 5, ADA], [], str(ADA))
    connection.orders.insert_one({"customer_id": str(ADA), "status": ["Shipped"]})
    connection.users.insert_one({"_id": ADA})
    result = recount(connection)
    assert (result.totals.counted_orders, result.totals.unknown_customers) == (3, 1)
    assert result.totals.orders_without_customer == 1
    assert not result.count.has_usable_indexes
    assert find_mismatches(connection.users.database) == []


@pytest.mark.parametrize(
    "options", [{"hidden": True}, {"partialFilterExpression": {"status": "Shipped"}}]
)
def test_without_an_index_a_single_query_counts_all_customers(
    connection: Connection, options: dict[str, Any]
) -> None:
    connection.users.insert_one({"_id": ADA})
    ship(connection, ADA, str(ADA).upper())
    connection.orders.drop_indexes()
    connection.orders.create_index([("status", 1), ("customer_id", 1)], **options)
    # The partial index holds fewer orders than these statuses have.
    result = recount(connection, [ADA, BOB], ORDER_STATUSES="Shipped,Sent")
    assert not result.count.has_usable_indexes
    assert result.count.exact
    assert find_mismatches(connection.users.database) == []


def test_each_requested_customer_has_a_row(connection: Connection) -> None:
    connection.users.insert_many([{"_id": ADA, "loyalty_points": 2}, {"_id": BOB}, {"_id": 5}])
    ship(connection, str(ADA), str(ADA).upper(), BOB, 5, "unknown", "other")
    rows: list[Row] = []
    customers = [(c, indexable_forms(c)) for c in (ADA, 5, "unknown", EVE)]
    result = OrderCounter(connection, SETTINGS, ignore_progress).count_customers(
        rows.append, customers
    )
    found = {
        row.customer: (row.orders, len(row.users)) for row in rows if isinstance(row, CustomerCount)
    }
    assert found == {ADA: (2, 1), 5: (1, 1), "unknown": (1, 0)}
    assert len(rows) == 3
    assert result.exact


def test_a_customer_in_a_later_chunk_of_ids_is_counted(connection: Connection) -> None:
    connection.users.insert_many([{"_id": n} for n in range(5_000)])
    ship(connection, 0, 4_999)
    rows: list[Row] = []
    customers = [(n, [n]) for n in range(5_000)]
    OrderCounter(connection, SETTINGS, ignore_progress).count_customers(rows.append, customers)
    assert len(rows) == 5_000
    assert sum(row.orders for row in rows) == 2


def test_a_count_longer_than_the_servers_snapshots_continues_at_a_new_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    window = ["--setParameter", "minSnapshotHistoryWindowInSeconds=0"]
    with Deployment(options=window, parent=MEMORY) as deployment, deployment.client() as client:
        settings = settings_for(deployment.uri, COUNT_WORKERS="1")
        shop = client.oms_db
        shop.users.insert_many([{"_id": n} for n in range(40)])
        shop.orders.insert_many([{"customer_id": n % 40, "status": "Shipped"} for n in range(400)])
        calls = 0

        def discard_now_and_then(_: str) -> None:
            nonlocal calls
            calls += 1
            if calls in (4, 12):  # of two for each of the 12 partitions
                discard_snapshots(client)

        with connect(settings, writing=True) as connection:
            create_index(connection.orders, settings)
            request = RecountRequest(find_boundaries=fixed_boundaries(range(4, 40, 4)))
            before = datetime.now(UTC)
            result = run_recount(
                connection, settings, History(None, settings), request, discard_now_and_then
            )
        assert find_mismatches(shop) == []
        assert not result.count.exact
        assert result.count.cluster_time is None
        assert len(result.count.snapshots) > 1
        assert result.as_of == min(result.count.snapshots).as_datetime()
        assert (before - result.as_of).total_seconds() < 5
        assert result.totals.counted_orders == 400
        assert "snapshot_restarted done=" in caplog.text
        assert "count_retry" not in caplog.text


def test_a_boundary_that_fails_after_some_partitions_repeats_the_whole_count(
    connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise a restart at a new snapshot would end with the partitions found so far."""
    connection.users.insert_many([{"_id": n} for n in range(50)])
    ship(connection, *range(50))
    attempts = 0

    def fail_once(_users: Any, _key: str, type_name: str) -> Iterator[Any]:
        nonlocal attempts
        if type_name != "number":
            return
        attempts += 1
        yield from range(1, 40)  # more than are counted in advance
        if attempts == 1:
            raise SnapshotTooOld("no snapshot")
        yield from range(40, 50)

    history = History(None, SETTINGS)
    request = RecountRequest(find_boundaries=fail_once)
    result = run_recount(connection, SETTINGS, history, request)
    assert result.totals.counted_orders == result.totals.users == 50
    assert result.count.exact
    assert "count_retry attempt=2" in caplog.text
    assert find_mismatches(connection.users.database) == []


def test_an_array_that_is_stored_between_two_snapshots_does_not_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    window = ["--setParameter", "minSnapshotHistoryWindowInSeconds=0"]
    with Deployment(options=window, parent=MEMORY) as deployment, deployment.client() as client:
        settings = settings_for(deployment.uri, COUNT_WORKERS="1")
        shop = client.oms_db
        last = datetime(2026, 1, 1, tzinfo=UTC)  # in the last partition
        shop.users.insert_many([{"_id": n} for n in (*range(40), last)])
        shop.orders.insert_many([{"customer_id": n, "status": "Shipped"} for n in range(40)])
        calls = 0

        def store_an_array_once(_: str) -> None:
            nonlocal calls
            calls += 1
            if calls == 4:
                shop.orders.insert_one({"customer_id": last, "status": ["Shipped"]})
                discard_snapshots(client)

        with connect(settings, writing=True) as connection:
            create_index(connection.orders, settings)
            request = RecountRequest(find_boundaries=fixed_boundaries(range(4, 40, 4)))
            history = History(None, settings)
            result = run_recount(connection, settings, history, request, store_an_array_once)
        assert "snapshot_restarted done=" in caplog.text
        assert find_mismatches(shop) == []
        assert result.totals.counted_orders == 40


def discard_snapshots(client: MongoClient[Any]) -> None:
    """Write until the oldest snapshot that the server keeps is a new one."""
    before = client.admin.command("hello")["$clusterTime"]["clusterTime"]

    def is_too_old() -> bool:
        client.other.writes.insert_one({})
        concern = {"level": "snapshot", "atClusterTime": before}
        read = {"find": "users", "singleBatch": True, "limit": 1, "readConcern": concern}
        try:
            client.oms_db.command(read)
        except OperationFailure as error:
            return error.code == 239
        return False

    wait_until("a snapshot that is too old", is_too_old)


class SnapshotIgnoringUsers:
    """The users of a server that ignores read concerns, as some compatible servers do."""

    def __init__(self, connection: Connection) -> None:
        self._users = connection.users
        self.name, self.full_name = self._users.name, self._users.full_name
        self.find_one = self._users.find_one
        self.database = self

    def command(self, command: dict[str, Any]) -> Any:
        del command["readConcern"]
        return self._users.database.command(command)


def test_a_server_that_ignores_the_read_concern_has_no_snapshots(connection: Connection) -> None:
    users: Any = SnapshotIgnoringUsers(connection)
    server = replace(connection, users=users)
    assert pin_cluster_time(server) is not None  # no users: they are empty at any time
    connection.users.insert_one({})
    assert pin_cluster_time(server) is None
    assert pin_cluster_time(connection) is not None


def test_a_count_reads_at_the_wanted_cluster_time_or_later(connection: Connection) -> None:
    connection.users.insert_one({"_id": 1})
    earlier = pin_cluster_time(connection)
    ship(connection, 1)
    later = pin_cluster_time(connection)
    assert earlier is not None
    assert later is not None
    assert later > earlier
    for wanted in (earlier, later):
        pinned = pin_cluster_time(connection, wanted)
        assert pinned is not None
        assert pinned >= later


def test_a_count_without_snapshots_is_as_of_its_start(connection: Connection) -> None:
    started_at = datetime(2026, 1, 2, tzinfo=UTC)
    for server, use_snapshot in (
        (connection, False),
        (replace(connection, supports_snapshots=False), True),
    ):
        counter = OrderCounter(server, SETTINGS, ignore_progress, use_snapshot=use_snapshot)
        count = counter.count_all(lambda _: None)
        assert not count.exact
        assert (count.cluster_time, count.snapshots) == (None, ())
        assert Result(started_at=started_at, count=count).as_of == started_at


def test_other_fields_of_a_user_do_not_change_the_count(connection: Connection) -> None:
    fields = ("user", "users", "customer", "orders", "points", "up_to_date", "number")
    values: tuple[Any, ...] = ([], [1], {"_id": 7}, "text")
    connection.users.insert_many(
        {"_id": ObjectId(), **dict.fromkeys(fields, value)} for value in values
    )
    ship(connection, *(str(user["_id"]) for user in connection.users.find()))
    recount(connection)
    assert [user["loyalty_points"] for user in connection.users.find()] == [1] * len(values)


def once(action: Callable[[], None]) -> Callable[[str], None]:
    """Return a progress callback that does something at its first call."""
    actions = [action]
    return lambda _: actions.pop()() if actions else None


def test_an_order_that_arrives_after_the_count_does_not_refuse_the_recount(
    connection: Connection,
) -> None:
    connection.users.insert_one({"_id": ADA})
    result = run_recount(
        connection,
        SETTINGS,
        History(None, SETTINGS),
        on_progress=once(lambda: ship(connection, ADA)),
    )
    assert result.refusal is None
    assert result.totals.counted_orders == 0


def test_a_transient_error_of_explain_does_not_cause_a_single_query(
    connection: Connection, deployment: Deployment
) -> None:
    connection.users.insert_one({"_id": ADA})
    ship(connection, ADA)
    interrupted = 11601
    with faults.fail_command(deployment.servers[0], "explain", 1, errorCode=interrupted):
        result = recount(connection)
    assert result.count.has_usable_indexes
    assert find_mismatches(connection.users.database) == []


def test_customers_with_large_ids_are_counted_in_several_queries(connection: Connection) -> None:
    ids = [f"{n:01000000}" for n in range(8)]
    for customer in ids:
        connection.users.insert_one({"_id": customer})
        ship(connection, customer)
    customers = [(customer, indexable_forms(customer)) for customer in ids]
    request = RecountRequest(customers=customers)
    reports: list[str] = []
    result = run_recount(connection, SETTINGS, History(None, SETTINGS), request, reports.append)
    assert result.written == 8
    assert len(reports) > 2
    assert find_mismatches(connection.users.database) == []


def test_progress_is_reported_between_the_queries_about_statuses(connection: Connection) -> None:
    connection.users.insert_one({"_id": ADA})
    reports: list[str] = []
    check_uncounted(connection, SETTINGS, reports.append)
    assert reports == ["", ""]
