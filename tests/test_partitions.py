"""The partitions together hold every id once, wherever the boundaries are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from boundaries import fixed_boundaries, sort_key, type_name
from bson import Binary, Decimal128, ObjectId
from bson.raw_bson import RawBSONDocument
from hypothesis import example, given
from hypothesis import strategies as st
from pymongo.database import Database

from loyalty.recount.partitions import (
    Partition,
    build_partitions,
    find_boundaries,
    first_object_id_from,
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


def find_partition(found: Iterable[Partition], value: Any) -> int:
    """Return the position of the only partition that has the value."""
    (position,) = (n for n, partition in enumerate(found) if is_in(value, partition))
    return position


@given(boundaries=st.lists(IDS, max_size=8), value=IDS)
@example(boundaries=[0], value=-1)
@example(boundaries=["f" * 25], value=ObjectId("f" * 24))
def test_every_id_is_in_exactly_one_partition(boundaries: list[Any], value: Any) -> None:
    assert find_partition(build_partitions(fixed_boundaries(boundaries)), value) >= 0


@given(boundaries=st.lists(IDS, max_size=8), object_id=OBJECT_IDS)
@example(boundaries=["0g"], object_id=ObjectId("1" + "0" * 23))
def test_an_object_id_and_its_hex_string_are_in_the_same_partition(
    boundaries: list[Any], object_id: ObjectId
) -> None:
    found = list(build_partitions(fixed_boundaries(boundaries)))
    assert find_partition(found, str(object_id)) == find_partition(found, object_id)


def each_boundary_starts_a_partition(boundaries: Iterable[Any]) -> bool:
    found = list(build_partitions(fixed_boundaries(boundaries)))
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


TYPES = ("number", "string", "binary", "objectid")


@pytest.mark.parametrize(("users", "size"), [(0, 3), (3, 3), (4, 3), (10, 3), (11, 1)])
def test_the_boundaries_are_every_nth_id_of_each_type(
    database: Database[Any], users: int, size: int
) -> None:
    ids: list[Any] = [3.5, 2, "b", "a", Binary(b"x", 4), ObjectId(), True, {"a": 1}, 5, "é"]
    ids.append(Decimal128("4.5"))
    if users:
        database.users.insert_many([{"_id": user_id} for user_id in ids[:users]])
    for name, least in zip(
        TYPES, (float("-inf"), "", Binary(b"", 0), ObjectId("0" * 24)), strict=True
    ):
        ordered = database.users.find({"_id": {"$gte": least}}).sort("_id", 1)
        expected = [user["_id"] for user in ordered][size::size]
        assert list(find_boundaries(database.users, "_id", name, size=size)) == expected


def test_the_boundaries_end_before_an_id_that_python_cannot_hold(database: Database[Any]) -> None:
    database.users.insert_many([{"_id": f"{n:03}"} for n in range(9)])
    not_utf_8 = b"\x12\x00\x00\x00\x02_id\x00\x03\x00\x00\x005\xfe\x00\x00"
    database.users.insert_one(RawBSONDocument(len(not_utf_8).to_bytes(4, "little") + not_utf_8[4:]))
    database.users.insert_many([{"_id": f"9{n}"} for n in range(9)])
    assert list(find_boundaries(database.users, "_id", "string", size=3)) == ["003", "006"]


def test_the_boundaries_end_before_an_array(database: Database[Any]) -> None:
    database.users.insert_many([{"key": f"{n:03}"} for n in range(9)])
    database.users.insert_one({"key": ["0071"]})
    database.users.create_index("key")
    assert list(find_boundaries(database.users, "key", "string", size=4)) == ["004"]


def test_the_first_partition_is_known_before_all_boundaries_are(database: Database[Any]) -> None:
    database.users.insert_many([{"_id": ObjectId()} for _ in range(10)])
    steps = 0

    def find(type_name: str) -> Iterator[Any]:
        nonlocal steps
        for boundary in find_boundaries(database.users, "_id", type_name, size=1):
            steps += 1
            yield boundary

    partitions = build_partitions(find)
    next(partitions)
    assert steps == 1
    assert len(list(partitions)) == 10
    assert steps == 9
