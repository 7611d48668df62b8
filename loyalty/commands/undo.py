"""`--undo RECOUNT`: put back the points that one recount changed."""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime

from config import Settings
from loyalty.commands.output import pluralize, print_json, print_line
from loyalty.concurrency import ignore_progress
from loyalty.errors import Exit
from loyalty.history import History
from loyalty.mongo.connection import connect
from loyalty.mongo.values import format_value
from loyalty.recount.change_log import LoggedRecount
from loyalty.recount.result import CountResult, Result, build_record
from loyalty.recount.undo import MISSING, NotRestored, UndoResult, resolve_recount, undo_recount

_ADVICE = (
    "The next recount counts again and may repeat the change. First stop the service, or correct "
    "the settings and check them with --dry-run."
)


def run(args: argparse.Namespace, settings: Settings) -> Exit:
    """Undo a recount, or show what that would do; FINDINGS if some users are not restored."""
    write = not args.dry_run
    with connect(settings, writing=write) as connection:
        history = History(connection.recounts, settings)
        recount = resolve_recount(connection, settings, history, args.undo)
        started_at, clock = datetime.now(UTC), time.monotonic()
        if not args.json:
            field = f"{recount.users}.{recount.points_field}"
            print_line(f"Recount {recount.id} of {recount.at:%Y-%m-%d %H:%M:%S} UTC wrote {field}")
        result = undo_recount(
            connection,
            recount,
            write=write,
            on_not_restored=_print_json_user if args.json else _print_user,
            on_progress=ignore_progress,
        )
        if write:
            undone = Result(
                started_at=started_at,
                seconds=time.monotonic() - clock,
                outcome="undone",
                count=CountResult(as_of=started_at),
                written=result.restored,
            )
            fields = {"undone_recount": recount.id, "not_restored": result.not_restored}
            history.write(build_record(undone) | fields)
    if args.json:
        print_json(_to_json(recount, result, write=write))
    else:
        _print_result(result, write=write)
    return Exit.FINDINGS if result.not_restored else Exit.OK


def _print_user(user: NotRestored) -> None:
    found = "deleted" if user.is_deleted else _format_points(user.found)
    print_line(
        f"  not restored: user {format_value(user.user)}, before {_format_points(user.before)}, "
        f"recount {user.after}, now {found}"
    )


def _print_json_user(user: NotRestored) -> None:
    print_json(
        {
            "user": format_value(user.user),
            "before": _format_points(user.before),
            "after": user.after,
            "found": None if user.is_deleted else _format_points(user.found),
        }
    )


def _format_points(value: object) -> str:
    return "no field" if value is MISSING else format_value(value)


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


def _to_json(recount: LoggedRecount, result: UndoResult, *, write: bool) -> dict[str, object]:
    return {
        "recount": recount.id,
        "users_collection": recount.users,
        "points_field": recount.points_field,
        "written": write,
        "restored": result.restored,
        "unchanged": result.unchanged,
        "not_restored": result.not_restored,
    }
