"""What the tests share: a real replica set, and the real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from pymongo import MongoClient
from pymongo.database import Database

from config import Settings, load
from sandbox.mongod import Deployment

ROOT = Path(__file__).parents[1]
SECONDS = 60.0  # a deadline for what takes about one second, on a machine that does other things

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


def settings_for(uri: str, **values: str) -> Settings:
    return load({"MONGODB_URI": uri, **values})


def wait_until(what: str, ready: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Return what `ready` returns once that is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := ready():
            return result
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {seconds:g} s")


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

        wait_until(f"{text!r} in:\n{self.output}", ready, seconds)
        if not seen():
            self._reader.join(SECONDS)
        assert seen(), f"it ended without {text!r}:\n{self.output}"

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
