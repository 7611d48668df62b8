"""Settings: read from a mapping, checked whole, immutable.

Nothing here reads the environment or touches the network; the command passes the mapping in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote_plus

from dotenv.parser import parse_stream
from pymongo import MongoClient
from pymongo.errors import PyMongoError
from pymongo.uri_parser import split_options

VERSION = "0.1.0"

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SCHEME = re.compile(r"mongodb(\+srv)?://")
_LABEL = r"[^\s:/\[\]%.]{1,63}"  # between dots; Python cannot look up others
_HOST = re.compile(rf"(\[[0-9A-Fa-f:.%]+\]|{_LABEL}(\.{_LABEL})*\.?)(:\d{{1,5}})?|[^:/]+\.sock")
_ENCODE = (
    "MONGODB_URI: user name and password must be percent-encoded "
    "(/ is %2F, : is %3A, @ is %40, ? is %3F, # is %23, % is %25)"
)
_HOSTS = (
    "MONGODB_URI: the hosts must be host[:port], separated by commas "
    "(and a user name and password percent-encoded, followed by @)"
)

T = TypeVar("T")


class ConfigError(Exception):
    """Settings that cannot work; `faults` has one line for each, without secrets."""

    exit_code = 78  # EX_CONFIG in sysexits.h

    def __init__(self, *faults: str) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the service was told; `load` is the way to make one."""

    mongodb_uri: str = field(repr=False)
    database: str
    orders: str
    users: str
    recounts: str
    """Name of the collection for the records; empty: keep none."""
    order_statuses: tuple[str, ...]
    points_per_order: int
    recount_interval: timedelta
    count_timeout: timedelta
    max_decrease_percent: int
    batch_size: int
    log_level: str

    @property
    def hosts(self) -> str:
        """The hosts of the URI, as written; never its credentials."""
        return _split_uri(self.mongodb_uri)[1]


def load(values: Mapping[str, str]) -> Settings:
    """Check `values` (as in `os.environ`) and return the settings.

    A value that is empty counts as not given, save `RECOUNTS_COLLECTION`, where it means "none".
    Raises ConfigError with every fault at once.
    """
    faults: list[str] = []

    def read(name: str, default: str, parse: Callable[[str], T]) -> T:
        try:
            return parse(values.get(name, "").strip() or default)
        except ValueError as error:
            faults.append(f"{name}: {error}")
            return parse(default)

    uri = _read_uri(values, faults)
    uri_database = "" if faults else _split_uri(uri)[2]
    settings = Settings(
        mongodb_uri=uri,
        database=read("MONGODB_DATABASE", uri_database or "oms_db", _database_name),
        orders=read("ORDERS_COLLECTION", "orders", _collection_name),
        users=read("USERS_COLLECTION", "users", _collection_name),
        recounts=""
        if values.get("RECOUNTS_COLLECTION", "-").strip() == ""
        else read("RECOUNTS_COLLECTION", "loyalty_recounts", _collection_name),
        order_statuses=read("ORDER_STATUSES", "Shipped", _statuses),
        points_per_order=read("POINTS_PER_ORDER", "1", _whole_number(1, 1_000_000)),
        recount_interval=read("RECOUNT_INTERVAL", "2h", _duration(timedelta(days=366))),
        # The server takes maxTimeMS as a 32-bit number, which ends after 24 days.
        count_timeout=read("COUNT_TIMEOUT", "10m", _duration(timedelta(days=24))),
        max_decrease_percent=read("MAX_DECREASE_PERCENT", "90", _whole_number(0, 100)),
        batch_size=read("BATCH_SIZE", "1000", _whole_number(1, 100_000)),
        log_level=read("LOG_LEVEL", "INFO", _log_level),
    )
    named = {"ORDERS_COLLECTION": settings.orders, "USERS_COLLECTION": settings.users}
    if settings.recounts:
        named["RECOUNTS_COLLECTION"] = settings.recounts
    if len(set(named.values())) < len(named):
        faults.append(f"{', '.join(named)}: must be different collections")
    if settings.database in ("admin", "config", "local"):  # in a URI, often for authentication
        faults.append(f"MONGODB_DATABASE: {settings.database!r} is the server's, not a shop's")
    if faults:
        raise ConfigError(*faults)
    return settings


def read_env_file(path: Path) -> dict[str, str]:
    """Return the settings in an `.env` file, taken literally: `$`, `%` and `#` in a value stay.

    Raises ConfigError where the file cannot be read or a line is not `NAME=value`.
    """
    # python-dotenv's own loader only warns about a bad line; its parser tells which one it is.
    try:
        with path.open(encoding="utf-8-sig") as stream:
            lines = list(parse_stream(stream))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    bad = [line.original.line for line in lines if line.error or (line.key and line.value is None)]
    if bad:
        raise ConfigError(
            *(f"{path} line {n}: not NAME=value (quotes that do not close?)" for n in bad)
        )
    return {line.key: line.value for line in lines if line.key and line.value is not None}


