"""`--undo RECOUNT`: restore the points that users had before one recount."""

import argparse
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from config import VERSION, Settings
from loyalty.commands.changes import change_to_json, format_points, print_recount
from loyalty.commands.output import pluralize, print_json, print_line
from loyalty.commands.status import read_server_time
from loyalty.errors import Exit, RecountNotEnded
from loyalty.history import NO_RECORD, UNKNOWN, History
from loyalty.mongo.connection import Connection, connect
from loyalty.mongo.values import Document
from loyalty.recount.change_log import MAX_SILENCE, LoggedRecount, resolve_recount
from loyalty.recount.undo import LoggedUser, UndoResult, undo_leaves_old_points, undo_recount

_ADVICE = (
    "The next recount counts again, and may repeat the change. Before the next recount, stop the "
    "service, correct the settings or the orders, and check with --dry-run."
)


def run(args: argparse.Namespace, settings: Settings) -> Exit:
    """Undo a recount, or show what that would do; FINDINGS if some users are not restored.

    Print one line for each user who is not restored, and then the result.
    """
    write = not args.dry_run

    def print_user(user: LoggedUser) -> None:
        row = _user_to_json(user)
        if args.json:
            print_json(row)
        else:
            text = f"{row['user']}  {row['from']} -> {row['to']}, now {row['found']} ({row['why']})"
            print_line(f"  {'not restored' if write else 'would not be restored'}: {text}")

    with connect(settings, writing=write, verify=False) as connection:
        history = History(connection.recounts, settings)
        recount = resolve_recount(connection, settings, history, args.undo)
        if write:
            _require_ended(connection, history, recount)
        if not args.json:
            print_recount(recount)
        is_recorded = write and undo_leaves_old_points(connection, recount)
        # The recount may have written to another target than that of the settings.
        target = replace(settings, users=recount.users, points_field=recount.points_field)
        target_history, started_at = History(connection.recounts, target), datetime.now(UTC)
        if is_recorded:  # before the first update, as the undo may be interrupted
            target_history.write(_build_record(recount, started_at))
        result = undo_recount(connection, recount, write=write, on_not_restored=print_user)
        if is_recorded:
            target_history.write(_build_record(recount, started_at, result))
    if args.json:
        print_json(_to_json(recount, result, write=write))
    else:
        _print_result(result, write=write)
    return Exit.FINDINGS if result.not_restored else Exit.OK


def _require_ended(connection: Connection, history: History, recount: LoggedRecount) -> None:
    """Raise RecountNotEnded if the recount may still be writing; other ServiceErrors."""
    outcome = history.find_outcomes([recount.id])[recount.id]
    if outcome in (NO_RECORD, UNKNOWN) and not recount.is_silent(read_server_time(connection)):
        raise RecountNotEnded(
            f"recount {recount.id} has no record and logged changes at {recount.logged_at:%H:%M:%S}"
            " UTC: it is still writing, or it was interrupted. Stop the service; --undo is possible"
            f" after {recount.logged_at + MAX_SILENCE:%H:%M:%S} UTC"
        )


def _build_record(
    recount: LoggedRecount, started_at: datetime, result: UndoResult | None = None
) -> Document:
    """Return the record of an undo; without a result, the one from before its first update."""
    finished_at = datetime.now(UTC)
    record: dict[str, Any] = {
        "started_at": started_at,
        "finished_at": finished_at,
        "outcome": "undone" if result else "undoing",
        "undone_recount": recount.id,
        "version": VERSION,
    }
    if result:
        record["seconds"] = (finished_at - started_at).total_seconds()
        record["changed"] = result.restored
        record["not_restored"] = result.not_restored.total()
        record["error"] = None
    return record


def _user_to_json(user: LoggedUser) -> Document:
    """Return a user who is not restored as `{user, from, to, found, why}`."""
    found = "no user" if user.is_deleted else format_points(user.stored)
    return {**change_to_json(user.change), "found": found, "why": user.why_not_restored}


def _print_result(result: UndoResult, *, write: bool) -> None:
    verb = "restored" if write else "would be restored; nothing is written"
    print_line(f"{pluralize(result.restored, 'user')} {verb}")
    if result.unchanged:
        print_line(f"{pluralize(result.unchanged, 'user')} already had the old points")
    for why, number in result.not_restored.items():
        verb = "not restored" if write else "would not be restored"
        print_line(f"{pluralize(number, 'user')} {verb}: {why}")
    print_line(_ADVICE)


def _to_json(recount: LoggedRecount, result: UndoResult, *, write: bool) -> Document:
    return {
        "recount": recount.id,
        "users_collection": recount.users,
        "points_field": recount.points_field,
        "written": write,
        "restored": result.restored,
        "unchanged": result.unchanged,
        "not_restored": result.not_restored.total(),
    }
