"""The README's snippets run, and it says what --help and the settings say."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import pytest
from conftest import ROOT
from pymongo import MongoClient

from config import setting_specs
from loyalty_microservice import main
from sandbox.mongod import Deployment
from sandbox.service import Process, service_environment

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_every_python_snippet_runs_and_shows_the_points(
    deployment: Deployment, client: MongoClient[Any], service: Callable[..., Process]
) -> None:
    shop = client["oms_db"]  # the name in the snippet, and the default
    user = shop.users.insert_one({"name": "Ada"}).inserted_id
    shop.orders.insert_many([{"customer_id": str(user), "status": "Shipped"} for _ in range(7)])
    try:
        assert service("--once", MONGODB_URI=deployment.uri).wait() == 0
        assert SNIPPETS
        for snippet in SNIPPETS:
            ran = subprocess.run(
                [sys.executable, "-W", "error", "-c", snippet],
                env=service_environment(MONGODB_URI=deployment.uri),
                capture_output=True,
                text=True,
                check=False,
            )
            assert ran.stderr == ""
            assert re.fullmatch(
                rf"{user} has 7 points, counted as of [-0-9]+ [:0-9]+ UTC\n", ran.stdout
            )
    finally:
        client.drop_database("oms_db")


def test_help_and_the_readme_name_the_same_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    section = README.split("## Commands and exit codes")[1].split("\n## ")[0]
    flag = r"--[a-z][a-z-]+"
    assert set(re.findall(flag, said)) == set(re.findall(flag, section))
    codes = re.search(r"exit codes: (.*?) settings", " ".join(said.split()))
    assert codes
    assert re.findall(r"\d+", codes[1]) == re.findall(r"\*\*(\d+)\*\*", section)


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for setting in setting_specs().values():
        (line,) = re.findall(rf"^  {setting.name} .*", said, re.MULTILINE)
        assert setting.help in line
        assert not setting.default or line.endswith(f"(default: {setting.default})")


def test_the_readmes_table_has_the_settings_that_are_declared_and_their_defaults() -> None:
    section = README.split("## Settings")[1].split("\n## ")[0]
    table: dict[str, str] = {}
    for names, defaults in re.findall(r"^\| (`.*?`) \| (.*?) \|", section, re.MULTILINE):
        found = re.findall(r"`(\w+)`", names), re.findall(r"`(\w+)`", defaults)
        table |= dict(zip_longest(*found, fillvalue=""))
    wanted = {setting.name: setting.default for setting in setting_specs().values()}
    assert table == wanted | {"MONGODB_DATABASE": "oms_db"}
