"""Creates the indexes on orders and users."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from pymongo.collection import Collection
from pymongo.errors import NetworkTimeout

from config import Settings
from loyalty.errors import ConfigurationError, DatabaseUnavailable, QueryTimeout, ServiceError
from loyalty.logs import log
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.error_codes import error_name
from loyalty.mongo.privileges import read_collection_type
from loyalty.mongo.values import SIMPLE_COLLATION, Document, format_value
from loyalty.recount.index import (
    IndexPlan,
    describe_view,
    index_keys,
    inspect_orders_plan,
    inspect_users_plan,
)

_Keys = list[tuple[str, int]]

_SECOND_NAME = "loyalty_counts"  # if another index has the default name


def create_index(orders: Collection[Any], settings: Settings) -> str:
    """Create the index on orders unless one can be used, and return its name.

    Raises ServiceError.
    """
    inspect = partial(inspect_orders_plan, orders, settings)
    keys, key_field = index_keys(settings), settings.customer_field
    return _ensure_index(orders, keys, key_field, inspect, settings.count_ms)


def create_user_index(users: Collection[Any], settings: Settings) -> str:
    """Create the index on the key of users unless one can be used, and return its name.

    Raises ServiceError.
    """
    key = settings.user_key_field
    inspect = partial(inspect_users_plan, users, key)
    return _ensure_index(users, [(key, 1)], key, inspect, settings.count_ms)


def _ensure_index(
    collection: Collection[Any],
    keys: _Keys,
    key_field: str,
    inspect: Callable[[], IndexPlan],
    max_time_ms: int,
) -> str:
    kind = read_collection_type(collection)
    if kind is None:
        raise ConfigurationError(f"cannot create an index: {collection.full_name} does not exist")
    if kind == "view":
        raise ConfigurationError(describe_view(collection))
    plan = inspect()
    if plan.needs_build:
        try:
            _check_arrays(collection, key_field, max_time_ms)
        except QueryTimeout as error:
            log.warning('arrays_not_checked error="%s"', error)
        name = _build_index(collection, keys)
        plan = inspect()
        if plan.needs_build:  # a hidden index with these keys is not created again
            raise ConfigurationError(
                f"the index {name} exists, but the server does not use it. If it is hidden: "
                f"db.{collection.name}.unhideIndex({name!r})"
            )
    if not plan.supports_partitions:
        raise ConfigurationError(plan.advice)
    return plan.index_name


def _check_arrays(collection: Collection[Any], field: str, max_time_ms: int) -> None:
    """Raise ConfigurationError if a document holds an array in a field that must have none.

    An index that was built before their correction would stay multikey, and support no partitions.
    Raises QueryTimeout.
    """
    query = {"$or": array_conditions(field)}
    advice = f"if {field} holds an array, recounts cannot use the index"
    with map_driver_errors("find", collection, if_too_slow=advice):
        found = collection.find(query, {"_id": 1}, max_time_ms=max_time_ms).limit(5)
        ids = ", ".join(format_value(document["_id"]) for document in found)
    if ids:
        raise ConfigurationError(
            f"no index is created on {collection.full_name}, because recounts could not use it: "
            f"documents hold an array in {field}, such as those with _id {ids}. Correct them, then "
            "run --create-index again"
        )


def _build_index(collection: Collection[Any], keys: _Keys) -> str:
    try:
        return _wait_for_build(collection, keys)
    except ServiceError as error:
        code = error_name(getattr(error.__cause__, "code", None))
        # An index of this name is partial, or has another collation.
        if code == "IndexKeySpecsConflict":
            return _wait_for_build(collection, keys, name=_SECOND_NAME)
        # The same index with another name is hidden, or still being built.
        details = getattr(error.__cause__, "details", None) or {}
        other = re.search("already exists with a different name: (.+)", details.get("errmsg", ""))
        if code == "IndexOptionsConflict" and other:
            return _wait_for_build(collection, keys, name=other[1])
        raise


def _wait_for_build(collection: Collection[Any], keys: _Keys, **options: Any) -> str:
    while True:
        try:
            with map_driver_errors("createIndex", collection):
                return collection.create_index(keys, collation=SIMPLE_COLLATION, **options)
        except DatabaseUnavailable as error:
            if not isinstance(error.__cause__, NetworkTimeout):
                raise
            # The server goes on; the same command again waits for the build that is in progress.
            log.info("index_build_in_progress collection=%s", collection.full_name)


def array_conditions(field: str) -> list[Document]:
    """Return conditions, one of which is true if `field`, or a field above it, is an array."""
    parts = field.split(".")
    return [{".".join(parts[:n]): {"$type": "array"}} for n in range(1, len(parts) + 1)]
