"""Every option of the connection string, tried with every command and with live updates.

The table in docs/connections.md is made of the data in this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from conftest import ROOT, Command, settings_for
from live_harness import live_service
from pymongo import MongoClient, ReadPreference
from pymongo.common import URI_OPTIONS_ALIAS_MAP, URI_OPTIONS_VALIDATOR_MAP
from pymongo.database import Database
from small_shop import ADA, fill

from loyalty.errors import ConfigurationError
from loyalty.mongo.connection import OVERRIDDEN_OPTIONS, connect
from sandbox.mongod import Deployment

Capture = pytest.CaptureFixture[str]


class Result(StrEnum):
    """What an option changes, as the table shows it."""

    WORKS = "✓"
    OVERRIDDEN = "own"
    REJECTED = "78"


@dataclass(frozen=True)
class Option:
    """An option of the driver, the values that are tried, and the result of each."""

    name: str
    values: tuple[str, ...]
    result: Result = Result.WORKS
    needs: str = ""
    """Other options, without which the driver rejects this one."""
    has_tls: bool = False
    """Whether it is tried on a server with TLS and a login."""


class Outcome(NamedTuple):
    """The result of one command: the exit code, the masked lines of stdout, and stderr."""

    code: int
    lines: list[str]
    log: str


_WITHOUT_OPTIONS = pytest.StashKey[dict[str, Outcome]]()


def _overridden(name: str, *values: str, needs: str = "") -> Option:
    return Option(name, values, Result.OVERRIDDEN, needs)


def _tls(name: str, *values: str, needs: str = "") -> Option:
    return Option(name, values, needs=needs, has_tls=True)


TRUSTED = "tls=true&tlsCAFile={file}"
CONCERNS = ("local", "available", "majority", "linearizable", "snapshot")
PREFERENCES = ("primary", "primaryPreferred", "secondary", "secondaryPreferred", "nearest")
OPTIONS = [
    _overridden("readConcernLevel", *CONCERNS),
    _overridden("readPreference", *PREFERENCES),
    _overridden("readPreferenceTags", "region:north", needs="readPreference=nearest"),
    _overridden("maxStalenessSeconds", "90", needs="readPreference=secondary"),
    _overridden("w", "0", "1", "2", "majority", "region"),
    _overridden("wTimeoutMS", "1", needs="w=majority"),
    _overridden("journal", "false"),
    Option("fsync", ("true",)),
    _overridden("timeoutMS", "1"),
    _overridden("socketTimeoutMS", "1"),
    _overridden("maxPoolSize", "1"),
    _overridden("waitQueueTimeoutMS", "1", needs="maxPoolSize=1"),
    Option("retryWrites", ("false",)),
    Option("retryReads", ("false",)),
    Option("connectTimeoutMS", ("1000",)),
    Option("serverSelectionTimeoutMS", ("1",)),
    Option("minPoolSize", ("3",)),
    Option("maxConnecting", ("1",)),
    Option("maxIdleTimeMS", ("1",)),
    Option("waitQueueMultiple", ("1",)),
    Option("heartbeatFrequencyMS", ("600000",)),
    Option("serverMonitoringMode", ("poll",)),
    Option("localThresholdMS", ("0",)),
    Option("enableOverloadRetargeting", ("true",)),
    Option("maxAdaptiveRetries", ("0",)),
    Option("compressors", ("zlib",)),
    Option("zlibCompressionLevel", ("9",), needs="compressors=zlib"),
    Option("appName", ("shop",)),
    Option("connect", ("false",)),
    Option("replicaSet", ("rs0",)),
    Option("directConnection", ("true",)),
    Option("loadBalanced", ("true",), Result.REJECTED),
    Option("uuidRepresentation", ("standard",)),
    Option("unicode_decode_error_handler", ("ignore",)),
    Option("datetime_conversion", ("DATETIME_MS",)),
    Option("tz_aware", ("true",)),
    _tls("authSource", "admin"),
    _tls("authMechanism", "SCRAM-SHA-256"),
    _tls("tls", "true", needs="tlsCAFile={file}"),
    _tls("tlsCAFile", "{file}", needs="tls=true"),
    _tls("tlsInsecure", "true", needs="tls=true"),
    _tls("tlsAllowInvalidCertificates", "true", needs="tls=true"),
    _tls("tlsAllowInvalidHostnames", "true", needs=TRUSTED),
    _tls("tlsDisableOCSPEndpointCheck", "true", needs=TRUSTED),
]
NOT_TRIED = {
    "authMechanismProperties",  # of mechanisms that need a service of another vendor
    "driver",  # not in a URI
    "server_api",  # not in a URI
    "srvAllowedHostsSuffix",  # of mongodb+srv, which needs a DNS server
    "srvMaxHosts",
    "srvServiceName",
    "tlsCertificateKeyFile",  # of clients with a certificate
    "tlsCertificateKeyFilePassword",
    "tlsCRLFile",
}
COMMANDS = {
    "--create-index": ("--create-index",),
    "--check-config": ("--check-config",),
    "--dry-run": ("--dry-run",),
    "--customer": ("--dry-run", "--customer", str(ADA)),
    "--once": ("--once", "--force"),
    "--status": ("--status",),
    "--changes": ("--changes", "last"),
    "--undo": ("--undo", "last"),
    "--unknown-customers": ("--unknown-customers",),
}


def _format_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def format_table() -> str:
    """Return the table for docs/connections.md."""
    header = ["option", "values tried", "result"]
    rows = [_format_row(header), _format_row(["---"] * len(header)).replace(" ", "")]
    for option in OPTIONS:
        values = ", ".join(f"`{value}`" for value in option.values).replace("`{file}`", "a file")
        rows.append(_format_row([f"`{option.name}`", values, option.result]))
    return "\n".join(rows)


def test_the_table_in_the_documents_is_what_was_tried() -> None:
    page = (ROOT / "docs/connections.md").read_text(encoding="utf-8")
    assert format_table() in page, f"the table is:\n{format_table()}"


def test_every_option_that_the_driver_knows_is_tried() -> None:
    aliases = {alias for names in URI_OPTIONS_ALIAS_MAP.values() for alias in names}
    known = {name.lower() for name in URI_OPTIONS_VALIDATOR_MAP} - aliases
    tried = {option.name.lower() for option in OPTIONS}
    assert tried | {name.lower() for name in NOT_TRIED} == known


def test_every_overridden_option_is_tried() -> None:
    tried = {option.name for option in OPTIONS if option.result is Result.OVERRIDDEN}
    assert tried == set(OVERRIDDEN_OPTIONS)


def mask(text: str, database: Database[Any]) -> list[str]:
    """Return the sorted lines, without what differs between two runs."""
    text = text.replace(database.name, "DATABASE").replace(str(ADA), "ADA")
    text = re.sub(r"127\.0\.0\.1:\d+", "HOST", text)
    text = re.sub(r"\b[0-9a-f]{24}\b", "ID", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)
    text = re.sub(r"\b[\d.]+ ?s\b", "SECONDS", text)
    return sorted(" ".join(line.split()) for line in text.splitlines())


def run_commands(
    shop: Database[Any], uri: str, command: Command, capsys: Capture
) -> dict[str, Outcome]:
    """Run every command on a new shop; return the results and the log by command."""
    outcomes = {}
    for name, arguments in COMMANDS.items():
        code = command(*arguments, MONGODB_URI=uri)
        out, err = capsys.readouterr()
        outcomes[name] = Outcome(code, mask(out, shop), err)
    return outcomes


def run_daemon(deployment: Deployment, shop: Database[Any], uri: str) -> None:
    """Do a full recount and a live update, and check the points and how they are written."""
    with live_service(deployment, shop, MONGODB_URI=uri) as harness:
        assert harness.is_live
        shop.orders.insert_one({"customer_id": ADA, "status": "Shipped"})
        harness.update_until_exact()
    record = shop.loyalty_recounts.find_one({"outcome": "succeeded"}, sort=[("_id", -1)])
    assert record is not None
    assert record["exact"]


def check_connection(uri: str) -> None:
    with connect(settings_for(uri)) as connection:
        for collection in (connection.orders, connection.users, connection.recounts):
            assert collection is not None
            assert collection.read_preference == ReadPreference.PRIMARY
            assert collection.read_concern.level is None
            assert collection.write_concern.document == {"w": "majority", "wtimeout": 60_000}


@contextmanager
def make_shop(client: MongoClient[Any]) -> Iterator[Database[Any]]:
    shop = client[f"shop_{uuid4().hex[:12]}"]
    yield fill(shop)
    client.drop_database(shop.name)


@pytest.fixture
def without_options(
    client: MongoClient[Any], request: pytest.FixtureRequest, command: Command, capsys: Capture
) -> dict[str, Outcome]:
    """Return the results of the commands with a URI without options, which run once."""
    stash = request.config.stash
    if _WITHOUT_OPTIONS not in stash:
        with make_shop(client) as shop:
            uri = f"mongodb://{':'.join(map(str, client.primary or ()))}/{shop.name}"
            stash[_WITHOUT_OPTIONS] = run_commands(shop, uri, command, capsys)
        codes = [outcome.code for outcome in stash[_WITHOUT_OPTIONS].values()]
        assert codes == [0, 0, 1, 1, 0, 0, 0, 0, 0]
    return stash[_WITHOUT_OPTIONS]


@pytest.fixture(scope="session")
def tls_client(tls_deployment: Deployment) -> Iterator[MongoClient[Any]]:
    with tls_deployment.client() as client:
        yield client


def _params() -> Iterator[Any]:
    for option in OPTIONS:
        marks = [pytest.mark.xdist_group("tls")] if option.has_tls else []
        for value in option.values:
            yield pytest.param(option, value, id=f"{option.name}={value}", marks=marks)


@pytest.mark.parametrize(("option", "value"), list(_params()))
def test_an_option_of_the_uri_weakens_no_command(
    request: pytest.FixtureRequest,
    deployment: Deployment,
    client: MongoClient[Any],
    ca_file: str,
    option: Option,
    value: str,
    without_options: dict[str, Outcome],
    command: Command,
    capsys: Capture,
) -> None:
    """Each command prints what it prints without the option, or rejects the option by name."""
    login, options = "", [*filter(None, [option.needs]), f"{option.name}={value}"]
    if option.has_tls:
        deployment = request.getfixturevalue("tls_deployment")
        client = request.getfixturevalue("tls_client")
        login = f"{urlsplit(deployment.uri).netloc.rpartition('@')[0]}@"
        options += ["authSource=admin"] * (option.name != "authSource")
    query = "&".join(options).format(file=ca_file)
    with make_shop(client) as shop:
        uri = f"mongodb://{login}127.0.0.1:{deployment.servers[0].port}/{shop.name}?{query}"
        outcomes = run_commands(shop, uri, command, capsys)
        if option.result is Result.REJECTED:
            for outcome in outcomes.values():
                assert outcome.code == 78
                assert option.name in outcome.log
            with pytest.raises(ConfigurationError, match=option.name):
                run_daemon(deployment, shop, uri)
            return
        for name, outcome in outcomes.items():
            assert (outcome.code, outcome.lines) == (
                without_options[name].code,
                without_options[name].lines,
            )
            overridden = re.findall(r"uri_options_overridden options=(\S+)", outcome.log)
            is_named = option.name in ",".join(overridden).split(",")
            assert is_named is (option.result is Result.OVERRIDDEN)
        run_daemon(deployment, shop, uri)
    check_connection(uri)
