"""Stored values in Python: as points, and as texts for people."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from math import inf
from typing import Any

import bson
import pytest
from bson import Binary, Decimal128, Int64, ObjectId

from loyalty.mongo.values import (
    LENIENT_CODEC,
    MAX_VALUE_LENGTH,
    format_value,
    get_nested,
    is_integer,
    is_number,
)
from loyalty.recount.points import parse_points

UUID = uuid.UUID(int=9)


@pytest.mark.parametrize(
    ("stored", "number"),
    [
        (3, 3),
        (Int64(2**62), 2**62),
        (2.5, 2.5),
        (-1, -1),
        (inf, inf),
        (Decimal128("2.5"), 2.5),
        (Decimal128("Infinity"), inf),
        ("500", 500),
        (" 500 ", 500),
        ("-3", -3),
        ("+7.25", 7.25),
        ("9" * 400, inf),
    ],
)
def test_a_stored_number_or_numeric_string_counts_as_its_number(stored: Any, number: float) -> None:
    assert parse_points(stored) == number


@pytest.mark.parametrize(
    "stored",
    [None, True, False, float("nan"), Decimal128("NaN"), Decimal128("sNaN"), "", " ", "gold"]
    + ["1e3", "0x10", "nan", "inf", "1_000", "1,5", "5.", "٣", [5], {"points": 5}, b"5"]
    + [Binary(b"5" * 36, 4), datetime(2026, 1, 1, tzinfo=UTC), ObjectId()],
)
def test_any_other_stored_value_counts_as_zero(stored: Any) -> None:
    assert parse_points(stored) == 0


@pytest.mark.parametrize("stored", [0, 5, Int64(5)])
def test_only_32_bit_and_64_bit_integers_are_integers(stored: Any) -> None:
    assert is_integer(stored)
    assert is_number(stored)


@pytest.mark.parametrize(
    ("stored", "number"), [(5.0, True), (Decimal128("5"), True), (True, False), ("5", False)]
)
def test_other_number_types_are_numbers_but_not_integers(stored: Any, number: bool) -> None:
    assert not is_integer(stored)
    assert is_number(stored) is number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (5, "5"),
        ("5", "'5'"),
        ("a\nb\x1b[31m", r"'a\nb\x1b[31m'"),
        ("\udcff", r"'\udcff'"),
        (ObjectId("a" * 24), "a" * 24),
        ("a" * 24, f"'{'a' * 24}'"),
        (Binary.from_uuid(UUID), str(UUID)),
    ],
)
def test_a_value_is_formatted_as_one_line_that_shows_its_type(value: Any, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize("subtype", [0, 3, 4, 128])
@pytest.mark.parametrize("length", [0, 16, 36, 10_000])
def test_a_binary_of_any_subtype_and_length_is_formatted(subtype: int, length: int) -> None:
    text = format_value(Binary(b"\n" * length, subtype))
    assert text
    assert text.isprintable()
    assert len(text) <= MAX_VALUE_LENGTH


def test_a_long_value_is_cut() -> None:
    text = format_value({"a": "x" * 1_000})
    assert len(text) == MAX_VALUE_LENGTH
    assert text.endswith("...")


@pytest.mark.parametrize(
    ("path", "value"),
    [("a", {"b": {"c": 1}}), ("a.b.c", 1), ("a.x", None), ("a.b.c.d", None), ("x", None)],
)
def test_a_nested_value_is_found_by_its_path(path: str, value: Any) -> None:
    assert get_nested({"a": {"b": {"c": 1}}}, path) == value
    assert get_nested(None, path, default=7) == 7


def test_values_that_python_has_no_type_for_are_decoded() -> None:
    far_date = b"\x09a\x00\xff\xff\xff\xff\xff\xff\xff\x7f"
    not_utf_8 = b"\x02b\x00\x03\x00\x00\x00\xff\xfe\x00"
    body = far_date + not_utf_8
    document = bson.decode((len(body) + 5).to_bytes(4, "little") + body + b"\0", LENIENT_CODEC)
    assert document["b"] == "\udcff\udcfe"
    assert format_value(document["a"])
    assert bson.encode({"a": document["a"]})[4:-1] == far_date
    with pytest.raises(UnicodeEncodeError):
        bson.encode({"b": document["b"]})
