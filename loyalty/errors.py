"""The errors of the service, each with the exit code of a command that fails with it."""

from collections.abc import Mapping
from enum import IntEnum
from typing import ClassVar


class Exit(IntEnum):
    """The exit codes of the process; from 64 to 78 as in sysexits.h."""

    OK = 0
    FINDINGS = 1  # a check found something, or some updates failed
    REFUSED = 65  # EX_DATAERR
    UNAVAILABLE = 69  # EX_UNAVAILABLE
    INTERNAL_ERROR = 70  # EX_SOFTWARE
    CONFIG = 78  # EX_CONFIG
    INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class ServiceError(Exception):
    """The base class. Any other exception is a bug.

    `problems` has one line for the operator for each problem, without secrets.
    """

    exit_code: ClassVar[Exit] = Exit.UNAVAILABLE

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class ConfigurationError(ServiceError):
    """Settings, credentials, privileges or a server that only a person can correct."""

    exit_code = Exit.CONFIG


class MissingPrivilege(ConfigurationError):
    """The database user lacks a privilege."""


class AuthenticationFailed(ConfigurationError):
    """The server rejects the user name or the password."""


class UnsupportedServer(ConfigurationError):
    """The server lacks a feature that the service needs."""


class DatabaseUnavailable(ServiceError):
    """The database cannot do this now; a later attempt may succeed."""


class QueryTimeout(DatabaseUnavailable):
    """The query reached its time limit; an immediate retry would also reach it."""


class SnapshotTooOld(DatabaseUnavailable):
    """The server no longer keeps the snapshot; a read at a new snapshot may succeed."""


class ClientUnusable(DatabaseUnavailable):
    """The client can no longer talk to this cluster; only a new client can succeed.

    After a restore, for example, the cluster time and the keys that a client remembers are not
    those of the cluster.
    """


class NoTempSpace(ServiceError):
    """There is no temporary disk space; nothing was written."""


class RecountRefused(ServiceError):
    """The safety checks refused the recount. Nothing was written."""

    exit_code = Exit.REFUSED


class ResyncRequired(ServiceError):
    """Live updates cannot continue; a full recount must follow. This is normal operation."""


class BulkUpdateErrors(ServiceError):
    """Some updates of a batch failed because of their documents; all others are done.

    `reasons` maps the position of each failed update in the batch to a description of its error
    code. `matched` is the number of users who were updated. The server's own text is left out: it
    may quote the document.
    """

    def __init__(self, reasons: Mapping[int, str], matched: int = 0) -> None:
        text = ", ".join(sorted(set(reasons.values())))
        super().__init__(f"{len(reasons)} updates failed: {text}")
        self.reasons = dict(reasons)
        self.matched = matched


class TooManyFailedUpdates(ServiceError):
    """So many updates failed that the recount failed. All other updates are written."""

    exit_code = Exit.FINDINGS

    def __init__(self, text: str, failed_updates: int) -> None:
        super().__init__(text)
        self.failed_updates = failed_updates


class RecountNotFound(ServiceError):
    """The change log has no such recount."""

    exit_code = Exit.FINDINGS


class RecountNotEnded(ServiceError):
    """The recount may still be writing, so that an undo would restore only some users."""

    exit_code = Exit.FINDINGS
