"""Each error of the driver becomes an error of the service, whose class says what helps."""

from __future__ import annotations

import logging
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from bson.errors import InvalidBSON
from certificates import make_certificate
from conftest import settings_for
from pymongo import MongoClient, UpdateOne
from pymongo.database import Database
from pymongo.errors import BulkWriteError, DocumentTooLarge, NetworkTimeout, OperationFailure

from loyalty.errors import (
    AuthenticationFailed,
    BulkUpdateErrors,
    ClientUnusable,
    ConfigurationError,
    DatabaseUnavailable,
    MissingPrivilege,
    QueryTimeout,
    ResyncRequired,
    ServiceError,
    SnapshotTooOld,
    UnsupportedServer,
)
from loyalty.mongo.connection import connect
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.error_codes import CODES
from loyalty.recount.snapshot import pin_cluster_time
from sandbox.mongod import Deployment, wait_until


def mapped(error: Exception) -> ServiceError:
    with pytest.raises(ServiceError) as raised, map_driver_errors("find", "shop.orders"):
        raise error
    return raised.value


def failure(code: int, text: str, **details: Any) -> OperationFailure:
    return OperationFailure(text, code, {"errmsg": text, "code": code, "of": "a secret", **details})


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        (13, "not authorized on shop to execute command { find: 'secret' }", MissingPrivilege),
        (18, "Authentication failed.", AuthenticationFailed),
        (8000, "bad auth : authentication failed", AuthenticationFailed),
        (8000, "user is not allowed to do action [find] on [shop.orders]", MissingPrivilege),
        (8000, "$currentOp is not allowed in this atlas tier", ConfigurationError),
        (50, "operation exceeded time limit", QueryTimeout),
        (239, "Snapshot too old", SnapshotTooOld),
        (246, "Unable to read from a snapshot", SnapshotTooOld),
        (250, "Cannot find chunk history", SnapshotTooOld),
        (272, "Database shop has undergone a catalog change operation", SnapshotTooOld),
        (204, "Proof does not match signature for cluster time", ClientUnusable),
        (205, "New cluster time is too far from this node's wall clock time", ClientUnusable),
        (211, "Cache Reader No keys found for HMAC", ClientUnusable),
        (286, "Resume of change stream was not possible", ResyncRequired),
        (40324, "Unrecognized pipeline stage name: '$unionWith'", UnsupportedServer),
        (304, "Aggregation stage not supported: '$unionWith'", UnsupportedServer),
        (303, "Feature not supported: explain", UnsupportedServer),
        (166, "Namespace shop.orders is a view, not a collection", ConfigurationError),
        (167, "Cannot override a view's default collation", ConfigurationError),
        (86, "An existing index has the same name as the requested index", ConfigurationError),
        (2, "bad hint", ConfigurationError),
        (9, "unknown operator", ConfigurationError),
        (72, "invalid option", ConfigurationError),
        (91, "The server is in quiesce mode and will shut down", DatabaseUnavailable),
        (26, "ns does not exist", DatabaseUnavailable),
        (14031, "available disk space is less than required", DatabaseUnavailable),
    ],
)
def test_the_code_of_a_server_error_decides_its_class(
    code: int, text: str, expected: type[ServiceError]
) -> None:
    error = mapped(failure(code, text))
    assert type(error) is expected
    assert "secret" not in str(error)
    assert "\n" not in str(error)


def test_an_unknown_code_is_transient_and_named_as_the_server_names_it() -> None:
    error = mapped(failure(12345, "new in MongoDB 12"))
    assert type(error) is DatabaseUnavailable
    assert "error code 12345 is unknown to this service" in str(error)
    error = mapped(failure(12345, "new in MongoDB 12", codeName="NewProblem"))
    assert type(error) is DatabaseUnavailable
    assert "(code 12345, NewProblem)" in str(error)


def test_a_changed_split_horizon_is_not_an_unsupported_feature() -> None:
    text = "The original request horizon parameter does not match"
    error = mapped(failure(303, text, codeName="SplitHorizonChange"))
    assert type(error) is DatabaseUnavailable


@pytest.mark.parametrize("error", [DocumentTooLarge("a secret"), InvalidBSON("a secret")])
def test_a_value_that_no_command_can_have_is_a_configuration_error(error: Exception) -> None:
    result = mapped(error)
    assert type(result) is ConfigurationError
    assert "too large for one command" in str(result)
    assert "secret" not in str(result)


