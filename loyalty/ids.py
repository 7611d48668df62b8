"""Values as they are stored, some of which Python cannot hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import bson
from bson import Decimal128, ObjectId
from bson.codec_options import CodecOptions
from bson.errors import InvalidBSON
from bson.raw_bson import RawBSONDocument

from loyalty.counting import Document

# Text that is not UTF-8 and a date after the year 9999 have no Python value: such ids go back to
# the server as they came.
RAW: CodecOptions[RawBSONDocument] = CodecOptions(document_class=RawBSONDocument)
_PLAIN: CodecOptions[dict[str, Any]] = CodecOptions()


def decoded(answer: bytes) -> Sequence[Document]:
    """Return the documents in an answer of the server; undecoded where one is not for Python."""
    try:
        return bson.decode_all(answer, _PLAIN)
    except InvalidBSON:
        return bson.decode_all(answer, RAW)


def shown(value: Any) -> str:
    """Return a value for a person to read, on one short line."""
    if isinstance(value, bson.Binary) and value.subtype == bson.binary.UUID_SUBTYPE:
        value = value.as_uuid()
    text = str(value) if isinstance(value, ObjectId | UUID | Odd) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def value_of(document: Document, key: str) -> Any:
    """Return a value, or an `Odd` where there is none that Python can hold."""
    try:
        value = document[key]
        return bson.decode(value.raw) if isinstance(value, RawBSONDocument) else value
    except KeyError:
        return Odd("none")
    except InvalidBSON:
        return Odd("(unreadable)")


class Odd(str):
    """In the place of a value that is not there, or that Python cannot hold."""

    __slots__ = ()


def number_in(stored: Any) -> float:
    """Return the points that a user holds; 0 if what is stored is no number."""
    if isinstance(stored, Decimal128):
        stored = stored.to_decimal()
        return 0 if stored.is_nan() else float(stored)
    is_number = isinstance(stored, int | float) and not isinstance(stored, bool)
    return stored if is_number and not math.isnan(stored) else 0
