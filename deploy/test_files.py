"""The files of this folder, checked by Kubernetes' schemas, podman-compose and promtool.

Part of `make test-container`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import debian

DEPLOY = debian.TOP / "deploy"
BIN = Path(sys.executable).parent
# The oldest whose schema allows a rule on exit codes alone, and the newest.
KUBERNETES = ("1.29.0", "1.37.0")


def _output(*command: str) -> str:
    """Run a command that must succeed, and return its output."""
    done = subprocess.run(
        command,
        cwd=DEPLOY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("file", ["cronjob.yaml", "deployment.yaml"])
def test_the_kubernetes_schema_allows_the_file(file: str, version: str) -> None:
    tool = str(BIN / "kubernetes-validate")
    assert "passed" in _output(tool, "--strict", "--kubernetes-version", version, file)


def test_compose_has_the_restrictions_of_the_documented_command() -> None:
    parsed = _output(str(BIN / "podman-compose"), "--file", "compose.yml", "config")
    for line in ("read_only: true", "- no-new-privileges", "- ALL", "restart: on-failure:10"):
        assert f" {line}\n" in parsed


@pytest.fixture
def promtool() -> str:
    tool = shutil.which("promtool")
    assert tool, "promtool is missing: apt-get install prometheus"
    return tool


def test_the_alert_rules_pass_their_tests(promtool: str) -> None:
    assert "5 rules found" in _output(promtool, "check", "rules", "alerts.yml")
    assert "SUCCESS" in _output(promtool, "test", "rules", "alerts_test.yml")


def test_the_documented_alerts_are_those_of_the_rules() -> None:
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    rules = (DEPLOY / "alerts.yml").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(Loyalty\w+)` \|", readme, re.MULTILINE)
    assert documented == re.findall(r"- alert: (\w+)", rules)


def test_promtool_accepts_the_documented_additional_alerts(promtool: str, tmp_path: Path) -> None:
    page = (debian.TOP / "docs/operation.md").read_text(encoding="utf-8")
    (documented,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "additional.yml").write_text(documented, encoding="utf-8")
    assert "2 rules found" in _output(promtool, "check", "rules", str(tmp_path / "additional.yml"))


def test_prometheus_accepts_the_documented_configuration(promtool: str, tmp_path: Path) -> None:
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    (documented,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "prometheus.yml").write_text(documented, encoding="utf-8")
    shutil.copy(DEPLOY / "alerts.yml", tmp_path / "loyalty.yml")
    config = str(tmp_path / "prometheus.yml")
    assert "1 rule files found" in _output(promtool, "check", "config", config)