def test_the_error_for_a_too_old_snapshot_names_the_server_parameter(
    deployment: Deployment, database: Database[Any]
) -> None:
    parameter = "minSnapshotHistoryWindowInSeconds"
    admin = database.client.admin
    before = admin.command({"getParameter": 1, parameter: 1})[parameter]
    admin.command({"setParameter": 1, parameter: 0})
    try:
        with connect(settings_for(deployment.uri_for(database=database.name))) as connection:
            database.users.insert_one({})
            at = pin_cluster_time(connection)
            read = {"level": "snapshot", "atClusterTime": at}

            def is_too_old() -> bool:
                database.users.insert_one({})
                with map_driver_errors("find", connection.users):
                    connection.users.database.command("find", "users", readConcern=read)
                return False

            with pytest.raises(SnapshotTooOld, match=parameter):
                wait_until("the snapshot to be too old", is_too_old)
    finally:
        admin.command({"setParameter": 1, parameter: before})


RENAMED = {"WriteConcernFailed": "WriteConcernTimeout"}  # in MongoDB 8.0
# These need a document that belongs to the error; 303 closes the connection.
WITH_DETAILS = {121, 150, 169, 249, 303, 346, 11000, 13388}


def test_the_names_of_the_codes_are_those_of_the_server(deployment: Deployment) -> None:
    codes = {code: name for names in CODES.values() for name, code in names.items()}
    assert len(codes) == sum(map(len, CODES.values()))
    with deployment.client(appName="names") as client:
        names = {code: name_on_server(client, code) for code in codes if code not in WITH_DETAILS}
    known = {code: name for code, name in names.items() if not name.startswith("Location")}
    assert len(known) > 80  # the others are newer than this server
    assert {code: RENAMED.get(name, name) for code, name in known.items()} == {
        code: codes[code] for code in known
    }


def name_on_server(client: MongoClient[Any], code: int) -> str:
    data = {"failCommands": ["ping"], "appName": "names", "errorCode": code}
    client.admin.command("configureFailPoint", "failCommand", mode={"times": 1}, data=data)
    # Unchecked, or the driver would wait for another primary after some codes.
    return str(client.admin.command("ping", check=False)["codeName"])


# Updates.


def write_errors(*errors: tuple[int, str]) -> BulkWriteError:
    entries = [{"index": n, "code": c, "errmsg": text} for n, (c, text) in enumerate(errors)]
    return BulkWriteError({"writeErrors": entries, "writeConcernErrors": [], "nMatched": 0})


INVALID = (121, "Document failed validation: {email: 'ada@example.com'}")


@pytest.mark.parametrize(
    "code",
    [6, 7, 64, 82, 89, 91, 112, 133, 189, 246, 262, 272, 365, 402, 9001, 10107, 11600, 11601]
    + [11602, 13388, 13435, 13436],
)
def test_a_transient_write_error_is_never_a_failed_update(code: int) -> None:
    for errors in ([(code, "no")], [INVALID, (code, "no")], [(code, "no"), INVALID]):
        assert isinstance(mapped(write_errors(*errors)), DatabaseUnavailable)


@pytest.mark.parametrize("code", [8, 83, 12345])
def test_unavailable_write_results_of_a_shard_are_transient(code: int) -> None:
    text = "Write results unavailable from failing to target a host in the shard s1"
    assert isinstance(mapped(write_errors((code, text))), DatabaseUnavailable)


def test_other_write_errors_keep_their_class() -> None:
    assert isinstance(mapped(write_errors(INVALID, (13, "not authorized"))), MissingPrivilege)
    assert isinstance(mapped(write_errors((211, "no keys"))), ClientUnusable)


def test_failed_updates_are_reported_by_code_without_the_document(
    database: Database[Any], caplog: pytest.LogCaptureFixture
) -> None:
    database.create_collection("users", validator={"loyalty_points": {"$not": {"$gt": 5}}})
    database.users.insert_many([{"_id": n, "email": "ada@example.com"} for n in range(3)])
    database.users.update_one({"_id": 1}, {"$set": {"loyalty_points": 1}})
    updates = [UpdateOne({"_id": n}, {"$set": {"loyalty_points": n * 4}}) for n in range(3)]
    caplog.set_level(logging.INFO, "loyalty")
    with pytest.raises(BulkUpdateErrors) as raised, map_driver_errors("update", database.users):
        database.users.bulk_write(updates, ordered=False)
    assert raised.value.reasons == {2: "code 121, DocumentValidationFailure"}
    assert "ada@example.com" not in str(raised.value)
    assert not caplog.messages
    assert "unknown" in str(mapped(write_errors((999_999, "of an index"))))


