"""What the tests share: real servers, the real process, and how much of it they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings
from pymongo import MongoClient
from pymongo.database import Database

from config import Settings, load
from loyalty_microservice import main
from sandbox import faults
from sandbox.mongod import Deployment
from sandbox.service import Process

ROOT = Path(__file__).parents[1]

# In memory where that is possible: most of the time goes into waiting for the disk.
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40)
settings.register_profile("usual", quick)
settings.register_profile("deep", quick, max_examples=200)


def examples(usual: int, deep: int) -> int:
    """How many examples of its own a Hypothesis test takes; for those that are slow."""
    return deep if settings().max_examples > quick.max_examples else usual


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "only the tests that have larger numbers, with these"
    parser.addoption("--deep", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("deep" if config.getoption("--deep") else "usual")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--deep"):
        items[:] = [item for item in items if _has_larger_numbers(item)]
    if config.option.markexpr != "machine":
        reason = "needs root, systemd's tools or a long install: make test-systemd"
        for item in items:
            if item.get_closest_marker("machine"):
                item.add_marker(pytest.mark.skip(reason=reason))


def _has_larger_numbers(item: pytest.Item) -> bool:
    test = getattr(item, "obj", None)
    return bool(item.get_closest_marker("size")) or is_hypothesis_test(test)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if left_out := terminalreporter.stats.get("skipped", []):
        reasons = {report.longrepr[2] for report in left_out}
        terminalreporter.section("not run", yellow=True)
        terminalreporter.line(f"{len(left_out)} tests: {'; '.join(sorted(reasons))}", yellow=True)


@pytest.fixture
def size(request: pytest.FixtureRequest) -> int:
    """How much of it a test does, as its mark says: `size(5, deep=20)`."""
    mark = request.node.get_closest_marker("size")
    return int(mark.kwargs["deep"] if request.config.getoption("--deep") else mark.args[0])


@pytest.fixture(scope="session")
def deployment() -> Iterator[Deployment]:
    """One server for all tests of a worker, which also has faults to offer."""
    with Deployment(options=faults.OPTIONS, parent=MEMORY) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def authenticated_deployment() -> Iterator[Deployment]:
    with Deployment(auth=True, parent=MEMORY) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def three_node_cluster() -> Iterator[Deployment]:
    """Three nodes, for the groups `lost` and `frozen`: each in one worker, for its time."""
    with Deployment(3, options=faults.OPTIONS, parent=MEMORY) as deployment:
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


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start the service: `service("--once", MONGODB_URI=…)`; killed at the end if it still runs."""
    started: list[Process] = []

    def start(*arguments: str, **options: Any) -> Process:
        log = tmp_path / f"service-{len(started)}.log"
        started.append(Process(*arguments, log=log, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
