"""The privileges of the database user, and the type and the owner of a collection.

The server is asked for them: nothing is written to find them out.
"""

from collections.abc import Mapping
from typing import Any

from pymongo.collection import Collection

from loyalty.errors import ConfigurationError
from loyalty.mongo.driver_errors import build_privilege_error, map_driver_errors

OWNER_FILTER = {"recorded_by": "loyalty-microservice"}
"""Matches the documents that this service wrote. Only these are read, and only these expire."""

_CHECKED_DOCUMENTS = 10
"""How many of the oldest and of the newest documents are checked. Reading all would be slow."""


def require_privileges(collection: Collection[Any], *actions: str) -> None:
    """Raise MissingPrivilege if an action is known to be forbidden. Raises DatabaseUnavailable."""
    if missing := find_missing_privileges(collection, *actions):
        raise build_privilege_error(f"{missing[0]} on {collection.full_name}")


def find_missing_privileges(collection: Collection[Any], *actions: str) -> list[str]:
    """Return those actions, such as "find", that the database user may not do on a collection.

    The list is empty if the server does not list privileges, or has no access control.
    Raises DatabaseUnavailable.
    """
    try:
        with map_driver_errors("connectionStatus", collection.full_name):
            admin = collection.database.client.admin
            status = admin.command("connectionStatus", showPrivileges=True)
    except ConfigurationError:  # not every server that speaks the protocol has the command
        return []
    privileges = status.get("authInfo", {}).get("authenticatedUserPrivileges")
    if not privileges:
        return []
    covering = [p for p in privileges if _covers(p["resource"], collection)]
    allowed = {action for privilege in covering for action in privilege["actions"]}
    return [action for action in actions if action not in allowed]


def _covers(resource: Mapping[str, Any], collection: Collection[Any]) -> bool:
    """Return whether a privilege on this resource applies to the collection.

    An empty name stands for every database, or every collection. A resource without these names is
    {anyResource: true}, which is everything, or another one, such as {cluster: true}.
    """
    if "db" not in resource or "collection" not in resource:
        return bool(resource.get("anyResource"))
    is_in_database = resource["db"] in ("", collection.database.name)
    return is_in_database and resource["collection"] in ("", collection.name)


def read_collection_type(collection: Collection[Any]) -> str | None:
    """Return "collection", "view" or "timeseries"; None if there is none that the user may see.

    Listing the names and types of these collections needs no privilege. Raises ServiceError.
    """
    database, name = collection.database, collection.name
    options: dict[str, Any] = {"nameOnly": True, "authorizedCollections": True}
    with map_driver_errors("listCollections", database.name):
        found = next(database.list_collections(filter={"name": name}, **options), None)
    return str(found.get("type", "collection")) if found else None


def require_own_collection(collection: Collection[Any], hint: str) -> None:
    """Raise ConfigurationError with `hint` if this is a view or the like, or another program's.

    Raises MissingPrivilege without the privilege `find`.
    """
    kind = read_collection_type(collection)
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
