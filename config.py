"""Settings: each is declared once, parsed from a mapping, and immutable."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from bson import json_util

from loyalty.errors import ConfigurationError
from loyalty.mongo.uri import parse_database, read_uri, split_uri
from loyalty.parsers import (
    Parser,
    check_text,
    choice_parser,
    duration_parser,
    integer_parser,
    none_or,
    parse_boolean,
    parse_collection,
    parse_field,
    parse_order_filter,
    parse_points_field,
    parse_prom_path,
    parse_reference_field,
    parse_statuses,
)

VERSION = "1.1.0"
SECRETS = ("MONGODB_URI",)  # never in a log or in an output


@dataclass(frozen=True, slots=True)
class SettingSpec:
    """The declaration of a setting: its variable, its default as a string, and a line of help."""

    name: str
    default: str
    parse: Parser
    description: str


def setting(name: str, default: str, parse: Parser, description: str) -> Any:
    """Declare a setting. `default` is a text as in `.env`; "" means that there is no default."""
    spec = SettingSpec(name, default, parse, description)
    return dataclasses.field(metadata={"spec": spec}, repr=name not in SECRETS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one service, made by `load`; `.env.example` explains each."""

    mongodb_uri: str = setting(
        "MONGODB_URI", "", str, "connection string, required; or MONGODB_URI_FILE, a file with it"
    )
    database: str = setting(
        "MONGODB_DATABASE", "", parse_database, "database; default: that in MONGODB_URI, or oms_db"
    )
    orders: str = setting("ORDERS_COLLECTION", "orders", parse_collection, "collection of orders")
    users: str = setting("USERS_COLLECTION", "users", parse_collection, "collection of users")
    recounts: str = setting(
        "RECOUNTS_COLLECTION",
        "loyalty_recounts",
        none_or(parse_collection),
        "collection of records, or none",
    )
    changes: str = setting(
        "CHANGES_COLLECTION",
        "loyalty_changes",
        none_or(parse_collection),
        "collection of the change log for --undo, or none",
    )
    retention: timedelta = setting(
        "RETENTION", "90d", duration_parser(3650), "lifetime of records and changes, up to 3650d"
    )
    order_statuses: tuple[str, ...] = setting(
        "ORDER_STATUSES", "Shipped", parse_statuses, "counted statuses, comma-separated"
    )
    points_per_order: int = setting(
        "POINTS_PER_ORDER", "1", integer_parser(1, 10**6), "points for one order, 1 to 1,000,000"
    )
    status_field: str = setting(
        "ORDER_STATUS_FIELD",
        "status",
        parse_field,
        "field of an order with its status; order.state if nested",
    )
    customer_field: str = setting(
        "ORDER_CUSTOMER_FIELD",
        "customer_id",
        parse_reference_field,
        "field of an order with the customer id",
    )
    order_filter: Mapping[str, Any] = setting(
        "ORDER_FILTER", "none", parse_order_filter, "condition on orders, a JSON object, or none"
    )
    user_key_field: str = setting(
        "USER_KEY_FIELD", "_id", parse_field, "field of a user that orders refer to"
    )
    points_field: str = setting(
        "USER_POINTS_FIELD", "loyalty_points", parse_points_field, "field of a user's points"
    )
    recount_interval: timedelta = setting(
        "RECOUNT_INTERVAL", "2h", duration_parser(366), "time between recounts, 1s to 366d"
    )
    live_updates: bool = setting(
        "LIVE_UPDATES", "no", parse_boolean, "live updates, yes or no; not on a standalone server"
    )
    # The server takes maxTimeMS as a 32-bit number, which ends after 24 days.
    count_timeout: timedelta = setting(
        "COUNT_TIMEOUT", "10m", duration_parser(24), "time limit of one aggregation, 1s to 24d"
    )
    count_workers: int = setting(
        "COUNT_WORKERS", "2", integer_parser(1, 16), "aggregations in parallel, 1 to 16"
    )
    max_decrease_percent: int = setting(
        "MAX_DECREASE_PERCENT",
        "90",
        integer_parser(0, 100),
        "percentage of users with points who may lose points, 0 to 100",
    )
    batch_size: int = setting(
        "BATCH_SIZE", "1000", integer_parser(1, 100_000), "users in one write, 1 to 100,000"
    )
    log_level: str = setting(
        "LOG_LEVEL",
        "INFO",
        choice_parser("DEBUG", "INFO", "WARNING", "ERROR"),
        "lowest level that is logged: DEBUG, INFO, WARNING, ERROR",
    )
    log_format: str = setting(
        "LOG_FORMAT", "text", choice_parser("text", "json"), "format of log lines, text or json"
    )
    metrics_file: str = setting(
        "METRICS_FILE", "none", none_or(parse_prom_path), "absolute path of a .prom file or none"
    )

    @property
    def count_ms(self) -> int:
        """`count_timeout` in milliseconds, for maxTimeMS."""
        return int(self.count_timeout.total_seconds() * 1000)

    @property
    def hosts(self) -> str:
        """The hosts of the URI, as written; never its credentials."""
        return split_uri(self.mongodb_uri).hosts

    @property
    def order_filter_json(self) -> str:
        """`order_filter` as a string: a stored document must not have operators as field names."""
        return json_util.dumps(dict(self.order_filter)) if self.order_filter else ""

    def to_dict(self) -> dict[str, Any]:
        """Return all values by the names of their variables, without secrets."""
        values = {spec.name: getattr(self, name) for name, spec in setting_specs().items()}
        values["ORDER_FILTER"] = self.order_filter_json
        return {name: value for name, value in values.items() if name not in SECRETS}

    def to_record(self) -> dict[str, Any]:
        """Return the settings that say what is counted, and where, for the record of a recount.

        The names of their variables begin with ORDER, POINTS or USER.
        """
        values = {
            name: getattr(self, name)
            for name, spec in setting_specs().items()
            if spec.name.startswith(("ORDER", "POINTS", "USER"))
        }
        # Sorted: services with the same statuses or conditions in another order count the same.
        values["order_statuses"] = sorted(self.order_statuses)
        by_field = dataclasses.replace(self, order_filter=dict(sorted(self.order_filter.items())))
        values["order_filter"] = by_field.order_filter_json
        return values


