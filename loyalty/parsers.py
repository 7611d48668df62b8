"""Parsers of the values of settings: each returns the value, or raises ValueError."""

import json
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import bson
from bson.errors import BSONError
from bson.json_util import JSONOptions, object_pairs_hook

SECONDS_PER_UNIT = {"d": 86400, "h": 3600, "m": 60, "s": 1}
# One status: in quotes, which are doubled inside it, or plain; then a comma or the end.
_STATUS = re.compile(r"""\s*(?:(["'])((?:(?!\1).|\1\1)*)\1\s*|([^,]*))(?:,|\Z)""", re.DOTALL)
_TRUE = ("yes", "true", "on", "1")
_FALSE = ("no", "false", "off", "0")

Parser = Callable[[str], Any]


def check_text(text: str) -> None:
    """Raise ValueError for a value of the environment that is not UTF-8."""
    if re.search("[\ud800-\udfff]", text):  # Python decodes such bytes as lone surrogates
        raise ValueError("is not UTF-8 text")


def none_or(parser: Parser) -> Parser:
    """Return a parser that returns "" for the word none, and otherwise calls `parser`."""

    def parse(text: str) -> Any:
        return "" if text.lower() == "none" else parser(text)

    return parse


def parse_collection(text: str) -> str:
    if "$" in text or "\0" in text or ".." in text or text.strip(".") != text:
        raise ValueError(f"{text!r} is not a collection name")
    if text.startswith("system."):
        raise ValueError(f"{text!r} is reserved for the server")
    return text


def parse_field(text: str) -> str:
    if not all(re.fullmatch(r"[^$\0\s][^\0]*", part) for part in text.split(".")):
        raise ValueError(f"{text!r} is not the name of a field, such as status or order.status")
    return text


def parse_points_field(text: str) -> str:
    """Parse the name of a field to write: `$set` of points.9 would extend an array `points`."""
    if any(part.isdecimal() for part in parse_field(text).split(".")[1:]):
        raise ValueError(f"{text!r} contains a number, which could be a position in an array")
    return text


def parse_reference_field(text: str) -> str:
    """Parse the name of a field, or of the id in a DBRef, such as customer.$id."""
    parse_field(text.removesuffix(".$id"))
    return text


def parse_order_filter(text: str) -> Mapping[str, Any]:
    """Parse one object in MongoDB Extended JSON, with a condition for each field; or none."""
    if text.lower() == "none":
        return MappingProxyType({})
    try:
        conditions = json.loads(text, object_pairs_hook=_convert_object)
        if not isinstance(conditions, dict):
            raise TypeError("not an object")
        bson.encode(conditions)  # raises for integers of more than 64 bits
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, BSONError) as error:
        reason = " ".join(str(error).split())
        example = '{"deleted": {"$ne": true}}'
        raise ValueError(f"not Extended JSON such as {example}: {reason}") from None
    for key in conditions:
        if key.startswith("$"):
            raise ValueError(f"{key!r} is an operator; the keys must be names of fields")
        parse_field(re.sub(r"\.\$(id|ref|db)\Z", "", key))  # the parts of a DBRef
    return MappingProxyType(conditions)


def _convert_object(pairs: list[tuple[str, Any]]) -> Any:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):  # JSON itself would keep the last one silently
        raise ValueError(f"duplicate key in {names}")
    return object_pairs_hook(pairs, JSONOptions(tz_aware=True))


def parse_statuses(text: str) -> tuple[str, ...]:
    """Parse a list of statuses, which are separated by commas and quoted as in CSV.

    Whitespace around a status is removed, except inside quotes. A single status keeps it, because
    `.env`, shells and YAML have removed the quotes around it.
    """
    found = []
    for match in _STATUS.finditer(text):
        quote, quoted, plain = match.groups()
        if quote:
            found.append(quoted.replace(quote * 2, quote))
        elif plain.startswith(("'", '"')):
            raise ValueError(f"{plain!r} begins with a quote, but has no closing quote at its end")
        else:
            is_whole_value = match.start() == 0 and match.end(3) == len(text)
            found.append(text.strip("\r\n") if is_whole_value else plain.strip())
    if not any(found):
        raise ValueError("contains no status; example: Shipped,Delivered")
    return tuple(dict.fromkeys(filter(None, found)))


def integer_parser(low: int, high: int) -> Parser:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(f"{text!r} is not an integer from {low:,} to {high:,}")
        return int(text)

    return parse


def duration_parser(max_days: int) -> Parser:
    def parse(text: str) -> timedelta:
        match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
        seconds = int(match[1]) * SECONDS_PER_UNIT[match[2]] if match else 0
        if not 1 <= seconds <= max_days * SECONDS_PER_UNIT["d"]:
            raise ValueError(
                f"{text!r} is not a duration from 1s to {max_days}d, such as 90s, 30m, 2h or 1d"
            )
        return timedelta(seconds=seconds)

    return parse


def format_duration(time: timedelta) -> str:
    """Return a time as `duration_parser` reads it.

    100 or more of a unit are rounded down to that unit: 6001 seconds to 100m.
    """
    seconds = int(time.total_seconds())
    for unit, size in SECONDS_PER_UNIT.items():
        if seconds >= size and (seconds % size == 0 or seconds >= 100 * size):
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def choice_parser(*words: str) -> Parser:
    def parse(text: str) -> str:
        if found := [word for word in words if word.lower() == text.lower()]:
            return found[0]
        raise ValueError(f"{text!r} is not one of {', '.join(words)}")

    return parse


def parse_boolean(text: str) -> bool:
    return choice_parser(*_TRUE, *_FALSE)(text) in _TRUE


def parse_prom_path(text: str) -> str:
    # node_exporter reads only files with this ending.
    if not (Path(text).is_absolute() and text.endswith(".prom")) or "\0" in text:
        raise ValueError(f"{text!r} is not the absolute path of a file that ends in .prom")
    return text


def describe_os_error(error: OSError | ValueError) -> str:
    """Return why a file cannot be read, without its name."""
    if isinstance(error, OSError):
        return str(error.strerror)
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
