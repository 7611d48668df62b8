"""BSON values in Python: decoding without failures, and texts for people."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import bson
from bson import Binary, DBRef, Decimal128, ObjectId
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.errors import BSONError

Document = Mapping[str, Any]
T = TypeVar("T")

SIMPLE_COLLATION = {"locale": "simple"}
"""Overrides the collation of a collection: strings are equal only if all their bytes are."""

# Dates after the year 9999 become DatetimeMS. Bytes that are not UTF-8 become lone surrogates. bson
# does not encode lone surrogates, so such a string is never written back in another form.
LENIENT_CODEC: CodecOptions[dict[str, Any]] = CodecOptions(
    tz_aware=True,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
    unicode_decode_error_handler="surrogateescape",
)
# For values that are only shown.
READABLE_CODEC: CodecOptions[dict[str, Any]] = LENIENT_CODEC.with_options(
    unicode_decode_error_handler="replace"
)

MAX_VALUE_LENGTH = 60
_MAX_CHUNK_BYTES = 4 * 1024 * 1024
"""A command may have 16 MB, and some have three lists of the same ids."""


def try_encode(document: Document) -> bytes | None:
    """Return a document as BSON; None if Python cannot encode it unchanged."""
    try:
        return bson.encode(document)
    except (BSONError, UnicodeEncodeError):
        return None


def split_ids(ids: Sequence[T], max_number: int) -> Iterator[list[T]]:
    """Yield lists of consecutive ids, each small enough for one command."""
    chunk: list[T] = []
    size = 0
    for item in ids:
        item_size = len(bson.encode({"": item}))
        if chunk and (len(chunk) == max_number or size + item_size > _MAX_CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += item_size
    if chunk:
        yield chunk


def format_value(value: Any) -> str:
    """Return a value as one short line, with control characters escaped."""
    if value is None:
        return "null"
    if isinstance(value, Binary) and value.subtype == bson.binary.UUID_SUBTYPE:
        with suppress(ValueError):  # subtype 4, and not 16 bytes
            value = value.as_uuid()
    text = str(value) if isinstance(value, ObjectId | uuid.UUID) else repr(value)
    return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - 3] + "..."


def is_integer(value: Any) -> bool:
    """Return whether a value is stored as a 32-bit or 64-bit integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is stored as any of the four number types."""
    return is_integer(value) or isinstance(value, float | Decimal128)


def get_nested(document: Document | None, path: str, default: Any = None) -> Any:
    """Return the value at a dotted path, or `default` if there is none."""
    value: Any = document
    for name in path.split("."):
        if isinstance(value, DBRef):  # what the driver makes of {$ref, $id}
            value = value.as_doc()
        if not isinstance(value, dict) or name not in value:
            return default
        value = value[name]
    return value
