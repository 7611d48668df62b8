"""The index on orders that makes a count fetch no order: what its plan tells, and making it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pymongo.collection import Collection

from config import Settings
from loyalty.errors import ConfigurationError, ServiceError
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.values import Document, format_value
from loyalty.recount.order_filter import COLLATION

_PARALLEL_ARRAYS = 171
_LARGE = 100_000  # orders that are slow to read without an index


@dataclass(frozen=True, slots=True)
class Plan:
    """How the server would read the orders of one range."""

    supports_partitions: bool = False
    """Whether an index leads to the orders of a range; without, each would read all of them."""
    status_is_multikey: bool = True
    """Whether a status may be an array, so that each has to be looked at."""
    needs_fetch: bool = True
    """Whether orders are fetched, and not only the index read."""
    multikey: bool = False
    """Whether the index is there, but some order has held an array in one of its fields."""

    @property
    def advice(self) -> str:
        """What to do about the index; "" if nothing."""
        if self.supports_partitions and not self.status_is_multikey:
            return "there; orders are fetched all the same" if self.needs_fetch else ""
        if self.multikey:
            return (
                "there, but not used, as if an order had once held an array: drop it, and make it "
                "again with --create-index"
            )
        return "none that serves a recount: make it with --create-index"


def index_keys(settings: Settings) -> list[tuple[str, int]]:
    """Return the keys of the index."""
    return [(settings.status_field, 1), (settings.customer_field, 1)]


def inspect_plan(orders: Collection[Any], settings: Settings) -> Plan:
    """Ask the server how it would read a range; the worst case where it does not say.

    An index knows of each of its fields whether any order has ever held an array there.
    """
    wanted = {
        settings.status_field: {"$in": list(settings.order_statuses)},
        settings.customer_field: {"$gte": ""},
    }
    group = {"_id": f"${settings.customer_field}", "orders": {"$sum": 1}}
    asked = {
        "aggregate": orders.name,
        "pipeline": [{"$match": wanted}, {"$group": group}],
        "cursor": {},
        "collation": COLLATION,
    }
    try:
        with map_driver_errors("find", orders):
            reply = orders.database.command("explain", asked, verbosity="queryPlanner")
    except ServiceError:  # the count itself will say what is wrong
        return Plan()
    change_stream_pipeline = list(_stages(reply))
    scans = [
        stage.get("multiKeyPaths", {})
        for stage in change_stream_pipeline
        if stage["stage"] == "IXSCAN"
    ]
    if not scans or any(stage["stage"] == "COLLSCAN" for stage in change_stream_pipeline):
        return Plan()
    return Plan(
        supports_partitions=all(scan.get(settings.customer_field) == [] for scan in scans),
        status_is_multikey=any(scan.get(settings.status_field) != [] for scan in scans),
        needs_fetch=any(stage["stage"] == "FETCH" for stage in change_stream_pipeline),
        multikey=any(any(scan.values()) for scan in scans if settings.customer_field in scan),
    )


def _stages(plan: Any) -> Iterator[Document]:
    """Yield every stage of a plan, however the server nests them."""
    if isinstance(plan, dict):
        if isinstance(plan.get("stage"), str):
            yield plan
        for name, part in plan.items():
            if name != "rejectedPlans":
                yield from _stages(part)
    elif isinstance(plan, list):
        for part in plan:
            yield from _stages(part)


def missing_index_hint(orders: Collection[Any], settings: Settings) -> str:
    """Return what to do where `orders` is large and no index leads to a customer's; else ""."""
    with suppress(ServiceError), map_driver_errors("count", orders):
        if orders.estimated_document_count() > _LARGE:
            plan = inspect_plan(orders, settings)
            return "" if plan.supports_partitions else plan.advice
    return ""


def create_index(orders: Collection[Any], settings: Settings) -> str:
    """Make the index, if it is not there, and return its name. Raises ServiceError."""
    with map_driver_errors("find", orders):
        there = orders.database.list_collection_names(authorizedCollections=True)
    if orders.name not in there:
        raise ConfigurationError(f"there is no collection {orders.full_name} to make an index on")
    try:
        with map_driver_errors("createIndex", orders):
            return orders.create_index(index_keys(settings), collation=COLLATION)
    except ServiceError as error:
        if getattr(error.__cause__, "code", None) != _PARALLEL_ARRAYS:
            raise
        both = {"$and": [{"$or": array_conditions(field)} for field, _ in index_keys(settings)]}
        with map_driver_errors("find", orders):
            found = [format_value(order["_id"]) for order in orders.find(both, {"_id": 1}).limit(5)]
        names = f"{settings.status_field} and {settings.customer_field}"
        raise ConfigurationError(
            f"no index can be made on {orders.full_name} while an order holds arrays in both "
            f"{names}, such as the order with _id {', '.join(found)}"
        ) from error


def array_conditions(field: str) -> list[Document]:
    """Return conditions, one of which is true of a document with an array in `field`, or above."""
    parts = field.split(".")
    return [{".".join(parts[:n]): {"$type": "array"}} for n in range(1, len(parts) + 1)]
