"""`--status`: the records, how the last recounts ended, and whether the points are fresh."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock

import pytest
from bson import ObjectId
from conftest import Command, settings_for
from pymongo import monitoring
from pymongo.database import Database
from small_shop import fill, make_change_log_older

from loyalty.commands.status import MAX_RECORDS
from loyalty.heartbeat import Heartbeat
from loyalty.history import History

Capture = pytest.CaptureFixture[str]


class RecordsListener(monitoring.CommandListener):
    """Calls `on_read` once, after --status has read the records."""

    on_read: Callable[[], object] | None = None
    request_id: int | None = None

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if event.command_name == "find" and event.command.get("limit") == MAX_RECORDS:
            self.request_id = event.request_id

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        if event.request_id == self.request_id and (on_read := self.on_read) is not None:
            self.on_read = None
            on_read()

    def failed(self, event: monitoring.CommandFailedEvent) -> None: ...


RECORDS = RecordsListener()
monitoring.register(RECORDS)  # for clients made from now on


@pytest.fixture
def shop(database: Database[Any]) -> Database[Any]:
    return fill(database)


def rows(out: str) -> list[list[str]]:
    """Return the cells of the table of records, which has a header."""
    table = [line for line in out.splitlines() if line.startswith("  ") and "written, " not in line]
    return [re.split(r"  +", line.strip()) for line in table]


def make_older(shop: Database[Any], by: timedelta) -> None:
    for record in shop.loyalty_recounts.find({"as_of": {"$exists": True}}):
        older = {name: record[name] - by for name in ("as_of", "finished_at", "started_at")}
        shop.loyalty_recounts.update_one({"_id": record["_id"]}, {"$set": older})


def test_without_a_record_the_points_are_not_fresh(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    assert command("--status") == 1
    assert capsys.readouterr().out == "No recount has succeeded yet\n"
    assert command("--status", RECOUNTS_COLLECTION="none") == 78
    assert "no records are kept" in capsys.readouterr().err


def test_a_recount_that_succeeded_is_one_row_and_the_points_are_fresh(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    assert command("--once") == 0
    capsys.readouterr()
    assert command("--status") == 0
    out = capsys.readouterr().out
    header, row = rows(out)
    assert header[1:5] == ["outcome", "written", "failed", "orders"]
    (record,) = shop.loyalty_recounts.find()
    recount = str(record["_id"])
    assert row[1:] == ["succeeded", "2", "0", "5", recount, socket.gethostname()]
    assert re.search(
        r"^The points are \ds old: fresh, not older than 4h \(twice", out, re.MULTILINE
    )
    assert "The last recount" not in out
    make_older(shop, timedelta(hours=5))
    assert command("--status") == 1
    assert re.search(r"The points are \w+ old: STALE, older than 4h \(", capsys.readouterr().out)


def test_refused_recounts_have_written_no_user_and_the_last_one_is_explained(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    assert command("--once") == 0
    shop.users.insert_many([{"_id": n, "loyalty_points": 1} for n in range(20)])
    for _ in range(2):
        assert command("--once") == 65
    capsys.readouterr()
    assert command("--status") == 0
    out = capsys.readouterr().out
    assert [row[1:3] for row in rows(out)[1:]] == [["refused", "0"]] * 2 + [["succeeded", "2"]]
    assert "The last 2 recounts did not succeed\n" in out
    reason = r"The last recount was refused by the safety checks: 20 of the \d+ users with points"
    assert re.search(reason, out)
    assert " old: still fresh, not older than 4h" in out
    assert out.rstrip().endswith("from an earlier recount")


def test_an_incomplete_recount_shows_users_written_and_failed_updates(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    assert command("--once") == 0
    incomplete = {"outcome": "incomplete", "changed": 38, "failed_updates": 2}
    shop.loyalty_recounts.update_one({}, {"$set": incomplete})
    capsys.readouterr()
    assert command("--status") == 0
    out = capsys.readouterr().out
    assert rows(out)[1][1:4] == ["incomplete", "38", "2"]
    assert "The last recount was incomplete: 2 failed updates\n" in out


@pytest.mark.parametrize("changed", [0, 9])
def test_a_failed_recount_may_have_written_some_users(
    shop: Database[Any], command: Command, capsys: Capture, changed: int
) -> None:
    assert command("--once") == 0
    failed = {"outcome": "failed", "changed": changed, "error": "no \x1b[31mprimary\nx"}
    shop.loyalty_recounts.update_one({}, {"$set": failed})
    capsys.readouterr()
    assert command("--status") == 1
    out = capsys.readouterr().out
    assert rows(out)[1][1:3] == ["failed", str(changed)]
    assert "\nThe last recount failed: no \\x1b[31mprimary\\nx\n" in out
    assert out.endswith("No recount has succeeded yet\n")


def test_the_age_is_0_where_this_clock_is_behind_the_servers(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    assert command("--once") == 0
    make_older(shop, timedelta(days=-3))
    capsys.readouterr()
    assert command("--status") == 0
    assert "The points are 0s old: fresh" in capsys.readouterr().out
    assert command("--status", "--json") == 0
    assert json.loads(capsys.readouterr().out)["age_seconds"] == 0


def test_without_the_servers_time_the_age_is_measured_by_this_clock(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    assert command("--once") == 0
    capsys.readouterr()
    # No fail point changes the reply to `hello`.
    send = Database.command

    def hide_time(database: Database[Any], asked: Any, *args: Any, **options: Any) -> Any:
        reply = send(database, asked, *args, **options)
        return {n: v for n, v in reply.items() if n != "localTime"} if asked == "hello" else reply

    with mock.patch.object(Database, "command", hide_time):
        assert command("--status") == 0
    assert "s old: fresh, not older than 4h" in capsys.readouterr().out


def test_live_updates_are_running_while_their_heartbeat_is_recent(
    shop: Database[Any], uri: str, command: Command, capsys: Capture
) -> None:
    assert command("--once") == 0
    capsys.readouterr()
    assert command("--status") == 0
    assert "Live updates" not in capsys.readouterr().out
    assert command("--status", LIVE_UPDATES="yes") == 0
    assert "Live updates: NOT running, there is no heartbeat" in capsys.readouterr().out
    now = datetime.now(UTC)
    beat = Heartbeat(
        live_since=now, as_of=now, last_event=None, last_update=now, users_updated=1, waiting=2
    )
    History(shop.loyalty_recounts, settings_for(uri)).write_heartbeat(beat)
    assert command("--status") == 0
    out = capsys.readouterr().out
    details = "UTC, 1 user updated, 2 pending changes; the last heartbeat was .*s ago\n"
    assert re.search(f"Live updates: running since .* {details}", out)
    shop.loyalty_recounts.update_one(
        {"outcome": "live"}, {"$set": {"at": now - timedelta(minutes=5)}}
    )
    assert command("--status", LIVE_UPDATES="yes") == 0
    out = capsys.readouterr().out
    assert re.search("Live updates: NOT running, the last heartbeat was (5m|30.s) ago", out)


def test_the_table_of_records_fits_in_100_columns(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    assert command("--once") == 0
    large = {"outcome": "incomplete", "changed": 1_000_000, "counted_orders": 10_000_000}
    large |= {"failed_updates": 9_999, "host": "shop-1"}
    shop.loyalty_recounts.update_one({}, {"$set": large})
    capsys.readouterr()
    assert command("--status") == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len(table) == 3
    assert max(map(len, table)) <= 100


def test_two_shops_in_one_database_are_told_apart(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    """One shop is always refused; the other's recounts must not make its points look fresh."""
    shop.users_b.insert_many([{"_id": n, "loyalty_points": 1} for n in range(20)])
    shop.orders_b.insert_one({"customer_id": 1, "status": "Shipped"})
    other = {"USERS_COLLECTION": "users_b", "ORDERS_COLLECTION": "orders_b"}
    assert command("--once", **other) == 65
    assert command("--once") == 0
    capsys.readouterr()
    assert command("--status", **other) == 1
    out = capsys.readouterr().out
    assert [row[1] for row in rows(out)[1:]] == ["refused"]
    assert out.endswith("No recount has succeeded yet\n")
    assert command("--status") == 0
    out = capsys.readouterr().out
    assert [row[1] for row in rows(out)[1:]] == ["succeeded"]
    assert "refused" not in out