def setting_specs() -> dict[str, SettingSpec]:
    """Return all declarations, by attribute of `Settings`."""
    return {f.name: f.metadata["spec"] for f in dataclasses.fields(Settings)}


def settings_help() -> str:
    """Return a line for each setting."""
    lines = []
    for spec in setting_specs().values():
        default = f" (default: {spec.default})" if spec.default else ""
        lines.append(f"  {spec.name:<21} {spec.description}{default}")
    return "\n".join(lines)


def load(values: Mapping[str, str], problems: Iterable[str] = ()) -> Settings:
    """Parse and check the values of variables; an empty value is treated as unset.

    Raises ConfigurationError with all problems, including `problems`.
    """
    nonempty = {name: value for name, value in values.items() if value.strip()}
    uri, uri_problems = read_uri(nonempty)
    database_in_uri = "" if uri_problems else split_uri(uri).database
    texts = {"MONGODB_DATABASE": database_in_uri or "oms_db"} | nonempty | {"MONGODB_URI": uri}
    problems = [*problems, *uri_problems]
    parsed: dict[str, Any] = {}
    for attribute, spec in setting_specs().items():
        text = texts.get(spec.name, spec.default)
        try:
            check_text(text)
            # Whitespace at the ends may belong to a status.
            parsed[attribute] = spec.parse(text if spec.parse is parse_statuses else text.strip())
        except ValueError as error:
            problems.append(f"{spec.name}: {error}")
            parsed[attribute] = spec.parse(spec.default)  # for the cross-checks
    settings = Settings(**parsed)
    problems += _find_conflicts(settings)
    if problems:
        raise ConfigurationError(*problems)
    return settings


def _find_conflicts(settings: Settings) -> list[str]:
    problems = []
    names = {"ORDERS_COLLECTION": settings.orders, "USERS_COLLECTION": settings.users}
    optional = {"RECOUNTS_COLLECTION": settings.recounts, "CHANGES_COLLECTION": settings.changes}
    names |= {name: collection for name, collection in optional.items() if collection}
    if len(set(names.values())) < len(names):
        problems.append(f"{', '.join(names)}: must be different collections")
    if settings.database in ("admin", "config", "local"):
        problems.append(
            f"MONGODB_DATABASE: {settings.database!r} is reserved for the server; if this is the "
            "database in MONGODB_URI, set MONGODB_DATABASE"
        )
    if settings.retention < 2 * settings.recount_interval:
        problems.append(
            "RETENTION: must be at least twice RECOUNT_INTERVAL, or a record would expire before "
            "the next recount, whose safety checks need it"
        )
    if _overlap(settings.status_field, settings.customer_field):
        problems.append("ORDER_STATUS_FIELD, ORDER_CUSTOMER_FIELD: must be different fields")
    if _overlap(settings.points_field, "_id"):
        problems.append("USER_POINTS_FIELD: must not be _id, which identifies a user")
    elif _overlap(settings.points_field, settings.user_key_field):
        problems.append("USER_POINTS_FIELD, USER_KEY_FIELD: must be different fields")
    for name in settings.order_filter:
        if _overlap(name, settings.status_field):
            problems.append(f"ORDER_FILTER: must not contain {name}; use ORDER_STATUSES instead")
        if _overlap(name, settings.customer_field):
            problems.append(f"ORDER_FILTER: must not contain {name}, the ORDER_CUSTOMER_FIELD")
    return problems


def _overlap(field: str, other: str) -> bool:
    return f"{field}.".startswith(f"{other}.") or f"{other}.".startswith(f"{field}.")
