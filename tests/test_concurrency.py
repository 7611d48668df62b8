"""The ordered parallel map, and progress reports."""

from __future__ import annotations

from threading import Barrier, Event

import pytest

from loyalty.concurrency import Progress, map_ordered
from loyalty.errors import DatabaseUnavailable
from sandbox.mongod import DEADLINE_SECONDS


def test_after_a_failure_no_further_item_is_started() -> None:
    started: list[int] = []
    other_started = Event()

    def do(item: int) -> None:
        started.append(item)
        if item == 0:  # time enough to start all others before the failure is seen
            other_started.wait(0.2)
        elif item == 1:
            raise DatabaseUnavailable("item 1")
        else:
            other_started.set()

    with (
        pytest.raises(DatabaseUnavailable, match="item 1"),
        map_ordered(do, iter(range(20)), 2, prefetch=8) as results,
    ):
        list(results)
    assert sorted(started) == [0, 1]


def test_results_have_the_order_of_the_items() -> None:
    both_started = Barrier(2)

    def do(item: int) -> int:
        if item in (0, 8):  # item 0 waits for one that is computed before its turn
            both_started.wait(DEADLINE_SECONDS)
        return item

    with map_ordered(do, iter(range(20)), 2, prefetch=8) as results:
        assert list(results) == list(range(20))


def test_no_call_is_running_after_the_block() -> None:
    finished: list[int] = []
    second_started = Event()

    def do(item: int) -> int:
        if item == 0:
            second_started.wait(DEADLINE_SECONDS)
            return item
        second_started.set()
        Event().wait(0.2)
        finished.append(item)
        return item

    with map_ordered(do, iter(range(2)), 2) as results:
        next(results)
    assert finished == [1]


def test_progress_is_reported_to_the_log_and_the_callback(caplog: pytest.LogCaptureFixture) -> None:
    texts: list[str] = []
    progress = Progress("counting", 1_200, texts.append, report_seconds=0)
    with caplog.at_level("INFO", "loyalty"):
        progress.add(300)
        progress.add(900)
    assert [text.rsplit(", ", 1)[0] for text in texts] == [
        "counting 300 of 1,200",
        "counting 1,200 of 1,200",
    ]
    assert [message.split(" rate")[0] for message in caplog.messages] == [
        "counting done=300 total=1200 percent=25",
        "counting done=1200 total=1200 percent=100",
    ]


def test_between_two_reports_the_callback_gets_an_empty_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts: list[str] = []
    progress = Progress("counting", 3, texts.append)
    with caplog.at_level("INFO", "loyalty"):
        for _ in range(3):
            progress.add(1)
    assert texts == ["", "", ""]
    assert caplog.messages == []
