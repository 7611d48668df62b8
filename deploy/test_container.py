"""The image, built and run with podman: `sudo make test-container`. Not part of `make test`.

No registry is used: the base image is a small Debian with Python 3.11, with the name of the base
image in the Dockerfile. Podman stores everything in memory, in its own namespaces, so that nothing
remains after the run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pymongo.database import Database

from config import VERSION
from deploy import debian
from sandbox.mongod import Deployment, bind_to_parent, wait_until

# The first run downloads the small Debian, and the network can be slow.
pytestmark = pytest.mark.timeout(1200)

README = (debian.TOP / "deploy/README.md").read_text(encoding="utf-8")
BASE = r"""
FROM scratch
COPY . /
RUN python3 -m venv /usr/local && printf '[global]\nno-index=1\nfind-links=/wheels\n' >/etc/pip.conf
"""
# Works without systemd and with few privileges: root may not raise a limit on the test machine.
CONTAINERS_CONF = """
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
"""
HEALTH_CHECK = "{{json .Config.Healthcheck.Test}}"


class Podman:
    """Podman in the namespaces of the process `leader`."""

    def __init__(self, leader: int) -> None:
        self._leader = leader

    def inside(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the namespaces; the sources are its working directory."""
        enter = ["nsenter", f"--target={self._leader}", "--mount", "--pid", f"--wdns={debian.TOP}"]
        env = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "CONTAINERS_CONF=/run/containers.conf"]
        return subprocess.run(
            [*enter, "env", "-i", *env, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.inside("podman", *arguments)

    def run(self, *arguments: str) -> str:
        done = self.call(*arguments)
        if done.returncode:
            pytest.fail(f"podman {' '.join(arguments)}: exit {done.returncode}\n{done.stderr}")
        return done.stdout.strip()

    def state(self, field: str) -> str:
        return self.run("inspect", "--format", f"{{{{.{field}}}}}", "loyalty")


@pytest.fixture(scope="session")
def podman() -> Iterator[Podman]:
    if os.geteuid() != 0:
        pytest.exit("containers need root: sudo make test-container", 1)
    script = "mount -t tmpfs none /run && mount -t tmpfs none /var/lib && echo && sleep infinity"
    unshare = ["/usr/bin/unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
    with (
        debian.lock_cache({"podman": "podman", "runc": "runc"}),
        debian.remove_empty_groups("libpod_parent"),
        subprocess.Popen(
            bind_to_parent([*unshare, "sh", "-c", script]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C ends the test run, which then ends this process
        ) as process,
    ):
        try:
            assert process.stdout
            process.stdout.readline()
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            leader = int(children)
            Path(f"/proc/{leader}/root/run/containers.conf").write_text(CONTAINERS_CONF)
            yield Podman(leader)
        finally:
            process.kill()


@pytest.fixture(scope="session")
def commands(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Build the image with the documented command; return both commands, without `docker`."""
    (documented,) = re.findall(r"```sh\n(docker build .*?)```", README, re.DOTALL)
    lines = documented.replace("\\\n", "").splitlines()
    build, run = ([*shlex.split(line)[1:]] for line in lines)
    root = debian.prepare_root()
    base = tmp_path_factory.mktemp("base") / "Dockerfile"
    base.write_text(BASE, encoding="ascii")
    name = "docker.io/library/python:3.13-slim"
    # A network bridge would remain on this machine.
    options = ["--pull=never", "--network=host"]
    podman.run("build", *options, f"--file={base}", f"--tag={name}", str(root))
    # Docker's format is the only one with a HEALTHCHECK.
    options += ["--format=docker", f"--volume={debian.download_wheels(root)}:/wheels:ro"]
    with _bytecode_in_the_sources():
        podman.run(build[0], *options, *build[1:])
    return [build, run]


@contextmanager
def _bytecode_in_the_sources() -> Iterator[None]:
    """Put a file into loyalty/__pycache__, as a run of the service does."""
    folder = debian.TOP / "loyalty/__pycache__"
    created = not folder.exists()
    folder.mkdir(exist_ok=True)
    file = folder / "old.cpython-311.pyc"
    file.touch()
    try:
        yield
    finally:
        file.unlink()
        if created:
            folder.rmdir()


@pytest.fixture(scope="session")
def shop(commands: list[list[str]]) -> Iterator[Deployment]:
    with Deployment(auth=True) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def database(shop: Deployment) -> Iterator[Database[dict[str, Any]]]:
    with shop.client() as client:
        database = client["oms_db"]
        customers = database.users.insert_many([{} for _ in range(100)]).inserted_ids
        database.orders.insert_many(
            [{"customer_id": str(_id), "status": "Shipped"} for _id in customers for _ in range(3)]
        )
        yield database


@pytest.fixture
def loyalty(
    podman: Podman,
    commands: list[list[str]],
    shop: Deployment,
    database: Database[dict[str, Any]],
    tmp_path: Path,
) -> Iterator[Podman]:
    """A container that was started with the documented command and has recounted once."""
    settings = tmp_path / "loyalty.env"
    settings.write_text(f"MONGODB_URI={shop.uri}\n", encoding="ascii")
    database.users.update_many({}, {"$unset": {"loyalty_points": ""}})
    database.loyalty_recounts.delete_many({})
    with _container(podman, commands[1], settings):
        wait_until("a record", database.loyalty_recounts.find_one)
        yield podman


@contextmanager
def _container(podman: Podman, documented: list[str], settings: Path) -> Iterator[None]:
    run, *words = (str(settings) if word == "loyalty.env" else word for word in documented)
    try:
        # Docker makes no other folders writable than the command names.
        podman.run(run, "--network=host", "--read-only-tmpfs=false", *words)
        yield
    finally:
        podman.run("rm", "--force", "--time=0", "loyalty")


def test_the_container_recounts_as_an_unprivileged_user_on_a_read_only_file_system(
    loyalty: Podman, database: Database[dict[str, Any]]
) -> None:
    assert database.users.count_documents({"loyalty_points": 3}) == 100
    inside = loyalty.run("exec", "loyalty", "cat", "/proc/1/status")
    status = dict(line.split(":\t", 1) for line in inside.splitlines())
    assert status["Uid"].split() == status["Gid"].split() == ["65534"] * 4
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    for path in ("/x", "/app/x", "/var/tmp/x"):
        touched = loyalty.call("exec", "loyalty", "touch", path)
        assert touched.returncode == 1
        assert "Read-only file system" in touched.stderr


def test_the_image_has_the_modules_of_the_product_and_no_other_files(loyalty: Podman) -> None:
    listed = loyalty.run("exec", "loyalty", "find", "/app", "-type", "f").splitlines()
    modules = {*debian.TOP.glob("*.py"), *debian.TOP.glob("loyalty/**/*.py")}
    expected = {f"/app/{path.relative_to(debian.TOP)}" for path in modules}
    assert set(listed) == expected | {"/app/requirements.lock"}


def test_the_health_check_fails_when_the_points_are_stale(
    loyalty: Podman, database: Database[dict[str, Any]]
) -> None:
    assert loyalty.call("healthcheck", "run", "loyalty").returncode == 0
    long_ago = datetime.now(UTC) - timedelta(hours=5)
    database.loyalty_recounts.update_many({}, {"$set": {"as_of": long_ago}})
    # podman reports every container as healthy during --start-period.
    kind, *command = json.loads(loyalty.run("inspect", "--format", HEALTH_CHECK, "loyalty"))
    assert kind == "CMD"
    assert loyalty.call("exec", "loyalty", *command).returncode == 1


def test_stop_takes_less_than_two_seconds_and_exits_with_0(loyalty: Podman) -> None:
    started = time.monotonic()
    loyalty.run("stop", "loyalty")
    assert time.monotonic() - started < 2
    assert loyalty.state("State.ExitCode") == "0"


def test_after_a_sigkill_the_container_is_restarted(loyalty: Podman, database: Any) -> None:
    loyalty.inside("kill", "-KILL", loyalty.state("State.Pid"))
    wait_until("a second record", lambda: database.loyalty_recounts.count_documents({}) == 2)
    assert loyalty.state("RestartCount") == "1"


def test_an_unavailable_database_causes_no_restart(
    podman: Podman, commands: list[list[str]], tmp_path: Path
) -> None:
    settings = tmp_path / "loyalty.env"
    unavailable = "mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=200"
    settings.write_text(f"MONGODB_URI={unavailable}\n", encoding="ascii")
    with _container(podman, commands[1], settings):
        wait_until("the failure", lambda: "retry_in=" in podman.call("logs", "loyalty").stderr)
        assert podman.state("State.Status") == "running"
        assert podman.state("RestartCount") == "0"


def test_with_wrong_settings_the_restarts_end(
    podman: Podman, commands: list[list[str]], tmp_path: Path
) -> None:
    settings = tmp_path / "loyalty.env"
    settings.touch()
    with _container(podman, commands[1], settings):
        wait_until("the last restart", lambda: podman.state("RestartCount") == "10")
        wait_until("its end", lambda: podman.state("State.Status") == "exited")
        assert podman.state("State.ExitCode") == "78"


def test_options_are_appended_and_the_uri_can_be_a_file(
    podman: Podman, shop: Deployment, database: Database[dict[str, Any]], tmp_path: Path
) -> None:
    once = ("run", "--rm", "--network=host")
    assert podman.run(*once, "loyalty-microservice", "--version") == VERSION
    secret = tmp_path / "mongodb_uri"
    secret.write_text(shop.uri, encoding="ascii")
    os.chown(secret, 65534, 65534)
    secret.chmod(0o400)
    database.users.update_many({}, {"$unset": {"loyalty_points": ""}})
    volume = f"--volume={secret}:/run/secrets/mongodb_uri:ro"
    file = "--env=MONGODB_URI_FILE=/run/secrets/mongodb_uri"
    podman.run(*once, volume, file, "loyalty-microservice", "--once")
    assert database.users.count_documents({"loyalty_points": 3}) == 100
