"""Settings: each declared once; read from the environment and a file, checked whole, immutable."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from dotenv.parser import parse_stream

from loyalty.errors import ConfigError
from loyalty.logs import log_as
from loyalty.parsers import (
    Parser,
    collection,
    duration,
    field,
    metrics_file,
    one_of,
    statuses,
    whole_number,
    yes,
)
from loyalty.uri import database_name, split_uri, uri_faults

VERSION = "0.1.0"

log = logging.getLogger("loyalty")

_URI_NAMES = {"MONGODB_URI", "MONGODB_URI_FILE"}
_NEAR = 0.8  # how alike a name must be to one of ours to be a misspelling of it, from 0 to 1


@dataclass(frozen=True, slots=True)
class Declared:
    """What there is to know of a setting: its variable, and how to read it."""

    name: str
    default: str
    parse: Parser


def _setting(name: str, default: str, parse: Parser, *, shown: bool = True) -> Any:
    """Declare a setting; `default` is what a person would write, "" for none."""
    return dataclasses.field(metadata={"declared": Declared(name, default, parse)}, repr=shown)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the service was told; `load` is the way to make one, `.env.example` explains each."""

    mongodb_uri: str = _setting("MONGODB_URI", "", str, shown=False)
    database: str = _setting("MONGODB_DATABASE", "", database_name)
    orders: str = _setting("ORDERS_COLLECTION", "orders", collection)
    users: str = _setting("USERS_COLLECTION", "users", collection)
    recounts: str = _setting("RECOUNTS_COLLECTION", "loyalty_recounts", collection)
    order_statuses: tuple[str, ...] = _setting("ORDER_STATUSES", "Shipped", statuses)
    points_per_order: int = _setting("POINTS_PER_ORDER", "1", whole_number(1, 1_000_000))
    status_field: str = _setting("ORDER_STATUS_FIELD", "status", field)
    customer_field: str = _setting("ORDER_CUSTOMER_FIELD", "customer_id", field)
    points_field: str = _setting("USER_POINTS_FIELD", "loyalty_points", field)
    recount_interval: timedelta = _setting("RECOUNT_INTERVAL", "2h", duration(timedelta(days=366)))
    live_updates: bool = _setting("LIVE_UPDATES", "no", yes)
    # The server takes maxTimeMS as a 32-bit number, which ends after 24 days.
    count_timeout: timedelta = _setting("COUNT_TIMEOUT", "10m", duration(timedelta(days=24)))
    count_workers: int = _setting("COUNT_WORKERS", "2", whole_number(1, 16))
    max_decrease_percent: int = _setting("MAX_DECREASE_PERCENT", "90", whole_number(0, 100))
    batch_size: int = _setting("BATCH_SIZE", "1000", whole_number(1, 100_000))
    log_level: str = _setting("LOG_LEVEL", "INFO", one_of("DEBUG", "INFO", "WARNING", "ERROR"))
    log_format: str = _setting("LOG_FORMAT", "text", one_of("text", "json"))
    metrics_file: str = _setting("METRICS_FILE", "", metrics_file)

    @property
    def count_ms(self) -> int:
        """`count_timeout` as the server takes it (maxTimeMS)."""
        return int(self.count_timeout.total_seconds() * 1000)

    @property
    def hosts(self) -> str:
        """The hosts of the URI, as written; never its credentials."""
        return split_uri(self.mongodb_uri)[1]

    def shown(self) -> dict[str, Any]:
        """Return all values by the name of their variable, but for the URI with its password."""
        names = {attribute: setting.name for attribute, setting in declared().items()}
        return {
            name: getattr(self, attribute)
            for attribute, name in names.items()
            if name != "MONGODB_URI"
        }


def declared() -> dict[str, Declared]:
    """Return what is declared of each setting, by the name of its attribute."""
    return {f.name: f.metadata["declared"] for f in dataclasses.fields(Settings)}


def settings_of(given: Path | None, usual: Path) -> Settings:
    """Read the settings: the environment's first, then those of a file.

    The `usual` file need not be there. Raises ConfigError.
    """
    values: dict[str, str] = {}
    path = given or usual
    log_as(os.environ.get("LOG_FORMAT", ""))
    if given or path.exists():
        values = read_env_file(path)
        log_as({**values, **os.environ}.get("LOG_FORMAT", ""))
        mode = path.stat().st_mode
        if stat.S_ISREG(mode) and mode & stat.S_IROTH:
            told = {"event": "configuration"}
            log.warning("others can read %s: chmod 600 %s", path, path, extra=told)
    if os.environ.keys() & _URI_NAMES:  # either of them outside replaces both in the file
        values = {name: value for name, value in values.items() if name not in _URI_NAMES}
    return load({**values, **os.environ})


