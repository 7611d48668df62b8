"""The `.env` file: settings as they stand in it, and names that somebody misspelt."""

from __future__ import annotations

import difflib
import logging
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from dotenv.parser import parse_stream

from config import Settings, declared, load, reason
from loyalty.errors import ConfigurationError
from loyalty.logs import set_log_format

log = logging.getLogger("loyalty")

_URI_NAMES = {"MONGODB_URI", "MONGODB_URI_FILE"}
SIMILARITY_CUTOFF = (
    0.8  # how alike a name must be to one of ours to be a misspelling of it, from 0 to 1
)


def load_settings(given: Path | None, usual: Path) -> Settings:
    """Read the settings: the environment's first, then those of a file.

    The `usual` file need not be there. Raises ConfigurationError.
    """
    values: dict[str, str] = {}
    path = given or usual
    set_log_format(os.environ.get("LOG_FORMAT", ""))
    if given or path.exists():
        values = read_env_file(path)
        set_log_format({**values, **os.environ}.get("LOG_FORMAT", ""))
        mode = path.stat().st_mode
        if stat.S_ISREG(mode) and mode & stat.S_IROTH:
            told = {"event": "configuration"}
            log.warning("others can read %s: chmod 600 %s", path, path, extra=told)
    if os.environ.keys() & _URI_NAMES:  # either of them outside replaces both in the file
        values = {name: value for name, value in values.items() if name not in _URI_NAMES}
    return load({**values, **os.environ})


def read_env_file(path: Path) -> dict[str, str]:
    """Return the settings in an `.env` file, taken literally: `$`, `%` and `#` in a value stay.

    Raises ConfigurationError where the file cannot be read, a line is not `NAME=value`, or a name
    is nearly one of ours.
    """
    # python-dotenv's own loader only warns about a bad line; its parser tells which one it is.
    try:
        with path.open(encoding="utf-8-sig") as stream:
            lines = list(parse_stream(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {reason(error)}") from None
    bad = [line.original.line for line in lines if line.error or (line.key and line.value is None)]
    faults = [f"{path} line {n}: not NAME=value (quotes that do not close?)" for n in bad]
    values = {line.key: line.value for line in lines if line.key and line.value is not None}
    faults += _unknown_settings(values)
    if faults:
        raise ConfigurationError(*faults)
    return values


def _unknown_settings(names: Iterable[str]) -> list[str]:
    """Return a fault for each name that is not, but nearly, a setting's.

    Only of a file: in the environment, other programs have names of their own.
    """
    ours = ["MONGODB_URI_FILE", *(setting.name for setting in declared().values())]
    faults = []
    for name in names:
        near = difflib.get_close_matches(name.upper(), ours, n=1, cutoff=SIMILARITY_CUTOFF)
        if name not in ours and near:
            faults.append(f"unknown setting {name}, did you mean {near[0]}?")
    return faults
