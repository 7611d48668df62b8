"""Work that overlaps: in its order, and ended by the first failure."""

from __future__ import annotations

from threading import Barrier, Event

import pytest

from loyalty.concurrency import map_ordered
from loyalty.errors import DatabaseUnavailable
from sandbox.mongod import DEADLINE_SECONDS


def test_after_one_that_fails_none_is_begun() -> None:
    begun: list[int] = []
    others = Event()

    def do(item: int) -> None:
        begun.append(item)
        if item == 0:  # so that all others could be begun before the failure is seen
            others.wait(0.2)
        elif item == 1:
            raise DatabaseUnavailable("of 1")
        else:
            others.set()

    with (
        pytest.raises(DatabaseUnavailable, match="of 1"),
        map_ordered(do, iter(range(20)), 2, prefetch=8) as results,
    ):
        list(results)
    assert sorted(begun) == [0, 1]


def test_results_come_in_order_though_later_ones_are_done_before() -> None:
    others_done = Barrier(2)

    def do(item: int) -> int:
        if item in (0, 8):  # the first waits for one that is well ahead of it
            others_done.wait(DEADLINE_SECONDS)
        return item

    with map_ordered(do, iter(range(20)), 2, prefetch=8) as results:
        assert list(results) == list(range(20))
