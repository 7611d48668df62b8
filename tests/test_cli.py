"""The command line: arguments, exit codes, stdout and stderr, mostly of the real process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Command
from pymongo.database import Database
from small_shop import fill

from config import setting_specs
from loyalty.commands import once
from loyalty_microservice import main
from sandbox.mongod import DEADLINE_SECONDS, Deployment, wait_until
from sandbox.service import Process, service_environment
from sandbox.shop import count_points, find_mismatches

Start = Callable[..., Process]


@pytest.fixture
def shop(database: Database[Any]) -> Database[Any]:
    return fill(database)


def test_the_daemon_recounts_at_start_and_after_every_interval(
    shop: Database[Any], uri: str, service: Start
) -> None:
    daemon = service(MONGODB_URI=uri, RECOUNT_INTERVAL="2s")
    daemon.wait_for("outcome=succeeded")
    assert find_mismatches(shop) == []
    connected, nothing, taken, first = daemon.lines[:4]
    host = uri.split("//")[1].split("/")[0]
    assert f"INFO connected host={host} database={shop.name} " in connected
    assert ' WARNING safety_warning text="2 of the 5 counted orders earn nothing: ' in nothing
    assert taken.endswith(
        ' safety_warning text="1 of the 1 user with points loses points in the first recount"'
    )
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO recount outcome=succeeded ", first)
    assert " changed=2 increased=1 decreased=1 unknown_customers=1 " in first
    assert " orders_without_customer=1 " in first
    assert "exact=true" in first
    assert "stranger" not in daemon.output  # it may be an e-mail address

    shop.orders.update_many({"status": "Pending"}, {"$set": {"status": "Shipped"}})
    assert find_mismatches(shop)
    wait_until("the next recount", lambda: not find_mismatches(shop))
    daemon.wait_for("changed=1 increased=1")
    assert daemon.stop() == 0
    assert daemon.lines[-1].endswith("INFO stopped signal=SIGTERM")
    assert "Traceback" not in daemon.output
    wait = shop.loyalty_recounts.find({}, {"started_at": 1}).sort("started_at").limit(2)
    one, two = (record["started_at"] for record in wait)
    assert 1.9 <= (two - one).total_seconds() <= 30


def test_ctrl_c_stops_the_daemon_and_a_second_one_changes_nothing(
    shop: Database[Any], uri: str, service: Start
) -> None:
    daemon = service(MONGODB_URI=uri)
    daemon.wait_for("outcome=succeeded")
    daemon.send_signal(signal.SIGINT)
    assert daemon.stop(signal.SIGINT) == 0


def test_a_daemon_keeps_running_and_recounts_when_its_terminal_closes(
    shop: Database[Any], uri: str
) -> None:
    """A terminal that closes sends SIGHUP, which means reload."""
    terminal, its_side = os.openpty()
    program = str(ROOT / "loyalty_microservice.py")
    start = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
    daemon = subprocess.Popen(
        [
            *(sys.executable, "-c", f"{start}; os.execv(sys.executable, sys.argv[1:])"),
            *(sys.executable, program, "--env-file", os.devnull),
        ],
        env=service_environment(MONGODB_URI=uri),
        stdin=its_side,
        stdout=its_side,
        stderr=its_side,
        start_new_session=True,  # a session of its own, like the shell of a terminal
    )
    os.close(its_side)
    try:
        wait_until("the first recount", lambda: shop.loyalty_recounts.count_documents({}) == 1)
        os.close(terminal)
        shop.orders.update_many({"status": "Pending"}, {"$set": {"status": "Shipped"}})
        wait_until("a recount", lambda: shop.loyalty_recounts.count_documents({}) == 2)
        wait_until("the new points", lambda: not find_mismatches(shop))
        assert daemon.poll() is None
        daemon.terminate()
        assert daemon.wait(DEADLINE_SECONDS) == 0
    finally:
        daemon.kill()
        daemon.wait()


def test_without_settings_the_log_has_advice_and_the_code_is_78(
    service: Start, tmp_path: Path
) -> None:
    nothing = service()
    assert nothing.wait() == 78
    assert (
        'ERROR configuration_problem error="MONGODB_URI: required, for example mongodb:'
        in nothing.output
    )
    assert "make demo" in nothing.output
    assert "Traceback" not in nothing.output


def test_in_an_installation_the_advice_names_only_files_that_exist(
    service: Start, tmp_path: Path
) -> None:
    _copy_program(tmp_path)
    file = tmp_path / "shop.env"
    file.write_text("RECOUNT_INTERVAL=1h\n")
    program = tmp_path / "loyalty_microservice.py"
    nothing = service("--once", "--env-file", str(file), program=program)
    assert nothing.wait() == 78
    assert f"configuration_help env_file={file} " in nothing.output
    assert "--help explains them" in nothing.output
    assert ".env.example" not in nothing.output
    assert "make demo" not in nothing.output


def _copy_program(folder: Path) -> None:
    for module in ROOT.glob("*.py"):
        (folder / module.name).write_text(module.read_text())
    shutil.copytree(ROOT / "loyalty", folder / "loyalty")


def test_the_environment_overrides_the_env_file(
    shop: Database[Any], uri: str, service: Start, tmp_path: Path
) -> None:
    file = tmp_path / "settings"
    file.touch(mode=0o600)
    file.write_text(f"MONGODB_URI={uri}\nORDER_STATUSES=Pending\nPOINTS_PER_ORDER=2\n")
    assert service("--once", "--env-file", str(file), ORDER_STATUSES="Shipped").wait() == 0
    assert find_mismatches(shop, ("Shipped",), 2) == []
    # a URI, or the file of one, in the environment replaces either in the file
    uri_file = tmp_path / "uri"
    uri_file.write_text(uri)
    file.write_text("MONGODB_URI=mongodb://127.0.0.1:1\n")
    once = service("--once", "--env-file", str(file), MONGODB_URI_FILE=str(uri_file))
    assert once.wait() == 0
    assert find_mismatches(shop) == []


def test_the_env_file_beside_the_program_is_read_from_any_working_directory(
    shop: Database[Any], uri: str, service: Start, tmp_path: Path
) -> None:
    _copy_program(tmp_path)
    (tmp_path / ".env").write_text(f"MONGODB_URI={uri}\n")
    (tmp_path / ".env").chmod(0o644)
    once = service("--once", program=tmp_path / "loyalty_microservice.py")
    assert once.wait() == 0
    assert find_mismatches(shop) == []
    text = f'WARNING env_file_permissions error="other users can read {tmp_path / ".env"}'
    assert text in once.output


def run_in_shell(command: str, uri: str, **values: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command in which `$LOYALTY` is the service."""
    program = f"{sys.executable} {ROOT / 'loyalty_microservice.py'} --env-file /dev/null"
    env = service_environment(MONGODB_URI=uri, LOYALTY=program, PYTHONUNBUFFERED="", **values)
    return subprocess.run(
        ["sh", "-c", command], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stdout_or_stderr_does_not_fail_a_recount(
    shop: Database[Any], uri: str, closed: str
) -> None:
    ran = run_in_shell(f"$LOYALTY --once {closed}", uri)
    assert ran.returncode == 0
    assert "Traceback" not in ran.stderr
    assert find_mismatches(shop) == []


@pytest.mark.parametrize(
    ("arguments", "reader", "code"),
    [("--once", "true", 0), ("--status --json", "true", 1), ("--check-config", "head -1", 1)],
)
def test_a_closed_pipe_does_not_change_the_exit_code(
    shop: Database[Any], uri: str, arguments: str, reader: str, code: int
) -> None:
    shop.users.insert_many([{"_id": n} for n in range(5)])
    shop.loyalty_recounts.insert_many(
        # More text than fits into a pipe and the buffers.
        [{**RECORD, "error": "x" * 50_000} for _ in range(10)]
    )
    values = {"MAX_DECREASE_PERCENT": "100", "MONGODB_DATABASE": shop.name}
    if "check" in arguments:
        values["METRICS_FILE"] = "/nowhere/x.prom"
    ran = run_in_shell(f"($LOYALTY {arguments}; echo exit $? >&2) | {reader}", uri, **values)
    assert f"exit {code}\n" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert "ERROR" not in ran.stderr


RECORD = {
    **{name: datetime(2020, 1, 1, tzinfo=UTC) for name in ("finished_at", "as_of")},
    **dict.fromkeys(("changed", "failed_updates", "counted_orders"), 0),
    "recorded_by": "loyalty-microservice",
    "outcome": "failed",
    "host": "h",
    "exact": True,
}


@pytest.mark.parametrize("arguments", ["--once", "--check-config"])
def test_a_full_disk_at_stdout_ends_with_1(shop: Database[Any], uri: str, arguments: str) -> None:
    ran = run_in_shell(f"$LOYALTY {arguments} > /dev/full", uri)
    assert ran.returncode == 1
    assert 'ERROR results_not_written error="stdout: No space left on device"' in ran.stderr
    assert "internal_error" not in ran.stderr
    assert (find_mismatches(shop) == []) is ("--once" in arguments)


@pytest.mark.parametrize("mode", ["--once", "--dry-run", "--check-config"])
def test_without_a_usable_temporary_directory_a_command_ends_with_69(
    shop: Database[Any],
    command: Command,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # More users to change than are kept in memory.
    shop.users.insert_many([{"_id": f"{n:0500}"} for n in range(8_000)])
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert command(mode) == 69
    output = capsys.readouterr().err
    assert "no temporary disk space" in output
    assert "Traceback" not in output
    assert shop.users.count_documents({"loyalty_points": 0}) == 0


def test_an_internal_error_is_logged_with_its_traceback_and_ends_with_70(
    shop: Database[Any],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(once, "run_recount", fail)
    assert command("--once") == 70
    said = capsys.readouterr().err
    assert " ERROR internal_error\nTraceback " in said


def test_ctrl_c_ends_a_command_with_130_without_a_traceback(
    shop: Database[Any],
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(once, "run_recount", interrupt)
    assert command("--once") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_help_says_what_each_option_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--customer=-..." in text
    assert "override the safety checks" in text
    for setting in setting_specs().values():
        assert setting.name in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["--customer", "\udcff"],
        ["--customer", "1"],
        ["--once", "--customer", "-abc"],
        ["--json"],
        ["--create-index", "--json"],
        ["--status", "--customer", "1"],
        ["--force"],
        ["--once", "--status"],
        ["--nonsense"],
        ["extra"],
        ["--dry-run", "--force"],
        ["--once", "--force", "--customer", "7"],
        ["--undo", "last", "--once"],
        ["--undo", "last", "--changes", "last"],
        ["--undo", "last", "--customer", "7"],
        ["--changes", "last", "--dry-run"],
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.xdist_group("auth")
def test_a_missing_privilege_to_record_causes_one_warning(
    authenticated_deployment: Deployment, service: Start
) -> None:
    with authenticated_deployment.client() as client:
        client.oms_db.users.insert_one({"_id": 1})
        client.oms_db.orders.insert_one({"customer_id": 1, "status": "Shipped"})
        client.oms_db.create_collection("loyalty_recounts")
        privileges = [
            {"resource": {"db": "oms_db", "collection": c}, "actions": a}
            for c, a in (
                ("orders", ["find"]),
                ("users", ["find", "update"]),
                ("loyalty_changes", ["find", "insert", "createIndex"]),
            )
        ]
        client.admin.command("createRole", "loyalty", privileges=privileges, roles=[])
        client.admin.command("createUser", "svc", pwd="s3cr/et", roles=["loyalty"])
        uri = authenticated_deployment.uri_for("svc", "s3cr/et")
        daemon = service(MONGODB_URI=uri, RECOUNT_INTERVAL="1s", LOG_LEVEL="DEBUG")
        daemon.wait_for("outcome=succeeded", times=3)
        assert daemon.stop() == 0
        assert count_points(client.oms_db) == {("number", 1): 1}
        assert find_mismatches(client.oms_db) == []
        assert sum("WARNING record_write_failed " in line for line in daemon.lines) == 1
        assert "no privilege for insert on oms_db.loyalty_recounts" in daemon.output
        assert "s3cr" not in daemon.output
        check = service("--check-config", MONGODB_URI=uri)
        assert check.wait() == 1
        assert "no privilege for find on oms_db.loyalty_recounts" in check.output
        client.drop_database("oms_db")
        client.admin.command("dropUser", "svc")
        client.admin.command("dropRole", "loyalty")
