"""The records of recounts."""

from __future__ import annotations

import random
import socket
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import settings_for
from pymongo.database import Database

from config import VERSION, Settings
from loyalty.errors import ConfigurationError, RecountRefused
from loyalty.heartbeat import Heartbeat
from loyalty.history import History
from loyalty.mongo.connection import connect
from loyalty.recount.result import Result
from loyalty.recount.runner import run_recount
from sandbox.shop import Shop


def recount_with(settings: Settings, history: History) -> Result:
    """Do a recount of the test's shop, which gets a user and an order if it has none."""
    with connect(settings, writing=True) as connection:
        if connection.users.find_one() is None:
            connection.users.insert_one({"_id": 1})
        if connection.orders.find_one() is None:
            connection.orders.insert_one({"customer_id": 1, "status": "Shipped"})
        return run_recount(connection, settings, history)


def record(at: datetime, outcome: str = "succeeded") -> dict[str, Any]:
    return {"finished_at": at, "as_of": at, "outcome": outcome}


def test_a_record_has_the_result_and_the_settings(database: Database[Any], uri: str) -> None:
    Shop(database, random.Random(5)).fill(100, 1_000, dirty=0.3)
    settings = settings_for(uri, RETENTION="30d")
    with connect(settings, writing=True) as connection:
        history = History(connection.recounts, settings)
        result = run_recount(connection, settings, history)
        later = result.started_at + timedelta(hours=1)
        assert history.compute_age(later) == later - result.as_of.replace(microsecond=0)
        assert history.compute_age(result.as_of - timedelta(days=3)) == timedelta(0)
        stored = dict(history.find_newest(1)[0])
        assert history.find_last_success() == stored

    totals = result.totals
    assert stored.pop("_id")
    assert stored.pop("expires_at") - stored["finished_at"] == timedelta(days=30)
    for name in ("started_at", "finished_at"):  # the server keeps milliseconds
        assert abs(stored.pop(name) - getattr(result, name)) < timedelta(milliseconds=1)
    assert stored == {
        "recorded_by": "loyalty-microservice",
        "seconds": result.seconds,
        "as_of": result.as_of,
        "cluster_time": result.count.cluster_time,
        "exact": True,
        "outcome": "succeeded",
        "counted_orders": totals.counted_orders,
        "changed": totals.changed,
        "increased": totals.increased,
        "decreased": totals.decreased,
        "unknown_customers": totals.unknown_customers,
        "orders_of_unknown_customers": totals.orders_of_unknown_customers,
        "orders_without_customer": totals.orders_without_customer,
        "failed_updates": 0,
        "error": None,
        "host": socket.gethostname(),
        "version": VERSION,
        "settings": {
            "orders": "orders",
            "users": "users",
            "points_field": "loyalty_points",
            "order_statuses": ["Shipped"],
            "points_per_order": 1,
            "status_field": "status",
            "customer_field": "customer_id",
            "user_key_field": "_id",
            "order_filter": "",
        },
    }
    assert all(stored[name] > 0 for name in ("counted_orders", "changed", "unknown_customers"))


def test_an_index_removes_records_when_they_expire(database: Database[Any], uri: str) -> None:
    settings = settings_for(uri)
    recount_with(settings, History(database.loyalty_recounts, settings))
    index = database.loyalty_recounts.index_information()["loyalty_expires_at"]
    assert index["key"] == [("expires_at", 1)]
    assert index["expireAfterSeconds"] == 0
    assert index["partialFilterExpression"] == {"recorded_by": "loyalty-microservice"}


def test_a_refused_recount_records_that_no_user_was_changed(
    database: Database[Any], uri: str
) -> None:
    database.users.insert_many({"_id": n, "loyalty_points": 3} for n in range(20))
    settings = settings_for(uri)
    history = History(database.loyalty_recounts, settings)
    with pytest.raises(RecountRefused):
        recount_with(settings, history)
    (stored,) = history.find_newest(10)
    assert (stored["outcome"], stored["changed"]) == ("refused", 0)


def test_an_incomplete_recount_records_only_the_users_that_were_written(
    database: Database[Any], uri: str
) -> None:
    database.users.insert_many({"_id": n} for n in range(1_000))
    database.orders.insert_one({"customer_id": 7, "status": "Shipped"})
    database.command("collMod", "users", validator={"loyalty_points": {"$ne": 1}})
    settings = settings_for(uri)
    history = History(database.loyalty_recounts, settings)
    recount_with(settings, history)
    (stored,) = history.find_newest(10)
    assert (stored["changed"], stored["failed_updates"]) == (999, 1)


