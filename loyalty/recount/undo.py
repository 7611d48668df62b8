"""Undo: restore the points that one recount changed, from the change log."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import bson
from pymongo import UpdateMany
from pymongo.collection import Collection

from loyalty.concurrency import map_ordered
from loyalty.errors import BulkUpdateErrors, DatabaseUnavailable
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.values import LENIENT_CODEC, Document, get_nested, try_encode
from loyalty.recount.change_log import MISSING, LoggedRecount, change_log_collection, find_changes
from loyalty.recount.points import is_up_to_date, is_up_to_date_expr
from loyalty.recount.updates import MAX_WRITERS, bulk_write
from loyalty.retry import SHORT_OUTAGE_RETRY, retry


@dataclass(frozen=True, slots=True)
class LoggedUser:
    """A user whom a recount changed, and the points that are stored now."""

    change: Document
    """As logged: `{user, before, after}`."""
    stored: Any
    """MISSING without the field."""
    is_deleted: bool

    @property
    def before(self) -> Any:
        return self.change.get("before", MISSING)

    @property
    def has_old_points(self) -> bool:
        if self.stored is MISSING or self.before is MISSING:
            return self.stored is self.before and not self.is_deleted
        return try_encode({"": self.stored}) == bson.encode({"": self.before})

    @property
    def has_recount_points(self) -> bool:
        return is_up_to_date(self.stored, self.change["after"])

    @property
    def why_not_restored(self) -> str:
        """Why a user without the old points is not restored."""
        if self.is_deleted:
            return "deleted"
        return "update failed" if self.has_recount_points else "points changed since the recount"


@dataclass(slots=True)
class UndoResult:
    """How many users an undo restored, or would restore, and how many it did not change."""

    restored: int = 0
    unchanged: int = 0
    """Users who already had the old points: the change was not made, or was undone."""
    not_restored: Counter[str] = field(default_factory=Counter)
    """By reason."""


def undo_leaves_old_points(connection: Connection, recount: LoggedRecount) -> bool:
    """Return whether at least one user would have the old points after an undo.

    A user who already has them counts: a repeated undo completes the record of an interrupted one.
    Raises ServiceError.
    """
    users = connection.users.database.get_collection(recount.users, codec_options=LENIENT_CODEC)
    return any(
        user.has_recount_points or user.has_old_points
        for changes in find_changes(change_log_collection(connection), recount.id)
        for user in _read_users(users, recount.points_field, changes)
    )


def undo_recount(
    connection: Connection,
    recount: LoggedRecount,
    *,
    write: bool,
    on_not_restored: Callable[[LoggedUser], None],
) -> UndoResult:
    """Restore the old points of every user whose points are still what the recount wrote.

    It uses the collection and the field that the recount wrote to, even if the settings have
    changed, and changes no other field. Repeating it is harmless. Raises ServiceError.
    """
    change_log = change_log_collection(connection)
    users = connection.users.database.get_collection(recount.users, codec_options=LENIENT_CODEC)
    total = UndoResult()
    undo = partial(_undo_batch if write else _preview_batch, users, recount.points_field)
    with map_ordered(undo, find_changes(change_log, recount.id), MAX_WRITERS) as results:
        for result in results:
            total.restored += result.restored
            total.unchanged += result.unchanged
            for user in result.not_restored:
                total.not_restored[user.why_not_restored] += 1
                on_not_restored(user)
    return total


class _BatchResult(NamedTuple):
    restored: int
    unchanged: int
    not_restored: Sequence[LoggedUser]


def _preview_batch(
    users: Collection[Any], points_field: str, changes: Sequence[Document]
) -> _BatchResult:
    """Find out what `_undo_batch` would do."""
    found = _read_users(users, points_field, changes)
    return _BatchResult(
        restored=sum(user.has_recount_points for user in found),
        unchanged=sum(user.has_old_points for user in found),
        not_restored=[u for u in found if not u.has_recount_points and not u.has_old_points],
    )


def _undo_batch(
    users: Collection[Any], points_field: str, changes: Sequence[Document]
) -> _BatchResult:
    """Undo a batch of changes. Raises ServiceError."""
    matched = _restore(users, points_field, changes)
    if matched == len(changes):  # to read the users as well would take twice the time
        return _BatchResult(matched, 0, [])
    found = _read_users(users, points_field, changes)
    not_restored = [user for user in found if not user.has_old_points]
    with_old_points = len(found) - len(not_restored)
    # Without `matched`, users who already had the old points cannot be told from restored ones.
    restored = with_old_points if matched is None else min(matched, with_old_points)
    return _BatchResult(restored, with_old_points - restored, not_restored)


def _read_users(
    users: Collection[Any], points_field: str, changes: Sequence[Document]
) -> list[LoggedUser]:
    """Return the users of logged changes, with the points that are stored now."""
    ids = [change["user"] for change in changes]
    with map_driver_errors("find", users):
        found = users.find({"_id": {"$in": ids}}, {points_field: 1})
        by_id = {bson.encode({"": user["_id"]}): user for user in found}
    stored = [by_id.get(bson.encode({"": id_})) for id_ in ids]
    return [
        LoggedUser(change, get_nested(user, points_field, MISSING), user is None)
        for change, user in zip(changes, stored, strict=True)
    ]


def _restore(users: Collection[Any], points_field: str, changes: Sequence[Document]) -> int | None:
    """Restore users who still have the points of the recount. Raises ServiceError.

    Return how many users matched; None (unknown) after an error.
    """
    with suppress(BulkUpdateErrors, DatabaseUnavailable):
        return bulk_write(users, _build_updates(points_field, changes))
    # The updates may be done, without an acknowledgement; and an UpdateMany stops at the first user
    # whose update fails. So once more for each user.
    updates = [update for change in changes for update in _build_updates(points_field, [change])]
    with suppress(BulkUpdateErrors):
        retry(lambda: bulk_write(users, updates), SHORT_OUTAGE_RETRY)
    return None


def _build_updates(points_field: str, changes: Sequence[Document]) -> list[UpdateMany]:
    """Return the updates that restore users; users with the same change share an update."""
    groups: defaultdict[bytes, list[Document]] = defaultdict(list)
    for change in changes:
        key = {name: value for name, value in change.items() if name != "user"}
        groups[bson.encode(key)].append(change)
    updates = []
    for group in groups.values():
        change, ids = group[0], [change["user"] for change in group]
        # Expressions: the conditions of a query would also match elements of arrays.
        has_after_expr = is_up_to_date_expr(f"${points_field}", change["after"])
        condition = {"_id": {"$in": ids}, "$expr": has_after_expr}
        if "before" in change:
            updates.append(UpdateMany(condition, {"$set": {points_field: change["before"]}}))
            continue
        if created := change.get("created"):
            # Remove the document that the recount created, unless it has other fields by now. For
            # the field loyalty.points, `created` is "loyalty", and `created_value` is {points: 5}.
            created_value = change["after"]
            for name in reversed(points_field.removeprefix(f"{created}.").split(".")):
                created_value = {name: created_value}
            has_only_points_expr = {"$eq": [f"${created}", {"$literal": created_value}]}
            only_points = {**condition, "$expr": {"$and": [has_after_expr, has_only_points_expr]}}
            updates.append(UpdateMany(only_points, {"$unset": {created: ""}}))
            condition["$expr"] = {"$and": [has_after_expr, {"$not": [has_only_points_expr]}]}
        updates.append(UpdateMany(condition, {"$unset": {points_field: ""}}))
    return updates
