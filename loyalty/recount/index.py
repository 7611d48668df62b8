"""The index on orders with which a count fetches no order: what a plan tells, and creating it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from pymongo.collection import Collection
from pymongo.errors import NetworkTimeout

from config import Settings
from loyalty.errors import ConfigurationError, DatabaseUnavailable, ServiceError
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.error_codes import CODES, ErrorClass
from loyalty.mongo.privileges import collection_type
from loyalty.mongo.values import Document, format_value
from loyalty.recount.order_filter import COLLATION, counted_orders

log = logging.getLogger("loyalty")

LARGE_COLLECTION_ORDERS = 100_000
"""A count of fewer orders is fast without an index."""

_NO_INDEX = "none that serves a recount: create it with --create-index"
_SECOND_NAME = "loyalty_counts"  # where another index has the default name
_USER_KEY = "_id"

_CODES = CODES[ErrorClass.PERMANENT]
_UNBOUNDED = (["[MinKey, MaxKey]"], ["[MaxKey, MinKey]"])
_EMPTY_RANGE = {"$gt": "", "$lt": "\x01"}
_ALL_BUT_ONE = {"$ne": "\x01"}  # with bounds, and on every shard


@dataclass(frozen=True, slots=True)
class Plan:
    """How the server reads the orders of one partition. The default is the worst case."""

    supports_partitions: bool = False
    """Whether indexes lead to the orders and users of a partition, and to no others."""
    status_is_multikey: bool = True
    """Whether a status may be an array, so that each must be checked."""
    needs_fetch: bool = True
    """Whether orders are fetched as well as the index."""
    hint: str = field(default=_NO_INDEX, compare=False)
    """What to do about the index; "" if nothing."""
    index_name: str = field(default="", compare=False)
    """The index with the right keys; "" if there is none."""


def index_keys(settings: Settings) -> list[tuple[str, int]]:
    """Return the keys of the index: fields with fixed values first, the customer last."""
    return [(settings.status_field, 1), (settings.customer_field, 1)]


def inspect_plan(orders: Collection[Any], settings: Settings) -> Plan:
    """Ask the server how it would read a partition; the worst case where it does not answer."""
    try:
        plan = _inspect_orders(orders, settings)
        users = orders.database[settings.users]
        if not plan.supports_partitions or _can_look_up(users):
            return plan
    except ServiceError:  # the count itself reports what is wrong
        return Plan()
    hint = (
        f"not used: with the collation of {users.full_name}, each partition would read all users, "
        "so one query counts everybody"
    )
    return replace(plan, supports_partitions=False, hint=hint)


def _inspect_orders(orders: Collection[Any], settings: Settings) -> Plan:
    """Judge indexes by their key patterns, bounds and multikey paths, never by their names."""
    keys = [name for name, _ in index_keys(settings)]
    customer = settings.customer_field
    counted = counted_orders(settings)
    # Rejected plans included: of an empty range, several indexes are equally good.
    candidates = _explain(orders, {**counted, customer: _EMPTY_RANGE}, customer)
    names = [str(scan["indexName"]) for scan in _scans(candidates) if _is_bounded(scan, keys)]
    for name in dict.fromkeys(names):
        # Once more for all customers, as the first plan may be that of one shard. A partial index
        # that lacks some of the customers has no bounds here.
        stages = _explain(orders, {**counted, customer: _ALL_BUT_ONE}, customer, name)
        if all(_is_bounded(scan, keys) for scan in _scans(stages)):
            return _describe(name, stages, keys)
    if collection_type(orders.database, orders.name) == "view":
        return Plan(hint=_view_hint(orders))
    return Plan()


def _describe(name: str, stages: list[Document], keys: list[str]) -> Plan:
    """Return the plan with an index of the right keys."""
    # An index knows of each of its fields whether any order has ever held an array there.
    paths = [scan.get("multiKeyPaths", {}) for scan in _scans(stages)]
    multikey = [key for key in keys if not paths or any(path.get(key) != [] for path in paths)]
    kinds = {stage["stage"] for stage in stages}
    hint = ""
    if multikey:
        hint = (
            f"{name} is multikey: an order holds, or once held, an array in "
            f"{' and '.join(multikey)}. Correct such orders, drop the index, and create it again "
            "with --create-index"
        )
    elif "FETCH" in kinds:
        why = ", because the index lacks the shard key" if "SHARDING_FILTER" in kinds else ""
        hint = f"there; orders are fetched all the same{why}"
    return Plan(
        supports_partitions=keys[-1] not in multikey,
        status_is_multikey=multikey not in ([], keys[-1:]),
        needs_fetch=bool(multikey) or "FETCH" in kinds,
        hint=hint,
        index_name=name,
    )


def _is_bounded(scan: Document, fields: list[str]) -> bool:
    """Return whether an index begins with these fields, in any order, each with bounds."""
    pattern = scan.get("keyPattern", {})  # not every server that speaks the protocol has it
    return set(list(pattern)[: len(fields)]) == set(fields) and all(
        pattern[name] in (1, -1) and scan["indexBounds"][name] not in _UNBOUNDED for name in fields
    )


def _can_look_up(users: Collection[Any]) -> bool:
    """Return whether an index leads to the users of a partition, whatever their collation."""
    stages = _explain(users, {_USER_KEY: _EMPTY_RANGE}, _USER_KEY)
    return all(stage["stage"] != "COLLSCAN" for stage in stages) and all(
        scan.get("indexBounds", {}).get(_USER_KEY) not in _UNBOUNDED for scan in _scans(stages)
    )


def _explain(
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


def _scans(stages: list[Document]) -> list[Document]:
    return [stage for stage in stages if stage["stage"] == "IXSCAN"]


def _view_hint(orders: Collection[Any]) -> str:
    return f"{orders.full_name} is a view: create the index on the collection that it reads"


def missing_index_hint(orders: Collection[Any], settings: Settings) -> str:
    """Return what to do where `orders` is large and partitions are not supported; else ""."""
    with suppress(ServiceError), map_driver_errors("count", orders):
        if orders.estimated_document_count() > LARGE_COLLECTION_ORDERS:
            plan = inspect_plan(orders, settings)
            return "" if plan.supports_partitions else plan.hint
    return ""


def create_index(orders: Collection[Any], settings: Settings) -> str:
    """Create the index unless an equal one serves, and return its name. Raises ServiceError."""
    kind = collection_type(orders.database, orders.name)
    if kind is None:
        raise ConfigurationError(f"there is no collection {orders.full_name} to make an index on")
    if kind == "view":
        raise ConfigurationError(_view_hint(orders))
    plan = _inspect_orders(orders, settings)
    if not plan.index_name:
        name = _create(orders, settings)
        plan = _inspect_orders(orders, settings)
        if not plan.index_name:  # to create an index that is there, and hidden, succeeds
            raise ConfigurationError(
                f"the index {name} is there, but the server does not use it. If it is hidden: "
                f"db.{orders.name}.unhideIndex({name!r})"
            )
    if not plan.supports_partitions:
        raise ConfigurationError(plan.hint)
    return plan.index_name


def _create(orders: Collection[Any], settings: Settings) -> str:
    try:
        return _wait_for_build(orders, settings)
    except ServiceError as error:
        code = getattr(error.__cause__, "code", None)
        if code == _CODES["IndexKeySpecsConflict"]:  # a partial one, or of another collation
            return _wait_for_build(orders, settings, name=_SECOND_NAME)
        # Where the same index has another name it is hidden, or still being built.
        other = re.search(r"already exists with a different name: (.+) \(code", str(error))
        if code == _CODES["IndexOptionsConflict"] and other:
            return _wait_for_build(orders, settings, name=other[1])
        if code == _CODES["CannotIndexParallelArrays"]:
            raise ConfigurationError(_parallel_arrays_hint(orders, settings)) from error
        raise


def _wait_for_build(orders: Collection[Any], settings: Settings, **options: Any) -> str:
    while True:
        try:
            with map_driver_errors("createIndex", orders):
                return orders.create_index(index_keys(settings), collation=COLLATION, **options)
        except DatabaseUnavailable as error:
            if not isinstance(error.__cause__, NetworkTimeout):
                raise
            # The server goes on; the same command again waits for the build that is in progress.
            log.info("index_build_in_progress collection=%s", orders.full_name)


def _parallel_arrays_hint(orders: Collection[Any], settings: Settings) -> str:
    both = {"$and": [{"$or": array_conditions(name)} for name, _ in index_keys(settings)]}
    with map_driver_errors("find", orders):
        found = [format_value(order["_id"]) for order in orders.find(both, {"_id": 1}).limit(5)]
    return (
        f"no index can be made on {orders.full_name} while an order holds arrays in both "
        f"{settings.status_field} and {settings.customer_field}, such as the order with _id "
        + ", ".join(found)
    )


def array_conditions(field: str) -> list[Document]:
    """Return conditions, one of which is true if `field`, or a field above it, is an array."""
    parts = field.split(".")
    return [{".".join(parts[:n]): {"$type": "array"}} for n in range(1, len(parts) + 1)]
