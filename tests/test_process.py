"""The process: signals during the imports, and a terminal without UTF-8."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from pymongo.database import Database

from sandbox.mongod import DEADLINE_SECONDS


@pytest.mark.parametrize(
    ("arguments", "number", "code"),
    [([], signal.SIGINT, 0), ([], signal.SIGTERM, 0), (["--once"], signal.SIGINT, 130)],
)
def test_a_signal_while_the_settings_are_read_ends_the_process(
    tmp_path: Path, arguments: list[str], number: signal.Signals, code: int
) -> None:
    env_file = tmp_path / "env"
    os.mkfifo(env_file)
    command = [sys.executable, str(ROOT / "loyalty_microservice.py"), *arguments]
    command += ["--env-file", str(env_file)]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
        env_file.open("w"),  # waits until the process reads it
    ):
        process.send_signal(number)
        _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert errors == ""
    assert process.returncode == code


@pytest.mark.parametrize(
    ("arguments", "number", "code"),
    [
        ([], signal.SIGINT, 0),
        ([], signal.SIGTERM, 0),
        (["--env-file", os.devnull], signal.SIGTERM, 0),
        (["--once"], signal.SIGINT, 130),
        (["--once"], signal.SIGTERM, 143),  # the work is not done
    ],
)
def test_a_signal_during_the_imports_ends_the_process_without_a_traceback(
    tmp_path: Path, arguments: list[str], number: signal.Signals, code: int
) -> None:
    # Short sleeps: a signal just before a sleep is answered only after it.
    slow = "import time\nprint('importing', flush=True)\nfor _ in range(600): time.sleep(0.1)\n"
    (tmp_path / "schedule.py").write_text(slow)  # found before the real one
    with subprocess.Popen(
        [sys.executable, str(ROOT / "loyalty_microservice.py"), *arguments],
        # Without coverage, which at this moment can wait for a lock of its own.
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("COV")},
            "PYTHONPATH": str(tmp_path),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        rest = process.communicate(timeout=DEADLINE_SECONDS)
    assert rest == ("", "")
    assert process.returncode == code


def test_a_terminal_without_utf_8_gets_escaped_characters(
    database: Database[Any], uri: str
) -> None:
    database.users.insert_one({"_id": "Zoë", "loyalty_points": 2})
    database.orders.insert_one({"customer_id": "Zoë", "status": "Shipped"})
    program = [sys.executable, str(ROOT / "loyalty_microservice.py"), "--env-file", os.devnull]
    ran = subprocess.run(
        [*program, "--dry-run"],
        env={**os.environ, "MONGODB_URI": uri, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert r"'Zo\xeb'" in ran.stdout
    assert "internal_error" not in ran.stderr
