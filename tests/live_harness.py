"""A shop, and a service in the test's own process that does live updates of it."""

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
from loyalty.live.state import LiveState
from loyalty.recount.index import index_keys
from loyalty.service import Service
from sandbox.mongod import DEADLINE_SECONDS, Deployment
from sandbox.shop import find_mismatches

UPDATE_SECONDS = 0.05


@dataclass
class LiveHarness:
    """The shop, and the service after its first full recount."""

    shop: Database[Any]
    service: Service

    def update(self, seconds: float = UPDATE_SECONDS) -> None:
        """Do live updates for about `seconds`."""
        self.service.run_between(seconds, ignore_progress)

    def update_until(
        self, is_ready: Callable[[], object], deadline_seconds: float = DEADLINE_SECONDS
    ) -> None:
        deadline = time.monotonic() + deadline_seconds
        while not is_ready():
            assert time.monotonic() < deadline
            self.update()

    def update_until_exact(self) -> None:
        """Do live updates until all points are exact; fail after a while."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while find_mismatches(self.shop) and time.monotonic() < deadline:
            self.update()
        assert find_mismatches(self.shop) == []

    def recount(self) -> str:
        return self.service.recount(ignore_progress).status

    @property
    def state(self) -> LiveState:
        return self.service.updater.state

    @property
    def is_live(self) -> bool:
        return self.state.has_stream


@contextmanager
def live_service(
    deployment: Deployment,
    shop: Database[Any],
    service_options: dict[str, Any] | None = None,
    **values: str,
) -> Iterator[LiveHarness]:
    """Let a service with live updates connect and recount; disconnect it at the end."""
    defaults = {"MONGODB_URI": deployment.uri_for(database=shop.name), "LIVE_UPDATES": "yes"}
    settings = load(defaults | values)
    service = Service(settings, lambda: settings, **(service_options or {}))
    try:
        service.connect()
        service.recount(ignore_progress)
        yield LiveHarness(shop, service)
    finally:
        service.disconnect()


def make_index(shop: Database[Any]) -> None:
    shop.orders.create_index(index_keys(settings_for("mongodb://localhost")))


def points(shop: Database[Any]) -> list[Any]:
    return [user.get("loyalty_points") for user in shop.users.find().sort("_id")]
