"""Undo: restore the points that one recount changed, from the change log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import bson
from bson import ObjectId
from pymongo import UpdateMany
from pymongo.collection import Collection

from config import Settings
from loyalty.concurrency import ProgressCallback, map_ordered
from loyalty.errors import BulkUpdateErrors, ConfigurationError, RecountNotFound
from loyalty.history import History
from loyalty.mongo.connection import Connection
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.values import LENIENT_CODEC, Document, get_nested, is_integer
from loyalty.recount.change_log import LoggedRecount, find_changes, find_recount
from loyalty.recount.updates import MAX_WRITERS
from loyalty.retry import SHORT_OUTAGE_RETRY, retry

MISSING = object()
"""The value of a field that a user does not have."""


def change_log_collection(connection: Connection) -> Collection[Any]:
    """Return the collection of the change log. Raises ConfigurationError without one."""
    if connection.changes is None:
        raise ConfigurationError("CHANGES_COLLECTION is none, so there is no change log")
    return connection.changes


def find_interrupted(
    connection: Connection, settings: Settings, history: History
) -> LoggedRecount | None:
    """Return the newest recount of the target if it has logged changes and no record.

    It is writing, or it was interrupted. Raises ServiceError.
    """
    if connection.changes is None:
        return None
    target = {"users": settings.users, "points_field": settings.points_field}
    newest = find_recount(connection.changes, target)
    return newest if newest is not None and not history.has_record(newest.id) else None


def resolve_recount(
    connection: Connection, settings: Settings, history: History, text: str
) -> LoggedRecount:
    """Return the logged recount with the id `text`, or for "last" the newest one with an effect.

    That one wrote the collection and the field in the settings, changed users, and is not undone.
    Raises RecountNotFound, and other ServiceErrors.
    """
    change_log = change_log_collection(connection)
    if text == "last":
        target = {"users": settings.users, "points_field": settings.points_field}
        others = {"recount": {"$nin": history.recounts_without_effect()}}
        found = find_recount(change_log, {**target, **others})
        hint = f"no recount that changed {settings.users}.{settings.points_field} and is not undone"
    elif ObjectId.is_valid(text):
        found, hint = find_recount(change_log, {"recount": ObjectId(text)}), f"no recount {text}"
    else:
        raise RecountNotFound(f"{text!r} is neither the id of a recount nor the word last")
    if found is None:
        raise RecountNotFound(f"{change_log.full_name} holds {hint}; --status lists the recounts")
    return found


@dataclass(frozen=True, slots=True)
class NotRestored:
    """A user who keeps other points: `found` is what is stored now, MISSING for a missing field.

    `is_deleted`: the user does not exist any more.
    """

    user: Any
    before: Any
    after: int
    found: Any
    is_deleted: bool = False


@dataclass(slots=True)
class UndoResult:
    """How many users an undo restored, or would restore, and how many it left alone."""

    restored: int = 0
    not_restored: int = 0
    unchanged: int = 0
    """Users who have the old points already: the logged change was never made, or undone."""


def undo_recount(
    connection: Connection,
    recount: LoggedRecount,
    *,
    write: bool,
    on_not_restored: Callable[[NotRestored], None],
    on_progress: ProgressCallback,
) -> UndoResult:
    """Restore the old points of every user whose points are still what the recount wrote.

    It uses the collection and the field that the recount wrote, whatever the settings are now, and
    touches no other field. Repeating it is harmless. Raises ServiceError.
    """
    change_log = change_log_collection(connection)
    users = change_log.database.get_collection(recount.users, codec_options=LENIENT_CODEC)

    def undo(changes: Sequence[Document]) -> tuple[UndoResult, list[NotRestored]]:
        return _undo_batch(users, recount.points_field, changes, write=write)

    total = UndoResult()
    batches = find_changes(change_log, recount.id)
    with map_ordered(undo, batches, MAX_WRITERS) as results:
        for result, not_restored in results:
            total.restored += result.restored
            total.unchanged += result.unchanged
            total.not_restored += result.not_restored
            for user in not_restored:
                on_not_restored(user)
            on_progress("")
    return total


def _undo_batch(
    users: Collection[Any], points_field: str, changes: Sequence[Document], *, write: bool
) -> tuple[UndoResult, list[NotRestored]]:
    """Undo one batch of changes, or count what that would do."""
    # The filters match only users who still have the points of the recount.
    matched = _write(users, points_field, changes) if write else 0
    if matched == len(changes):
        return UndoResult(matched), []
    with_old_points = 0
    with_new_points, with_other_points = [], []
    for change, found, is_deleted in _read_points(users, points_field, changes):
        before = change.get("before", MISSING)
        user = NotRestored(change["user"], before, change["after"], found, is_deleted)
        if not is_deleted and _is_same(found, before):
            with_old_points += 1
        elif is_integer(found) and found == change["after"]:
            with_new_points.append(user)
        else:
            with_other_points.append(user)
    if not write:
        result = UndoResult(len(with_new_points), len(with_other_points), with_old_points)
        return result, with_other_points
    restored = with_old_points if matched is None else matched
    not_restored = [*with_new_points, *with_other_points]  # the former: their updates failed
    return UndoResult(restored, len(not_restored), with_old_points - restored), not_restored


def _write(users: Collection[Any], points_field: str, changes: Sequence[Document]) -> int | None:
    """Restore users, and return how many were matched; None if some updates failed.

    Raises ServiceError.
    """

    def write(updates: Sequence[UpdateMany]) -> int:
        with map_driver_errors("update", users):
            return users.bulk_write(updates, ordered=False).matched_count

    updates = _build_updates(points_field, changes)
    try:
        return retry(lambda: write(updates), SHORT_OUTAGE_RETRY)
    except BulkUpdateErrors:
        # An UpdateMany stops at the first user whose update fails. The caller lists those users.
        with suppress(BulkUpdateErrors):
            write([u for c in changes for u in _build_updates(points_field, [c])])
        return None


def _read_points(
    users: Collection[Any], points_field: str, changes: Sequence[Document]
) -> Iterator[tuple[Document, Any, bool]]:
    """Yield each change with the points that are stored now, and whether the user is deleted."""
    ids = [change["user"] for change in changes]
    with map_driver_errors("find", users):
        found = users.find({"_id": {"$in": ids}}, {points_field: 1})
        stored = {bson.encode({"": user.pop("_id")}): user for user in found}
    for change in changes:
        user = stored.get(bson.encode({"": change["user"]}))
        yield change, get_nested(user, points_field, MISSING), user is None


def _build_updates(points_field: str, changes: Sequence[Document]) -> list[UpdateMany]:
    """Return the updates that restore users, each for all who change in the same way."""
    groups: defaultdict[bytes, list[Document]] = defaultdict(list)
    for change in changes:
        key = {name: value for name, value in change.items() if name != "user"}
        groups[bson.encode(key)].append(change)
    updates = []
    for group in groups.values():
        change, ids = group[0], [change["user"] for change in group]
        recount_points = {"$eq": change["after"], "$type": ["int", "long"]}
        condition = {"_id": {"$in": ids}, points_field: recount_points}
        if "before" in change:
            updates.append(UpdateMany(condition, {"$set": {points_field: change["before"]}}))
            continue
        if created := change.get("created"):
            # Remove the document that the update created, unless it has other fields by now.
            document = _nest(points_field.removeprefix(f"{created}."), change["after"])
            condition_created = {"_id": {"$in": ids}, created: document}
            updates.append(UpdateMany(condition_created, {"$unset": {created: ""}}))
        updates.append(UpdateMany(condition, {"$unset": {points_field: ""}}))
    return updates


def _nest(path: str, value: Any) -> Any:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def _is_same(found: Any, before: Any) -> bool:
    if found is MISSING or before is MISSING:
        return found is before
    return bson.encode({"": found}) == bson.encode({"": before})
