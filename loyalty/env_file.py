"""The `.env` file, and the settings from it and the environment."""

import os
import re
import stat
from collections.abc import Mapping
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path

from dotenv.parser import parse_stream

from config import Settings, load, setting_specs
from loyalty.errors import ConfigurationError
from loyalty.logs import log, set_log_format
from loyalty.parsers import describe_os_error

_URI_NAMES = ("MONGODB_URI", "MONGODB_URI_FILE")
# The similarity of two names, from 0 to 1. A misspelling: MONGO_URI for MONGODB_URI, 0.90. Names of
# other programs: MONGODB_USER, 0.87; ACCOUNTS_COLLECTION beside RECOUNTS_COLLECTION, 0.89.
_MIN_SIMILARITY = 0.8
_MIN_MISSPELLING_SIMILARITY = 0.9


def load_settings(
    path: Path | None, default_path: Path, environment: Mapping[str, str] = os.environ
) -> Settings:
    """Load the settings from the environment and a file; the environment takes precedence.

    The file at `default_path` need not exist. Also sets the level and the format of the log. The
    format is set even if other settings are wrong, because their problems are logged next.
    Raises ConfigurationError with all problems.
    """
    file = path or default_path
    from_environment = {name: value for name, value in environment.items() if value.strip()}
    set_log_format(from_environment.get("LOG_FORMAT", ""))  # the file may be unreadable
    in_file, problems = read_env_file(file) if path or file.exists() else ({}, [])
    values = in_file | from_environment
    # A URI in the environment replaces both variables in the file.
    if any(name in from_environment for name in _URI_NAMES):
        values |= {name: from_environment.get(name, "") for name in _URI_NAMES}
    set_log_format(values.get("LOG_FORMAT", ""))
    problems += _check_names(in_file, from_environment, values)
    if in_file and _is_readable_by_others(file):
        log.warning('env_file_permissions error="other users can read %s" fix="chmod 600"', file)
    settings = load(values, problems)
    log.setLevel(settings.log_level)
    return settings


def read_env_file(path: Path) -> tuple[dict[str, str], list[str]]:
    """Return the values in an `.env` file, and its bad lines.

    `$` and `%` have no special meaning. A `#` after whitespace begins a comment, unless the value
    is quoted. Raises ConfigurationError if the file cannot be read.
    """
    # python-dotenv's own loader only warns about a bad line; its parser tells which one it is.
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            lines = list(parse_stream(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {describe_os_error(error)}") from None
    problems = []
    for line in lines:
        if line.error or (line.key and line.value is None):
            text = line.original.string  # begins with the empty lines before it
            number = line.original.line + text[: -len(text.lstrip())].count("\n")
            problems.append(f"{path} line {number}: not NAME=value; is a closing quote missing?")
    values = {line.key: line.value for line in lines if line.key and line.value is not None}
    return values, problems


def _check_names(
    in_file: Mapping[str, str], from_environment: Mapping[str, str], values: Mapping[str, str]
) -> list[str]:
    """Return a problem for each misspelt name in a file; warn of other suspicious variables.

    Other programs may use the same file or environment, so a name is a misspelling only if it is
    very similar to a setting that has no value.
    """
    known = [*_URI_NAMES, *(spec.name for spec in setting_specs().values())]
    misspelt = []
    for name in {**in_file, **from_environment}:
        if name in known:
            if re.search(r"\s#", from_environment.get(name, "")):  # systemd keeps a comment
                log.warning('comment_in_value name=%s effect="# is a part of the value"', name)
            continue
        for setting in get_close_matches(name.upper(), known, n=1, cutoff=_MIN_SIMILARITY):
            alternatives = _URI_NAMES if setting in _URI_NAMES else (setting,)
            has_value = any(values.get(alternative, "").strip() for alternative in alternatives)
            similarity = SequenceMatcher(None, setting, name.upper()).ratio()
            is_misspelt = similarity >= _MIN_MISSPELLING_SIMILARITY and not has_value
            if is_misspelt and name in in_file:
                misspelt.append(f"unknown setting {name}, did you mean {setting}?")
            elif is_misspelt or name in in_file:
                log.warning("unknown_setting name=%s similar_to=%s", name, setting)
    return misspelt


def _is_readable_by_others(path: Path) -> bool:
    mode = path.stat().st_mode
    return stat.S_ISREG(mode) and bool(mode & stat.S_IROTH)