@pytest.mark.parametrize(("seconds", "code"), [(20, 0), (40, 1)])
def test_while_live_updates_run_points_are_fresh_for_thirty_seconds(
    shop: Database[Any], command: Command, capsys: Capture, uri: str, seconds: int, code: int
) -> None:
    assert command("--once") == 0
    make_older(shop, timedelta(hours=1))
    now = datetime.now(UTC)
    beat = Heartbeat(
        live_since=now,
        as_of=now - timedelta(seconds=seconds),
        last_event=None,
        last_update=None,
        users_updated=0,
        waiting=0,
    )
    History(shop.loyalty_recounts, settings_for(uri)).write_heartbeat(beat)
    capsys.readouterr()
    assert command("--status", LIVE_UPDATES="yes") == code
    out = capsys.readouterr().out
    assert re.search(r"^The points are [234]\ds old: ", out, re.MULTILINE)
    verdict = "STALE, older than" if code else "fresh, not older than"
    assert f"old: {verdict} 30s (the limit with live updates)" in out
    assert ("acknowledges no write by a majority" in out) is bool(code)
    # Also if only the daemon has the setting.
    assert command("--status") == code
    # Without a heartbeat, the limit is two intervals.
    shop.loyalty_recounts.update_one(
        {"outcome": "live"}, {"$set": {"at": now - timedelta(minutes=5)}}
    )
    assert command("--status") == 0
    # Points of a newer recount are fresh, also with an old heartbeat.
    assert command("--once") == 0
    assert command("--status", LIVE_UPDATES="yes") == 0


