"""What other people's tools say about the files here; part of `make test-container`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import debian

DEPLOY = debian.TOP / "deploy"
BIN = Path(sys.executable).parent
# The oldest whose schema knows that a rule on exit codes alone is enough, and the newest.
KUBERNETES = ("1.29.0", "1.37.0")


def _says(*command: str) -> str:
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
def test_kubernetes_own_schema_allows_it(file: str, version: str) -> None:
    tool = str(BIN / "kubernetes-validate")
    assert "passed" in _says(tool, "--strict", "--kubernetes-version", version, file)


def test_compose_reads_its_file_and_locks_the_service_up_as_the_readme_does() -> None:
    understood = _says(str(BIN / "podman-compose"), "--file", "compose.yml", "config")
    for line in ("read_only: true", "- no-new-privileges", "- ALL", "restart: on-failure:10"):
        assert f" {line}\n" in understood


def test_the_alerts_go_off_when_they_should() -> None:
    tool = shutil.which("promtool")
    assert tool, "promtool is missing: apt-get install prometheus"
    assert "3 rules found" in _says(tool, "check", "rules", "alerts.yml")
    assert "SUCCESS" in _says(tool, "test", "rules", "alerts_test.yml")
