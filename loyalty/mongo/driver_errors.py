"""The one place where the driver's errors are sorted.

Whoever asks the driver for something does so inside `with sorted_errors(...)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from pymongo import errors as driver
from pymongo.errors import BulkWriteError, OperationFailure, PyMongoError

from loyalty.errors import (
    AuthenticationFailed,
    BulkUpdateErrors,
    ConfigurationError,
    DatabaseUnavailable,
    NoPermission,
    QueryTimeout,
    ServiceError,
    SnapshotTooOld,
)
from loyalty.mongo.values import Document

_UNAUTHORIZED = 13
# A view where a collection is needed, or with a collation of its own; an index over two arrays, or
# one that is there with other options.
_FINAL = {166, 167, 171, 85, 86}
# A stage, an operator, a command or an option that the server does not know, by MongoDB and others.
_UNSUPPORTED = {40324, 168, 59, 115, 303, 304}
_BAD_CREDENTIALS = 18
_ATLAS = 8000  # whatever Atlas itself turns down
_MAX_TIME_EXPIRED = 50
_SNAPSHOT_TOO_OLD = 239


class _Named(Protocol):
    """A collection or a database; the latter has no `full_name`."""

    @property
    def name(self) -> str: ...


@contextmanager
def map_driver_errors(
    action: str, target: _Named | str, *, if_too_slow: str = ""
) -> Iterator[None]:
    """Turn whatever the driver raises inside into a ServiceError.

    `action` is the privilege action, such as "find", and `target` what it is done on.
    `if_too_slow` says what to do about the server's time limit.
    """
    try:
        yield
    except (PyMongoError, OSError) as error:
        where = target if isinstance(target, str) else getattr(target, "full_name", target.name)
        preposition = "to" if action == "connect" else "on"
        raise _map(error, f"{action} {preposition} {where}", if_too_slow) from error


def _map(error: PyMongoError | OSError, action: str, if_too_slow: str) -> ServiceError:
    if isinstance(error, BulkWriteError) and error.details["writeErrors"]:
        failed = error.details["writeErrors"]
        return BulkUpdateErrors(
            {e["index"]: f"code {e['code']}" for e in failed}, error.details["nMatched"]
        )
    if isinstance(error, OperationFailure):
        return _map_operation_failure(error, action, if_too_slow)
    failed, reason = f"{action} failed", _one_line(str(error))
    if "SSL handshake failed" in reason:
        return ConfigurationError(f"{failed}: {reason}; does the server expect TLS, as the URI?")
    if "[Errno -2]" in reason or "[Errno -5]" in reason:  # getaddrinfo's EAI_NONAME, EAI_NODATA
        return DatabaseUnavailable(f"{failed}: no such host name, or not yet")
    # An OSError: a certificate file that is missing or no certificate.
    final = isinstance(error, driver.ConfigurationError | OSError) and not _is_about_dns(error)
    return (ConfigurationError if final else DatabaseUnavailable)(f"{failed}: {reason}")


def _map_operation_failure(error: OperationFailure, action: str, if_too_slow: str) -> ServiceError:
    # OperationFailure's own text ends in the whole reply, commands and documents included.
    details: Document = error.details or {}
    for concern in details.get("writeConcernErrors", []):  # of a bulk write, whose own has no text
        details = concern
    code, reason = error.code, _one_line(str(details.get("errmsg", "no reason given")))
    code = details.get("code", code)
    failed = f"{action} failed"
    if code == _UNAUTHORIZED or (code == _ATLAS and "not allowed to do action" in reason):
        advice = "grant it to the database user (deploy/mongodb-role.js)"
        if "requires authentication" in reason:
            advice += ", or put a user name and password into MONGODB_URI"
        return NoPermission(f"no permission for {action}: {advice}")
    if code == _BAD_CREDENTIALS or (code == _ATLAS and "bad auth" in reason):
        return AuthenticationFailed("the server rejects the user name or password in MONGODB_URI")
    if code == _MAX_TIME_EXPIRED:
        return QueryTimeout(f"{action} took too long" + (f": {if_too_slow}" if if_too_slow else ""))
    if code == _SNAPSHOT_TOO_OLD:
        return SnapshotTooOld(f"{failed}: {reason} (code {code})")
    if code in _UNSUPPORTED:
        return ConfigurationError(f"this server does not support what the service needs: {reason}")
    sort = ConfigurationError if code in {*_FINAL, _ATLAS} else DatabaseUnavailable
    return sort(f"{failed}: {reason} (code {code})")


def _is_about_dns(error: Exception) -> bool:
    """Whether a mongodb+srv name could not be resolved, which the driver wraps."""
    return type(error.__cause__).__module__.startswith("dns.")


def _one_line(reason: str) -> str:
    # The driver appends its timeouts and its whole view of the topology.
    return reason.split(", Timeout:")[0].split(" (configured")[0].replace("\n", " ")[:300]
