"""What a person reads: how a recount went, on stdout and in the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta

from config import Settings
from loyalty.examine import PreflightReport
from loyalty.history import Heartbeat, is_fresh
from loyalty.mongo.connection import Connection
from loyalty.parsers import format_duration
from loyalty.recount.customer_ids import Document
from loyalty.recount.statuses import OrderBreakdown, is_counted, shown_status
from loyalty.recount.tally import COUNTS, Change, Result, Totals

log = logging.getLogger("loyalty")

_CHANGE = ("user", "from", "to")
_STATUSES = 10  # shown


def log_result(result: Result) -> None:
    """Log one line about a recount, and a warning for whatever a person should look at."""
    totals = result.totals
    fields: dict[str, object] = {
        "outcome": result.outcome,
        **{name: getattr(totals, name) for name in ("users", *COUNTS)},
        "failed_updates": result.failed_updates,
        "as_of": f"{result.as_of:%Y-%m-%dT%H:%M:%SZ}",
        "exact": result.exact,
        "seconds": round(result.seconds, 1),
    }
    words = [f"{n}={str(v).lower() if isinstance(v, bool) else v}" for n, v in fields.items()]
    log.info("recount %s", " ".join(words), extra={"fields": fields})
    if totals.unknown_sample:  # at DEBUG only: an id may be an e-mail address
        log.debug('unknown_customers sample="%s"', ", ".join(totals.unknown_sample))
    if not totals.users:
        log.warning("no_users found: are MONGODB_DATABASE and USERS_COLLECTION right?")
    if refused := result.failed_updates:
        log.warning(
            "incomplete %s of %s users refused the update, the others are written; %s",
            *(f"{refused:,}", f"{totals.changed:,}", result.refusing),
        )


def systemd_status(result: Result) -> str:
    """Return how a recount went in a few words, for systemd."""
    changed = f"{result.totals.changed:,} changed"
    if refused := result.failed_updates:
        changed += f", {counted(refused, 'user')} refused the update"
    return f"recounted as of {result.as_of:%Y-%m-%d %H:%M:%S} UTC, {changed}"


def print_totals(result: Result, *, names: bool = False) -> None:
    """Print what a recount found; with `names`, ids of unknown customers, too."""
    totals = result.totals
    unknown = f"{totals.unknown_customers:,}"
    if totals.unknown_customers:
        unknown += f" with {counted(totals.orders_of_unknown_customers, 'order')}"
    if names:
        unknown += format_sample(totals)
    rows = [
        ("users", f"{totals.users:,}"),
        ("counted orders", f"{totals.counted_orders:,}"),
        ("changed", _changed(totals)),
        ("unknown customers", unknown),
        ("orders without customer", f"{totals.orders_without_customer:,}"),
        ("as of", f"{format_cell(result.as_of)} UTC ({_exactness(result)})"),
    ]
    if result.failed_updates:
        rows.append(("refused the update", f"{result.failed_updates:,}"))
    print_table(*rows)


def _changed(totals: Totals) -> str:
    parts = {
        "up": totals.increased,
        "down": totals.decreased,
        "set to 0": totals.initialized_to_zero,
    }
    parts["only in type"] = totals.changed - sum(parts.values())
    kinds = [f"{n:,} {kind}" for kind, n in parts.items() if n or kind in ("up", "down")]
    return f"{totals.changed:,} ({', '.join(kinds)})"


def _exactness(result: Result) -> str:
    if result.exact:
        # On an idle server that may be some seconds before the recount began.
        return "one point in time: the last that a majority of the servers had confirmed"
    return "not one point in time"


def print_dry_run(result: Result) -> None:
    """Print what a recount would do, with its largest changes first."""
    print("Dry run: nothing is written")
    print_totals(result, names=True)
    if result.totals.largest:
        print("Largest changes")
        ranked = sorted(result.totals.largest, reverse=True)
        print_table(_CHANGE, *((c.user, c.before, f"{c.after:,}") for c in ranked))
    if result.refusal:
        print(f"The guard would refuse this: {result.refusal}")
    elif result.warning:
        print(f"This would take points {result.warning}")


def print_customer(
    customer: str, settings: Settings, orders: Sequence[OrderBreakdown], users: Sequence[Change]
) -> None:
    """Print a customer's orders and points."""
    print(customer)
    if orders:
        names = (settings.customer_field, settings.status_field, "orders", "points", "")
        print_table(names, *((form, s, f"{n:,}", f"{p:,}", why) for form, s, n, p, why in orders))
    else:
        print("  no orders")
    if users:
        print_table(_CHANGE, *((c.user, c.before, f"{c.after:,}") for c in users))
    else:
        print("  no user has this id, be it text, number, UUID or ObjectId")


def print_records(records: Sequence[Document]) -> None:
    """Print records of recounts, one a line; times are UTC."""
    if not records:
        return
    names = ("finished_at", "outcome", "changed", "counted_orders", "as_of", "exact", "error")
    rows = ([format_cell(record.get(name)) for name in names] for record in records)
    times = {"finished_at": "finished (UTC)", "as_of": "as of (UTC)"}
    print_table([times.get(name, name.replace("_", " ")) for name in names], *rows)
    print("  As of: what most servers had confirmed, on idle ones a few seconds before the start.")


def print_age(age: timedelta | None, interval: timedelta) -> None:
    """Print how old the points are, and whether that is fresh enough."""
    if age is None:
        print("No recount has succeeded yet")
        return
    fresh = is_fresh(age, interval)
    old = timedelta(seconds=int(age.total_seconds()))
    print(
        f"The points are {format_duration(old)} old: "
        f"{'fresh, at most' if fresh else 'STALE, more than'} "
        f"twice the interval of {format_duration(interval)}"
    )


def status_of_live(heartbeat: Heartbeat) -> str:
    """Return how live updates are doing in a few words, for systemd."""
    since = f"live since {heartbeat.live_since:%Y-%m-%d %H:%M:%S} UTC"
    return (
        f"{since}, {counted(heartbeat.customers_updated, 'update')}, {heartbeat.waiting:,} waiting"
    )


def print_live(heartbeat: Heartbeat | None, now: datetime, *, wanted: bool) -> None:
    """Print whether live updates are at work; nothing if they are neither that nor wanted."""
    if heartbeat is not None and heartbeat.is_alive(now):
        print(f"Live: {status_of_live(heartbeat)[5:]}")
    elif wanted:
        last = (
            f"the last heartbeat was {format_duration(now - heartbeat.at)} ago" if heartbeat else ""
        )
        print(f"NOT live: {last or 'there is no heartbeat'}")


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
        *((name, format_cell(value)) for name, value in settings.to_dict().items()),
        ("permissions", problem or "fine"),
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
            number(found.orders_of_unknown_customers) + format_sample(found),
        ),
        ("users with points", number(found.users_with_points_before)),
        ("who would lose some", number(found.decreased)),
        (f"index {settings.status_field}, {settings.customer_field}", found.index or "not known"),
    )
    for problem in found.problems:
        print(f"PROBLEM: {problem}")


def format_sample(found: PreflightReport | Totals) -> str:
    return f", such as {', '.join(found.unknown_sample)}" if found.unknown_sample else ""


def format_cell(value: object) -> str:
    """Return a value as it stands in a table."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case datetime():
            return f"{value:%Y-%m-%d %H:%M:%S}"
        case timedelta():
            return format_duration(value)
        case tuple():
            return ", ".join(value)
    return str(value) or "none"


def counted(n: int, thing: str) -> str:
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def print_table(*rows: Sequence[str]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  " + "  ".join(map(str.ljust, row, widths)).rstrip())
