"""Every error of ours, with the exit code that it ends a command with."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """What the process ends with; from 64 on as in sysexits.h."""

    OK = 0
    FINDINGS = 1  # a check found something, or users refused their update
    REFUSED = 65  # EX_DATAERR
    UNAVAILABLE = 69  # EX_UNAVAILABLE
    INTERNAL_ERROR = 70  # EX_SOFTWARE
    CONFIG = 78  # EX_CONFIG
    INTERRUPTED = 130  # as shells say it of SIGINT


class ServiceError(Exception):
    """Something went wrong that is not a bug; the text is one line for a person."""

    exit_code = Exit.INTERNAL_ERROR


class ConfigurationError(ServiceError):
    """Settings, credentials, permissions or a server that only a person can correct.

    `problems` has one line for each problem, without secrets.
    """

    exit_code = Exit.CONFIG

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class NoPermission(ConfigurationError):
    """The database user may not do what is wanted."""


class AuthenticationFailed(ConfigurationError):
    """The server rejects the user name or the password."""


class DatabaseUnavailable(ServiceError):
    """The database cannot serve us now; a later try may succeed."""

    exit_code = Exit.UNAVAILABLE


class QueryTimeout(DatabaseUnavailable):
    """The server gave up at the time limit; trying again at once would not help."""


class SnapshotTooOld(DatabaseUnavailable):
    """The server does not keep the point in time any more that was being read."""


class NoTempSpace(ServiceError):
    """There is no room for a temporary file; nothing was written."""

    exit_code = Exit.UNAVAILABLE


class RecountRefused(ServiceError):
    """The guard: this recount is plainly a mistake. Nothing was written."""

    exit_code = Exit.REFUSED


class BulkUpdateErrors(ServiceError):
    """Some operations of a bulk write failed, all others are done; `reasons` by position."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(f"{len(reasons)} updates failed")
        self.reasons = reasons
