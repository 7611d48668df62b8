"""The index on the field of users that orders refer to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pymongo.collection import Collection

from config import Settings
from loyalty.errors import ConfigurationError
from loyalty.mongo.privileges import collection_type
from loyalty.recount.index_build import build_index, hidden_index_hint
from loyalty.recount.query_plan import EMPTY_RANGE, UNBOUNDED, explain, index_scans

_NOT_USED = "not used, so one query counts everybody"


@dataclass(frozen=True, slots=True)
class UserIndex:
    """The index that leads to the users of a partition."""

    name: str = ""
    """"" if there is none."""
    hint: str = ""
    """Why it cannot be used, and what to do; "" if it can."""


def inspect_user_index(users: Collection[Any], key: str) -> UserIndex:
    """Ask the server for the index on `key`. Raises ServiceError.

    A partial or sparse index serves if it holds every user that has a key.
    """
    stages = explain(users, {key: EMPTY_RANGE}, key)
    scans = index_scans(stages)
    is_bounded = all(stage["stage"] != "COLLSCAN" for stage in stages) and all(
        scan.get("indexBounds", {}).get(key) not in UNBOUNDED for scan in scans
    )
    if key == "_id":
        hint = f"with the collation of {users.full_name}, each partition would read all users"
        return UserIndex("_id_", "" if is_bounded else f"{_NOT_USED}: {hint}")
    if not is_bounded or not scans:
        hint = f"{users.full_name} has no index on {key}; create it with --create-index"
        return UserIndex("", f"{_NOT_USED}: {hint}")
    name = str(scans[0]["indexName"])
    if all(scan.get("multiKeyPaths", {}).get(key) == [] for scan in scans):
        return UserIndex(name)
    hint = (
        f"{name} on {users.full_name} is multikey: a user holds, or once held, an array in {key}. "
        "Correct such users, drop the index, and create it again with --create-index"
    )
    return UserIndex(name, f"{_NOT_USED}: {hint}")


def create_user_index(users: Collection[Any], settings: Settings) -> str:
    """Create the index unless one serves, and return its name. Raises ServiceError."""
    key = settings.user_key_field
    if collection_type(users.database, users.name) is None:
        raise ConfigurationError(f"there is no collection {users.full_name} to make an index on")
    found = inspect_user_index(users, key)
    if not found.name:
        name = build_index(users, [(key, 1)])
        found = inspect_user_index(users, key)
        if not found.name:  # to create an index that is there, and hidden, succeeds
            raise ConfigurationError(hidden_index_hint(users, name))
    if found.hint:
        raise ConfigurationError(found.hint)
    return found.name
