"""Boundaries of partitions that a test chooses, and the server's order of ids in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import bson


def type_name(value: Any) -> str:
    """Return the type in which the server compares the value; "other" if it is not divided."""
    if isinstance(value, bool) or value is None:
        return "other"
    if isinstance(value, int | float):
        return "number"
    names = {"str": "string", "ObjectId": "objectid", "bytes": "binary", "Binary": "binary"}
    return names.get(type(value).__name__, "other")


def sort_key(value: Any) -> Any:
    """Return what gives Python the server's order of values of one type."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes):
        encoded = bson.encode({"": value})
        return len(encoded), encoded  # length, subtype, bytes
    return value


def fixed_boundaries(cuts: Iterable[Any]) -> Callable[..., list[Any]]:
    """Return a function that finds `cuts` instead of ids of users.

    The last argument of the function is the type. As a user's id would, NaN ends no partition.
    """

    def find(*arguments: Any) -> list[Any]:
        wanted = arguments[-1]
        found = {cut for cut in cuts if type_name(cut) == wanted and cut == cut}
        return sorted(found, key=sort_key)

    return find
