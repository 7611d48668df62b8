"""`--undo RECOUNT`: restore the points that users had before one recount."""

import argparse
from dataclasses import replace
from datetime import UTC, datetime

from config import VERSION, Settings
from loyalty.commands.changes import change_json, format_points, print_recount
from loyalty.commands.output import pluralize, print_json, print_line
from loyalty.errors import Exit
from loyalty.history import History
from loyalty.mongo.connection import connect
from loyalty.mongo.values import Document
from loyalty.recount.change_log import LoggedRecount
from loyalty.recount.undo import LoggedUser, UndoResult, resolve_recount, undo_recount

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
        row = _user_json(user)
        if args.json:
            print_json(row)
        else:
            text = f"{row['user']}  {row['from']} -> {row['to']}, now {row['found']} ({row['why']})"
            print_line(f"  {'not restored' if write else 'would not be restored'}: {text}")

    with connect(settings, writing=write, verify=False) as connection:
        history = History(connection.recounts, settings)
        recount = resolve_recount(connection, settings, history, args.undo)
        started_at = datetime.now(UTC)
        if not args.json:
            print_recount(recount)
        result = undo_recount(connection, recount, write=write, on_not_restored=print_user)
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
        "not_restored": result.not_restored.total(),
        "error": None,
        "version": VERSION,
    }


def _user_json(user: LoggedUser) -> Document:
    """Return a user who is not restored as `{user, from, to, found, why}`."""
    found = "no user" if user.is_deleted else format_points(user.stored)
    return {**change_json(user.change), "found": found, "why": user.why_not_restored}


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