def load(values: Mapping[str, str]) -> Settings:
    """Check `values` (as in `os.environ`) and return the settings.

    A value that is empty counts as not given, save `RECOUNTS_COLLECTION`, where it means "none".
    Raises ConfigError with every fault at once.
    """
    faults: list[str] = []
    given = {name: value.strip() for name, value in values.items()}
    given["MONGODB_URI"] = _read_uri(values, faults)
    in_uri = "" if faults else split_uri(given["MONGODB_URI"])[2]
    given["MONGODB_DATABASE"] = given.get("MONGODB_DATABASE") or in_uri or "oms_db"
    read: dict[str, Any] = {}
    for attribute, setting in declared().items():
        try:
            read[attribute] = setting.parse(given.get(setting.name) or setting.default)
        except ValueError as error:
            faults.append(f"{setting.name}: {error}")
            read[attribute] = setting.parse(setting.default)
    if given.get("RECOUNTS_COLLECTION") == "":
        read["recounts"] = ""
    settings = Settings(**read)
    faults += _contradictions(settings)
    if faults:
        raise ConfigError(*faults)
    return settings


def _contradictions(settings: Settings) -> list[str]:
    faults = []
    named = {"ORDERS_COLLECTION": settings.orders, "USERS_COLLECTION": settings.users}
    if settings.recounts:
        named["RECOUNTS_COLLECTION"] = settings.recounts
    if len(set(named.values())) < len(named):
        faults.append(f"{', '.join(named)}: must be different collections")
    if settings.database in ("admin", "config", "local"):  # in a URI, often for authentication
        faults.append(f"MONGODB_DATABASE: {settings.database!r} is the server's, not a shop's")
    status, customer = settings.status_field, settings.customer_field
    if f"{status}.".startswith(f"{customer}.") or f"{customer}.".startswith(f"{status}."):
        faults.append("ORDER_STATUS_FIELD, ORDER_CUSTOMER_FIELD: must be different fields")
    if settings.points_field.split(".")[0] == "_id":
        faults.append("USER_POINTS_FIELD: _id is what a user is known by")
    return faults


def _read_uri(values: Mapping[str, str], faults: list[str]) -> str:
    uri, file = (values.get(n, "").strip() for n in ("MONGODB_URI", "MONGODB_URI_FILE"))
    if uri and file:
        faults.append("MONGODB_URI and MONGODB_URI_FILE: set one of them, not both")
        return ""
    if file:
        try:
            uri = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            faults.append(f"MONGODB_URI_FILE: {file}: {_reason(error)}")
            return ""
    if uri:
        faults.extend(f"MONGODB_URI: {fault}" for fault in uri_faults(uri))
    elif file:
        faults.append(f"MONGODB_URI_FILE: {file} is empty")
    else:
        faults.append("MONGODB_URI: required, for example mongodb://localhost:27017")
    return uri


def read_env_file(path: Path) -> dict[str, str]:
    """Return the settings in an `.env` file, taken literally: `$`, `%` and `#` in a value stay.

    Raises ConfigError where the file cannot be read, a line is not `NAME=value`, or a name is
    nearly one of ours.
    """
    # python-dotenv's own loader only warns about a bad line; its parser tells which one it is.
    try:
        with path.open(encoding="utf-8-sig") as stream:
            lines = list(parse_stream(stream))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {_reason(error)}") from None
    bad = [line.original.line for line in lines if line.error or (line.key and line.value is None)]
    faults = [f"{path} line {n}: not NAME=value (quotes that do not close?)" for n in bad]
    values = {line.key: line.value for line in lines if line.key and line.value is not None}
    faults += _misspelt(values)
    if faults:
        raise ConfigError(*faults)
    return values


def _misspelt(names: Iterable[str]) -> list[str]:
    """Return a fault for each name that is not, but nearly, a setting's.

    Only of a file: in the environment, other programs have names of their own.
    """
    ours = ["MONGODB_URI_FILE", *(setting.name for setting in declared().values())]
    faults = []
    for name in names:
        near = difflib.get_close_matches(name.upper(), ours, n=1, cutoff=_NEAR)
        if name not in ours and near:
            faults.append(f"unknown setting {name}, did you mean {near[0]}?")
    return faults


def _reason(error: OSError | UnicodeDecodeError) -> str:
    """Return why a file cannot be read, in a few words."""
    return str(error.strerror) if isinstance(error, OSError) else "it is not UTF-8 text"
