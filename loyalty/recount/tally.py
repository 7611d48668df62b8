"""The sums of the rows of a count: totals, changes, and unknown customers.

It makes no database calls: rows come from `counter`, changes go to `updates`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from config import Settings
from loyalty.mongo.values import format_value, is_number
from loyalty.recount.customer_ids import NO_CUSTOMER
from loyalty.recount.points import is_up_to_date, parse_points
from loyalty.recount.unknown import UnknownCustomers, classify_unknown, push_if_large

MAX_LARGEST = 10


@dataclass(frozen=True, slots=True)
class User:
    """A user as stored: `points` is the value of the points field, None if it is missing.

    `created_path` is set if the document around a nested points field is missing: the outermost
    part that an update would create, "loyalty" of "loyalty.points".
    """

    id: Any
    points: Any
    has_points_field: bool
    created_path: str | None = None


@dataclass(frozen=True, slots=True)
class CustomerCount:
    """A customer: its counted orders under all forms of the id, their points, and its users."""

    customer: Any
    orders: int
    points: int
    users: Sequence[User]

    @property
    def is_unknown(self) -> bool:
        """Whether it has counted orders and no user; False for the orders without customer."""
        return self.orders > 0 and not self.users and self.customer != NO_CUSTOMER


class CustomerRows(Protocol):
    """Collects rows of a count."""

    def append(self, row: CustomerCount, /) -> None: ...

    def clear(self) -> None:
        """Discard all: the count starts again."""


@dataclass(frozen=True, slots=True)
class UpToDateTotals:
    """The numbers of orders and users of all customers whose users are up to date."""

    orders: int
    users: int
    users_with_points: int
    users_sharing_a_key: int = 0


Row = CustomerCount | UpToDateTotals


class LargeChange(NamedTuple):
    """One user's change, formatted for a person."""

    size: float
    user: str
    before: str
    after: int


@dataclass(slots=True)
class Totals:
    """The sums over all customers of a recount."""

    users: int = 0
    users_with_points_before: int = 0
    users_with_points_after: int = 0
    counted_orders: int = 0
    users_sharing_a_key: int = 0
    """Users whose USER_KEY_FIELD, if it is not _id, equals that of another user."""
    changed: int = 0
    increased: int = 0
    decreased: int = 0
    users_with_points_changed: int = 0
    """Users with points whose points the recount changes."""
    users_with_a_value: int = 0
    """Users who have a non-null value in the points field."""
    non_numeric_values: int = 0
    """Users whose value in the points field is neither null nor a number."""
    non_numeric_sample: str = ""
    initialized_to_zero: int = 0
    """Users who had no value in the points field, and get 0."""
    unknown_customers: int = 0
    orders_of_unknown_customers: int = 0
    orders_without_customer: int = 0
    unknown_by_kind: dict[str, UnknownCustomers] = field(default_factory=dict)
    largest: list[LargeChange] = field(default_factory=list)
    """The largest changes, as a heap."""

    @property
    def orders_that_earn_nothing(self) -> int:
        return self.orders_without_customer + self.orders_of_unknown_customers


@dataclass
class Tally:
    """Adds up the rows of one count."""

    settings: Settings
    on_change: Callable[[User, int], None]
    """Is called with each user to update, and the points."""
    rows: CustomerRows | None = None
    totals: Totals = field(default_factory=Totals, init=False)

    def add(self, row: Row) -> None:
        """Add a row to the totals, and report the users in it that have to be updated."""
        totals = self.totals
        totals.counted_orders += row.orders
        if isinstance(row, UpToDateTotals):
            totals.users += row.users
            totals.users_sharing_a_key += row.users_sharing_a_key
            totals.users_with_a_value += row.users
            totals.users_with_points_before += row.users_with_points
            totals.users_with_points_after += row.users_with_points
            return
        if len(row.users) > 1 and self.settings.user_key_field != "_id":
            totals.users_sharing_a_key += len(row.users)
        for user in row.users:
            self._add_user(user, row.points)
        if row.is_unknown:
            totals.unknown_customers += 1
            totals.orders_of_unknown_customers += row.orders
            kind = classify_unknown(row.customer)
            unknown = totals.unknown_by_kind.setdefault(kind, UnknownCustomers())
            unknown.add(row.customer, row.orders)
        elif not row.users:  # NO_CUSTOMER, or a customer with 0 orders
            totals.orders_without_customer += row.orders
        if self.rows is not None:
            self.rows.append(row)

    def _add_user(self, user: User, after: int) -> None:
        totals, stored = self.totals, user.points
        before = parse_points(stored)
        totals.users += 1
        totals.users_with_points_before += before > 0
        totals.users_with_points_after += after > 0
        totals.increased += after > before
        totals.decreased += after < before
        totals.users_with_points_changed += before > 0 and after != before
        totals.initialized_to_zero += stored is None and after == 0
        totals.users_with_a_value += stored is not None
        if stored is not None and not is_number(stored):
            totals.non_numeric_values += 1
            totals.non_numeric_sample = format_value(stored)
        # Of two users that one customer id refers to, one may be up to date.
        if is_up_to_date(stored, after):
            return
        totals.changed += 1
        size = abs(after - before)
        push_if_large(
            totals.largest,
            MAX_LARGEST,
            size,
            lambda: LargeChange(size, format_value(user.id), format_value(stored), after),
        )
        self.on_change(user, after)
