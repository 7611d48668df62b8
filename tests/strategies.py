"""Hypothesis strategies for users and orders with ids, statuses and points of every type."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

import bson
from bson import Binary, Decimal128, Int64, ObjectId
from hypothesis import strategies as st

from sandbox.shop import canonical_key

Document = dict[str, Any]

# Few enough that orders and users meet; of each type one more that no user has.
OBJECT_IDS = [ObjectId(f"{n:x}".rjust(2, "b") * 12) for n in (0xAB, 0xCD, 0x12, 0xFE)]
UUIDS = [Binary.from_uuid(uuid.UUID(int=n)) for n in (1, 2)]
BINARIES = [*UUIDS, Binary(b"a" * 36, 4), Binary(b"a" * 36, 3), Binary(b"", 4)]


def object_id_forms(object_id: ObjectId) -> st.SearchStrategy[Any]:
    mixed = st.randoms(use_true_random=False).map(
        lambda rng: "".join(rng.choice((c, c.upper())) for c in str(object_id))
    )
    return st.one_of(st.sampled_from([object_id, str(object_id), str(object_id).upper()]), mixed)


PLAIN_IDS = st.sampled_from(
    [0, 1, 5, 5.0, Int64(5), Decimal128("5"), 5.5, float("nan"), -0.0, True, False]
    + ["5", "ada", " ada", "Ada", "é", "x" * 24, "b" * 23, *BINARIES, {"a": 1, "b": "x"}]
    + [{"b": "x"}, datetime(2026, 1, 2, tzinfo=UTC), bson.Timestamp(1, 1)]
)
CANONICAL_IDS = st.one_of(
    st.sampled_from(OBJECT_IDS).flatmap(lambda i: st.sampled_from([i, str(i)])), PLAIN_IDS
)
ANY_CASE_IDS = st.one_of(st.sampled_from(OBJECT_IDS).flatmap(object_id_forms), PLAIN_IDS)
BOUNDARIES = st.one_of(
    ANY_CASE_IDS, st.sampled_from(["", "g", "bb", "ab ", "c" * 30, "é", b"", b"x" * 16])
)
MISSING = object()
STATUSES = st.sampled_from(
    ["Shipped"] * 6
    + ["Delivered", "shipped", "Shipped ", ["Shipped"], ["x", "Shipped"], 1, None]
    + [MISSING, {"Shipped": 1}]
)
POINTS = st.one_of(
    st.integers(0, 4),
    st.integers(0, 4),
    st.sampled_from([MISSING, None, "3", 0.0, 1.0, 2.5, float("nan"), float("inf"), -1, True])
    | st.sampled_from([[1], [0], {}, {"w": 1}, Int64(2), 2**40 - 1, 2**40, 2**63 - 1, *BINARIES])
    | st.sampled_from([Decimal128(text) for text in ("1", "0", "-2.5", "NaN", "sNaN", "Infinity")])
    | st.sampled_from(["", "7.5", " 2 ", "-1", "1e3", "9" * 400, "2 points"]),
)


def present(**fields: Any) -> Document:
    """Return a document of the fields that are not MISSING."""
    return {name: value for name, value in fields.items() if value is not MISSING}


def _unique_key(value: Any) -> Any:
    """Return what is equal for ids that the unique index on _id takes for one."""
    return ("string", value) if isinstance(value, str) else canonical_key(value)


def users(ids: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Document]]:
    return st.lists(
        st.builds(
            lambda i, p: present(_id=i, loyalty_points=p, name="n", tags=[1]),
            st.one_of(ids, st.sampled_from([None, ""])),
            POINTS,
        ),
        max_size=12,
        unique_by=lambda user: _unique_key(user["_id"]),
    )


def orders(ids: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Document]]:
    others = [MISSING, None, "", [], [5], [str(OBJECT_IDS[0])], {"$gt": 1}]
    customers = st.one_of(ids, ids, st.sampled_from(others))
    return st.lists(
        st.builds(lambda c, s: present(customer_id=c, status=s), customers, STATUSES).filter(
            # No index takes two arrays in one document.
            lambda o: (
                not (isinstance(o.get("customer_id"), list) and isinstance(o.get("status"), list))
            )
        ),
        max_size=40,
    )


SHOPS = st.sampled_from([CANONICAL_IDS, ANY_CASE_IDS]).flatmap(
    lambda ids: st.tuples(users(ids), orders(ids), orders(ids))
)
"""Users, their orders, and further orders; half of the shops hold canonical ids only."""
