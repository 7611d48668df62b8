"""What the rows of a count add up to: totals, changes, and unknown customers.

It imports no driver: rows come from `counter`, changes go to `updates`.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from config import Settings
from loyalty.mongo.values import format_value, is_integer, is_number, numeric_or_zero
from loyalty.recount.customer_ids import NO_CUSTOMER
from loyalty.recount.unknown import UnknownCustomers, classify_unknown

MAX_SAMPLES = 5
MAX_LARGEST = 10

RECORDED_TOTALS = (
    "counted_orders",
    "changed",
    "increased",
    "decreased",
    "unknown_customers",
    "orders_of_unknown_customers",
    "orders_without_customer",
)
"""The totals that are stored in a record."""


@dataclass(frozen=True, slots=True)
class User:
    """A user as stored: `points` is the value of the points field, None if it is missing.

    `created_path` is set where the document around a nested points field is missing: the outermost
    part that an update would create, "loyalty" of "loyalty.points".
    """

    id: Any
    points: Any
    has_points: bool
    created_path: str | None = None


@dataclass(frozen=True, slots=True)
class CustomerCount:
    """A customer: the number of counted orders under all forms of the id, and its users."""

    customer: Any
    orders: int
    users: Sequence[User]


@dataclass(frozen=True, slots=True)
class UpToDate:
    """All customers whose users are up to date: how many orders and users, and points holders."""

    orders: int
    users: int
    users_with_points: int
    users_sharing_a_key: int = 0


@dataclass(frozen=True, slots=True, order=True)
class Change:
    """One user's change, formatted for a person."""

    size: float
    user: str
    before: str
    after: int


@dataclass(slots=True)
class Totals:
    """What a recount counted."""

    users: int = 0
    users_with_points_before: int = 0
    users_with_points_after: int = 0
    counted_orders: int = 0
    users_sharing_a_key: int = 0
    """Users whose USER_KEY_FIELD, if it is not _id, equals that of another user."""
    changed: int = 0
    increased: int = 0
    decreased: int = 0
    changed_holders: int = 0
    """Users who have points before, and another number after."""
    users_with_a_value: int = 0
    """Users who have anything but null in the points field."""
    non_numeric_values: int = 0
    """Users who have a string, a document or the like in the points field."""
    non_numeric_sample: str = ""
    initialized_to_zero: int = 0
    """Users who have no points, and get 0."""
    unknown_customers: int = 0
    orders_of_unknown_customers: int = 0
    orders_without_customer: int = 0
    unknown_by_kind: dict[str, UnknownCustomers] = field(default_factory=dict)
    largest: list[Change] = field(default_factory=list)
    """The largest changes, as a heap."""

    @property
    def orders_that_earn_nothing(self) -> int:
        return self.orders_without_customer + self.orders_of_unknown_customers


@dataclass(slots=True)
class FailedUpdates:
    """Users whose update the server did not accept: how many by error code name, and a few ids.

    The server's own text is left out: it quotes the user's document.
    """

    codes: Counter[str] = field(default_factory=Counter)
    sample: list[str] = field(default_factory=list)
    """Formatted ids, for DEBUG only."""

    def __len__(self) -> int:
        return self.codes.total()

    def __str__(self) -> str:
        return ", ".join(f"{code}: {number:,}" for code, number in self.codes.most_common(3))


class Tally:
    """Adds up the rows of one count.

    `on_change` gets each user to update, and the points; `on_unknown` each unknown customer, and
    the number of its orders.
    """

    def __init__(
        self,
        settings: Settings,
        on_change: Callable[[User, int], None],
        on_unknown: Callable[[Any, int], None] | None = None,
    ) -> None:
        self.totals = Totals()
        self._on_unknown = on_unknown
        self._is_key_unique = settings.user_key_field == "_id"
        self._points_per_order = settings.points_per_order
        self._on_change = on_change

    def add(self, row: CustomerCount | UpToDate) -> None:
        """Add a row to the totals, and report the users in it that have to be updated."""
        totals = self.totals
        totals.counted_orders += row.orders
        if isinstance(row, UpToDate):
            totals.users += row.users
            totals.users_sharing_a_key += row.users_sharing_a_key
            totals.users_with_a_value += row.users
            totals.users_with_points_before += row.users_with_points
            totals.users_with_points_after += row.users_with_points
        elif row.users:
            if len(row.users) > 1 and not self._is_key_unique:
                totals.users_sharing_a_key += len(row.users)
            for user in row.users:
                self._add_user(user, row.orders * self._points_per_order)
        elif row.orders:
            self._add_unknown(row)

    def _add_unknown(self, row: CustomerCount) -> None:
        totals = self.totals
        if row.customer == NO_CUSTOMER:
            totals.orders_without_customer += row.orders
            return
        totals.unknown_customers += 1
        totals.orders_of_unknown_customers += row.orders
        kind = classify_unknown(row.customer)
        totals.unknown_by_kind.setdefault(kind, UnknownCustomers()).add(row.customer, row.orders)
        if self._on_unknown is not None:
            self._on_unknown(row.customer, row.orders)

    def _add_user(self, user: User, after: int) -> None:
        totals, stored = self.totals, user.points
        before = numeric_or_zero(stored)
        totals.users += 1
        totals.users_with_points_before += before > 0
        totals.users_with_points_after += after > 0
        totals.increased += after > before
        totals.decreased += after < before
        totals.changed_holders += before > 0 and after != before
        totals.initialized_to_zero += stored is None and after == 0
        totals.users_with_a_value += stored is not None
        if stored is not None and not is_number(stored):
            totals.non_numeric_values += 1
            totals.non_numeric_sample = format_value(stored)
        # Of two users that one customer id refers to, one may be up to date.
        if is_integer(stored) and stored == after:
            return
        totals.changed += 1
        self._add_if_large(user, abs(after - before), after)
        self._on_change(user, after)

    def _add_if_large(self, user: User, size: float, after: int) -> None:
        largest = self.totals.largest
        if len(largest) < MAX_LARGEST or size > largest[0].size:
            change = Change(size, format_value(user.id), format_value(user.points), after)
            heapq.heappush(largest, change)
            if len(largest) > MAX_LARGEST:
                heapq.heappop(largest)