def test_the_recount_after_a_refused_first_one_is_still_the_first(
    database: Database[Any], uri: str
) -> None:
    database.users.insert_many({"_id": n, "loyalty_points": 3} for n in range(20))
    settings = settings_for(uri)
    history = History(database.loyalty_recounts, settings)
    with pytest.raises(RecountRefused):
        recount_with(settings, history)
    database.users.delete_many({"_id": {"$gte": 5}})
    (warning,) = recount_with(settings, history).warnings
    assert warning == "5 of the 5 users with points lose points in the first recount"


@pytest.mark.parametrize("outcome", ["failed", "refused"])
def test_a_failed_or_refused_recount_is_not_the_last_success(
    database: Database[Any], uri: str, outcome: str
) -> None:
    settings = settings_for(uri)
    history = History(database.loyalty_recounts, settings)
    history.write(record(datetime.now(UTC), outcome=outcome))
    assert len(history.find_newest(10)) == 1
    assert history.find_last_success() is None


def test_without_a_collection_nothing_is_recorded(database: Database[Any], uri: str) -> None:
    settings = settings_for(uri, RECOUNTS_COLLECTION="none")
    recount_with(settings, History(None, settings))
    assert "loyalty_recounts" not in database.list_collection_names()


@pytest.mark.parametrize("setting", ["USERS_COLLECTION", "ORDERS_COLLECTION", "USER_POINTS_FIELD"])
def test_two_shops_in_one_database_read_only_their_own_records_and_heartbeats(
    database: Database[Any], uri: str, setting: str
) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    heartbeat = Heartbeat(
        live_since=now, as_of=now, last_event=None, last_update=None, users_updated=1, waiting=0
    )
    one, other = (
        History(database.loyalty_recounts, settings_for(uri, **{setting: name}))
        for name in ("a", "b")
    )
    one.write(record(now))
    one.write_heartbeat(heartbeat)
    assert len(one.find_newest(10)) == 1
    assert one.compute_age(now) == timedelta(0)
    assert other.find_newest(10) == []
    assert other.compute_age(now) is None
    assert other.find_heartbeat() is None
    other.write_heartbeat(replace(heartbeat, users_updated=2))
    found = [history.find_heartbeat() for history in (one, other)]
    assert [beat and beat.users_updated for beat in found] == [1, 2]


