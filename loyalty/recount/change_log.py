"""The change log: each user's points before and after a full recount, one document a batch.

A batch's changes are inserted before its updates. After a crash the log may hold a change that was
not made; it never lacks one that was.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from bson import ObjectId, Timestamp
from pymongo.collection import Collection

from config import Settings
from loyalty.errors import ConfigurationError, MissingPrivilege, RecountNotFound
from loyalty.history import NO_RECORD, History
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.privileges import OWNER_FILTER, require_own_collection, require_privileges
from loyalty.mongo.values import LENIENT_CODEC, SIMPLE_COLLATION, Document, try_encode

MAX_SILENCE = timedelta(minutes=2)
"""A recount that has no record, and has logged no changes for this time, was interrupted."""
MISSING = object()
"""The value of a field that a user does not have."""
DOCUMENTS_PER_BATCH = 8
"""Documents in one reply. The server's limit, 16 MB, is 270,000 changes: 200 MB in Python."""


def change_log_collection(connection: Connection) -> Collection[Any]:
    """Return the collection of the change log. Raises ConfigurationError without one."""
    if connection.changes is None:
        raise ConfigurationError("CHANGES_COLLECTION is none, so there is no change log")
    return connection.changes


def open_change_log(
    collection: Collection[Any],
    settings: Settings,
    *,
    recount: ObjectId,
    started_at: datetime,
    cluster_time: Timestamp | None,
) -> Callable[[Sequence[Document]], None]:
    """Return a function that inserts one batch of a recount's changes, `{user, before, after}`.

    `before` is missing if the user had no points field. If even the document around a nested field
    was missing, `created` is the path of the outermost part that the update creates. The function
    raises ServiceError.
    """
    fields = {
        **OWNER_FILTER,
        "recount": recount,
        **logged_target(settings),
        "at": started_at,
        "cluster_time": cluster_time,
        "expires_at": started_at + settings.retention,
    }

    def insert(changes: Sequence[Document]) -> None:
        with map_driver_errors("insert", collection):
            collection.insert_one({**fields, "changes": changes})

    return insert


def check_change_log(connection: Connection) -> None:
    """Raise ConfigurationError if changes cannot be logged. Raises other ServiceErrors."""
    collection = connection.changes
    if collection is None:
        return
    try:
        require_privileges(collection, "find", "insert")
        hint = "CHANGES_COLLECTION must name a collection that only this service uses, or be none"
        require_own_collection(collection, hint)
    except MissingPrivilege as error:
        hint = "to run without a change log, set CHANGES_COLLECTION=none"
        raise MissingPrivilege(f"{error}; {hint}") from error


@dataclass(frozen=True, slots=True)
class LoggedRecount:
    """A recount in the change log, and where it wrote: `points_field` of the collection `users`."""

    id: ObjectId
    at: datetime
    users: str
    points_field: str
    logged_at: datetime
    """When its newest batch of changes was logged."""

    def is_silent(self, now: datetime) -> bool:
        """Return whether it has logged no changes for MAX_SILENCE."""
        return now - self.logged_at > MAX_SILENCE


def logged_target(settings: Settings) -> Document:
    """Return the target as the change log names it: the users collection and the points field."""
    return {"users": settings.users, "points_field": settings.points_field}


def find_recount(collection: Collection[Any], condition: Document) -> LoggedRecount | None:
    """Return the newest logged recount that satisfies `condition`. Raises ServiceError."""
    fields = {"recount": 1, "at": 1, "users": 1, "points_field": 1}
    with map_driver_errors("find", collection):
        # By _id, which has an index; documents are large, and a sort would need the disk.
        found = collection.find_one({**OWNER_FILTER, **condition}, fields, sort=[("_id", -1)])
    if found is None:
        return None
    return LoggedRecount(
        found["recount"],
        found["at"],
        found["users"],
        found["points_field"],
        logged_at=found["_id"].generation_time,
    )


def find_unrecorded(
    connection: Connection, settings: Settings, history: History
) -> LoggedRecount | None:
    """Return the newest logged recount of the target if it has no record.

    It is writing, or it was interrupted. None if a later recount succeeded, even without changes.
    Raises ServiceError.
    """
    if connection.changes is None:
        return None
    newest = find_recount(connection.changes, logged_target(settings))
    if newest is None or history.find_outcomes([newest.id])[newest.id] != NO_RECORD:
        return None
    return None if history.has_success_since(newest.logged_at) else newest


def resolve_recount(
    connection: Connection, settings: Settings, history: History, text: str
) -> LoggedRecount:
    """Return the logged recount with the id `text`.

    "last" is the newest recount that changed users in the collection and the field of the settings,
    and is not undone. Raises RecountNotFound, and other ServiceErrors.
    """
    change_log = change_log_collection(connection)
    if text == "last":
        others = {"recount": {"$nin": history.find_recounts_without_effect()}}
        found = find_recount(change_log, {**logged_target(settings), **others})
        hint = f"no recount that changed {settings.users}.{settings.points_field} and is not undone"
    else:
        found = find_recount(change_log, {"recount": ObjectId(text)})
        hint = f"no recount {text}"
        if found is None and (undone := history.find_undone_recounts(ObjectId(text))):
            raise RecountNotFound(
                f"{text} is the undo of recount {undone[0]}, and an undo cannot be undone: the "
                f"next recount counts again. To repeat the undo, give {undone[0]}"
            )
    if found is None:
        raise RecountNotFound(f"{change_log.full_name} holds {hint}; --status lists the recounts")
    return found


def find_changes(collection: Collection[Any], recount: ObjectId) -> Iterator[Sequence[Document]]:
    """Yield the batches of changes of a recount, in the order of writing. Raises ServiceError."""
    lenient = collection.with_options(codec_options=LENIENT_CODEC)
    logged = {**OWNER_FILTER, "recount": recount}
    with map_driver_errors("find", collection):
        for batch in lenient.find(logged, sort=[("_id", 1)], batch_size=DOCUMENTS_PER_BATCH):
            yield batch["changes"]


def find_user_changes(
    collection: Collection[Any], target: Document, users: Sequence[Any]
) -> list[Document]:
    """Return `{recount, at, change}` for each logged change of some users, the newest first.

    Only changes of `target`, a `logged_target`. Raises ServiceError.
    """
    ids = [user for user in users if try_encode({"": user})]  # no other is ever logged
    is_wanted_expr = {"$in": ["$$this.user", {"$literal": ids}]}
    stages: list[Document] = [
        {"$match": {**OWNER_FILTER, **target, "changes.user": {"$in": ids}}},
        {"$set": {"changes": {"$filter": {"input": "$changes", "cond": is_wanted_expr}}}},
        {"$unwind": "$changes"},
        {"$sort": {"at": -1, "_id": -1}},
        {"$project": {"_id": 0, "recount": 1, "at": 1, "change": "$changes"}},
    ]
    lenient = collection.with_options(codec_options=LENIENT_CODEC)
    with map_driver_errors("find", collection):
        return list(lenient.aggregate(stages, collation=SIMPLE_COLLATION))
