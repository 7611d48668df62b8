"""The record of a recount."""

from __future__ import annotations

import random
import socket
from datetime import UTC, datetime, timedelta
from typing import Any

from conftest import settings_for
from pymongo.database import Database

from config import VERSION
from loyalty.history import History
from loyalty.mongo import connect
from loyalty.recount import Recount
from sandbox.shop import Shop


def test_a_record_tells_what_a_recount_did_and_expires_after_90_days(
    database: Database[Any], uri: str
) -> None:
    Shop(database, random.Random(5)).fill(100, 1_000, dirty=0.3)
    settings = settings_for(uri)
    started = datetime.now(UTC).replace(microsecond=0)
    with connect(settings, writing=True) as connection:
        history = History(connection.recounts)
        assert history.age(started) is None
        with Recount(connection, settings, started) as recount:
            recount.count()
        history.write(recount, "succeeded", None, started + timedelta(seconds=3))
        history.write(recount, "failed", "why", started + timedelta(seconds=5))
        age = history.age(started + timedelta(hours=1))
        newest = history.newest(10)

    failed, succeeded = newest
    totals = recount.totals
    assert succeeded == {
        "started_at": started,
        "finished_at": started + timedelta(seconds=3),
        "as_of": totals.as_of,
        "exact": True,
        "outcome": "succeeded",
        "counted_orders": totals.counted_orders,
        "changed": totals.changed,
        "increased": totals.increased,
        "decreased": totals.decreased,
        "unknown_customers": totals.unknown_customers,
        "orders_of_unknown_customers": totals.orders_of_unknown_customers,
        "orders_without_customer": totals.orders_without_customer,
        "error": None,
        "host": socket.gethostname(),
        "version": VERSION,
    }
    assert all(succeeded[name] > 0 for name in ("counted_orders", "changed", "unknown_customers"))
    assert (failed["outcome"], failed["error"]) == ("failed", "why")
    assert totals.as_of is not None
    assert age == started + timedelta(hours=1) - totals.as_of
    indexes = database.loyalty_recounts.index_information()
    assert indexes["finished_at_1"]["expireAfterSeconds"] == 90 * 24 * 3600


def test_without_a_collection_nothing_is_recorded(database: Database[Any], uri: str) -> None:
    settings = settings_for(uri, RECOUNTS_COLLECTION="")
    with connect(settings, writing=True) as connection:
        with Recount(connection, settings, datetime.now(UTC)) as recount:
            recount.count()
        History(connection.recounts).write(recount, "succeeded", None, datetime.now(UTC))
    assert "loyalty_recounts" not in database.list_collection_names()
