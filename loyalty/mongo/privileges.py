"""The privileges of the database user, and the type and the owner of a collection.

All are read from the server, not tested by writing.
"""

from collections.abc import Mapping
from typing import Any

from pymongo import ReadPreference
from pymongo.collection import Collection
from pymongo.database import Database

from loyalty.errors import ConfigurationError
from loyalty.mongo.driver_errors import build_permission_error, map_driver_errors

OWNER_FILTER = {"recorded_by": "loyalty-microservice"}
"""Matches the documents that this service wrote. It reads no others, and no others expire."""

_CHECKED_DOCUMENTS = 10
"""The oldest and the newest show another program. A search of all would read the change log."""


def require_privileges(collection: Collection[Any], *actions: str) -> None:
    """Raise NoPermission if an action is not allowed. If that is unknown, this does nothing."""
    for action in missing_privileges(collection, *actions) or ():
        raise build_permission_error(f"{action} on {collection.full_name}")


def missing_privileges(collection: Collection[Any], *actions: str) -> list[str] | None:
    """Return those actions, such as "find", that the database user may not do on a collection.

    None if that is unknown: the server does not list privileges, or has no access control.
    Raises DatabaseUnavailable.
    """
    try:
        with map_driver_errors("connectionStatus", collection.database):
            admin = collection.database.client.admin
            status = admin.command("connectionStatus", showPrivileges=True)
    except ConfigurationError:  # not every server that speaks the protocol has the command
        return None
    privileges = status.get("authInfo", {}).get("authenticatedUserPrivileges")
    if not privileges:
        return None
    covering = [p for p in privileges if _covers(p["resource"], collection)]
    allowed = {action for privilege in covering for action in privilege["actions"]}
    return [action for action in actions if action not in allowed]


def _covers(resource: Mapping[str, Any], collection: Collection[Any]) -> bool:
    """Return whether a privilege on this resource is one on the collection.

    An empty name stands for every database, or every collection. A resource without both names is
    the whole server, {anyResource: true}, or something else, such as {cluster: true}.
    """
    if "db" not in resource or "collection" not in resource:
        return bool(resource.get("anyResource"))
    is_in_database = resource["db"] in ("", collection.database.name)
    return is_in_database and resource["collection"] in ("", collection.name)


def collection_type(database: Database[Any], name: str) -> str | None:
    """Return "collection", "view" or "timeseries"; None if there is none that the user may see.

    Listing the names and types of these collections needs no privilege. Raises ServiceError.
    """
    primary = database.with_options(read_preference=ReadPreference.PRIMARY)
    options: dict[str, Any] = {
        "filter": {"name": name},
        "nameOnly": True,
        "authorizedCollections": True,
    }
    with map_driver_errors("listCollections", database):
        for found in primary.list_collections(**options):
            return str(found.get("type", "collection"))
    return None


def require_own_collection(collection: Collection[Any], hint: str) -> None:
    """Raise ConfigurationError with `hint` if this is no collection, or another program uses it.

    Raises NoPermission without `find`.
    """
    kind = collection_type(collection.database, collection.name)
    if kind not in (None, "collection"):
        raise ConfigurationError(f"{collection.full_name} is a {kind}: {hint}")
    for order in (1, -1):
        with map_driver_errors("find", collection):
            found = collection.find({}, {"recorded_by": 1}, sort=[("_id", order)])
            owners = [document.get("recorded_by") for document in found.limit(_CHECKED_DOCUMENTS)]
        if any(owner != OWNER_FILTER["recorded_by"] for owner in owners):
            raise ConfigurationError(
                f"{collection.full_name} holds documents of other programs: {hint}"
            )
