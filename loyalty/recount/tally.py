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
from loyalty.recount.customer_ids import NO_CUSTOMER, Document, number_in, shown, value_of
from loyalty.recount.pipeline import Right, Row, User

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
    holders: int = 0  # users who held points before
    holding: int = 0  # users who do after it
    counted_orders: int = 0
    changed: int = 0
    increased: int = 0
    decreased: int = 0
    valued: int = 0  # users who hold anything where points go
    other_values: int = 0  # of them, those who hold a text or a document, say
    other_value: str = ""
    zeroed: int = 0  # users who had no points, and get 0
    unknown_customers: int = 0
    orders_of_unknown_customers: int = 0
    orders_without_customer: int = 0
    unknown_sample: list[str] = field(default_factory=list)
    largest: list[Change] = field(default_factory=list)  # a heap

    @property
    def losers(self) -> str:
        """Who would lose points, in words."""
        users = "user" if self.holders == 1 else "users"
        return f"{self.decreased:,} of the {self.holders:,} {users} with points"


@dataclass(slots=True)
class Refusing:
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
    first_time: Timestamp | None = None
    """The oldest time that anything was read at."""
    exact: bool = False
    odd_forms: dict[ObjectId, set[str]] | None = field(default_factory=dict)
    """The ids in capitals or mixed case, by customer; None if they are not known."""
    finds_customers: bool = False
    """Whether an index leads to the orders of one customer."""
    outcome: Outcome = "succeeded"
    totals: Totals = field(default_factory=Totals)
    refusing: Refusing = field(default_factory=Refusing)
    refusal: str | None = None
    """Why the guard would not let it through."""
    warning: str | None = None
    """What a person should know of it though it is let through."""
    error: str | None = None

    @property
    def finished_at(self) -> datetime:
        return self.started_at + timedelta(seconds=self.seconds)

    @property
    def refused_updates(self) -> int:
        return self.refusing.reasons.total()


class Recount:
    """Takes the rows of one count; `change` gets each user's key and the points to write."""

    def __init__(self, settings: Settings, change: Callable[[Document, int], None]) -> None:
        self.totals = Totals()
        self._settings = settings
        self._change = change

    def take(self, row: Row | Right) -> None:
        """Add a row to the totals, and what has to be written to the changes."""
        totals = self.totals
        totals.counted_orders += row.orders
        if isinstance(row, Right):
            totals.users += row.users
            totals.valued += row.users
            totals.holders += row.holders
            totals.holding += row.holders
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
            totals.unknown_sample.append(shown(row.customer))

    def _take_user(self, user: User, after: int) -> None:
        totals, stored = self.totals, user.points
        before = number_in(stored)
        totals.users += 1
        totals.holders += before > 0
        totals.holding += after > 0
        totals.increased += after > before
        totals.decreased += after < before
        totals.zeroed += stored is None and after == 0
        totals.valued += stored is not None
        if isinstance(stored, str | list | dict | bytes | bool | ObjectId | datetime):
            totals.other_values += 1
            totals.other_value = shown(stored)
        self._keep_if_large(user, abs(after - before), after)
        # Of two users with one customer's id, one may be right.
        if type(stored) not in (int, Int64) or stored != after:
            totals.changed += 1
            self._change(user.key, after)

    def _keep_if_large(self, user: User, size: float, after: int) -> None:
        largest = self.totals.largest
        if len(largest) < _LARGEST or size > largest[0].size:
            own: Any = value_of(user.key, "_id")
            heapq.heappush(largest, Change(size, shown(own), shown(user.points), after))
            if len(largest) > _LARGEST:
                heapq.heappop(largest)

    def refusal(self) -> str | None:
        """Return why the guard refuses to write what was counted, or None if it does not."""
        totals, percent = self.totals, self._settings.max_decrease_percent
        if totals.other_values >= _GUARD_USERS and 2 * totals.other_values > totals.valued:
            return (
                f"{totals.other_values:,} of the {totals.valued:,} users who have "
                f"{self._settings.points_field} hold something else in it, such as "
                f"{totals.other_value}, which would be lost: is USER_POINTS_FIELD right? If so, "
                "let it through once with --once --force"
            )
        earning_nothing = totals.orders_without_customer + totals.orders_of_unknown_customers
        if totals.users and totals.counted_orders == earning_nothing >= _GUARD_ORDERS:
            return f"{nobody_known(self._settings)} If so, let it through once with --once --force"
        if not are_many(totals.decreased, totals.holders, percent):
            return None
        return (
            f"{totals.losers} would lose some, more than MAX_DECREASE_PERCENT={percent} allows: "
            "are ORDER_STATUSES and the database right? If so, let one recount through with "
            "--once --force"
        )

    def warning(self) -> str | None:
        """Return what a person should know of this recount though it is not refused."""
        totals = self.totals
        many = are_many(totals.decreased, totals.holders, FEW_PERCENT)
        return f"from {totals.losers}" if many else None


def are_many(losers: int, holders: int, percent: int) -> bool:
    """Return whether so many who lose points are more than `percent` of those who hold some."""
    return losers >= _GUARD_USERS and 100 * losers > percent * holders


def nobody_known(settings: Settings) -> str:
    """Return what is said where no order that counts refers to a user."""
    return (
        "no order that counts refers to a user: are ORDER_CUSTOMER_FIELD="
        f"{settings.customer_field} and USERS_COLLECTION={settings.users} right?"
    )