def _read_uri(values: Mapping[str, str], faults: list[str]) -> str:
    uri, file = (values.get(n, "").strip() for n in ("MONGODB_URI", "MONGODB_URI_FILE"))
    if uri and file:
        faults.append("MONGODB_URI and MONGODB_URI_FILE: set one of them, not both")
        return ""
    if file:
        try:
            uri = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            faults.append(f"MONGODB_URI_FILE: {file}: {reason}")
            return ""
    if not uri:
        faults.append(
            f"MONGODB_URI_FILE: {file} is empty"
            if file
            else "MONGODB_URI: required, for example mongodb://localhost:27017"
        )
        return ""
    faults.extend(_uri_faults(uri))
    return uri


def _split_uri(uri: str) -> tuple[str, str, str, str]:
    """Split a URI into user information, hosts, database and options, all as written."""
    rest = _SCHEME.sub("", uri, count=1)
    base, _, options = rest.partition("?")
    authority, _, database = base.partition("/")
    userinfo, _, hosts = authority.rpartition("@")
    return userinfo, hosts, unquote_plus(database), options


def _uri_faults(uri: str) -> list[str]:
    """Return what is wrong with a URI.

    The driver's own messages quote what they stumbled over, which after an unescaped `/`, `?` or
    `@` is the tail of the password. So whatever stands near it is checked here, in words of ours.
    """
    if not _SCHEME.match(uri):
        return ["MONGODB_URI: must begin with mongodb:// or mongodb+srv://"]
    userinfo, hosts, database, options = _split_uri(uri)
    if "@" in database + options or "@" in userinfo or userinfo.count(":") > 1:
        return [_ENCODE]
    if re.search(r"%(?![0-9A-Fa-f]{2})", userinfo):
        return [_ENCODE]
    if not all(_HOST.fullmatch(host) for host in hosts.split(",")):
        return [_HOSTS]
    faults = []
    try:
        _database_name(database or "oms_db")
    except ValueError as error:
        faults.append(f"MONGODB_URI: the database name {error}")
    for option in filter(None, re.split("[&;]", options)):
        name, given, _ = option.partition("=")
        try:
            if given:
                split_options(option, warn=False)
            else:
                faults.append("MONGODB_URI: options must be name=value, separated by &")
        except (PyMongoError, ValueError, TypeError, OSError) as error:
            wrong = "unknown option" if "Unknown option" in str(error) else "bad value of option"
            faults.append(f"MONGODB_URI: {wrong} {name}")
    if not faults:
        faults = _driver_faults(uri)
    return faults


def _driver_faults(uri: str) -> list[str]:
    """Let the driver judge the whole: how options go together, and files that they name."""
    try:
        MongoClient[dict[str, Any]](uri, connect=False).close()
    except (PyMongoError, ValueError, TypeError, OSError) as error:
        reason = str(error)
        userinfo, _, _, options = _split_uri(uri)
        password = userinfo.partition(":")[2]
        secrets = {password, unquote_plus(password)}
        secrets |= {o.partition("=")[2] for o in options.split("&") if "password" in o.lower()}
        if any(secret and secret in reason for secret in secrets):
            reason = "the driver rejects it (its reason would show a credential)"
        return [f"MONGODB_URI: {reason}"]
    return []


def _database_name(text: str) -> str:
    if len(text.encode()) > 63 or re.search(r'[/\\. "$*<>:|?\0]', text):
        raise ValueError('must be under 64 bytes, without spaces and / \\ . " $ * < > : | ?')
    return text


def _collection_name(text: str) -> str:
    if "$" in text or "\0" in text or ".." in text or text.strip(".") != text:
        raise ValueError(f"{text!r} is not a collection name")
    if text.startswith("system."):
        raise ValueError(f"{text!r} belongs to the server")
    return text


def _statuses(text: str) -> tuple[str, ...]:
    statuses = tuple(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))
    if not statuses:
        raise ValueError("names no status; expected for example Shipped or Shipped,Delivered")
    return statuses


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(f"{text!r} is not a whole number from {low} to {high:,}")
        return int(text)

    return parse


def _duration(longest: timedelta) -> Callable[[str], timedelta]:
    def parse(text: str) -> timedelta:
        match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
        seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
        if not 1 <= seconds <= longest.total_seconds():
            raise ValueError(
                f"{text!r} is not a time from 1s to {longest.days}d, such as 90s, 30m, 2h or 1d"
            )
        return timedelta(seconds=seconds)

    return parse


def _log_level(text: str) -> str:
    if text.upper() not in LOG_LEVELS:
        raise ValueError(f"{text!r} is not one of {', '.join(LOG_LEVELS)}")
    return text.upper()
