"""The covering index on orders, and the index on the key of users: whether the server uses them."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from pymongo.collection import Collection

from config import Settings
from loyalty.errors import ConfigurationError
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.privileges import read_collection_type
from loyalty.mongo.values import SIMPLE_COLLATION, Document
from loyalty.recount.order_filter import counted_orders, equality_fields, other_conditions

LARGE_COLLECTION_DOCUMENTS = 100_000
"""A count of fewer orders, or users, is fast without an index."""

_NO_INDEX = "no usable index; create one with --create-index"
_UNBOUNDED = (None, ["[MinKey, MaxKey]"], ["[MaxKey, MinKey]"])
_EMPTY_RANGE = {"$gt": "", "$lt": "\x01"}
_ALL_BUT_ONE = {"$ne": "\x01"}  # has bounds in an index, and concerns every shard


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """How the server reads one partition of a collection. The default: without a usable index."""

    supports_partitions: bool = False
    """Whether the server can read the documents of a partition from an index, and no others."""
    advice: str = field(default=_NO_INDEX, compare=False)
    """What to do about the index; "" if nothing."""
    index_name: str = field(default="", compare=False)
    """The index with the right keys; "" if there is none."""
    missing_fields: tuple[str, ...] = ()
    """Fields that the index should have, and lacks."""

    @property
    def needs_build(self) -> bool:
        """Whether an index should be created."""
        return not self.index_name or bool(self.missing_fields)


@dataclass(frozen=True, slots=True)
class OrdersPlan(IndexPlan):
    """How the server reads the orders of one partition."""

    status_is_multikey: bool = True
    """Whether an order may have an array as status, so that each status must be checked."""
    needs_fetch: bool = True
    """Whether the server reads orders, and not only the index."""


def index_keys(settings: Settings) -> list[tuple[str, int]]:
    """Return the index keys: equality fields, the status, the customer, other conditions."""
    first = [*equality_fields(settings), settings.status_field, settings.customer_field]
    return [(name, 1) for name in dict.fromkeys([*first, *other_conditions(settings)])]


def inspect_plan(orders: Collection[Any], settings: Settings) -> OrdersPlan:
    """Return the plan for orders. It supports partitions only if the plan for users also does.

    If the server cannot explain its plans, this is the default. Raises DatabaseUnavailable.
    """
    try:
        plan = inspect_orders_plan(orders, settings)
        if plan.supports_partitions:
            users = inspect_users_plan(orders.database[settings.users], settings.user_key_field)
            if not users.supports_partitions:
                return replace(plan, supports_partitions=False, advice=users.advice)
    except ConfigurationError:  # the count itself reports what is wrong
        return OrdersPlan()
    return plan


def inspect_orders_plan(orders: Collection[Any], settings: Settings) -> OrdersPlan:
    """Return the plan with the best index on orders. Raises ServiceError.

    1. Explain the query for an empty range. No index has an advantage there, so the reply has a
       plan with each index that fits, chosen or rejected. Take those with the right keys and
       bounds.
    2. Explain the query for all customers with each of these indexes, because step 1 may have asked
       only one shard. A partial index that lacks some customers has no bounds here.

    Indexes are judged by their key patterns, bounds and multikey paths, never by their names.
    """
    customer, counted = settings.customer_field, counted_orders(settings)
    candidates = _explain(orders, {**counted, customer: _EMPTY_RANGE}, customer)
    scans = [scan for scan in _index_scans(candidates) if _is_bounded(scan, settings)]
    names = [str(scan.get("indexName", "")) for scan in scans]
    plans = []
    for name in dict.fromkeys(names):
        stages = _explain(orders, {**counted, customer: _ALL_BUT_ONE}, customer, name)
        if all(_is_bounded(scan, settings) for scan in _index_scans(stages)):
            plans.append(_build_plan(name, stages, settings))
    if plans:
        return min(
            plans, key=lambda p: (len(p.missing_fields), not p.supports_partitions, p.needs_fetch)
        )
    if read_collection_type(orders) == "view":
        return OrdersPlan(advice=describe_view(orders))
    return OrdersPlan()


def _build_plan(name: str, stages: list[Document], settings: Settings) -> OrdersPlan:
    """Return the plan with an index of the right keys."""
    scans = _index_scans(stages)
    multikey = _multikey_fields(scans, [settings.status_field, settings.customer_field])
    missing = [f for f, _ in index_keys(settings) if any(f not in s["keyPattern"] for s in scans)]
    kinds = {stage["stage"] for stage in stages}
    advice = ""
    supports_partitions = settings.customer_field not in multikey
    if multikey:
        advice = _describe_multikey(name, "an order", multikey, fetches=supports_partitions)
    elif missing:
        advice = (
            f"the server uses {name}, but reads each order, because the index lacks "
            f"{' and '.join(missing)} of ORDER_FILTER. Create a better index with --create-index"
        )
    elif "FETCH" in kinds:
        why = ""
        if "SHARDING_FILTER" in kinds:
            why = ", because the index lacks the shard key"
        elif settings.order_filter:
            why = ", because no index alone can evaluate a condition in ORDER_FILTER"
        advice = f"the server uses {name}, but also reads the orders{why}"
    return OrdersPlan(
        supports_partitions=supports_partitions,
        status_is_multikey=settings.status_field in multikey,
        needs_fetch=bool(multikey) or "FETCH" in kinds,
        advice=advice,
        index_name=name,
        missing_fields=tuple(missing),
    )


def _multikey_fields(scans: list[Document], fields: list[str]) -> list[str]:
    """Return the fields where, as the index knows, a document holds or once held an array."""
    paths = [scan.get("multiKeyPaths", {}) for scan in scans]
    return [field for field in fields if not paths or any(p.get(field) != [] for p in paths)]


def _describe_multikey(name: str, document: str, fields: list[str], fetches: bool = False) -> str:
    effect = "the server reads each order" if fetches else "a single query counts all customers"
    return (
        f"{name} is multikey: {document} holds, or once held, an array in {' and '.join(fields)}, "
        f"so {effect}. Correct such documents, drop the index, and create it again with "
        "--create-index"
    )


def _is_bounded(scan: Document, settings: Settings) -> bool:
    """Return whether an index begins with status and customer, in either order, each with bounds.

    Before and between them may be fields for which ORDER_FILTER names one value.
    """
    # Some servers that speak the protocol report no key pattern or no bounds.
    pattern: Document = scan.get("keyPattern", {})
    bounds = scan.get("indexBounds", {})
    wanted = {settings.status_field, settings.customer_field}
    allowed = wanted.union(equality_fields(settings))

    def is_usable(name: str) -> bool:
        return name in allowed and pattern[name] in (1, -1) and bounds.get(name) not in _UNBOUNDED

    return wanted <= set(takewhile(is_usable, pattern))


def inspect_users_plan(users: Collection[Any], key: str) -> IndexPlan:
    """Return the plan with the index on `key`. Raises ServiceError.

    A partial or sparse index can be used if it holds every user that has a key.
    """
    stages = _explain(users, {key: _EMPTY_RANGE}, key)
    scans = _index_scans(stages)
    is_bounded = all(stage["stage"] != "COLLSCAN" for stage in stages) and all(
        scan.get("indexBounds", {}).get(key) not in _UNBOUNDED for scan in scans
    )
    name, problem = "", ""
    if key == "_id":  # never multikey; a clustered collection has no index scan
        name = "_id_"
        if not is_bounded:
            problem = (
                f"with the collation of {users.full_name}, each partition would read all users"
            )
    elif not is_bounded or not scans:
        problem = f"{users.full_name} has no index on {key}; create it with --create-index"
    else:
        name = str(scans[0].get("indexName", ""))
        if _multikey_fields(scans, [key]):
            problem = _describe_multikey(f"{name} on {users.full_name}", "a user", [key])
    advice = f"a single query counts all customers, because {problem}" if problem else ""
    return IndexPlan(supports_partitions=not problem, advice=advice, index_name=name)


def find_index_problem(orders: Collection[Any], settings: Settings) -> str:
    """Return what to do if the shop is large and partitions are not supported; else "".

    Raises DatabaseUnavailable.
    """
    largest = 0
    with suppress(ConfigurationError), map_driver_errors("count", orders):
        largest = orders.estimated_document_count()
        if settings.user_key_field != "_id":
            users = orders.database[settings.users]
            largest = max(largest, users.estimated_document_count())
    if largest <= LARGE_COLLECTION_DOCUMENTS:
        return ""
    plan = inspect_plan(orders, settings)
    return "" if plan.supports_partitions else plan.advice


def describe_view(collection: Collection[Any]) -> str:
    return f"{collection.full_name} is a view: create the index on the collection that it reads"


def _explain(
    collection: Collection[Any], query: Document, group_by: str, index_name: str = ""
) -> list[Document]:
    """Return every stage of the plan for a query that is grouped by one of its fields."""
    group = {"_id": f"${group_by}", "count": {"$sum": 1}}
    command: dict[str, Any] = {
        "aggregate": collection.name,
        "pipeline": [{"$match": query}, {"$group": group}],
        "cursor": {},
        "collation": SIMPLE_COLLATION,
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


def _index_scans(stages: list[Document]) -> list[Document]:
    return [stage for stage in stages if stage["stage"] == "IXSCAN"]
