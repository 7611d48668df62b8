"""One recount over rows: the totals, what has to change, whether that is a mistake; its result.

It knows no driver: rows come from `counting`, and changes go to `writer`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from bson import Int64, ObjectId, Timestamp

from config import Settings
from loyalty.recount.customer_ids import (
    NO_CUSTOMER,
    Document,
    format_value,
    get_value,
    numeric_or_zero,
)
from loyalty.recount.pipeline import CustomerCount, UpToDate, User

_GUARD_USERS = 10
_GUARD_ORDERS = 10
FEW_PERCENT = 10
"""The share of those who hold points that may lose some without a word."""
_SAMPLES = 5
_LARGEST = 10

Outcome = Literal["succeeded", "incomplete", "refused", "failed"]

COUNTS = (
    "counted_orders",
    "changed",
    "increased",
    "decreased",
    "unknown_customers",
    "orders_of_unknown_customers",
    "orders_without_customer",
)
"""The totals that go into a record."""


@dataclass(frozen=True, slots=True, order=True)
class Change:
    """A user as shown to a person, with the points before and after."""

    size: float
    user: str
    before: str
    after: int


@dataclass(slots=True)
class Totals:
    """What a recount counted."""

    users: int = 0
    users_with_points_before: int = 0  # users who held points before
    users_with_points_after: int = 0  # users who do after it
    counted_orders: int = 0
    changed: int = 0
    increased: int = 0
    decreased: int = 0
    users_with_a_value: int = 0  # users who hold anything where points go
    non_numeric_values: int = 0  # of them, those who hold a text or a document, say
    other_value: str = ""
    initialized_to_zero: int = 0  # users who had no points, and get 0
    unknown_customers: int = 0
    orders_of_unknown_customers: int = 0
    orders_without_customer: int = 0
    unknown_sample: list[str] = field(default_factory=list)
    largest: list[Change] = field(default_factory=list)  # a heap

    @property
    def losers(self) -> str:
        """Who would lose points, in words."""
        users = "user" if self.users_with_points_before == 1 else "users"
        return f"{self.decreased:,} of the {self.users_with_points_before:,} {users} with points"


@dataclass(slots=True)
class FailedUpdates:
    """Users who refused their update (a validator, say): how many, why, and a few of them."""

    reasons: Counter[str] = field(default_factory=Counter)
    sample: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        most = self.reasons.most_common(3)
        why = (f"{reason} ({'once' if n == 1 else f'{n:,} times'})" for reason, n in most)
        return f"refused: {', '.join(self.sample)}; because: {', '.join(why)}"


@dataclass(slots=True)
class Result:
    """One recount, as far as it came."""

    started_at: datetime
    as_of: datetime
    seconds: float = 0.0
    cluster_time: Timestamp | None = None
    """What everything was read at, if `exact`."""
    oldest_snapshot: Timestamp | None = None
    """The oldest time that anything was read at."""
    exact: bool = False
    odd_forms: dict[ObjectId, set[str]] | None = field(default_factory=dict)
    """The ids in capitals or mixed case, by customer; None if they are not known."""
    has_customer_index: bool = False
    """Whether an index leads to the orders of one customer."""
    outcome: Outcome = "succeeded"
    totals: Totals = field(default_factory=Totals)
    failed: FailedUpdates = field(default_factory=FailedUpdates)
    refusal: str | None = None
    """Why the guard would not let it through."""
    warnings: list[str] = field(default_factory=list)
    """What the operator should know though it is not refused; each a sentence."""
    error: str | None = None

    @property
    def finished_at(self) -> datetime:
        return self.started_at + timedelta(seconds=self.seconds)

    @property
    def failed_updates(self) -> int:
        return self.failed.reasons.total()


class Tally:
    """Takes the rows of one count; `change` gets each user's key and the points to write."""

    def __init__(self, settings: Settings, change: Callable[[Document, int], None]) -> None:
        self.totals = Totals()
        self._settings = settings
        self._change = change

    def pop_pending(self, row: CustomerCount | UpToDate) -> None:
        """Add a row to the totals, and what has to be written to the changes."""
        totals = self.totals
        totals.counted_orders += row.orders
        if isinstance(row, UpToDate):
            totals.users += row.users
            totals.users_with_a_value += row.users
            totals.users_with_points_before += row.users_with_points_before
            totals.users_with_points_after += row.users_with_points_before
            return
        for user in row.users:
            self._take_user(user, row.orders * self._settings.points_per_order)
        if row.users or not row.orders:
            return
        if row.customer == NO_CUSTOMER:
            totals.orders_without_customer += row.orders
            return
        totals.unknown_customers += 1
        totals.orders_of_unknown_customers += row.orders
        if len(totals.unknown_sample) < _SAMPLES:
            totals.unknown_sample.append(format_value(row.customer))

    def _take_user(self, user: User, after: int) -> None:
        totals, stored = self.totals, user.points
        before = numeric_or_zero(stored)
        totals.users += 1
        totals.users_with_points_before += before > 0
        totals.users_with_points_after += after > 0
        totals.increased += after > before
        totals.decreased += after < before
        totals.initialized_to_zero += stored is None and after == 0
        totals.users_with_a_value += stored is not None
        if isinstance(stored, str | list | dict | bytes | bool | ObjectId | datetime):
            totals.non_numeric_values += 1
            totals.other_value = format_value(stored)
        self._keep_if_large(user, abs(after - before), after)
        # Of two users with one customer's id, one may be right.
        if type(stored) not in (int, Int64) or stored != after:
            totals.changed += 1
            self._change(user.key, after)

    def _keep_if_large(self, user: User, size: float, after: int) -> None:
        largest = self.totals.largest
        if len(largest) < _LARGEST or size > largest[0].size:
            own: Any = get_value(user.key, "_id")
            heapq.heappush(
                largest, Change(size, format_value(own), format_value(user.points), after)
            )
            if len(largest) > _LARGEST:
                heapq.heappop(largest)

    def refusal(self) -> str | None:
        """Return why the guard refuses to write what was counted, or None if it does not."""
        totals, percent = self.totals, self._settings.max_decrease_percent
        if (
            totals.non_numeric_values >= _GUARD_USERS
            and 2 * totals.non_numeric_values > totals.users_with_a_value
        ):
            return (
                f"{totals.non_numeric_values:,} of the {totals.users_with_a_value:,} users who "
                f"have {self._settings.points_field} hold something else in it, such as "
                f"{totals.other_value}, which would be lost: is USER_POINTS_FIELD right? If so, "
                "let it through once with --once --force"
            )
        earning_nothing = totals.orders_without_customer + totals.orders_of_unknown_customers
        if totals.users and totals.counted_orders == earning_nothing >= _GUARD_ORDERS:
            return (
                f"{no_matching_users(self._settings)} If so, let it through once with "
                "--once --force"
            )
        if not exceeds_share(totals.decreased, totals.users_with_points_before, percent):
            return None
        return (
            f"{totals.losers} would lose some, more than MAX_DECREASE_PERCENT={percent} allows: "
            "are ORDER_STATUSES and the database right? If so, let one recount through with "
            "--once --force"
        )

    def warnings(self) -> list[str]:
        """Return what the operator should know of this recount though it is not refused."""
        totals = self.totals
        many = exceeds_share(totals.decreased, totals.users_with_points_before, FEW_PERCENT)
        return [f"{totals.losers} would lose some"] if many else []


def exceeds_share(losers: int, users_with_points_before: int, percent: int) -> bool:
    """Return whether so many who lose points are more than `percent` of those who hold some."""
    return losers >= _GUARD_USERS and 100 * losers > percent * users_with_points_before


def no_matching_users(settings: Settings) -> str:
    """Return what is said where no order that counts refers to a user."""
    return (
        "no order that counts refers to a user: are ORDER_CUSTOMER_FIELD="
        f"{settings.customer_field} and USERS_COLLECTION={settings.users} right?"
    )
