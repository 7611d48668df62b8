"""What the database user may do, and what a collection is: asked for, never tried out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pymongo import MongoClient, ReadPreference
from pymongo.database import Database

from loyalty.errors import ConfigurationError
from loyalty.mongo.driver_errors import map_driver_errors, permission_error


@dataclass(frozen=True, slots=True)
class MissingPrivilege:
    """An action on a collection that no role of the database user allows."""

    action: str
    collection: str
    """With the name of its database."""

    def __str__(self) -> str:
        return f"{self.action} on {self.collection}"


def missing_privileges(
    client: MongoClient[Any], database: str, wanted: Mapping[str, Sequence[str]]
) -> list[MissingPrivilege] | None:
    """Return which actions the database user may not do; `wanted` has them by collection.

    None if that is unknown: the server does not list privileges, or nobody has logged in, as on a
    server without access control. Raises DatabaseUnavailable.
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
        MissingPrivilege(action, f"{database}.{collection}")
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
    is_own = collection.startswith("system.")
    return resource["db"] in ("", database) and (
        resource["collection"] == collection or (resource["collection"] == "" and not is_own)
    )


def require_privileges(
    client: MongoClient[Any], database: str, wanted: Mapping[str, Sequence[str]]
) -> None:
    """Raise NoPermission if an action is not allowed. Where that is unknown, this does nothing."""
    for missing in missing_privileges(client, database, wanted) or ():
        raise permission_error(str(missing))


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
