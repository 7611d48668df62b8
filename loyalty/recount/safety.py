"""Safety checks: every rule that refuses a recount or warns about it, with its threshold and text.

A refused recount writes nothing. This module makes no database calls.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from config import Settings
from loyalty.mongo.values import format_value
from loyalty.recount.order_filter import is_counted
from loyalty.recount.tally import Totals

MIN_USERS = 10
"""A percentage of users is checked only if at least this many users are affected."""
MIN_ORDERS = 10
WARN_DECREASE_PERCENT = 10
"""Of the users with points. Live updates pause above it, or above MAX_DECREASE_PERCENT if lower."""
WARN_CHANGED_PERCENT = 50
WARN_EARNING_NOTHING_PERCENT = 1
MIN_REMAINING_ORDERS_PERCENT = 50
MIN_PREVIOUS_ORDERS = 100
MAX_NON_NUMERIC_PERCENT = 50
MAX_FAILED_PERCENT = 1
MIN_FAILED_UPDATES = 10
MAX_STATUSES_SHOWN = 10
MAX_COLLECTIONS_SHOWN = 10

_FORCE = "If this is intended, run --once --force"

StatusCounts = Sequence[tuple[Any, int]]
"""The statuses that orders have, with the number of orders, the most frequent first."""


@dataclass(slots=True)
class SafetyReport:
    """The reasons to refuse a recount, and the warnings; both are empty if there is no problem."""

    refusals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __add__(self, other: "SafetyReport") -> "SafetyReport":
        return SafetyReport(self.refusals + other.refusals, self.warnings + other.warnings)

    @property
    def refusal(self) -> str | None:
        if not self.refusals:
            return None
        text = "; ".join(self.refusals)
        return f"{text}{'' if text.endswith('?') else '.'} {_FORCE}"


@dataclass(frozen=True, slots=True)
class PreviousRecounts:
    """Earlier recounts of the same users. The defaults are for when they are unknown."""

    is_first: bool = False
    counted_orders: int | None = None
    """The counted orders of the last successful one. None: unknown, or no such recount."""


def exceeds_share(part: int, whole: int, percent: int, minimum: int = MIN_USERS) -> bool:
    """Return whether `part` is at least `minimum` and more than `percent` of `whole`."""
    return part >= minimum and 100 * part > percent * whole


def check_totals(totals: Totals, settings: Settings, previous: PreviousRecounts) -> SafetyReport:
    """Check the totals of a full recount."""
    return (
        _check_users(totals, settings)
        + _check_orders(totals, settings, previous)
        + _check_changes(totals, settings, previous)
    )


def _check_users(totals: Totals, settings: Settings) -> SafetyReport:
    report = SafetyReport()
    if not totals.users:
        report.refusals.append(
            f"{settings.users} holds no users: are MONGODB_DATABASE={settings.database} and "
            f"USERS_COLLECTION={settings.users} right?"
        )
    if exceeds_share(totals.non_numeric_values, totals.users_with_a_value, MAX_NON_NUMERIC_PERCENT):
        report.refusals.append(
            f"{totals.non_numeric_values:,} of the {totals.users_with_a_value:,} values in "
            f"{settings.points_field} are not numbers, and the recount would overwrite them: is "
            "USER_POINTS_FIELD right?"
        )
    if totals.users_sharing_a_key:
        report.warnings.append(
            f"{totals.users_sharing_a_key:,} users have the same {settings.user_key_field} as "
            "another user: each of these users gets the points of every order with that key"
        )
    return report


def _check_orders(totals: Totals, settings: Settings, previous: PreviousRecounts) -> SafetyReport:
    report = SafetyReport()
    counted, unmatched = totals.counted_orders, totals.orders_that_earn_nothing
    earn = "earns" if unmatched == 1 else "earn"
    if totals.users and counted == unmatched and counted >= MIN_ORDERS:
        report.refusals.append(
            "no counted order matches a user: are "
            f"ORDER_CUSTOMER_FIELD={settings.customer_field}, "
            f"USER_KEY_FIELD={settings.user_key_field} and "
            f"USERS_COLLECTION={settings.users} right?"
        )
    elif 100 * unmatched > WARN_EARNING_NOTHING_PERCENT * counted:
        report.warnings.append(
            f"{unmatched:,} of the {counted:,} counted orders {earn} nothing: "
            f"{totals.orders_of_unknown_customers:,} of unknown customers, "
            f"{totals.orders_without_customer:,} without customer"
        )
    last, percent = previous.counted_orders or 0, MIN_REMAINING_ORDERS_PERCENT
    if last >= MIN_PREVIOUS_ORDERS and 100 * counted < percent * last:
        report.refusals.append(
            f"{counted:,} orders are counted, less than {percent} % of the {last:,} in the last "
            "successful recount: are the orders complete, and is "
            f"{_format_statuses(settings)} right?"
        )
    return report


def _check_changes(totals: Totals, settings: Settings, previous: PreviousRecounts) -> SafetyReport:
    report = SafetyReport()
    losing, changed = totals.decreased, totals.users_with_points_changed
    with_points, percent = totals.users_with_points_before, settings.max_decrease_percent
    statuses = _format_statuses(settings)
    users = f"{with_points:,} {'user' if with_points == 1 else 'users'} with points"
    lose = "loses" if losing == 1 else "lose"
    if exceeds_share(losing, with_points, percent):
        report.refusals.append(
            f"{losing:,} of the {users} would lose points, more than MAX_DECREASE_PERCENT={percent}"
            f" allows: are {statuses} and MONGODB_DATABASE={settings.database} right?"
        )
    elif losing and previous.is_first:
        report.warnings.append(f"{losing:,} of the {users} {lose} points in the first recount")
    elif exceeds_share(losing, with_points, WARN_DECREASE_PERCENT):
        report.warnings.append(f"{losing:,} of the {users} {lose} points")
    if exceeds_share(changed, with_points, WARN_CHANGED_PERCENT):
        report.warnings.append(
            f"{changed:,} of the {users} get different points: are "
            f"POINTS_PER_ORDER={settings.points_per_order} and {statuses} right?"
        )
    return report


def _format_statuses(settings: Settings) -> str:
    return f"ORDER_STATUSES={','.join(map(format_status, settings.order_statuses))}"


def check_live_update(losing: int, with_points: int, settings: Settings) -> str | None:
    """Return why live updates must pause, or None.

    `losing` is the number of decreases since the last full recount.
    """
    percent = min(WARN_DECREASE_PERCENT, settings.max_decrease_percent)
    if settings.max_decrease_percent == 100 or not exceeds_share(losing, with_points, percent):
        return None
    return f"live updates would take points from {losing:,} of {with_points:,} users with points"


def has_too_many_failed_updates(failed: int, users: int) -> bool:
    """Return whether so many failed updates make the recount failed, not incomplete."""
    return exceeds_share(failed, users, MAX_FAILED_PERCENT, MIN_FAILED_UPDATES)


def check_collections(missing: Sequence[str], existing: Sequence[str]) -> str | None:
    """Return why a recount without these collections is refused."""
    if not missing:
        return None
    shown = list(existing[:MAX_COLLECTIONS_SHOWN])
    if more := len(existing) - len(shown):
        shown.append(f"{more:,} more")
    names = ", ".join(shown) or "none"
    return f"there is no collection {', '.join(missing)}; this database has: {names}"


def check_statuses(statuses: StatusCounts, settings: Settings) -> SafetyReport:
    """Check the statuses of all orders, if no order is counted."""
    if not statuses and settings.order_filter:
        return SafetyReport(warnings=["no order matches ORDER_FILTER"])
    if not statuses or any(is_counted(status, settings) for status, _ in statuses):
        return SafetyReport()
    if all(status is None for status, _ in statuses):
        text = f"no order has a field {settings.status_field}: is ORDER_STATUS_FIELD right?"
        return SafetyReport(refusals=[text])
    text = describe_uncounted(statuses, settings)
    counted = {normalize_status(status) for status in settings.order_statuses}
    if any(normalize_status(status) in counted for status, _ in statuses):
        return SafetyReport(refusals=[f"{text}. Correct ORDER_STATUSES"])
    return SafetyReport(warnings=[text])


def describe_swapped_collections(settings: Settings) -> str:
    """Return the refusal for users that have a counted status while no order has one."""
    return (
        f"documents in {settings.users} have a counted status: are ORDERS_COLLECTION and "
        "USERS_COLLECTION swapped?"
    )


def describe_uncounted(statuses: StatusCounts, settings: Settings) -> str:
    """Return which statuses exist instead of the counted ones."""
    wanted = " or ".join(format_status(status) for status in settings.order_statuses)
    found = ", ".join(f"{format_status(s)} ({n:,})" for s, n in statuses[:MAX_STATUSES_SHOWN])
    order = "order that matches ORDER_FILTER" if settings.order_filter else "order"
    return f"no {order} has status {wanted}; found: {found or 'no orders'}"


def format_status(status: Any) -> str:
    """Return a status for a person: quoted and escaped unless it is a plain, visible string."""
    if not isinstance(status, str):
        return format_value(status)
    is_plain = (
        status.isprintable()
        and status == status.strip() != ""
        and status == unicodedata.normalize("NFC", status)
        and not status.replace(".", "").isdigit()  # "2" must differ from the number 2
    )
    return status if is_plain else ascii(status)


def normalize_status(status: Any) -> str:
    """Return a form that is equal for statuses that mean the same.

    They differ only in case, whitespace, invisible characters, Unicode normalization or type.
    """
    text = unicodedata.normalize("NFKC", str(status))
    visible = (c for c in text if not c.isspace() and unicodedata.category(c)[0] != "C")
    return "".join(visible).casefold()
