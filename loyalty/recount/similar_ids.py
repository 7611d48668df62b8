"""All unknown customers of a count, and the users with similar ids."""

from collections.abc import Iterator, Sequence
from typing import Any

import bson
from bson import DBRef, ObjectId
from pymongo.collection import Collection

from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.values import LENIENT_CODEC, SIMPLE_COLLATION, Document, format_value, get_nested
from loyalty.recount.customer_ids import parse_id_argument
from loyalty.recount.spool import Spool
from loyalty.recount.tally import CustomerCount
from loyalty.recount.unknown import OBJECT_ID_CALL, classify_unknown

MAX_SIMILAR_IDS = 5


class UnknownCustomerList:
    """All unknown customers of a count, in a temporary file."""

    def __init__(self) -> None:
        self._spool = Spool()

    def clear(self) -> None:
        """Discard all: the count starts again."""
        self._spool = Spool()

    def append(self, row: CustomerCount) -> None:
        """Add a customer, if it is unknown. Raises NoTempSpace."""
        if row.is_unknown:
            customer, kind = format_value(row.customer), classify_unknown(row.customer)
            document = {"customer": customer, "orders": row.orders, "kind": kind}
            self._spool.add(bson.encode(document))

    def __iter__(self) -> Iterator[Document]:
        """Yield `{customer, orders, kind}`."""
        return map(bson.decode, self._spool)


def find_similar_ids(
    users: Collection[Any], key: str, customer: Any, *, max_time_ms: int
) -> list[Any]:
    """Return up to 5 keys of users that an unknown customer id may mean. Raises ServiceError.

    Strings are also compared without regard to case, for which the server reads all users.
    """
    lenient = users.with_options(codec_options=LENIENT_CODEC)
    queries: list[dict[str, Any]] = []
    if candidates := _correct_mistakes(customer):
        queries.append({"filter": {key: {"$in": candidates}}})
    if isinstance(customer, str):
        ignore_case = {"locale": "en", "strength": 2}
        queries.append({"filter": {key: customer.strip()}, "collation": ignore_case})
    found: dict[str, Any] = {}
    options = {"projection": {key: 1}, "limit": MAX_SIMILAR_IDS, "max_time_ms": max_time_ms}
    with map_driver_errors("find", users, if_too_slow="raise COUNT_TIMEOUT"):
        for query in queries:
            for user in lenient.find(**query, **options):
                found[repr(user["_id"])] = get_nested(user, key)
    return list(found.values())[:MAX_SIMILAR_IDS]


def _correct_mistakes(customer: Any) -> Sequence[Any]:
    """Return the ids that result if the most frequent mistakes in a customer id are corrected."""
    if isinstance(customer, DBRef):
        customer = customer.id
        return [customer, *(parse_id_argument(customer) if isinstance(customer, str) else [])]
    if isinstance(customer, int | float) and not isinstance(customer, bool):
        return [str(customer)]
    if not isinstance(customer, str):
        return []
    text = customer.strip()
    if call := OBJECT_ID_CALL.fullmatch(text):
        return [ObjectId(call[1]), call[1]]
    return [value for value in parse_id_argument(text) if value != customer]


def find_user_ids(users: Collection[Any], key: str, values: Sequence[Any]) -> list[Any]:
    """Return the `_id` of the users whose key is one of the values. Raises ServiceError.

    If the key is `_id`, these are the values themselves: the users need not exist any more.
    """
    if key == "_id":
        return list(values)
    lenient = users.with_options(codec_options=LENIENT_CODEC)
    with map_driver_errors("find", users):
        found = lenient.find({key: {"$in": list(values)}}, {"_id": 1}, collation=SIMPLE_COLLATION)
        return [user["_id"] for user in found]
