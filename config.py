"""Settings: each declared once, read from a mapping that is passed in, checked whole, immutable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from loyalty.errors import ConfigurationError
from loyalty.mongo.uri import database_name, split_uri, uri_faults
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

VERSION = "1.0.0"


@dataclass(frozen=True, slots=True)
class SettingSpec:
    """What there is to know of a setting: its variable, how to read it, and a line of help."""

    name: str
    default: str
    parse: Parser
    help: str


def setting(name: str, default: str, parse: Parser, text: str, *, format_value: bool = True) -> Any:
    """Declare a setting; `default` is what a person would write, "" for none."""
    setting = SettingSpec(name, default, parse, text)
    return dataclasses.field(metadata={"declared": setting}, repr=format_value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the service was told; `load` is the way to make one, `.env.example` explains each."""

    mongodb_uri: str = setting(
        "MONGODB_URI",
        "",
        str,
        "required; or MONGODB_URI_FILE, a file that holds it",
        format_value=False,
    )
    database: str = setting("MONGODB_DATABASE", "", database_name, "else the URI's, else oms_db")
    orders: str = setting("ORDERS_COLLECTION", "orders", collection, "")
    users: str = setting("USERS_COLLECTION", "users", collection, "")
    recounts: str = setting(
        "RECOUNTS_COLLECTION",
        "loyalty_recounts",
        collection,
        "where the records go; empty: keep none",
    )
    order_statuses: tuple[str, ...] = setting(
        "ORDER_STATUSES", "Shipped", statuses, "comma-separated, exactly as stored"
    )
    points_per_order: int = setting(
        "POINTS_PER_ORDER", "1", whole_number(1, 1_000_000), "1 to 1,000,000"
    )
    status_field: str = setting(
        "ORDER_STATUS_FIELD", "status", field, "dots lead into nested documents"
    )
    customer_field: str = setting(
        "ORDER_CUSTOMER_FIELD", "customer_id", field, "the id of an order's customer"
    )
    points_field: str = setting(
        "USER_POINTS_FIELD", "loyalty_points", field, "where a user's points are written"
    )
    recount_interval: timedelta = setting(
        "RECOUNT_INTERVAL", "2h", duration(timedelta(days=366)), "90s, 30m, 2h, 1d; at most 366d"
    )
    live_updates: bool = setting(
        "LIVE_UPDATES", "no", yes, "yes: right within a second; needs a replica set"
    )
    # The server takes maxTimeMS as a 32-bit number, which ends after 24 days.
    count_timeout: timedelta = setting(
        "COUNT_TIMEOUT", "10m", duration(timedelta(days=24)), "for one aggregation; at most 24d"
    )
    count_workers: int = setting(
        "COUNT_WORKERS", "2", whole_number(1, 16), "ranges counted side by side, 1 to 16"
    )
    max_decrease_percent: int = setting(
        "MAX_DECREASE_PERCENT", "90", whole_number(0, 100), "the guard, 0 to 100; 100 turns it off"
    )
    batch_size: int = setting(
        "BATCH_SIZE", "1000", whole_number(1, 100_000), "users in one write, 1 to 100,000"
    )
    retention: timedelta = setting(
        "RETENTION",
        "90d",
        duration(timedelta(days=3660)),
        "how long records are kept; at most 3660d",
    )
    log_level: str = setting(
        "LOG_LEVEL",
        "INFO",
        one_of("DEBUG", "INFO", "WARNING", "ERROR"),
        "DEBUG, INFO, WARNING or ERROR",
    )
    log_format: str = setting(
        "LOG_FORMAT", "text", one_of("text", "json"), "text; or json: one object a line"
    )
    metrics_file: str = setting(
        "METRICS_FILE", "", metrics_file, "a .prom file for node_exporter; empty: none"
    )

    @property
    def count_ms(self) -> int:
        """`count_timeout` as the server takes it (maxTimeMS)."""
        return int(self.count_timeout.total_seconds() * 1000)

    @property
    def hosts(self) -> str:
        """The hosts of the URI, as written; never its credentials."""
        return split_uri(self.mongodb_uri)[1]

    def format_value(self) -> dict[str, Any]:
        """Return all values by the name of their variable, but for the URI with its password."""
        names = {attribute: setting.name for attribute, setting in declared().items()}
        return {
            name: getattr(self, attribute)
            for attribute, name in names.items()
            if name != "MONGODB_URI"
        }


def declared() -> dict[str, SettingSpec]:
    """Return what is declared of each setting, by the name of its attribute."""
    return {f.name: f.metadata["declared"] for f in dataclasses.fields(Settings)}


def settings_help() -> str:
    """Return a line on each setting, as --help has it."""
    lines = []
    for setting in declared().values():
        default = setting.default and f"(default: {setting.default})"
        lines.append(f"  {setting.name:<21} {' '.join(filter(None, [setting.help, default]))}")
    return "\n".join(lines)


def load(values: Mapping[str, str]) -> Settings:
    """Check `values` (as in `os.environ`) and return the settings.

    A value that is empty counts as not given, save `RECOUNTS_COLLECTION`, where it means "none".
    Raises ConfigurationError with every fault at once.
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
    faults += _cross_checks(settings)
    if faults:
        raise ConfigurationError(*faults)
    return settings


def _cross_checks(settings: Settings) -> list[str]:
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
            faults.append(f"MONGODB_URI_FILE: {file}: {reason(error)}")
            return ""
    if uri:
        faults.extend(f"MONGODB_URI: {fault}" for fault in uri_faults(uri))
    elif file:
        faults.append(f"MONGODB_URI_FILE: {file} is empty")
    else:
        faults.append("MONGODB_URI: required, for example mongodb://localhost:27017")
    return uri


def reason(error: OSError | UnicodeDecodeError) -> str:
    """Return why a file cannot be read, in a few words."""
    return str(error.strerror) if isinstance(error, OSError) else "it is not UTF-8 text"
