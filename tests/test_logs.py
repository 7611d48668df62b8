"""The log: constant event names, one line for each event, priorities for the journal."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

LEVELS = {"debug", "info", "warning", "error", "exception"}


def run_program(statements: str, *, log_format: str = "text") -> list[str]:
    """Run statements that log, under the journal, and return the lines on stderr."""
    program = f"""
import logging, os
stderr = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{{stderr.st_dev}}:{{stderr.st_ino}}"
from loyalty.logs import log_to_stderr, set_log_format
log_to_stderr(); set_log_format({log_format!r})
log = logging.getLogger("loyalty")
{statements}
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return ran.stderr.splitlines()


STATEMENTS = r"""
log.info("one key=%s", 1); log.warning("two text=%s", "a\nERROR failed\x1b[2J")
try: 1 / 0
except ZeroDivisionError: log.exception("internal_error")
logging.getLogger("pymongo").info("never")
logging.getLogger("pymongo").error("theirs")
log.info("%s done=1", "counting", extra={"event": "counting"})
log.info("%s is no event", "value")
"""


def test_under_the_journal_every_line_has_a_priority_and_no_time() -> None:
    lines = run_program(STATEMENTS)
    assert lines[0] == "<6>one key=1"
    assert lines[1] == r"<4>two text=a\nERROR failed\x1b[2J"
    assert lines[2] == "<3>internal_error"
    traceback = lines[3:-3]
    assert traceback[0] == "<3>Traceback (most recent call last):"
    assert traceback[-1] == "<3>ZeroDivisionError: division by zero"
    assert all(line.startswith("<3>") for line in traceback)
    assert lines[-3:] == ["<3>theirs", "<6>counting done=1", "<6>value is no event"]


def test_as_json_every_event_is_one_object_after_its_priority() -> None:
    lines = run_program(STATEMENTS, log_format="json")
    assert [line[:3] for line in lines] == ["<6>", "<4>", "<3>", "<3>", "<6>", "<6>"]
    found = [json.loads(line[3:]) for line in lines]
    events = [line["event"] for line in found]
    # The last one is never a stored value, even if its text begins with one.
    assert events == ["one", "two", "internal_error", "pymongo", "counting", "%s"]
    assert found[1]["message"] == "two text=a\nERROR failed\x1b[2J"
    assert found[2]["traceback"].endswith("ZeroDivisionError: division by zero")


def log_calls(file: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(file.read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in LEVELS
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "log"
        ):
            yield node


@pytest.mark.parametrize(
    "file",
    [
        ROOT / "config.py",
        ROOT / "loyalty_microservice.py",
        *sorted((ROOT / "loyalty").rglob("*.py")),
    ],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_every_log_call_has_a_constant_event_name(file: Path) -> None:
    for call in log_calls(file):
        has_event = any(
            word.arg == "extra" and "event" in ast.unparse(word) for word in call.keywords
        )
        template = call.args[0]
        assert isinstance(template, ast.Constant), ast.unparse(call)
        name = str(template.value).partition(" ")[0]
        assert has_event or re.fullmatch("[a-z]+(_[a-z]+)*", name), ast.unparse(call)
