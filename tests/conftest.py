"""What the tests share: a real replica set, and the real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from pymongo import MongoClient
from pymongo.database import Database

from config import Settings, load
from loyalty_microservice import main
from sandbox.mongod import SECONDS, Deployment, Failed, wait_until

ROOT = Path(__file__).parents[1]

settings.register_profile(
    "real_server", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("real_server")


@pytest.fixture(scope="session")
def deployment() -> Iterator[Deployment]:
    # In memory where that is possible: most of the time goes into waiting for the disk.
    memory = Path("/dev/shm")
    with Deployment(parent=memory if memory.is_dir() else None) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def client(deployment: Deployment) -> Iterator[MongoClient[Any]]:
    with deployment.client() as client:
        yield client


@pytest.fixture
def database(client: MongoClient[Any]) -> Iterator[Database[Any]]:
    """An empty database of its own."""
    database = client[f"shop_{uuid4().hex[:12]}"]
    yield database
    client.drop_database(database.name)


@pytest.fixture
def uri(deployment: Deployment, database: Database[Any]) -> str:
    return deployment.uri_for(database=database.name)


Command = Callable[..., int]


@pytest.fixture
def command(uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run the command line in this process, against the test's own database."""
    file = tmp_path / "env"

    def run(*arguments: str, **values: str) -> int:
        file.touch(mode=0o600)
        settings = {"MONGODB_URI": uri, **values}
        file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        return main(["--env-file", str(file), *arguments])

    return run


def settings_for(uri: str, **values: str) -> Settings:
    return load({"MONGODB_URI": uri, **values})


class Process:
    """The real service as a process, its output as it comes."""

    def __init__(self, *arguments: str, env: dict[str, str], program: Path | None = None) -> None:
        ours = {"MONGODB_", "ORDER", "USERS_", "RECOUNT", "POINTS_", "COUNT_", "MAX_", "BATCH_"}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(tuple(ours))}
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, str(program or ROOT / "loyalty_microservice.py"), *arguments],
            env={**kept, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, text: str, times: int = 1, seconds: float = SECONDS) -> None:
        """Return once `text` stands in that many lines."""

        def seen() -> bool:
            return sum(text in line for line in self.lines) >= times

        def ready() -> bool:
            return seen() or self._process.poll() is not None

        with suppress(Failed):
            wait_until(text, ready, seconds)
        if self._process.poll() is not None:
            self._reader.join(SECONDS)
        assert seen(), f"{text!r} is not in:\n{self.output}"

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = SECONDS) -> int:
        """Return the exit code."""
        code = self._process.wait(seconds)
        self._reader.join(SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def stop(self, number: signal.Signals = signal.SIGTERM, within: float = 2.0) -> int:
        """Signal it and return the exit code; fail if that takes longer than `within`."""
        self.send(number)
        started = time.monotonic()
        code = self.wait(SECONDS)
        took = time.monotonic() - started
        assert took <= within, f"it took {took:.1f} s to stop:\n{self.output}"
        return code

    def kill(self) -> None:
        self._process.kill()
        self.wait()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start the service: `service("--once", MONGODB_URI=…)`; killed at the end if it still runs."""
    empty = tmp_path / "empty.env"
    empty.touch(mode=0o600)
    started: list[Process] = []

    def start(*arguments: str, program: Path | None = None, **env: str) -> Process:
        if "--env-file" not in arguments and program is None:
            arguments = ("--env-file", str(empty), *arguments)
        started.append(Process(*arguments, env=env, program=program))
        return started[-1]

    yield start
    for process in started:
        process.kill()
