"""Creating an index, whatever other indexes there are."""

from __future__ import annotations

import logging
import re
from typing import Any

from pymongo.collection import Collection
from pymongo.errors import NetworkTimeout

from loyalty.errors import DatabaseUnavailable, ServiceError
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.error_codes import CODES, ErrorClass
from loyalty.recount.order_filter import COLLATION

log = logging.getLogger("loyalty")

IndexKeys = list[tuple[str, int]]

_SECOND_NAME = "loyalty_counts"  # where another index has the default name
_CODES = CODES[ErrorClass.PERMANENT]


def build_index(collection: Collection[Any], keys: IndexKeys) -> str:
    """Create an index and return its name, also if it is there already. Raises ServiceError."""
    try:
        return _wait_for_build(collection, keys)
    except ServiceError as error:
        code = getattr(error.__cause__, "code", None)
        if code == _CODES["IndexKeySpecsConflict"]:  # a partial one, or of another collation
            return _wait_for_build(collection, keys, name=_SECOND_NAME)
        # Where the same index has another name it is hidden, or still being built.
        other = re.search(r"already exists with a different name: (.+) \(code", str(error))
        if code == _CODES["IndexOptionsConflict"] and other:
            return _wait_for_build(collection, keys, name=other[1])
        raise


def is_parallel_arrays_error(error: ServiceError) -> bool:
    """Return whether a document has arrays in two fields of the index."""
    code = getattr(error.__cause__, "code", None)
    return code == _CODES["CannotIndexParallelArrays"]


def _wait_for_build(collection: Collection[Any], keys: IndexKeys, **options: Any) -> str:
    while True:
        try:
            with map_driver_errors("createIndex", collection):
                return collection.create_index(keys, collation=COLLATION, **options)
        except DatabaseUnavailable as error:
            if not isinstance(error.__cause__, NetworkTimeout):
                raise
            # The server goes on; the same command again waits for the build that is in progress.
            log.info("index_build_in_progress collection=%s", collection.full_name)


def hidden_index_hint(collection: Collection[Any], name: str) -> str:
    """Return what to do where an index was created, and is not used."""
    return (
        f"the index {name} is there, but the server does not use it. If it is hidden: "
        f"db.{collection.name}.unhideIndex({name!r})"
    )
