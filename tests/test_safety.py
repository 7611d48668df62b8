"""The safety checks, each on both sides of its threshold; without a server."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import settings_for

from loyalty.recount.safety import (
    PreviousRecounts,
    SafetyReport,
    check_collections,
    check_live_update,
    check_statuses,
    check_totals,
    format_status,
    has_too_many_failed_updates,
    normalize_status,
)
from loyalty.recount.tally import Totals

URI = "mongodb://localhost/shop"
SETTINGS = settings_for(URI)


def healthy(**values: Any) -> Totals:
    """Totals of a shop of 1,000 users in which nothing changes."""
    usual: dict[str, Any] = {
        "users": 1_000,
        "users_with_points_before": 1_000,
        "users_with_points_after": 1_000,
        "users_with_a_value": 1_000,
        "counted_orders": 5_000,
    }
    return Totals(**{**usual, **values})


def check(
    totals: Totals, previous: PreviousRecounts | None = None, **values: str
) -> tuple[str, list[str]]:
    """Return the refusal, "" for none, and the warnings."""
    settings = settings_for(URI, **values)
    report = check_totals(totals, settings, previous or PreviousRecounts())
    return report.refusal or "", report.warnings


def test_a_recount_without_problems_is_neither_refused_nor_warned_about() -> None:
    assert check(healthy(), PreviousRecounts(counted_orders=5_000)) == ("", [])


@pytest.mark.parametrize(
    ("holders", "losing", "percent", "is_refused"),
    [
        (9, 9, 0, False),  # fewer than 10 users
        (10, 10, 90, True),
        (1_000, 900, 90, False),  # exactly 90 %
        (1_000, 901, 90, True),
        (100, 10, 9, True),
        (100, 9, 9, False),
        (100, 100, 100, False),  # turned off
    ],
)
def test_a_recount_is_refused_if_too_many_users_would_lose_points(
    holders: int, losing: int, percent: int, is_refused: bool
) -> None:
    totals = healthy(users_with_points_before=holders, decreased=losing)
    refusal, _ = check(totals, MAX_DECREASE_PERCENT=str(percent))
    assert bool(refusal) is is_refused
    if is_refused:
        assert f"{losing} of the {holders:,} users with points would lose points" in refusal
        assert f"MAX_DECREASE_PERCENT={percent}" in refusal
        assert refusal.endswith("right? If this is intended, run --once --force")


@pytest.mark.parametrize(
    ("counted", "last", "is_refused"),
    [
        (49, 100, True),
        (50, 100, False),  # exactly half
        (0, 99, False),  # the last one had fewer than 100
        (0, 100, True),
        (96_641, 224_573, True),  # in the middle of a restore
        (1, None, False),  # nothing is known
    ],
)
def test_a_recount_with_less_than_half_of_the_previous_orders_is_refused(
    counted: int, last: int | None, is_refused: bool
) -> None:
    refusal, _ = check(healthy(counted_orders=counted), PreviousRecounts(counted_orders=last))
    assert ("less than 50 %" in refusal) is is_refused


def test_a_recount_without_any_user_is_refused() -> None:
    assert "users holds no users" in check(Totals())[0]
    assert check(healthy(users=1, users_with_points_before=0, users_with_a_value=0))[0] == ""


@pytest.mark.parametrize(
    ("counted", "unknown", "without", "is_refused"),
    [(9, 9, 0, False), (10, 10, 0, True), (10, 0, 10, True), (10, 5, 5, True), (11, 10, 0, False)],
)
def test_a_recount_is_refused_if_no_counted_order_matches_a_user(
    counted: int, unknown: int, without: int, is_refused: bool
) -> None:
    totals = healthy(
        counted_orders=counted, orders_of_unknown_customers=unknown, orders_without_customer=without
    )
    assert ("no counted order matches a user" in check(totals)[0]) is is_refused


@pytest.mark.parametrize(
    ("values", "non_numeric", "is_refused"),
    [(9, 9, False), (12, 10, True), (20, 10, False), (21, 11, True), (1_000, 500, False)],
)
def test_a_points_field_whose_values_are_mostly_not_numbers_is_refused(
    values: int, non_numeric: int, is_refused: bool
) -> None:
    totals = healthy(users_with_a_value=values, non_numeric_values=non_numeric)
    refusal, _ = check(totals)
    assert ("are not numbers" in refusal) is is_refused


@pytest.mark.parametrize(
    ("losing", "is_first", "words"),
    [
        (0, True, None),
        (1, True, "1 of the 1,000 users with points loses points in the first recount"),
        (1, False, None),
        (100, False, None),  # exactly a tenth
        (101, False, "101 of the 1,000 users with points lose points"),
    ],
)
def test_lost_points_cause_a_warning_at_first_or_above_a_tenth(
    losing: int, is_first: bool, words: str | None
) -> None:
    refusal, warnings = check(healthy(decreased=losing), PreviousRecounts(is_first=is_first))
    assert (refusal, warnings) == ("", [words] if words else [])


@pytest.mark.parametrize(
    ("holders", "changed", "is_warned"),
    [(9, 9, False), (10, 10, True), (1_000, 500, False), (1_000, 501, True)],
)
def test_changed_points_of_more_than_half_of_the_users_cause_a_warning(
    holders: int, changed: int, is_warned: bool
) -> None:
    totals = healthy(
        users_with_points_before=holders, users_with_points_changed=changed, increased=changed
    )
    refusal, warnings = check(totals)
    assert refusal == ""
    assert any("POINTS_PER_ORDER" in warning for warning in warnings) is is_warned


@pytest.mark.parametrize(
    ("unknown", "without", "is_warned"), [(25, 25, False), (26, 25, True), (0, 51, True)]
)
def test_more_than_one_percent_of_orders_without_points_cause_a_warning(
    unknown: int, without: int, is_warned: bool
) -> None:
    totals = healthy(orders_of_unknown_customers=unknown, orders_without_customer=without)
    refusal, warnings = check(totals)
    assert refusal == ""
    assert any("earn nothing" in warning for warning in warnings) is is_warned


def test_all_reasons_for_a_refusal_are_given_together() -> None:
    totals = healthy(decreased=1_000, counted_orders=0)
    refusal, _ = check(totals, PreviousRecounts(counted_orders=5_000))
    assert "would lose points" in refusal
    assert "less than 50 %" in refusal


@pytest.mark.parametrize(
    ("failed", "users", "is_failed"),
    [(9, 9, False), (10, 999, True), (10, 1_000, False), (11, 1_000, True), (500, 500, True)],
)
def test_more_than_one_percent_of_failed_updates_is_a_failure(
    failed: int, users: int, is_failed: bool
) -> None:
    assert has_too_many_failed_updates(failed, users) is is_failed


@pytest.mark.parametrize(
    ("losing", "holders", "percent", "is_paused"),
    [(9, 9, 90, False), (10, 99, 90, True), (10, 100, 90, False), (100, 100, 100, False)]
    + [(50, 1_000, 5, False), (51, 1_000, 5, True)],
)
def test_live_updates_pause_above_a_tenth_of_the_users_with_points(
    losing: int, holders: int, percent: int, is_paused: bool
) -> None:
    settings = settings_for(URI, MAX_DECREASE_PERCENT=str(percent))
    assert (check_live_update(losing, holders, settings) is not None) is is_paused


def test_a_missing_collection_is_named_with_those_that_exist() -> None:
    assert check_collections([], ["orders", "users"]) is None
    refusal = check_collections(["shop.Orders"], ["orders", "users"]) or ""
    assert "there is no collection shop.Orders" in refusal
    assert "orders, users" in refusal
    assert "none" in (check_collections(["shop.orders"], []) or "")
    many = [f"c{number:02}" for number in range(12)]
    assert (check_collections(["shop.orders"], many) or "").endswith("c08, c09, 2 more")


def judge(*statuses: Any, **values: str) -> SafetyReport:
    settings = settings_for(URI, **values)
    return check_statuses([(status, 4) for status in statuses], settings)


@pytest.mark.parametrize(
    "stored",
    ["shipped", "SHIPPED", "Shipped ", " ship ped", "Shipped\u200b", "\ufeffShipped", "Shipped\n"]
    + ["Shipped\u00ad", "\uff33hipped", "Ship\u00a0ped", "Shipped\0"],
)
def test_a_status_that_differs_only_in_form_is_refused_and_shown_differently(stored: str) -> None:
    report = judge("Pending", stored)
    assert report.warnings == []
    (refusal,) = report.refusals
    assert "no order has status Shipped; found: Pending (4), " in refusal
    assert f"{format_status(stored)} (4). Correct ORDER_STATUSES" in refusal
    assert format_status(stored) != "Shipped"
    assert format_status(stored).isprintable()


@pytest.mark.parametrize(("stored", "shown"), [(2, "2"), (2.0, "2.0")])
def test_a_number_is_shown_differently_from_the_string_of_its_digits(
    stored: Any, shown: str
) -> None:
    (refusal,) = judge(stored, ORDER_STATUSES=shown).refusals
    assert f"no order has status '{shown}'; found: {shown} (4)" in refusal


def test_other_unicode_forms_of_a_status_are_shown_differently() -> None:
    (refusal,) = judge("Envoye\u0301", ORDER_STATUSES="Envoy\u00e9").refusals
    assert "no order has status Envoyé; found: 'Envoye\\u0301' (4)" in refusal


def test_unrelated_statuses_cause_a_warning() -> None:
    report = judge("Sent", None, "Ship")
    assert report.refusals == []
    assert report.warnings == ["no order has status Shipped; found: Sent (4), null (4), Ship (4)"]


def test_a_status_field_that_no_order_has_is_refused() -> None:
    (refusal,) = judge(None).refusals
    assert "no order has a field status: is ORDER_STATUS_FIELD right?" in refusal


def test_a_shop_without_orders_or_with_a_counted_order_is_not_refused() -> None:
    assert judge() == SafetyReport()
    assert judge("shipped", "Shipped") == SafetyReport()


def test_normalizing_keeps_different_statuses_apart() -> None:
    assert normalize_status("Shipped") == normalize_status("SHIP ped\u200d")
    assert normalize_status("Shipped") != normalize_status("Unshipped")
