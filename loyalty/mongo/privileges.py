"""The privileges of the database user, and the type of a collection.

Both are read from the server, not tested by writing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pymongo import MongoClient, ReadPreference
from pymongo.database import Database

from loyalty.errors import ConfigurationError
from loyalty.mongo.driver_errors import map_driver_errors, permission_error


def missing_privileges(
    client: MongoClient[Any], database: str, wanted: Mapping[str, Sequence[str]]
) -> list[str] | None:
    """Return which actions the database user may not do, such as "find on shop.orders".

    `wanted` has the actions by collection. None if that is unknown: the server does not list
    privileges, or has no access control. Raises DatabaseUnavailable.
    """
    try:
        with map_driver_errors("connectionStatus", database):
            status = client.admin.command("connectionStatus", showPrivileges=True)
    except ConfigurationError:  # not every server that speaks the protocol has the command
        return None
    privileges = status.get("authInfo", {}).get("authenticatedUserPrivileges")
    if not privileges:
        return None
    return [
        f"{action} on {database}.{collection}"
        for collection, actions in wanted.items()
        for action in actions
        if not _is_allowed(privileges, database, collection, action)
    ]


def _is_allowed(
    privileges: Iterable[Mapping[str, Any]], database: str, collection: str, action: str
) -> bool:
    return any(
        action in privilege["actions"] and _covers(privilege["resource"], database, collection)
        for privilege in privileges
    )


def _covers(resource: Mapping[str, Any], database: str, collection: str) -> bool:
    """Return whether a privilege on this resource is one on the collection.

    An empty name stands for every database, or every collection that is not the server's own.
    """
    if resource.get("anyResource"):
        return True
    if "db" not in resource or "collection" not in resource:  # such as {cluster: true}
        return False
    is_system_collection = collection.startswith("system.")
    return resource["db"] in ("", database) and (
        resource["collection"] == collection
        or (resource["collection"] == "" and not is_system_collection)
    )


def require_privileges(
    client: MongoClient[Any], database: str, wanted: Mapping[str, Sequence[str]]
) -> None:
    """Raise NoPermission if an action is not allowed. If that is unknown, this does nothing."""
    for missing in missing_privileges(client, database, wanted) or ():
        raise permission_error(missing)


def collection_type(database: Database[Any], name: str) -> str | None:
    """Return "collection", "view" or "timeseries"; None if there is none that the user may see.

    To list the names and types of such collections takes no privilege. Raises ServiceError.
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
