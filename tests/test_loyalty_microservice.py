"""The command line end to end: the real process, exit codes, stdout and stderr."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from conftest import ROOT, Command
from pymongo.database import Database

from loyalty.recount import index
from loyalty.recount.counter import Count
from loyalty.recount.tally import Tally
from loyalty_microservice import main
from sandbox.mongod import Deployment, wait_until
from sandbox.service import Process, environment
from sandbox.shop import count, disagreements

ADA = ObjectId("66abcdefabcdefabcdefabcd")
Start = Callable[..., Process]


@pytest.fixture
def shop(database: Database[Any]) -> Database[Any]:
    """Ada has 3 shipped orders, Bob none; one order without customer, one of a stranger."""
    database.users.insert_many([{"_id": ADA, "name": "Ada"}, {"_id": "bob", "loyalty_points": 9}])
    customers = [str(ADA), str(ADA).upper(), ADA, None, "stranger"]
    database.orders.insert_many([{"customer_id": c, "status": "Shipped"} for c in customers])
    database.orders.insert_one({"customer_id": str(ADA), "status": "Pending"})
    return database


def test_the_daemon_connects_recounts_at_once_and_again_until_it_is_stopped(
    shop: Database[Any], uri: str, service: Start
) -> None:
    daemon = service(MONGODB_URI=uri, RECOUNT_INTERVAL="2s")
    daemon.wait_for("outcome=succeeded")
    assert disagreements(shop) == []
    connected, taken, first = daemon.lines[:3]
    host = uri.split("//")[1].split("/")[0]
    assert f"INFO connected host={host} database={shop.name} " in connected
    assert taken.endswith(
        "WARNING points_taken from 1 of the 1 user with points, as this is the first recount"
    )
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO recount outcome=succeeded ", first)
    assert " changed=2 increased=1 decreased=1 unknown_customers=1 " in first
    assert " orders_without_customer=1 " in first
    assert "exact=true" in first
    assert "stranger" not in daemon.output  # it may be an e-mail address

    shop.orders.update_many({"status": "Pending"}, {"$set": {"status": "Shipped"}})
    assert disagreements(shop)
    wait_until("the next recount", lambda: not disagreements(shop))
    daemon.wait_for("changed=1 increased=1")
    assert daemon.stop() == 0
    assert daemon.lines[-1].endswith("INFO stopped signal=SIGTERM")
    assert "Traceback" not in daemon.output
    wait = shop.loyalty_recounts.find({}, {"started_at": 1}).sort("started_at").limit(2)
    one, two = (record["started_at"] for record in wait)
    assert 1.9 <= (two - one).total_seconds() <= 30


def test_ctrl_c_stops_it_too_and_a_second_signal_changes_nothing(uri: str, service: Start) -> None:
    daemon = service(MONGODB_URI=uri)
    daemon.wait_for("outcome=succeeded")
    daemon.send(signal.SIGINT)
    assert daemon.stop(signal.SIGINT) == 0


def test_without_settings_it_says_what_to_do_and_ends_with_78(
    service: Start, tmp_path: Path
) -> None:
    nothing = service()
    assert nothing.wait() == 78
    assert "ERROR MONGODB_URI: required, for example mongodb://localhost:27017" in nothing.output
    assert "make demo" in nothing.output
    assert "Traceback" not in nothing.output


def test_the_environment_goes_before_the_env_file(
    shop: Database[Any], uri: str, service: Start, tmp_path: Path
) -> None:
    file = tmp_path / "settings"
    file.touch(mode=0o600)
    file.write_text(f"MONGODB_URI={uri}\nORDER_STATUSES=Pending\nPOINTS_PER_ORDER=2\n")
    assert service("--once", "--env-file", str(file), ORDER_STATUSES="Shipped").wait() == 0
    assert disagreements(shop, ("Shipped",), 2) == []
    # a URI, or the file of one, in the environment replaces either in the file
    uri_file = tmp_path / "uri"
    uri_file.write_text(uri)
    file.write_text("MONGODB_URI=mongodb://127.0.0.1:1\n")
    once = service("--once", "--env-file", str(file), MONGODB_URI_FILE=str(uri_file))
    assert once.wait() == 0
    assert disagreements(shop) == []


def test_env_beside_the_program_is_read_wherever_it_is_started_from(
    shop: Database[Any], uri: str, service: Start, tmp_path: Path
) -> None:
    for module in ROOT.glob("*.py"):
        (tmp_path / module.name).write_text(module.read_text())
    shutil.copytree(ROOT / "loyalty", tmp_path / "loyalty")
    (tmp_path / ".env").write_text(f"MONGODB_URI={uri}\n")
    (tmp_path / ".env").chmod(0o644)
    once = service("--once", program=tmp_path / "loyalty_microservice.py")
    assert once.wait() == 0
    assert disagreements(shop) == []
    assert f"WARNING others can read {tmp_path / '.env'}" in once.output


def test_once_prints_a_summary_on_stdout(
    shop: Database[Any], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--once") == 0
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Recount succeeded in \d+\.\d s", out[0])
    assert out[1:6] == [
        "  users                    2",
        "  counted orders           5",
        "  changed                  2 (1 up, 1 down)",
        "  unknown customers        1 with 1 order",
        "  orders without customer  1",
    ]
    assert re.fullmatch(
        r"  as of +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC \(one point in time: .*\)", out[6]
    )


def test_a_dry_run_shows_the_largest_changes_and_writes_nothing(
    shop: Database[Any], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    before = list(shop.users.find())
    assert command("--dry-run") == 1
    out = capsys.readouterr().out
    assert "1 with 1 order, such as 'stranger'\n" in out
    assert "  'bob'                     9     0\n" in out
    assert "  66abcdefabcdefabcdefabcd  none  3\n" in out
    assert out.index("bob") < out.index("66abc")
    assert list(shop.users.find()) == before
    assert set(shop.list_collection_names()) == {"orders", "users"}
    assert command("--once") == 0
    assert command("--dry-run") == 0
    assert "Largest" not in capsys.readouterr().out


def test_one_customer_is_shown_and_written_and_nobody_else(
    shop: Database[Any], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--dry-run", "--customer", str(ADA)) == 1
    assert shop.users.find_one({"_id": ADA}) == {"_id": ADA, "name": "Ada"}
    assert command("--once", "--customer", str(ADA).upper(), "--customer", "nobody") == 1
    out = capsys.readouterr().out
    assert f"{str(ADA).upper()}\n  customer_id " in out
    assert "  66abcdefabcdefabcdefabcd  none  3\n" in out
    assert "nobody\n  no orders\n  no user has this id" in out
    assert {u["_id"]: u["loyalty_points"] for u in shop.users.find()} == {ADA: 3, "bob": 9}
    assert command("--once", "--customer", str(ADA)) == 0
    assert "  66abcdefabcdefabcdefabcd  3     3\n" in capsys.readouterr().out
    assert command("--dry-run", "--customer", str(ADA)) == 0
    assert "loyalty_recounts" not in shop.list_collection_names()


def test_status_shows_the_records_and_whether_the_points_are_stale(
    shop: Database[Any], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--status") == 1
    assert "No recount has succeeded yet" in capsys.readouterr().out
    assert command("--once") == 0
    assert command("--status") == 0
    out = capsys.readouterr().out
    assert re.search(r"succeeded  2 +5 +\S+ \S+  yes", out)
    assert "fresh, at most twice the interval of 2h" in out
    old = {"$set": {"as_of": ObjectId("5" * 24).generation_time}}
    shop.loyalty_recounts.update_many({}, old)
    assert command("--status") == 1
    assert "STALE" in capsys.readouterr().out
    assert command("--status", RECOUNTS_COLLECTION="") == 78
    assert "no record is kept" in capsys.readouterr().err


def test_check_config_shows_the_settings_and_writes_nothing(
    shop: Database[Any], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--check-config") == 0
    out = capsys.readouterr().out
    assert re.search(r"ORDER_STATUSES +Shipped\n", out)
    assert re.search(r"permissions +fine\n", out)
    assert shop.loyalty_recounts.count_documents({}) == 0
    assert shop.users.find_one({"_id": ADA}) == {"_id": ADA, "name": "Ada"}


def test_create_index_makes_the_index_that_the_warning_asks_for(
    shop: Database[Any],
    command: Command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert command("--once") == 0
    assert "no_index" not in capsys.readouterr().err  # a small collection needs none
    monkeypatch.setattr(index, "_LARGE", 3)
    assert command("--once") == 0
    assert "WARNING no_index" in (said := capsys.readouterr().err)
    assert "--create-index" in said
    assert command("--create-index") == 0
    assert "status_1_customer_id_1" in capsys.readouterr().out
    assert command("--create-index") == 0
    capsys.readouterr()
    assert command("--once") == 0
    assert "no_index" not in capsys.readouterr().err


def test_ids_that_look_like_expressions_are_ids(
    database: Database[Any], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    database.users.insert_many([{"_id": i} for i in ("$name", "$$ROOT", "$$foo")])
    orders = [{"customer_id": u["_id"], "status": "Shipped"} for u in database.users.find()]
    database.orders.insert_many(orders)
    for text in ("$name", "$$ROOT", "$$foo"):
        assert command("--once", "--customer", text) == 0
        assert f"  '{text}'" in capsys.readouterr().out
    assert disagreements(database) == []


def test_a_shop_without_users_is_a_warning(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--once") == 0
    assert "WARNING no_users found" in capsys.readouterr().err


def test_a_view_is_a_wrong_setting_where_a_collection_is_needed(
    shop: Database[Any], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.create_collection("seen", viewOn="users", pipeline=[])
    assert command("--once", USERS_COLLECTION="seen") == 78
    assert "is a view" in capsys.readouterr().err


@pytest.mark.parametrize("ends", ["stdout", "stderr"])
def test_whoever_reads_its_output_may_leave(
    shop: Database[Any], uri: str, tmp_path: Path, ends: str
) -> None:
    close = {"stdout": ">&-", "stderr": "2>&-"}[ends]
    program = f"{sys.executable} {ROOT / 'loyalty_microservice.py'} --env-file /dev/null --once"
    env = environment(MONGODB_URI=uri)
    ran = subprocess.run(
        ["sh", "-c", f"{program} {close}"], env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0
    assert "Traceback" not in ran.stderr
    assert disagreements(shop) == []
    gone = subprocess.run(
        ["sh", "-c", f"({program}; echo exit $? >&2) | true"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "exit 0" in gone.stderr
    assert "Traceback" not in gone.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--customer", "\udcff"],
        ["--customer", "1"],
        ["--status", "--customer", "1"],
        ["--force"],
        ["--once", "--status"],
        ["--nonsense"],
        ["extra"],
        ["--dry-run", "--force"],
        ["--once", "--force", "--customer", "7"],
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_a_bug_is_logged_with_its_traceback_and_ends_with_70(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shop: Database[Any],
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("mongodb://u:secret@h")

    monkeypatch.setattr(Tally, "refusal", broken)
    assert command("--once") == 70
    assert "Traceback" in capsys.readouterr().err
    (record,) = shop.loyalty_recounts.find()
    assert (record["outcome"], record["error"]) == ("failed", "ZeroDivisionError")
    assert record["changed"] is None  # not known: a bug ended it


def test_ctrl_c_during_once_ends_without_a_traceback(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Count, "count_all", interrupted)
    assert command("--once") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.xdist_group("auth")
def test_not_being_allowed_to_record_is_one_warning_and_no_failure(
    authenticating: Deployment, service: Start
) -> None:
    with authenticating.client() as client:
        client.oms_db.users.insert_one({"_id": 1})
        client.oms_db.orders.insert_one({"customer_id": 1, "status": "Shipped"})
        client.oms_db.create_collection("loyalty_recounts")
        privileges = [
            {"resource": {"db": "oms_db", "collection": c}, "actions": a}
            for c, a in (("orders", ["find"]), ("users", ["find", "update"]))
        ]
        client.admin.command("createRole", "loyalty", privileges=privileges, roles=[])
        client.admin.command("createUser", "svc", pwd="s3cr/et", roles=["loyalty"])
        uri = authenticating.uri_for("svc", "s3cr/et")
        daemon = service(MONGODB_URI=uri, RECOUNT_INTERVAL="1s", LOG_LEVEL="DEBUG")
        daemon.wait_for("outcome=succeeded", times=3)
        assert daemon.stop() == 0
        assert count(client.oms_db) == {("number", 1): 1}
        assert disagreements(client.oms_db) == []
        assert sum("WARNING record_write_failed" in line for line in daemon.lines) == 1
        assert "no permission for insert on oms_db.loyalty_recounts" in daemon.output
        assert "s3cr" not in daemon.output
        check = service("--check-config", MONGODB_URI=uri)
        assert check.wait() == 1
        assert "no permission for find on oms_db.loyalty_recounts" in check.output
        client.drop_database("oms_db")
        client.admin.command("dropUser", "svc")
        client.admin.command("dropRole", "loyalty")


def test_under_the_journal_every_line_has_a_priority_and_no_time(tmp_path: Path) -> None:
    program = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
stderr = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{{stderr.st_dev}}:{{stderr.st_ino}}"
import logging
from loyalty.logs import log_to_stderr
log_to_stderr()
log = logging.getLogger("loyalty")
log.info("one"); log.warning("two\\nthree")
try: 1 / 0
except ZeroDivisionError: log.exception("four")
logging.getLogger("pymongo").info("never")
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    lines = ran.stderr.splitlines()
    assert lines[:4] == ["<6>one", "<4>two", "<4>three", "<3>four"]
    assert len(lines) > 6
    assert all(line.startswith("<3>") for line in lines[4:])