def test_the_error_for_missing_retryable_writes_names_the_option() -> None:
    # As the driver raises it: with a text of its own, and the server's reply without one.
    reply = {"writeErrors": [{"index": 0, "code": 20, "errmsg": "Transaction numbers are …"}]}
    error = mapped(OperationFailure("does not support retryable writes", 20, reply))
    assert isinstance(error, ConfigurationError)
    assert "retryWrites=false" in str(error)


def test_a_write_concern_that_times_out_is_transient() -> None:
    concern = {"code": 64, "errmsg": "waiting for replication timed out"}
    error = mapped(BulkWriteError({"writeErrors": [], "writeConcernErrors": [concern]}))
    assert isinstance(error, DatabaseUnavailable)
    assert "WriteConcernTimeout" in str(error)


def test_the_error_for_a_client_timeout_names_its_option(
    deployment: Deployment, database: Database[Any]
) -> None:
    database.orders.insert_one({})
    with deployment.client(socketTimeoutMS=500) as client:
        slow = client[database.name].orders.find({"$where": "sleep(3000) || true"})
        with pytest.raises(DatabaseUnavailable) as raised, map_driver_errors("find", "shop.orders"):
            next(slow)
    assert isinstance(raised.value.__cause__, NetworkTimeout)
    assert "socketTimeoutMS: 500" in str(raised.value)


# TLS.

Serve = Callable[[socket.socket], None]


@contextmanager
def listening(serve: Serve) -> Iterator[int]:
    """Give the port of a server that does `serve` with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve_one(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                serve(connection)

        def accept() -> None:
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def close(connection: socket.socket) -> None: ...


def reset(connection: socket.socket) -> None:
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def stall(connection: socket.socket) -> None:
    connection.recv(1)
    threading.Event().wait(30)


def answer_in_plain_text(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")


@pytest.mark.parametrize("serve", [close, reset, stall, answer_in_plain_text])
def test_a_tls_handshake_that_does_not_complete_is_transient(serve: Serve) -> None:
    with listening(serve) as port:
        uri = f"mongodb://127.0.0.1:{port}/?tls=true&connectTimeoutMS=500"
        with pytest.raises(DatabaseUnavailable) as raised:
            connect(settings_for(uri), verify=False, timeout_seconds=1.5)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the files of a certificate for another.example and of its key."""
    return make_certificate(tmp_path_factory.mktemp("tls"), "DNS:another.example")


@pytest.mark.parametrize(
    ("trusted", "said"), [(False, "self-signed certificate"), (True, "mismatch")]
)
def test_a_certificate_that_does_not_verify_is_permanent(
    certificate: tuple[str, str], trusted: bool, said: str
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as encrypted:
            encrypted.recv(1)

    with listening(serve) as port:
        uri = f"mongodb://127.0.0.1:{port}/?tls=true"
        if trusted:
            uri += f"&tlsCAFile={certificate[0]}"
        with pytest.raises(ConfigurationError) as raised:
            connect(settings_for(uri), verify=False, timeout_seconds=1.5)
        assert said in str(raised.value).lower()
        # One of the two hosts may come back, and have the right certificate.
        with socket.create_server(("127.0.0.1", 0)) as unused:
            other = unused.getsockname()[1]
        uri = uri.replace(f":{port}/", f":{port},127.0.0.1:{other}/")
        with pytest.raises(DatabaseUnavailable):
            connect(settings_for(uri), verify=False, timeout_seconds=1.5)


def test_a_missing_ca_file_is_permanent(certificate: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_bytes(Path(certificate[0]).read_bytes())
    settings = settings_for(f"mongodb://127.0.0.1:1/?tls=true&tlsCAFile={file}")
    file.unlink()
    with pytest.raises(ConfigurationError):
        connect(settings, verify=False, timeout_seconds=1.5)
