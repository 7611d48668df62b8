"""The index on orders with which a count fetches no order: what a plan tells, and creating it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from pymongo.collection import Collection

from config import Settings
from loyalty.errors import ConfigurationError, ServiceError
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.privileges import collection_type
from loyalty.mongo.values import Document, format_value
from loyalty.recount.index_build import build_index, hidden_index_hint, is_parallel_arrays_error
from loyalty.recount.order_filter import counted_orders, equality_fields
from loyalty.recount.query_plan import EMPTY_RANGE, UNBOUNDED, explain, index_scans
from loyalty.recount.user_index import inspect_user_index

LARGE_COLLECTION_DOCUMENTS = 100_000
"""A count of fewer orders, or users, is fast without an index."""

_NO_INDEX = "none that serves a recount: create it with --create-index"
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
    missing_fields: tuple[str, ...] = ()
    """Fields of ORDER_FILTER that the index lacks."""


def index_keys(settings: Settings) -> list[tuple[str, int]]:
    """Return the keys of the index: fields with fixed values, the customer, other conditions."""
    first = [*equality_fields(settings), settings.status_field, settings.customer_field]
    return [(name, 1) for name in dict.fromkeys([*first, *settings.order_filter])]


def inspect_plan(orders: Collection[Any], settings: Settings) -> Plan:
    """Ask the server how it would read a partition; the worst case where it does not answer."""
    try:
        plan = _inspect_orders(orders, settings)
        if not plan.supports_partitions:
            return plan
        users = inspect_user_index(orders.database[settings.users], settings.user_key_field)
    except ServiceError:  # the count itself reports what is wrong
        return Plan()
    return replace(plan, supports_partitions=False, hint=users.hint) if users.hint else plan


def _inspect_orders(orders: Collection[Any], settings: Settings) -> Plan:
    """Judge indexes by their key patterns, bounds and multikey paths, never by their names."""
    customer = settings.customer_field
    counted = counted_orders(settings)
    # Rejected plans included: of an empty range, several indexes are equally good.
    candidates = explain(orders, {**counted, customer: EMPTY_RANGE}, customer)
    names = [scan["indexName"] for scan in index_scans(candidates) if _is_bounded(scan, settings)]
    plans = []
    for name in dict.fromkeys(names):
        # Once more for all customers, as the first plan may be that of one shard. A partial index
        # that lacks some of the customers has no bounds here.
        stages = explain(orders, {**counted, customer: _ALL_BUT_ONE}, customer, name)
        if all(_is_bounded(scan, settings) for scan in index_scans(stages)):
            plans.append(_describe(str(name), stages, settings))
    if plans:
        return min(plans, key=lambda plan: (len(plan.missing_fields), plan.needs_fetch))
    if collection_type(orders.database, orders.name) == "view":
        return Plan(hint=_view_hint(orders))
    return Plan()


def _describe(name: str, stages: list[Document], settings: Settings) -> Plan:
    """Return the plan with an index of the right keys."""
    scans = index_scans(stages)
    keys = [settings.status_field, settings.customer_field]
    # An index knows of each of its fields whether any order has ever held an array there.
    paths = [scan.get("multiKeyPaths", {}) for scan in scans]
    multikey = [key for key in keys if not paths or any(path.get(key) != [] for path in paths)]
    missing = [f for f in settings.order_filter if any(f not in s["keyPattern"] for s in scans)]
    kinds = {stage["stage"] for stage in stages}
    hint = ""
    if multikey:
        hint = (
            f"{name} is multikey: an order holds, or once held, an array in "
            f"{' and '.join(multikey)}. Correct such orders, drop the index, and create it again "
            "with --create-index"
        )
    elif missing:
        hint = (
            f"{name}, but each order is fetched because it lacks {' and '.join(missing)} of "
            "ORDER_FILTER: create a better one with --create-index"
        )
    elif "FETCH" in kinds:
        why = ""
        if "SHARDING_FILTER" in kinds:
            why = ", because the index lacks the shard key"
        elif settings.order_filter:
            why = ", for a condition in ORDER_FILTER that no index answers alone"
        hint = f"there; orders are fetched all the same{why}"
    return Plan(
        supports_partitions=settings.customer_field not in multikey,
        status_is_multikey=settings.status_field in multikey,
        needs_fetch=bool(multikey) or "FETCH" in kinds,
        hint=hint,
        index_name=name,
        missing_fields=tuple(missing),
    )


def _is_bounded(scan: Document, settings: Settings) -> bool:
    """Return whether an index begins with the status and the customer, each with bounds.

    They may be in any order, and among them fields for which ORDER_FILTER names one value.
    """
    pattern = scan.get("keyPattern", {})  # not every server that speaks the protocol has it
    wanted = {settings.status_field, settings.customer_field}
    allowed = wanted.union(equality_fields(settings))
    for name, direction in pattern.items():
        if name not in allowed or direction not in (1, -1):
            return False
        if scan["indexBounds"][name] in UNBOUNDED:
            return False
        wanted.discard(name)
        if not wanted:
            return True
    return False


def _view_hint(orders: Collection[Any]) -> str:
    return f"{orders.full_name} is a view: create the index on the collection that it reads"


def missing_index_hint(orders: Collection[Any], settings: Settings) -> str:
    """Return what to do where the shop is large and partitions are not supported; else ""."""
    with suppress(ServiceError), map_driver_errors("count", orders):
        largest = orders.estimated_document_count()
        if settings.user_key_field != "_id":
            users = orders.database[settings.users]
            largest = max(largest, users.estimated_document_count())
        if largest > LARGE_COLLECTION_DOCUMENTS:
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
    if not plan.index_name or plan.missing_fields:
        try:
            name = build_index(orders, index_keys(settings))
        except ServiceError as error:
            if is_parallel_arrays_error(error):
                raise ConfigurationError(_parallel_arrays_hint(orders, settings)) from error
            raise
        plan = _inspect_orders(orders, settings)
        if not plan.index_name or plan.missing_fields:
            # To create an index that is there, and hidden, succeeds.
            raise ConfigurationError(hidden_index_hint(orders, name))
    if not plan.supports_partitions:
        raise ConfigurationError(plan.hint)
    return plan.index_name


def _parallel_arrays_hint(orders: Collection[Any], settings: Settings) -> str:
    names = [name for name, _ in index_keys(settings)]
    pairs = [
        {"$and": [{"$or": array_conditions(one)}, {"$or": array_conditions(other)}]}
        for one, other in combinations(names, 2)
    ]
    both = pairs[0] if len(pairs) == 1 else {"$or": pairs}
    with map_driver_errors("find", orders):
        found = [format_value(order["_id"]) for order in orders.find(both, {"_id": 1}).limit(5)]
    fields = f"both {' and '.join(names)}" if len(names) == 2 else f"two of {', '.join(names)}"
    return (
        f"no index can be made on {orders.full_name} while an order holds arrays in {fields}, such "
        "as the order with _id " + ", ".join(found)
    )


def array_conditions(field: str) -> list[Document]:
    """Return conditions, one of which is true if `field`, or a field above it, is an array."""
    parts = field.split(".")
    return [{".".join(parts[:n]): {"$type": "array"}} for n in range(1, len(parts) + 1)]
