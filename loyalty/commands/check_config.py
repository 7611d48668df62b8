"""`--check-config`."""

from __future__ import annotations

import argparse
import dataclasses

from config import Settings
from loyalty.commands.output import format_cell, format_sample, print_json, print_table
from loyalty.errors import ConfigurationError, Exit
from loyalty.examine import PreflightReport, run_preflight
from loyalty.history import History
from loyalty.live.watcher import keeps_pre_images, live_updates_blocker
from loyalty.metrics import Metrics
from loyalty.mongo.connection import Connection
from loyalty.recount.customer_ids import Document
from loyalty.recount.runner import connect_and_verify
from loyalty.recount.statuses import is_counted, shown_status

_STATUSES = 10  # shown


def run(args: argparse.Namespace, settings: Settings) -> int:
    misplaced: ConfigurationError | None = None
    with connect_and_verify(settings, writing=True, recording=False) as connection:
        try:
            problem = History(connection.recounts).check()
        except ConfigurationError as error:  # said at the end: the data may have other problems
            problem, misplaced = str(error), error
        not_live = live_updates_blocker(connection, settings) if settings.live_updates else None
        if not args.json:  # before the look at the data, which takes its time
            print_settings(settings, connection, problem)
            if settings.live_updates:
                print_live_updates_check(connection, not_live, keeps_pre_images(connection))
        found = run_preflight(connection, settings)
        found.problems += filter(None, [Metrics(settings).check()])
        if not args.json:
            print_examination(found, settings)
        elif not misplaced:
            found.problems += [f"live updates will not work: {not_live}"] if not_live else []
            print_json(of_check(settings, connection, problem, found))
    if misplaced:
        raise misplaced
    return Exit.FINDINGS if problem or not_live or found.problems else Exit.OK


def print_settings(settings: Settings, connection: Connection, problem: str | None) -> None:
    """Print what the service goes by, without credentials."""
    print_table(
        ("hosts", settings.hosts),
        ("server", f"{connection.server_version}, {connection.topology.replace('_', ' ')}"),
        (
            "one point in time",
            f"no: {connection.snapshot_unsupported_reason}"
            if connection.snapshot_unsupported_reason
            else "yes",
        ),
        *((name, format_cell(value)) for name, value in settings.format_value().items()),
        ("permissions", problem or "fine"),
    )


def print_live_updates_check(
    connection: Connection, problem: str | None, pre_images: bool | None
) -> None:
    """Print whether live updates will work, and what they will see at once."""
    orders = connection.orders
    switch = f"db.runCommand({{collMod: '{orders.name}', changeStreamPreAndPostImages: "
    told = {
        True: "on",
        False: "off: deletes, and orders that go to another customer, wait for the next full "
        f"recount; to switch them on: {switch}{{enabled: true}}}})",
        None: "not known: that takes the permission listCollections",
    }
    if not connection.pre_images:
        told[False] = "none before MongoDB 6.0: deletes wait for the next full recount"
    print_table(
        ("live updates", f"will NOT work: {problem}" if problem else "will work"),
        ("pre-images", told[pre_images]),
    )


def print_examination(found: PreflightReport, settings: Settings) -> None:
    """Print what is known of the data, and what has to be put right."""
    about = "about " if found.sampled else ""

    def number(n: int | None) -> str:
        return "not known; --dry-run counts them all" if n is None else f"{about}{n:,}"

    print("The data" + (" (about: an estimate, from a sample)" if about else ""))
    ids = ", ".join(f"{kind} {number(n)}" for kind, n in found.ids.items())
    counts = {status: n for status, n in found.statuses if isinstance(status, str)}
    missing = [(s, 0) for s in settings.order_statuses if s not in counts]
    print_table(
        ("users", number(found.users) + (f": _id is {ids}" if ids else "")),
        ("orders", number(found.orders)),
        *(
            (f"  {shown_status(status)}", number(n) + (", counts" * is_counted(status, settings)))
            for status, n in [*found.statuses[:_STATUSES], *missing]
        ),
        ("that count, without customer", number(found.orders_without_customer)),
        (
            "that count, of no user",
            number(found.orders_of_unknown_customers) + format_sample(found.unknown_sample),
        ),
        ("users with points", number(found.users_with_points_before)),
        ("who would lose some", number(found.decreased)),
        (f"index {settings.status_field}, {settings.customer_field}", found.index or "not known"),
    )
    for problem in found.problems:
        print(f"PROBLEM: {problem}")


def of_check(
    settings: Settings, connection: Connection, problem: str | None, found: PreflightReport
) -> Document:
    data = dataclasses.asdict(found)
    data["statuses"] = [
        {"status": shown_status(status), "orders": n, "counts": is_counted(status, settings)}
        for status, n in found.statuses
    ]
    return {
        "problems": data.pop("problems"),
        "permissions": problem,
        "hosts": settings.hosts,
        "server": connection.server_version,
        "topology": connection.topology,
        "inexact": connection.snapshot_unsupported_reason or None,
        "settings": settings.format_value(),
        "data": data,
    }
