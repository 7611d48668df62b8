"""The plan of the server for a query: its stages, however the server nests them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pymongo.collection import Collection

from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.values import Document
from loyalty.recount.order_filter import COLLATION

UNBOUNDED = (["[MinKey, MaxKey]"], ["[MaxKey, MinKey]"])
EMPTY_RANGE = {"$gt": "", "$lt": "\x01"}


def explain(
    collection: Collection[Any], query: Document, group_by: str, index_name: str = ""
) -> list[Document]:
    """Return every stage of the plan for a query that is grouped by one of its fields."""
    group = {"_id": f"${group_by}", "count": {"$sum": 1}}
    command: dict[str, Any] = {
        "aggregate": collection.name,
        "pipeline": [{"$match": query}, {"$group": group}],
        "cursor": {},
        "collation": COLLATION,
    }
    if index_name:
        command["hint"] = index_name
    with map_driver_errors("find", collection):
        reply = collection.database.command("explain", command, verbosity="queryPlanner")
    return list(_stages(reply))


def _stages(plan: Any) -> Iterator[Document]:
    """Yield every stage of a plan, however the server nests them."""
    if isinstance(plan, dict):
        if isinstance(plan.get("stage"), str):
            yield plan
        for part in plan.values():
            yield from _stages(part)
    elif isinstance(plan, list):
        for part in plan:
            yield from _stages(part)


def index_scans(stages: list[Document]) -> list[Document]:
    return [stage for stage in stages if stage["stage"] == "IXSCAN"]
