"""`--undo RECOUNT`: restore the points from before one recount."""

from __future__ import annotations

import argparse
from dataclasses import replace
from datetime import UTC, datetime

from config import VERSION, Settings
from loyalty.commands.changes import format_points, print_recount
from loyalty.commands.output import pluralize, print_json, print_line
from loyalty.concurrency import ignore_progress
from loyalty.errors import Exit
from loyalty.history import History
from loyalty.mongo.connection import connect
from loyalty.mongo.values import Document, format_value
from loyalty.recount.change_log import LoggedRecount
from loyalty.recount.undo import NotRestored, UndoResult, resolve_recount, undo_recount

_ADVICE = (
    "The next recount counts again and may repeat the change. Before it: stop the service, correct "
    "the settings or the orders, and check with --dry-run."
)


def run(args: argparse.Namespace, settings: Settings) -> Exit:
    """Undo a recount, or show what that would do; FINDINGS if some users are not restored.

    The result comes after one line for each user who is not restored, as JSON as well.
    """
    write = not args.dry_run
    with connect(settings, writing=write, verify=False) as connection:
        history = History(connection.recounts, settings)
        recount = resolve_recount(connection, settings, history, args.undo)
        started_at = datetime.now(UTC)
        if not args.json:
            print_recount(recount)
        result = undo_recount(
            connection,
            recount,
            write=write,
            on_not_restored=_print_json_user if args.json else _print_user,
            on_progress=ignore_progress,
        )
        if write:
            # The recount may have written elsewhere than the settings say now.
            target = replace(settings, users=recount.users, points_field=recount.points_field)
            record = _build_record(recount, result, started_at)
            History(connection.recounts, target).write(record)
    if args.json:
        print_json(_to_json(recount, result, write=write))
    else:
        _print_result(result, write=write)
    return Exit.FINDINGS if result.not_restored else Exit.OK


def _build_record(recount: LoggedRecount, result: UndoResult, started_at: datetime) -> Document:
    finished_at = datetime.now(UTC)
    return {
        "started_at": started_at,
        "finished_at": finished_at,
        "seconds": (finished_at - started_at).total_seconds(),
        "outcome": "undone",
        "undone_recount": recount.id,
        "changed": result.restored,
        "not_restored": result.not_restored,
        "error": None,
        "version": VERSION,
    }


def _user_json(user: NotRestored) -> Document:
    """Return a user who keeps other points as `{user, from, to, found}`."""
    return {
        "user": format_value(user.user),
        "from": format_points(user.before),
        "to": user.after,
        "found": "no user" if user.is_deleted else format_points(user.found),
    }


def _print_json_user(user: NotRestored) -> None:
    print_json(_user_json(user))


def _print_user(user: NotRestored) -> None:
    row = _user_json(user)
    change = f"{row['from']} -> {row['to']}"
    print_line(f"  not restored: {row['user']}  {change}, now {row['found']}")


def _print_result(result: UndoResult, *, write: bool) -> None:
    verb = "restored" if write else "would be restored; nothing is written"
    print_line(f"{pluralize(result.restored, 'user')} {verb}")
    if result.unchanged:
        print_line(f"{pluralize(result.unchanged, 'user')} had the old points already")
    if result.not_restored:
        print_line(
            f"{pluralize(result.not_restored, 'user')} not restored: the points are no longer "
            "those of the recount, or the update failed"
        )
    print_line(_ADVICE)


def _to_json(recount: LoggedRecount, result: UndoResult, *, write: bool) -> Document:
    return {
        "recount": recount.id,
        "users_collection": recount.users,
        "points_field": recount.points_field,
        "written": write,
        "restored": result.restored,
        "unchanged": result.unchanged,
        "not_restored": result.not_restored,
    }
