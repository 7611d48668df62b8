"""Into which ranges everyone is cut, so that each can be counted in the server's memory.

A range is an interval of canonical ids: from one edge up to, and without, the next. The server
compares values of one kind only (MQL's type bracketing), so a range knows an interval for each
kind of id in it. Whatever the edges are, the ranges together hold every id once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from bson import Binary, ObjectId
from pymongo.collection import Collection

from loyalty.recount.customer_ids import RAW, UNREADABLE, Document, get_value, is_hex_id

USERS = 25_000
"""How many users make a range: few enough that neither the server nor we need the disk, and that
two workers get even shares of a small shop, too."""

_DIGITS = "0123456789abcdef"
# The least value of each kind; NaN is below all numbers, and so in the rest.
_LEAST: dict[str, Any] = {
    "number": float("-inf"),
    "text": "",
    "binary": Binary(b"", 0),
    "objectid": ObjectId("0" * 24),
}


@dataclass(frozen=True)
class Range:
    """What an id must satisfy: all operators of at least one of `intervals`, each an index scan."""

    intervals: Sequence[Sequence[Document]]
    is_string_partition: bool = False
    """Whether all ids in it are texts and ObjectIds."""


def edges(users: Collection[Any], size: int = USERS) -> list[Any]:
    """Return every `size`-th id of the users, in the server's order; an index is all it reads."""
    found: list[Any] = []
    while True:
        step = users.with_options(codec_options=RAW).find({}, {"_id": 1}).sort("_id", 1)
        step = step.hint([("_id", 1)]).skip(size).limit(1)
        if found:
            step = step.min([("_id", found[-1])])
        document = next(step, None)
        if document is None or (edge := get_value(document, "_id")) is UNREADABLE:
            return found  # after an id that Python cannot hold, one long range
        found.append(edge)


def ranges(edges: Iterable[Any]) -> list[Range]:
    """Return the ranges between these edges, of any kind and in any order, and the rest.

    What is neither text nor ObjectId is cut at the edges of its own kind, where there are any;
    all that is left, and no id at all, is the rest.
    """
    by_kind: dict[str, set[Any]] = {kind: set() for kind in _LEAST}
    for edge in edges:
        if kind := _kind(edge):
            by_kind[kind].add(edge)
    found = []
    cut_kinds = {"text", "objectid"}
    for kind in ("number", "binary"):
        if by_kind[kind]:
            cut_kinds.add(kind)
            cuts = sorted(by_kind[kind], key=_order)
            found += [Range([_interval(kind, *ends)]) for ends in pairwise([None, *cuts, None])]
    # In the order of their text: an id in capitals then is never in a later range than its user.
    texts = {str(edge) for edge in by_kind["text"] | by_kind["objectid"]}
    cuts = sorted({edge.lower() if is_hex_id(edge) else edge for edge in texts})
    found += [_of_text(*ends) for ends in pairwise([None, *cuts, None])]
    # Not $nor: it would fetch every order to look.
    found.append(Range([[{"$not": {"$gte": _LEAST[kind]}} for kind in sorted(cut_kinds)]]))
    return found


def _kind(edge: Any) -> str:
    match edge:
        case bool():
            return ""
        case int() | float():  # a Decimal128 has no order in Python
            return "number" if edge == edge else ""  # no edge can be NaN
        case str():
            return "text" if edge else ""
        case Binary() | bytes():
            return "binary"
        case ObjectId():
            return "objectid"
    return ""


def _order(edge: Any) -> Any:
    """Return what Python has to compare, to have the server's order of numbers or binaries."""
    if isinstance(edge, bytes):
        return len(edge), getattr(edge, "subtype", 0), bytes(edge)
    return edge


def _interval(kind: str, low: Any, high: Any) -> list[Document]:
    bounds: dict[str, Any] = {"$gte": _LEAST[kind] if low is None else low}
    return [bounds if high is None else {**bounds, "$lt": high}]


def _of_text(low: str | None, high: str | None) -> Range:
    """Return the range of the texts from `low` to `high`, and of the ObjectIds that they spell."""
    intervals = [_interval("text", low, high)]
    first, last = first_object_id_from(low or ""), first_object_id_from(high) if high else None
    if first is not None:
        intervals.append(_interval("objectid", first, last))
    return Range(intervals, is_string_partition=True)


def first_object_id_from(text: str) -> ObjectId | None:
    """Return the first ObjectId whose 24 digits are `text` or come after it, if there is one.

    That is a900…0 for "a9", b000…0 for "a~", and none for "g".
    """
    spelt = re.match("[0-9a-f]{0,24}", text)
    digits = spelt[0] if spelt else ""
    if digits == text:
        return ObjectId(digits.ljust(24, "0"))
    # The next character is no digit, or one too many: the next digit is after it, or carries.
    after = [d for d in _DIGITS if d > text[len(digits)]] if len(digits) < 24 else []
    if after:
        return ObjectId((digits + after[0]).ljust(24, "0"))
    number = int(digits or "0", 16) + 1
    if number >= 16 ** len(digits):
        return None
    return ObjectId(f"{number:0{len(digits)}x}".ljust(24, "0"))
