"""A shop, and a service that does live updates for it in the test's own process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from conftest import settings_for
from pymongo.database import Database

from config import load
from loyalty.concurrency import ignore_progress
from loyalty.daemon import RecountOutcome
from loyalty.recount.index import index_keys
from loyalty.service import Service
from sandbox.mongod import SECONDS, Deployment
from sandbox.shop import disagreements

QUICK = 0.05  # seconds of live updates


@dataclass
class Stage:
    """The shop, and the service after its first recount."""

    shop: Database[Any]
    service: Service

    def update(self, seconds: float = QUICK) -> None:
        """Do live updates for about so long."""
        self.service.run_between(seconds, ignore_progress)

    def update_until(self, ready: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS
        while not ready():
            assert time.monotonic() < deadline
            self.update()

    def settle(self) -> None:
        """Do live updates until everyone is right; fail after a while."""
        deadline = time.monotonic() + SECONDS
        while disagreements(self.shop) and time.monotonic() < deadline:
            self.update()
        assert disagreements(self.shop) == []

    def recount(self) -> RecountOutcome:
        return self.service.recount(ignore_progress)

    @property
    def is_live(self) -> bool:
        return self.service._live is not None


@contextmanager
def live(deployment: Deployment, shop: Database[Any], **values: str) -> Iterator[Stage]:
    """Let the service connect and recount, and disconnect it at the end."""
    uri = {"MONGODB_URI": deployment.uri_for(database=shop.name), "LIVE_UPDATES": "yes"}
    settings = load(uri | values)
    service = Service(settings, lambda: settings)
    try:
        service.connect()
        service.recount(ignore_progress)
        yield Stage(shop, service)
    finally:
        if service._live:
            service._live.close()
        if service._connection:
            service._connection.client.close()


def make_index(shop: Database[Any]) -> None:
    shop.orders.create_index(index_keys(settings_for("mongodb://localhost")))


def points(shop: Database[Any]) -> list[Any]:
    return [user.get("loyalty_points") for user in shop.users.find().sort("_id")]
