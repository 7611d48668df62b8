"""The record of a recount."""

from __future__ import annotations

import random
import socket
from datetime import timedelta
from typing import Any

import pytest
from conftest import settings_for
from pymongo.database import Database

from config import VERSION
from loyalty.errors import ConfigurationError
from loyalty.history import History
from loyalty.mongo.connection import connect
from loyalty.recount.runner import run_recount
from sandbox.shop import Shop


def test_a_record_tells_what_a_recount_did(database: Database[Any], uri: str) -> None:
    Shop(database, random.Random(5)).fill(100, 1_000, dirty=0.3)
    settings = settings_for(uri)
    with connect(settings, writing=True) as connection:
        history = History(connection.recounts)
        result = run_recount(connection, settings, history)
        later = result.started_at + timedelta(hours=1)
        assert history.age(later) == later - result.as_of.replace(microsecond=0)
        record = dict(history.newest(1)[0])

    totals = result.totals
    for name in ("started_at", "finished_at"):  # the server keeps milliseconds
        assert abs(record.pop(name) - getattr(result, name)) < timedelta(milliseconds=1)
    assert record == {
        "recorded_by": "loyalty-microservice",
        "seconds": result.seconds,
        "as_of": result.as_of,
        "cluster_time": result.cluster_time,
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
    }
    assert all(record[name] > 0 for name in ("counted_orders", "changed", "unknown_customers"))


def test_without_a_collection_nothing_is_recorded(database: Database[Any], uri: str) -> None:
    settings = settings_for(uri, RECOUNTS_COLLECTION="none")
    with connect(settings, writing=True) as connection:
        run_recount(connection, settings, History(connection.recounts))
    assert "loyalty_recounts" not in database.list_collection_names()


@pytest.mark.parametrize("foreign", [{"finished_at": 1}, {"recorded_by": "somebody"}])
def test_a_collection_with_documents_of_others_is_no_place_for_records(
    database: Database[Any], uri: str, foreign: dict[str, Any]
) -> None:
    settings = settings_for(uri)
    with connect(settings, writing=True) as connection:
        history = History(connection.recounts)
        run_recount(connection, settings, history)
        assert history.check() is None
        database.loyalty_recounts.insert_one(foreign)
        with pytest.raises(
            ConfigurationError, match="loyalty_recounts holds documents that are not"
        ):
            history.check()
        assert len(history.newest(10)) == 1