@pytest.mark.parametrize(("minutes", "code"), [(0, 0), (1, 0), (3, 1)])
def test_a_recount_without_a_record_is_reported_and_makes_points_stale_after_two_minutes(
    shop: Database[Any], command: Command, capsys: Capture, minutes: int, code: int
) -> None:
    """It is writing at first; later it was interrupted, and the points are a mixture."""
    assert command("--once") == 0
    make_older(shop, timedelta(hours=2))
    shop.loyalty_changes.drop()
    shop.users.update_many({}, {"$set": {"loyalty_points": 77}})
    assert command("--once", "--force") == 0
    last = shop.loyalty_recounts.find_one_and_delete({}, sort=[("_id", -1)])
    assert last is not None
    (changes,) = shop.loyalty_changes.find({"recount": last["_id"]})
    shop.loyalty_changes.delete_one({"_id": changes["_id"]})
    logged_at = datetime.now(UTC) - timedelta(minutes=minutes)
    at = logged_at - timedelta(hours=1)  # the count took an hour
    new_id = ObjectId.from_datetime(logged_at)
    shop.loyalty_changes.insert_one({**changes, "_id": new_id, "at": at})
    capsys.readouterr()
    assert command("--status") == code
    out = capsys.readouterr().out
    assert f"Recount {last['_id']} of " in out
    assert ("STALE" in out, "fresh" in out) == (bool(code), not code)
    assert command("--status", "--json") == code
    document = json.loads(capsys.readouterr().out)
    assert (document["fresh"], document["interrupted_recount"]) == (not code, str(last["_id"]))


def test_a_recount_without_a_record_is_not_reported_after_a_later_success_without_changes(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    assert command("--once") == 0
    shop.loyalty_recounts.delete_many({})
    make_change_log_older(shop, timedelta(minutes=11))
    capsys.readouterr()
    assert command("--status") == 1
    assert "has no record" in capsys.readouterr().out
    assert command("--once") == 0
    assert len(shop.loyalty_changes.distinct("recount")) == 1
    capsys.readouterr()
    assert command("--status") == 0
    assert "has no record" not in capsys.readouterr().out


def test_a_first_recount_may_end_while_the_status_is_read(
    shop: Database[Any], command: Command, capsys: Capture
) -> None:
    assert command("--once") == 0
    record = shop.loyalty_recounts.find_one_and_delete({})
    shop.loyalty_changes.drop()
    capsys.readouterr()
    RECORDS.on_read = lambda: shop.loyalty_recounts.insert_one(record)
    assert command("--status") == 1
    assert capsys.readouterr().out == "No recount has succeeded yet\n"
    assert RECORDS.on_read is None
    assert command("--status") == 0
