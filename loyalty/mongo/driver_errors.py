"""Maps the exceptions of the driver to the errors of the service.

Every request to the server is made inside `with map_driver_errors(...)`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from bson.errors import BSONError
from pymongo import errors as driver
from pymongo.collection import Collection
from pymongo.errors import BulkWriteError, OperationFailure, PyMongoError

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
    UnsupportedServer,
)
from loyalty.logs import log
from loyalty.mongo.error_codes import classify_code, describe_code, error_name

_MAX_REASON_LENGTH = 300


@contextmanager
def map_driver_errors(
    action: str, target: Collection[Any] | str, *, if_too_slow: str = ""
) -> Iterator[None]:
    """Turn any error of the driver into a ServiceError.

    The message names `action`, if possible a privilege action such as "find", and `target`, a
    collection, a database or hosts. `if_too_slow` says what to do about the query's time limit.
    """
    try:
        yield
    except (PyMongoError, BSONError, OSError) as error:
        where = target.full_name if isinstance(target, Collection) else target
        preposition = "to" if action == "connect" else "on"
        raise _map(error, f"{action} {preposition} {where}", if_too_slow) from error


def build_privilege_error(operation: str, *, has_user: bool = True) -> MissingPrivilege:
    """Return the error for an operation, such as "find on shop.orders", that is not allowed."""
    hint = "grant it to the database user (deploy/mongodb-role.js)"
    if not has_user:
        hint += ", or add a user name and a password to MONGODB_URI"
    return MissingPrivilege(f"no privilege for {operation}: {hint}")


def _map(
    error: PyMongoError | BSONError | OSError, operation: str, if_too_slow: str
) -> ServiceError:
    if isinstance(error, BSONError):  # its text may quote a value
        kind = type(error).__name__
        return ConfigurationError(
            f"{operation} failed: a value is too large for one command, or not valid BSON ({kind})"
        )
    if (
        isinstance(error, BulkWriteError)
        and error.details["writeErrors"]
        and not error.details["writeConcernErrors"]  # a failover could undo all updates
    ):
        return _map_write_errors(error.details, operation)
    if isinstance(error, OperationFailure | driver.NotPrimaryError):
        details: Mapping[str, Any] = error.details or {}  # type: ignore[assignment]  # may be []
        if concern_errors := details.get("writeConcernErrors"):  # of a bulk write
            details = concern_errors[-1]
        code = details.get("code", getattr(error, "code", None))
        return _map_server_error(details, code, operation, if_too_slow)
    return _map_client_error(error, operation)


def _map_client_error(error: PyMongoError | OSError, operation: str) -> ServiceError:
    error_type: type[ServiceError] = DatabaseUnavailable
    reason = _shorten(str(error))
    if _is_certificate_error(str(error)):
        error_type = ConfigurationError
    elif "SSL handshake failed" in reason:
        # A server without TLS closes the connection, and so does a load balancer without servers.
        reason += "; check that the server and the URI agree on TLS"
    elif "[Errno -2]" in reason or "[Errno -5]" in reason:  # getaddrinfo's EAI_NONAME, EAI_NODATA
        reason = "the host name cannot be resolved"
    elif isinstance(error, driver.NetworkTimeout):
        reason = str(error)[:_MAX_REASON_LENGTH]  # with the timeout options, which _shorten removes
    elif isinstance(error, driver.InvalidOperation) and "after close" in reason:
        error_type = ClientUnusable
    elif isinstance(error, driver.ConfigurationError | OSError) and not _is_dns_error(error):
        error_type = ConfigurationError  # an OSError: a certificate file is missing or invalid
    if "load balancing mode" in reason:
        reason += ": remove loadBalanced=true from the URI"
    return error_type(f"{operation} failed: {reason}")


def _map_write_errors(details: Mapping[str, Any], operation: str) -> ServiceError:
    """Return BulkUpdateErrors if the documents are the cause of every error.

    Any other error ends the whole batch. A code that is not in the table counts as an error of the
    document: most such codes come from an index. If one is transient, the second attempt of the
    callers probably succeeds.
    """
    errors: Sequence[Mapping[str, Any]] = details["writeErrors"]
    for error in errors:
        if "write results unavailable" in error["errmsg"].lower():  # a mongos lost its shard
            return DatabaseUnavailable(f"{operation} failed: {_shorten(error['errmsg'])}")
        if classify_code(error["code"]) not in (None, ConfigurationError):
            return _map_server_error(error, error["code"], operation, "")
    for error in errors:
        log.debug('update_failed code=%d error="%s"', error["code"], _shorten(error["errmsg"]))
    reasons = {error["index"]: describe_code(error["code"]) for error in errors}
    return BulkUpdateErrors(reasons, details["nMatched"])


def _map_server_error(
    details: Mapping[str, Any], code: int | None, operation: str, if_too_slow: str
) -> ServiceError:
    # Not str() of the driver's error: it ends with the whole reply, with commands and documents.
    name, reason = error_name(code), _shorten(str(details.get("errmsg", "no reason given")))
    if name == "IllegalOperation" and "writeErrors" in details:  # a result of the driver
        reason = "this server does not support retryable writes: add retryWrites=false to the URI"
    error_type = _find_error_type(code, details, reason, operation)
    if error_type is MissingPrivilege:
        return build_privilege_error(operation, has_user="requires authentication" not in reason)
    if error_type is AuthenticationFailed:
        return AuthenticationFailed("the server rejects the user name or password in MONGODB_URI")
    if error_type is QueryTimeout:
        advice = f": {if_too_slow}" if if_too_slow else ""
        return QueryTimeout(f"{operation} took too long{advice}")
    if error_type is UnsupportedServer:
        return UnsupportedServer(f"this server does not support what the service needs: {reason}")
    message = f"{operation} failed: {reason} ({describe_code(code, details.get('codeName', ''))})"
    if name == "SnapshotTooOld":
        message += (
            "; if this repeats, raise the server's parameter minSnapshotHistoryWindowInSeconds "
            "above the time that the count of one partition takes"
        )
    return error_type(message)


def _find_error_type(
    code: int | None, details: Mapping[str, Any], reason: str, operation: str
) -> type[ServiceError]:
    """Return the type of an error, also if its code has several meanings."""
    name = error_name(code)
    if name == "AtlasError" and "not allowed to do action" in reason:
        return MissingPrivilege
    if name == "AtlasError" and "bad auth" in reason:
        return AuthenticationFailed
    if name == "SplitHorizonChange" and details.get("codeName") != name:
        return UnsupportedServer  # Amazon DocumentDB uses this code for an unsupported feature
    if name == "BSONObjectTooLarge" and operation.startswith("changeStream "):
        return ResyncRequired  # the event is too large, and no resume can skip it
    return classify_code(code) or DatabaseUnavailable


def _is_certificate_error(text: str) -> bool:
    """Return whether every host has a certificate that does not verify, or is for another name.

    The driver has one error for each host, in one text: the errors themselves are not kept.
    """
    text = text.split(", Timeout:")[0]
    failures = text.count("CERTIFICATE_VERIFY_FAILED")
    return failures > 0 and failures >= len(re.findall(r":\d+: ", text))


def _is_dns_error(error: Exception) -> bool:
    """Return whether a mongodb+srv name could not be resolved, which the driver wraps."""
    return type(error.__cause__).__module__.startswith("dns.")


def _shorten(reason: str) -> str:
    # The driver appends its timeouts and its whole view of the topology.
    reason = reason.split(", Timeout:")[0].split(" (configured")[0].replace("\n", " ")
    return reason[:_MAX_REASON_LENGTH]
