"""What a person reads about live updates."""

from __future__ import annotations

from datetime import datetime

from loyalty.history import Heartbeat
from loyalty.mongo import Connection
from loyalty.parsers import written
from loyalty.report import counted, print_table


def status_of(beat: Heartbeat) -> str:
    """Return how live updates are doing in a few words, for systemd."""
    since = f"live since {beat.live_since:%Y-%m-%d %H:%M:%S} UTC"
    return f"{since}, {counted(beat.customers_updated, 'update')}, {beat.waiting:,} waiting"


def print_live(beat: Heartbeat | None, now: datetime, *, wanted: bool) -> None:
    """Print whether live updates are at work; nothing if they are neither that nor wanted."""
    if beat is not None and beat.is_alive(now):
        print(f"Live: {status_of(beat)[5:]}")
    elif wanted:
        last = f"the last heartbeat was {written(now - beat.at)} ago" if beat else ""
        print(f"NOT live: {last or 'there is no heartbeat'}")


def print_prospects(connection: Connection, problem: str | None, pre_images: bool | None) -> None:
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
