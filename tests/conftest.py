"""Fixtures: real MongoDB servers, databases, the command line and the service as a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from certificates import make_certificate
from hypothesis import HealthCheck, is_hypothesis_test, settings
from pymongo import MongoClient
from pymongo.database import Database

from config import Settings, load
from loyalty.cli import main
from loyalty.recount import index
from sandbox import faults
from sandbox.mongod import Deployment
from sandbox.service import Process

ROOT = Path(__file__).parents[1]

# Data files in memory where possible: with a disk, most of the time is spent waiting for it.
MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None

quick = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40)
settings.register_profile("usual", quick)
settings.register_profile("deep", quick, max_examples=200)


def examples(usual: int, deep: int) -> int:
    """Return the number of Hypothesis examples of a slow test: `usual`, or `deep` with --deep."""
    return deep if settings().max_examples > quick.max_examples else usual


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run only the tests that have a larger size or more examples, with those"
    parser.addoption("--deep", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("deep" if config.getoption("--deep") else "usual")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--deep"):
        items[:] = [item for item in items if _has_deep_size(item)]
    if config.option.markexpr != "machine":
        reason = "needs root, systemd's tools or a long install: make test-systemd"
        for item in items:
            if item.get_closest_marker("machine"):
                item.add_marker(pytest.mark.skip(reason=reason))


def _has_deep_size(item: pytest.Item) -> bool:
    test = getattr(item, "obj", None)
    return bool(item.get_closest_marker("size")) or is_hypothesis_test(test)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if skipped := terminalreporter.stats.get("skipped", []):
        reasons = {report.longrepr[2] for report in skipped}
        terminalreporter.section("skipped tests", yellow=True)
        terminalreporter.line(f"{len(skipped)} tests: {'; '.join(sorted(reasons))}", yellow=True)


@pytest.fixture
def size(request: pytest.FixtureRequest) -> int:
    """Return the size from the test's marker `size(5, deep=20)`: rounds, users or the like."""
    mark = request.node.get_closest_marker("size")
    return int(mark.kwargs["deep"] if request.config.getoption("--deep") else mark.args[0])


@pytest.fixture(scope="session")
def deployment() -> Iterator[Deployment]:
    """A replica set of one server, with fail points; shared by all tests of a worker."""
    with Deployment(options=faults.OPTIONS, parent=MEMORY) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def authenticated_deployment() -> Iterator[Deployment]:
    """A replica set of one server that requires a login."""
    with Deployment(auth=True, parent=MEMORY) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the files of the certificate of `tls_deployment` and of its key."""
    return make_certificate(tmp_path_factory.mktemp("tls"), "IP:127.0.0.1")


@pytest.fixture(scope="session")
def ca_file(certificate: tuple[str, str]) -> str:
    """Return the file for `tlsCAFile` in a URI of `tls_deployment`."""
    return certificate[0]


@pytest.fixture(scope="session")
def tls_deployment(certificate: tuple[str, str]) -> Iterator[Deployment]:
    """A replica set of one server that requires a login, and accepts TLS. For the group `tls`."""
    both = Path(certificate[0]).with_name("both.pem")
    both.write_text("".join(Path(file).read_text(encoding="ascii") for file in certificate))
    options = ["--tlsMode", "allowTLS", "--tlsCertificateKeyFile", str(both)]
    options += ["--tlsCAFile", certificate[0], "--tlsAllowConnectionsWithoutCertificates"]
    with Deployment(auth=True, options=options, parent=MEMORY) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def three_node_cluster() -> Iterator[Deployment]:
    """A replica set of three servers, with fail points.

    For the group `cluster` only, so that no other worker starts three servers.
    """
    with Deployment(3, options=faults.OPTIONS, parent=MEMORY) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def client(deployment: Deployment) -> Iterator[MongoClient[Any]]:
    with deployment.client() as client:
        yield client


@pytest.fixture(scope="session")
def pre_images(client: MongoClient[Any]) -> None:
    """Skip the test on a server that has no change stream pre-images."""
    if client.server_info()["versionArray"][0] < 6:
        pytest.skip("MongoDB 5.0 has no pre-images")


@pytest.fixture
def database(client: MongoClient[Any]) -> Iterator[Database[Any]]:
    """An empty database, dropped after the test."""
    database = client[f"shop_{uuid4().hex[:12]}"]
    yield database
    client.drop_database(database.name)


@pytest.fixture
def uri(deployment: Deployment, database: Database[Any]) -> str:
    return deployment.uri_for(database=database.name)


Command = Callable[..., int]


@pytest.fixture
def command(uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Return a function that runs the command line in this process on the test's database."""
    file = tmp_path / "env"

    def run(*arguments: str, **values: str) -> int:
        file.touch(mode=0o600)
        settings = {"MONGODB_URI": uri, **values}
        file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        return main(["--env-file", str(file), *arguments])

    return run


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """Return from how many documents on a collection is large; less than in the service."""
    monkeypatch.setattr(index, "LARGE_COLLECTION_DOCUMENTS", 1_000)
    return 1_000


def settings_for(uri: str, **values: str) -> Settings:
    return load({"MONGODB_URI": uri, **values})


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Return a function that starts the service: `service("--once", MONGODB_URI=...)`.

    Services that still run after the test are killed.
    """
    started: list[Process] = []

    def start(*arguments: str, **options: Any) -> Process:
        log = tmp_path / f"service-{len(started)}.log"
        started.append(Process(*arguments, log=log, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
