"""The ranges hold every id once, wherever the edges are; without a server."""

from __future__ import annotations

from typing import Any

import pytest
from bson import Binary, ObjectId
from hypothesis import example, given
from hypothesis import strategies as st

from loyalty.recount.partitions import Range, first_object_id_from, ranges

DIGITS = "0123456789abcdef"
TEXTS = st.one_of(
    st.text(st.sampled_from("0af9gG!Aé"), max_size=4),
    st.text(st.sampled_from("0f"), min_size=24, max_size=25),
    st.text(st.sampled_from("fF9"), min_size=24, max_size=24),
)
OBJECT_IDS = st.text(st.sampled_from("0af"), min_size=24, max_size=24).map(ObjectId)
IDS = st.one_of(
    TEXTS,
    OBJECT_IDS,
    st.sampled_from([None, True, float("nan"), float("-inf"), float("inf"), -3, -0.5, 0, 5, 5.5]),
    st.binary(max_size=2),
    st.binary(max_size=2).map(lambda value: Binary(value, 4)),
)


def kind(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "other"
    if isinstance(value, int | float):
        return "number"
    return "binary" if isinstance(value, bytes) else type(value).__name__


def place(value: Any) -> Any:
    """How the server orders values of one kind."""
    if isinstance(value, str):
        return value.encode()
    return (len(value), getattr(value, "subtype", 0), value) if kind(value) == "binary" else value


def satisfies(value: Any, operator: Any) -> bool:
    """What MQL says: only values of one kind are compared, and NaN with nothing."""
    if "$not" in operator:
        return not satisfies(value, operator["$not"])
    compared = {"$gte": lambda a, b: a >= b, "$lt": lambda a, b: a < b}
    return all(
        kind(value) == kind(bound) and compared[name](place(value), place(bound))
        for name, bound in operator.items()
    )


def holds(part: Range, value: Any) -> bool:
    return any(all(satisfies(value, o) for o in interval) for interval in part.intervals)


def home(cut: list[Range], value: Any) -> int:
    (number,) = (n for n, part in enumerate(cut) if holds(part, value))
    return number


@given(edges=st.lists(IDS, max_size=8), value=IDS)
@example(edges=[0], value=-1)
@example(edges=["f" * 25], value=ObjectId("f" * 24))
def test_every_id_is_in_one_range(edges: list[Any], value: Any) -> None:
    assert home(ranges(edges), value) >= 0


@given(edges=st.lists(IDS, max_size=8), own=OBJECT_IDS, data=st.data())
@example(edges=["0g"], own=ObjectId("1" + "0" * 23), data=None)
def test_an_id_is_where_its_text_is_and_in_other_cases_there_or_earlier(
    edges: list[Any], own: ObjectId, data: st.DataObject | None
) -> None:
    cut = ranges(edges)
    assert home(cut, str(own)) == home(cut, own)
    assert cut[home(cut, own)].is_string_partition
    capitals = data.draw(st.lists(st.booleans(), min_size=24, max_size=24)) if data else [True] * 24
    pairs = zip(str(own), capitals, strict=True)
    text = "".join(digit.upper() if capital else digit for digit, capital in pairs)
    assert home(cut, text) <= home(cut, own)


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
def test_the_first_object_id_that_is_spelt_at_or_after_a_text(text: str, first: str | None) -> None:
    assert first_object_id_from(text) == (first and ObjectId(first))