def test_the_age_is_that_of_the_newest_as_of_of_all_hosts(
    database: Database[Any], uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = History(database.loyalty_recounts, settings_for(uri))
    now = datetime.now(UTC).replace(microsecond=0)
    history.write(record(now - timedelta(hours=1)))
    earlier = record(now - timedelta(hours=3))
    history.write({**earlier, "finished_at": now + timedelta(hours=7)})  # with a wrong clock
    assert history.compute_age(now) == timedelta(hours=1)
    for host, minutes in (("a", 1), ("b", 5)):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        as_of = now - timedelta(minutes=minutes)
        history.write_heartbeat(
            Heartbeat(
                live_since=as_of,
                as_of=as_of,
                last_event=None,
                last_update=None,
                users_updated=0,
                waiting=0,
            )
        )
    assert history.compute_age(now) == timedelta(minutes=1)


OTHER_SETTINGS = [
    ("ORDERS_COLLECTION", "sales", "orders='sales'"),
    ("ORDER_STATUSES", "Sent", "order_statuses=['Sent']"),
    ("POINTS_PER_ORDER", "10", "points_per_order=10"),
    ("ORDER_STATUS_FIELD", "state", "status_field='state'"),
    ("ORDER_CUSTOMER_FIELD", "buyer", "customer_field='buyer'"),
    ("USER_KEY_FIELD", "email", "user_key_field='email'"),
    ("ORDER_FILTER", '{"a": {"$ne": 1}}', 'order_filter=\'{"a": {"$ne": 1}}\''),
]


@pytest.mark.parametrize(("setting", "value", "difference"), OTHER_SETTINGS)
def test_another_service_with_other_settings_causes_one_warning_that_names_it(
    database: Database[Any],
    uri: str,
    caplog: pytest.LogCaptureFixture,
    setting: str,
    value: str,
    difference: str,
) -> None:
    ours = History(database.loyalty_recounts, settings_for(uri))
    theirs = History(database.loyalty_recounts, settings_for(uri, **{setting: value}))
    start = datetime.now(UTC)
    for n in range(3):
        at = start + timedelta(seconds=n)
        theirs.write(record(at))
        database.loyalty_recounts.update_many(
            {f"settings.{difference.split('=')[0]}": {"$ne": None}}, {"$set": {"host": "berlin"}}
        )
        ours.write(record(at + timedelta(seconds=0.5)))
    warnings = [m for m in caplog.messages if m.startswith("other_service") and difference in m]
    assert len(warnings) == 1
    assert "on host berlin" in warnings[0]


def test_the_first_recount_of_a_process_names_the_other_service_if_it_is_refused(
    database: Database[Any], uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    now = datetime.now(UTC)
    History(database.loyalty_recounts, settings_for(uri)).write(record(now))
    other = settings_for(uri, POINTS_PER_ORDER="10")
    History(database.loyalty_recounts, other).write(record(now, outcome="refused"))
    assert "other_service" in caplog.text
    assert f"on host {socket.gethostname()} last wrote the same points" in caplog.text
    assert "other: points_per_order=1" in caplog.text


def test_another_service_whose_recounts_are_refused_causes_no_warning(
    database: Database[Any], uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours = History(database.loyalty_recounts, settings_for(uri))
    theirs = History(database.loyalty_recounts, settings_for(uri, ORDER_STATUSES="shipped"))
    now = datetime.now(UTC)
    ours.write(record(now))
    theirs.write(record(now + timedelta(seconds=1), outcome="refused"))
    caplog.clear()  # their first record warns of ours
    theirs.write(record(now + timedelta(seconds=2), outcome="refused"))
    ours.write(record(now + timedelta(seconds=3)))
    assert "other_service" not in caplog.text


def test_each_collection_without_a_ttl_index_causes_one_warning(
    database: Database[Any], uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An index of the same name with other keys is in the way, until it is dropped."""
    settings = settings_for(uri)
    history = History(database.loyalty_recounts, settings)
    for name in ("loyalty_recounts", "loyalty_changes"):
        database[name].create_index("other", name="loyalty_expires_at")
    for _ in range(2):
        history.create_expiry_index(database.loyalty_recounts)
        history.create_expiry_index(database.loyalty_changes)
    warnings = [m for m in caplog.messages if m.startswith("expiry_index_failed")]
    assert len(warnings) == 2
    database.loyalty_changes.drop_index("loyalty_expires_at")
    history.create_expiry_index(database.loyalty_changes)
    assert database.loyalty_changes.index_information()["loyalty_expires_at"]["key"] == [
        ("expires_at", 1)
    ]


@pytest.mark.parametrize(
    "interference", ["the same settings", "another target", "earlier settings"]
)
def test_records_of_the_same_settings_or_another_target_cause_no_warning(
    database: Database[Any], uri: str, caplog: pytest.LogCaptureFixture, interference: str
) -> None:
    values = {
        "the same settings": {},
        "another target": {"USERS_COLLECTION": "members", "POINTS_PER_ORDER": "5"},
        "earlier settings": {"POINTS_PER_ORDER": "5"},
    }[interference]
    other = History(database.loyalty_recounts, settings_for(uri, **values))
    ours = History(database.loyalty_recounts, settings_for(uri))
    now = datetime.now(UTC)
    other.write(record(now))
    for n in range(1, 4):
        at = now + timedelta(seconds=n)
        ours.write(record(at))
        if interference != "earlier settings":
            other.write(record(at + timedelta(seconds=0.5)))
    assert "other_service" not in caplog.text


@pytest.mark.parametrize(
    ("setting", "value", "same"),
    [
        ("ORDER_STATUSES", "Shipped,Sent", "Sent,Shipped"),
        ("ORDER_FILTER", '{"a": 1, "b": 2}', '{"b": 2, "a": 1}'),
    ],
)
def test_the_order_of_statuses_and_of_conditions_causes_no_warning(
    database: Database[Any],
    uri: str,
    caplog: pytest.LogCaptureFixture,
    setting: str,
    value: str,
    same: str,
) -> None:
    histories = [
        History(database.loyalty_recounts, settings_for(uri, **{setting: text}))
        for text in (value, same)
    ]
    now = datetime.now(UTC)
    for n in range(4):
        histories[n % 2].write(record(now + timedelta(seconds=n)))
    assert "other_service" not in caplog.text


@pytest.mark.parametrize("foreign", [{"finished_at": 1}, {"recorded_by": "somebody"}])
def test_a_collection_with_foreign_documents_is_not_accepted_for_records(
    database: Database[Any], uri: str, foreign: dict[str, Any]
) -> None:
    settings = settings_for(uri)
    history = History(database.loyalty_recounts, settings)
    recount_with(settings, history)
    history.check_collection()
    database.loyalty_recounts.insert_one(foreign)
    with pytest.raises(
        ConfigurationError, match="loyalty_recounts holds documents of other programs"
    ):
        history.check_collection()
    assert len(history.find_newest(10)) == 1
