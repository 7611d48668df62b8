"""Unknown customers: ids of counted orders that no user has, by the likely reason.

Nothing is guessed: such orders earn nothing, also where a user looks alike.
"""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from loyalty.mongo.values import format_value, is_dbref

Kind = Literal[
    "no such user", "DBRef", "array", "whitespace around", "number as string", "ObjectId as string"
]

MAX_LARGEST_OF_KIND = 5
OBJECT_ID_CALL = re.compile(r"""ObjectId\(["']?([0-9A-Fa-f]{24})["']?\)""")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


def classify_unknown(customer: Any) -> Kind:
    """Return what an unknown customer id looks like."""
    if is_dbref(customer):
        return "DBRef"
    if isinstance(customer, list):
        return "array"
    if isinstance(customer, str):
        if customer != customer.strip():
            return "whitespace around"
        if OBJECT_ID_CALL.fullmatch(customer):
            return "ObjectId as string"
        if _NUMBER.fullmatch(customer):
            return "number as string"
    return "no such user"


@dataclass(slots=True)
class UnknownCustomers:
    """The unknown customers of one kind; `largest` are those with most orders, as a heap."""

    customers: int = 0
    orders: int = 0
    largest: list[tuple[int, str]] = field(default_factory=list)

    def add(self, customer: Any, orders: int) -> None:
        self.customers += 1
        self.orders += orders
        if len(self.largest) < MAX_LARGEST_OF_KIND or orders > self.largest[0][0]:
            heapq.heappush(self.largest, (orders, format_value(customer)))
            if len(self.largest) > MAX_LARGEST_OF_KIND:
                heapq.heappop(self.largest)
