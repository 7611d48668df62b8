"""A generated shop with dirty data, and an independent count of its points.

The count shares no code with the service: it reads every document and counts in plain Python.
"""

from __future__ import annotations

import random
import re
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from typing import Any

import bson
from bson import Binary, DBRef, Decimal128, Int64, ObjectId
from bson.codec_options import CodecOptions, DatetimeConversion
from pymongo.database import Database

Document = dict[str, Any]

STATUSES = {"Pending": 15, "Paid": 20, "Shipped": 45, "Returned": 10, "Cancelled": 10}
"""The statuses of clean orders, with their shares in percent."""

_UNCOUNTED_STATUSES: tuple[Any, ...] = (
    "shipped",
    "SHIPPED",
    "Shipped ",
    ["Shipped"],
    ["Paid", "Shipped"],
    3,
    None,
)
_STALE_POINTS: tuple[Any, ...] = (
    None,
    "3",
    "",
    2.0,
    1.5,
    True,
    [3],
    {},
    Decimal128("2"),
    -4,
    1,
    2,
    3,
    4,
)
_FIRST_NAMES = ("Ada", "Ben", "Chi", "Dora", "Emil", "Femi", "Gita", "Hugo", "Ines", "Jun", "Kofi")
_LAST_NAMES = (
    "Abara",
    "Berg",
    "Costa",
    "Dias",
    "Eriksen",
    "Farah",
    "Gruber",
    "Haddad",
    "Ito",
    "Jansen",
)
_BATCH = 10_000

# Also decodes values that Python's types do not have: dates after the year 9999, and strings that
# are not UTF-8.
LENIENT_CODEC: CodecOptions[Document] = CodecOptions(
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
    unicode_decode_error_handler="surrogateescape",
)


class Shop:
    """The collections `users` and `orders` of a database, and changes of orders.

    The same seed generates the same shop.
    """

    def __init__(self, database: Database[Document], rng: random.Random) -> None:
        self.users = database["users"]
        self.orders = database["orders"]
        self._rng = rng

    def fill(self, users: int = 1_000, orders: int = 10_000, dirty: float = 0.03) -> None:
        """Insert users and orders, in batches: millions are fine.

        `dirty` is the share of users and of orders with unusual values.
        """
        ids: list[Any] = []
        for batch in _batches(self._new_users(users, dirty, ids)):
            self.users.insert_many(batch, ordered=False)
        for batch in _batches(self._new_orders(orders, dirty, ids)):
            self.orders.insert_many(batch, ordered=False)

    def ship_orders(self, n: int) -> int:
        """Ship `n` random orders that are not shipped; return how many were changed."""
        return self._change_status(n, [s for s in STATUSES if s != "Shipped"], "Shipped")

    def return_orders(self, n: int) -> int:
        """Set `n` random shipped orders to Returned; return how many were changed."""
        return self._change_status(n, ["Shipped"], "Returned")

    def _change_status(self, n: int, sources: list[str], target: str) -> int:
        found = self.orders.find({"status": {"$in": sources}}, {"_id": 1}).sort("_id")
        order_ids = [order["_id"] for order in found]
        chosen = self._rng.sample(order_ids, min(n, len(order_ids)))
        change = {"$set": {"status": target}}
        return self.orders.update_many({"_id": {"$in": chosen}}, change).modified_count

    def _new_users(self, n: int, dirty: float, ids: list[Any]) -> Iterator[Document]:
        """Yield users, and append their ids to `ids`."""
        rng = self._rng
        empty_ids = iter([None, ""])
        for number in range(n):
            user_id: Any = _object_id(rng, number)
            user: Document = {"loyalty_points": 0}
            if rng.random() < dirty / 2:
                previous = ids[-1] if ids else None
                other = _other_id(rng, number, user_id, previous)
                user_id = next(empty_ids, other)
            elif rng.random() < dirty / 2:
                user = rng.choice([{}, *({"loyalty_points": points} for points in _STALE_POINTS)])
            ids.append(user_id)
            name = f"{rng.choice(_FIRST_NAMES)} {rng.choice(_LAST_NAMES)}"
            yield {"_id": user_id, "name": name, "email": f"{number}@example.com", **user}

    def _new_orders(self, n: int, dirty: float, ids: Sequence[Any]) -> Iterator[Document]:
        rng = self._rng
        statuses, shares = list(STATUSES), list(STATUSES.values())
        for number in range(1, n + 1):
            # A few customers have many orders.
            customer = ids[int(len(ids) * rng.random() ** 1.5)]
            order: Document = {
                "_id": number,
                "customer_id": str(customer) if isinstance(customer, ObjectId) else customer,
                "status": rng.choices(statuses, shares)[0],
                "total_cents": rng.randrange(500, 20_000),
            }
            if rng.random() < dirty:
                self._make_dirty(order, customer)
            yield order

    def _make_dirty(self, order: Document, customer: Any) -> None:
        rng = self._rng
        kind = rng.randrange(4)
        if kind == 0:
            order["status"] = rng.choice(_UNCOUNTED_STATUSES)
        elif kind == 1:
            del order["customer_id"]
        elif kind == 2:  # another form of the same id: the order still counts
            order["customer_id"] = _other_form(rng, customer)
        else:  # no customer, or an unknown one
            deleted = rng.randbytes(12).hex()
            order["customer_id"] = rng.choice(
                [None, "", deleted, ObjectId(deleted), deleted[:-1], f" {deleted}", "n/a", True]
                + [-1, 0.5, [deleted], {"id": deleted}, Binary.from_uuid(uuid.UUID(int=7))]
            )


