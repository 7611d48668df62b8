"""`--changes RECOUNT`: the users that a recount changed, with their points before and after."""

import argparse
from collections.abc import Set as AbstractSet

from config import Settings
from loyalty.commands.output import pluralize, print_json, print_line
from loyalty.errors import Exit
from loyalty.history import History
from loyalty.mongo.connection import connect
from loyalty.mongo.values import Document, format_value
from loyalty.recount.change_log import (
    MISSING,
    LoggedRecount,
    change_log_collection,
    find_changes,
    resolve_recount,
)


def run(args: argparse.Namespace, settings: Settings) -> Exit:
    """Print each logged change, in the order of writing; as JSON, one object a line.

    Without --json, it also says whether some changes were perhaps not made.
    """
    number = 0
    with connect(settings, verify=False) as connection:
        history = History(connection.recounts, settings)
        recount = resolve_recount(connection, settings, history, args.changes)
        outcome = history.find_outcomes([recount.id])[recount.id]
        if not args.json:
            print_recount(recount)
        for batch in find_changes(change_log_collection(connection), recount.id):
            number += len(batch)
            for change in batch:
                row = change_to_json(change)
                if args.json:
                    print_json(row)
                else:
                    print_line(f"  {row['user']}  {row['from']} -> {row['to']}")
    if not args.json:
        print_line(pluralize(number, "change"))
        print_outcomes({outcome})
    return Exit.OK


def print_outcomes(outcomes: AbstractSet[str]) -> None:
    """Print what outcomes of recounts mean for their logged changes."""
    if "undone" in outcomes:
        print_line("  undone: the points were restored, unless they had changed meanwhile")
    if "unknown" in outcomes:
        print_line("  unknown: without the record of the recount, its outcome is not known")
    for outcome in sorted(outcomes - {"succeeded", "undone", "unknown"}):
        print_line(f"  {outcome}: some of the changes were perhaps not made")


def print_recount(recount: LoggedRecount) -> None:
    """Print which recount it is, and where it wrote."""
    written = f"{recount.users}.{recount.points_field}"
    print_line(f"Recount {recount.id} of {recount.at:%Y-%m-%d %H:%M:%S} UTC wrote {written}")


def change_to_json(change: Document) -> Document:
    """Return a logged change as `{user, from, to}`."""
    before = format_points(change.get("before", MISSING))
    return {"user": format_value(change["user"]), "from": before, "to": change["after"]}


def format_points(value: object) -> str:
    """Return stored points for a person; "no field" is not the same as null."""
    return "no field" if value is MISSING else format_value(value)
