"""Canonical ids and the forms they take, for the server and for Python; and odd values.

A customer's id may be stored as an ObjectId or as the 24 hex digits of one, in any mix of cases.
Its canonical form is the ObjectId; of any other id, the id itself.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import bson
from bson import Decimal128, ObjectId
from bson.binary import UuidRepresentation
from bson.codec_options import CodecOptions
from bson.errors import InvalidBSON
from bson.raw_bson import RawBSONDocument

Document = Mapping[str, Any]

NO_CUSTOMER: list[Any] = []
"""The key of the orders without customer: a user's _id is never an array."""

# Text that is not UTF-8 and a date after the year 9999 have no Python value: such ids go back to
# the server as they came.
RAW: CodecOptions[RawBSONDocument] = CodecOptions(document_class=RawBSONDocument)
_PLAIN: CodecOptions[dict[str, Any]] = CodecOptions()


_INT64 = range(-(2**63), 2**63)
_UUID_REPRESENTATIONS = (
    UuidRepresentation.STANDARD,
    UuidRepresentation.PYTHON_LEGACY,
    UuidRepresentation.JAVA_LEGACY,
    UuidRepresentation.CSHARP_LEGACY,
)


class _Unreadable:
    def __repr__(self) -> str:
        return "(unreadable)"


UNREADABLE = _Unreadable()
"""Stands for a value that Python cannot hold."""


def canonical(value: str, nothing: Any) -> Document:
    """Return the expression for the canonical form of the id at `value`, such as `$customer_id`.

    Null and missing become `nothing`, and "" too, unless `nothing` is null.
    """
    other: Any = value
    if nothing is not None:
        other = {"$cond": [{"$eq": [value, ""]}, nothing, value]}
    return {"$convert": {"input": value, "to": "objectId", "onError": other, "onNull": nothing}}


def is_hex_id(value: Any) -> bool:
    """Return whether this is the text of an ObjectId."""
    return isinstance(value, str) and ObjectId.is_valid(value)


def canonicalize(value: Any) -> Any:
    """Return the canonical form of an id, as `canonical` has it."""
    return ObjectId(value) if is_hex_id(value) else value


def indexable_variants(customer: Any) -> list[Any]:
    """Return the forms of a canonical id that an index finds at once; mixed case is another."""
    if isinstance(customer, ObjectId):
        return [customer, str(customer), str(customer).upper()]
    return [customer]


def all_variants(customer: Any) -> list[Any]:
    """Return values for `$in` that find every form of a canonical id."""
    return [customer, *any_case(customer)] if isinstance(customer, ObjectId) else [customer]


def parse_id_argument(text: str) -> list[Any]:
    """Return the canonical ids that a command-line argument may stand for.

    These are a string, a number, a UUID in each of its stored forms, or an ObjectId.
    """
    if ObjectId.is_valid(text):
        return [ObjectId(text)]
    ids: list[Any] = [text]
    if re.fullmatch(r"-?[0-9]{1,19}", text) and int(text) in _INT64:
        ids.append(int(text))
    elif re.fullmatch(r"-?[0-9]+\.[0-9]+", text):
        ids.append(float(text))
    elif re.fullmatch(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", text):
        stored = [bson.Binary.from_uuid(uuid.UUID(text), form) for form in _UUID_REPRESENTATIONS]
        ids += list(dict.fromkeys(stored))
    return ids


def any_case(customer: ObjectId) -> list[bson.Regex[str]]:
    """Return patterns that find the hex digits of an id in any mix of cases.

    An index finds them by their prefixes up to the ninth letter, 256 at most; more than one
    customer may share those.
    """
    digits = str(customer)
    letters = [match.start() for match in re.finditer("[a-f]", digits)]
    prefix = digits[: letters[8]] if len(letters) > 8 else digits
    cases = product(*(sorted({digit, digit.upper()}) for digit in prefix))
    return [bson.Regex("^" + "".join(case)) for case in cases]


def decode_documents(answer: bytes) -> Sequence[Document]:
    """Return the documents in an answer of the server; undecoded where one is not for Python."""
    try:
        return bson.decode_all(answer, _PLAIN)
    except InvalidBSON:
        return bson.decode_all(answer, RAW)


def get_value(document: Document, key: str) -> Any:
    """Return a value of a `decoded` document, None if there is none, or UNREADABLE."""
    try:
        value = document.get(key)
        return bson.decode(value.raw) if isinstance(value, RawBSONDocument) else value
    except InvalidBSON:
        return UNREADABLE


def format_value(value: Any) -> str:
    """Return a value for a person to read, on one short line."""
    if value is None:
        return "none"
    if isinstance(value, bson.Binary) and value.subtype == bson.binary.UUID_SUBTYPE:
        value = value.as_uuid()
    text = str(value) if isinstance(value, ObjectId | uuid.UUID) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def numeric_or_zero(stored: Any) -> float:
    """Return the points that a user holds; 0 if what is stored is no number."""
    if isinstance(stored, Decimal128):
        stored = stored.to_decimal()
        return 0 if stored.is_nan() else float(stored)
    is_number = isinstance(stored, int | float) and not isinstance(stored, bool)
    return stored if is_number and not math.isnan(stored) else 0
