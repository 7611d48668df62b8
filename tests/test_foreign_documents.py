"""Documents that are not the service's: it neither expires them nor takes their collection."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from conftest import MEMORY, Command
from pymongo import MongoClient
from pymongo.database import Database

from loyalty.mongo.privileges import OWNER_FILTER
from sandbox.mongod import Deployment, wait_until

Capture = pytest.CaptureFixture[str]
LONG_AGO = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def expiring() -> Iterator[MongoClient[Any]]:
    """A server that looks for expired documents every second."""
    options = ("--setParameter", "ttlMonitorSleepSecs=1")
    with Deployment(options=options, parent=MEMORY) as deployment, deployment.client() as client:
        yield client


def test_a_document_of_another_program_never_expires(
    expiring: MongoClient[Any], command: Command, capsys: Capture
) -> None:
    host, port = expiring.address or ("", 0)
    uri = f"mongodb://{host}:{port}/harm?replicaSet=rs0"
    shop = expiring.harm
    shop.users.insert_one({"_id": 1})
    shop.orders.insert_one({"customer_id": 1, "status": "Shipped"})
    shop.jobs.insert_many([{"expires_at": LONG_AGO} for _ in range(5)])
    for name in ("RECOUNTS_COLLECTION", "CHANGES_COLLECTION"):
        assert command("--once", MONGODB_URI=uri, **{name: "jobs"}) == 78
        assert "harm.jobs holds documents of other programs" in capsys.readouterr().err
    assert command("--check-config", MONGODB_URI=uri, RECOUNTS_COLLECTION="jobs") in (1, 78)
    assert list(shop.jobs.index_information()) == ["_id_"]

    assert command("--once", MONGODB_URI=uri) == 0
    for name, own_documents in (("loyalty_recounts", 1), ("loyalty_changes", 1)):
        expired = {**OWNER_FILTER, "expires_at": LONG_AGO}
        # A document of another program comes into the collection later.
        shop[name].insert_many([{"expires_at": LONG_AGO, "outcome": "succeeded"}, expired])
        wait_until("expiry", lambda: not shop[name].count_documents(expired))  # noqa: B023 -- now
        assert shop[name].count_documents({"expires_at": LONG_AGO}) == 1
        assert shop[name].count_documents(OWNER_FILTER) == own_documents
    assert shop.jobs.count_documents({}) == 5


@pytest.mark.parametrize("setting", ["RECOUNTS_COLLECTION", "CHANGES_COLLECTION"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("users", "must be different collections"),
        ("orders", "must be different collections"),
        ("seen", "must name a collection that only this service uses"),
    ],
)
def test_records_and_changes_must_have_collections_of_their_own(
    database: Database[Any], command: Command, capsys: Capture, setting: str, name: str, words: str
) -> None:
    database.create_collection("seen", viewOn="users", pipeline=[])
    assert command("--once", **{setting: name}) == 78
    text = capsys.readouterr().err
    assert words in text
    assert setting in text
