"""The partitions together hold every id once, wherever the boundaries are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from bson import Binary, Decimal128, ObjectId
from bson.raw_bson import RawBSONDocument
from hypothesis import example, given
from hypothesis import strategies as st
from pymongo.database import Database

from loyalty.recount.partitions import (
    Partition,
    build_partitions,
    first_object_id_from,
    partition_boundaries,
)

STRINGS = st.one_of(
    st.text(st.sampled_from("0af9gG!Aé"), max_size=4),
    st.text(st.sampled_from("0f"), min_size=24, max_size=25),
    st.text(st.sampled_from("fF9"), min_size=24, max_size=24),
)
OBJECT_IDS = st.text(st.sampled_from("0af"), min_size=24, max_size=24).map(ObjectId)
OTHERS: list[Any] = [None, True, float("nan"), float("-inf"), float("inf"), -3, -0.5, 0, 5, 5.5]
IDS = st.one_of(
    STRINGS,
    OBJECT_IDS,
    st.sampled_from(OTHERS),
    st.binary(max_size=2),
    st.binary(max_size=2).map(lambda value: Binary(value, 4)),
)


def type_name(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "other"
    if isinstance(value, int | float):
        return "number"
    return "binary" if isinstance(value, bytes) else type(value).__name__


def sort_key(value: Any) -> Any:
    """Return what gives Python the server's order of values of one type."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes):
        return len(value), getattr(value, "subtype", 0), bytes(value)
    return value


def satisfies(value: Any, operator: Any) -> bool:
    """Follow MQL: it compares only values of one type, and nothing with NaN."""
    if "$not" in operator:
        return not satisfies(value, operator["$not"])
    comparisons = {"$gte": lambda a, b: a >= b, "$lt": lambda a, b: a < b}
    return all(
        type_name(value) == type_name(bound) and comparisons[name](sort_key(value), sort_key(bound))
        for name, bound in operator.items()
    )


def is_in(value: Any, partition: Partition) -> bool:
    return any(all(satisfies(value, o) for o in interval) for interval in partition.intervals)


def find_partition(found: Sequence[Partition], value: Any) -> int:
    """Return the position of the only partition that has the value."""
    (position,) = (n for n, partition in enumerate(found) if is_in(value, partition))
    return position


@given(boundaries=st.lists(IDS, max_size=8), value=IDS)
@example(boundaries=[0], value=-1)
@example(boundaries=["f" * 25], value=ObjectId("f" * 24))
def test_every_id_is_in_exactly_one_partition(boundaries: list[Any], value: Any) -> None:
    assert find_partition(build_partitions(boundaries), value) >= 0


@given(boundaries=st.lists(IDS, max_size=8), object_id=OBJECT_IDS)
@example(boundaries=["0g"], object_id=ObjectId("1" + "0" * 23))
def test_an_object_id_and_its_hex_string_are_in_the_same_partition(
    boundaries: list[Any], object_id: ObjectId
) -> None:
    found = build_partitions(boundaries)
    assert find_partition(found, str(object_id)) == find_partition(found, object_id)


def each_boundary_starts_a_partition(boundaries: Iterable[Any]) -> bool:
    found = build_partitions(boundaries)
    return len({find_partition(found, boundary) for boundary in boundaries}) == len(
        list(boundaries)
    )


@pytest.mark.parametrize(
    "boundaries",
    [
        [1, 2.5, 3],
        [Binary(b"a", 4), Binary(b"b", 4), b"ccc"],
        ["a", "b", "g"],
        [ObjectId(f"{n}" * 24) for n in range(3)],
        ["5", ObjectId("7" * 24), 4, b"x"],
    ],
    ids=["numbers", "binaries", "strings", "object ids", "all types"],
)
def test_boundaries_of_each_type_divide_the_ids(boundaries: list[Any]) -> None:
    assert each_boundary_starts_a_partition(boundaries)


@pytest.mark.parametrize(
    "boundaries", [[], [None], [True], [float("nan")], [""], [Decimal128("5")], [{"a": 1}]]
)
def test_an_unusable_boundary_is_ignored(boundaries: list[Any]) -> None:
    assert len(build_partitions(boundaries)) == len(build_partitions([]))


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("", "0" * 24),
        ("5", "5".ljust(24, "0")),
        ("5 ", "5".ljust(24, "0")),
        ("5G", "5a".ljust(24, "0")),
        ("5g", "6".ljust(24, "0")),
        ("9fé", "a".ljust(24, "0")),
        ("5f" * 12, "5f" * 12),
        ("5f" * 12 + "!", "5f" * 11 + "60"),
        ("f" * 24 + "0", None),
        ("g", None),
    ],
)
def test_first_object_id_from_returns_the_first_id_not_below_the_text(
    text: str, first: str | None
) -> None:
    assert first_object_id_from(text) == (first and ObjectId(first))


@pytest.mark.parametrize(("users", "size"), [(0, 3), (3, 3), (4, 3), (10, 3), (10, 1)])
def test_the_boundaries_are_every_nth_id_of_each_type(
    database: Database[Any], users: int, size: int
) -> None:
    ids: list[Any] = [3.5, 2, "b", "a", Binary(b"x", 4), ObjectId(), True, {"a": 1}, 5, "é"]
    if users:
        database.users.insert_many([{"_id": user_id} for user_id in ids[:users]])
    expected: list[Any] = []
    for least in (float("-inf"), "", b"", ObjectId("0" * 24)):
        found = database.users.find({"_id": {"$gte": least}}).sort("_id", 1)
        expected += [user["_id"] for user in found][size::size]
    assert partition_boundaries(database.users, size=size) == expected


def test_the_boundaries_end_before_an_id_that_python_cannot_hold(database: Database[Any]) -> None:
    database.users.insert_many([{"_id": f"{n:03}"} for n in range(9)])
    not_utf_8 = b"\x12\x00\x00\x00\x02_id\x00\x03\x00\x00\x005\xfe\x00\x00"
    database.users.insert_one(RawBSONDocument(len(not_utf_8).to_bytes(4, "little") + not_utf_8[4:]))
    database.users.insert_many([{"_id": f"9{n}"} for n in range(9)])
    assert partition_boundaries(database.users, size=3) == ["003", "006"]