def _object_id(rng: random.Random, number: int) -> ObjectId:
    seconds = 1_600_000_000 + 60 * number
    return ObjectId(seconds.to_bytes(4, "big") + rng.randbytes(8))


def _other_id(rng: random.Random, number: int, user_id: ObjectId, previous: Any) -> Any:
    choices: list[Any] = [f"customer-{number}", number, float(number), str(user_id).upper()]
    choices += [Binary.from_uuid(uuid.UUID(int=rng.getrandbits(128)))]
    if isinstance(previous, ObjectId):  # a second user for the previous customer
        choices += [str(previous), str(previous).upper()]
    return rng.choice(choices)


def _other_form(rng: random.Random, customer: Any) -> Any:
    if isinstance(customer, ObjectId):
        return rng.choice([str(customer).upper(), str(customer).title(), customer])
    if isinstance(customer, float):
        return int(customer)
    if isinstance(customer, int):
        return rng.choice([float(customer), Int64(customer), Decimal128(str(customer))])
    return customer


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(islice(documents, _BATCH)):
        yield batch


def canonical_key(value: Any) -> Any:
    """Return a value that is equal for two ids if, and only if, they are of one customer.

    Ids are equal as in MongoDB (5 equals 5.0, and True does not equal 1), and a string of 24 hex
    digits equals its ObjectId.
    """
    if isinstance(value, str):
        return ObjectId(value) if re.fullmatch("[0-9a-fA-F]{24}", value) else value
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, Decimal128):
        value = value.to_decimal()
    if isinstance(value, int | float | Decimal):
        return "number", value if value == value else "NaN"
    if isinstance(value, dict):
        return "document", tuple((name, _canonical_part(part)) for name, part in value.items())
    if isinstance(value, list):
        return "array", tuple(map(_canonical_part, value))
    if value is None or isinstance(value, ObjectId):
        return value
    return type(value).__name__, bson.encode({"": value})


def _canonical_part(part: Any) -> Any:
    # Inside a document or an array, a hex string is not converted.
    return part if isinstance(part, str) else canonical_key(part)


@dataclass(frozen=True)
class Names:
    """The names of collections and fields; a dot separates the fields of nested documents."""

    orders: str = "orders"
    users: str = "users"
    status: str = "status"
    customer: str = "customer_id"
    points: str = "loyalty_points"
    key: str = "_id"
    """The field of a user that orders refer to."""


Predicate = Callable[[Document], bool]
"""Says in plain Python whether an order matches ORDER_FILTER."""

DEFAULT_NAMES = Names()


def count_points(
    database: Database[Document],
    statuses: Collection[str] = ("Shipped",),
    points_per_order: int = 1,
    names: Names = DEFAULT_NAMES,
) -> dict[Any, int]:
    """Return the correct points of every user, by the `canonical_key` of its `_id`.

    No order may change while it counts.
    """
    found = _count_by_customer(database, statuses, points_per_order, names, None)
    return {
        canonical_key(user["_id"]): _count_user(user, found, names)
        for user in _read(database, names.users, [names.key])
    }


def _count_by_customer(
    database: Database[Document],
    statuses: Collection[str],
    points_per_order: int,
    names: Names,
    predicate: Predicate | None,
) -> Counter[Any]:
    found: Counter[Any] = Counter()
    fields = [names.status, names.customer]
    for order in _read(database, names.orders, fields, whole=predicate is not None):
        status, customer = _get_value(order, names.status), _get_value(order, names.customer)
        is_counted = isinstance(status, str) and status in statuses
        if is_counted and customer not in (None, "") and (not predicate or predicate(order)):
            found[canonical_key(customer)] += points_per_order
    return found


def _count_user(user: Document, found: Counter[Any], names: Names) -> int:
    key = _get_value(user, names.key)
    return 0 if key in (None, "") or isinstance(key, list) else found[canonical_key(key)]


@dataclass(frozen=True)
class Mismatch:
    """A user whose stored points are not the counted ones, or not an integer."""

    user: Any
    stored: Any
    counted: int


def find_mismatches(
    database: Database[Document],
    statuses: Collection[str] = ("Shipped",),
    points_per_order: int = 1,
    names: Names = DEFAULT_NAMES,
    predicate: Predicate | None = None,
) -> list[Mismatch]:
    """Return the users whose stored points are wrong or missing."""
    found = _count_by_customer(database, statuses, points_per_order, names, predicate)
    return [
        Mismatch(user["_id"], stored, expected)
        for user in _read(database, names.users, [names.points, names.key])
        if (expected := _count_user(user, found, names))
        != (stored := _get_value(user, names.points))
        or type(stored) not in (int, Int64)
    ]


def _get_value(document: Any, path: str) -> Any:
    for name in path.split("."):
        if isinstance(document, DBRef):
            document = document.as_doc()
        document = document.get(name) if isinstance(document, dict) else None
    return document


def _read(
    database: Database[Document], collection: str, fields: Iterable[str], *, whole: bool = False
) -> Iterator[Document]:
    wanted = None if whole else dict.fromkeys(["_id", *fields], 1)
    yield from database.get_collection(collection, codec_options=LENIENT_CODEC).find({}, wanted)
