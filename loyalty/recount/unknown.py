"""Unknown customers: ids of counted orders that no user has, classified by the form of the id.

Their orders earn nothing: no order is assigned to a user with a similar id.
"""

import heapq
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from bson import DBRef

from loyalty.mongo.values import format_value

Kind = Literal[
    "no such user", "DBRef", "array", "whitespace around", "number as string", "ObjectId as string"
]

T = TypeVar("T", bound=tuple[Any, ...])

MAX_LARGEST_OF_KIND = 5
OBJECT_ID_CALL = re.compile(r"""ObjectId\(["']?([0-9A-Fa-f]{24})["']?\)""")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


def classify_unknown(customer: Any) -> Kind:
    """Return the kind of an unknown customer id."""
    if isinstance(customer, DBRef):
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


def push_if_large(heap: list[T], limit: int, size: float, make_item: Callable[[], T]) -> None:
    """Keep the `limit` largest items in a heap; `size` is the first element of the new item."""
    if len(heap) < limit:
        heapq.heappush(heap, make_item())
    elif size > heap[0][0]:
        heapq.heapreplace(heap, make_item())


@dataclass(slots=True)
class UnknownCustomers:
    """The unknown customers of one kind; `largest` are those with most orders, as a heap."""

    customers: int = 0
    orders: int = 0
    largest: list[tuple[int, str]] = field(default_factory=list)

    def add(self, customer: Any, orders: int) -> None:
        self.customers += 1
        self.orders += orders
        push_if_large(
            self.largest, MAX_LARGEST_OF_KIND, orders, lambda: (orders, format_value(customer))
        )
