"""Every error of ours, with the exit code that it ends a command with."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """What the process ends with; from 64 on as in sysexits.h."""

    FINE = 0
    FOUND = 1  # a check found something, or users refused their update
    USAGE = 2
    REFUSED = 65  # EX_DATAERR
    UNAVAILABLE = 69  # EX_UNAVAILABLE
    BUG = 70  # EX_SOFTWARE
    CONFIG = 78  # EX_CONFIG
    INTERRUPTED = 130  # as shells say it of SIGINT


class ServiceError(Exception):
    """Something went wrong that is not a bug; the text is one line for a person."""

    exit_code = Exit.BUG


class ConfigError(ServiceError):
    """Settings that cannot work; `faults` has one line for each, without secrets."""

    exit_code = Exit.CONFIG

    def __init__(self, *faults: str) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


class Misconfigured(ServiceError):
    """Credentials, permissions, options or a server that only a person can put right."""

    exit_code = Exit.CONFIG


class NoPermission(Misconfigured):
    """The database user may not do what is wanted."""


class Rejected(Misconfigured):
    """The server rejects the user name or the password."""


class Unavailable(ServiceError):
    """The database cannot serve us now; a later try may succeed."""

    exit_code = Exit.UNAVAILABLE


class TooSlow(Unavailable):
    """The server gave up at the time limit; trying again at once would not help."""


class SnapshotTooOld(Unavailable):
    """The server does not keep the point in time any more that was being read."""


class NoRoom(ServiceError):
    """There is no room for a temporary file; nothing was written."""

    exit_code = Exit.UNAVAILABLE


class Refused(ServiceError):
    """The guard: this recount is plainly a mistake. Nothing was written."""

    exit_code = Exit.REFUSED


class FailedWrites(ServiceError):
    """Some operations of a bulk write failed, all others are done; `reasons` by position."""

    def __init__(self, reasons: dict[int, str]) -> None:
        super().__init__(f"{len(reasons)} updates failed")
        self.reasons = reasons
