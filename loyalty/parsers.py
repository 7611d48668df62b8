"""What a setting's value must look like: each parser returns it, or raises ValueError."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}

Parser = Callable[[str], Any]


def collection(text: str) -> str:
    if "$" in text or "\0" in text or ".." in text or text.strip(".") != text:
        raise ValueError(f"{text!r} is not a collection name")
    if text.startswith("system."):
        raise ValueError(f"{text!r} belongs to the server")
    return text


def field(text: str) -> str:
    if not all(re.fullmatch(r"[^$\0\s][^\0]*", part) for part in text.split(".")):
        raise ValueError(f"{text!r} is not the name of a field, such as status or order.status")
    return text


def statuses(text: str) -> tuple[str, ...]:
    parts = (part.strip() for part in text.split(","))
    # In quotes a status may begin or end with a blank.
    bare = (part[1:-1] if re.fullmatch(r"'.*'|\".*\"", part) else part for part in parts)
    found = tuple(dict.fromkeys(filter(None, bare)))
    if not found:
        raise ValueError("names no status; expected for example Shipped or Shipped,Delivered")
    return found


def whole_number(low: int, high: int) -> Parser:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(f"{text!r} is not a whole number from {low:,} to {high:,}")
        return int(text)

    return parse


def duration(longest: timedelta) -> Parser:
    def parse(text: str) -> timedelta:
        match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
        seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
        if not 1 <= seconds <= longest.total_seconds():
            raise ValueError(
                f"{text!r} is not a time from 1s to {longest.days}d, such as 90s, 30m, 2h or 1d"
            )
        return timedelta(seconds=seconds)

    return parse


def format_duration(time: timedelta) -> str:
    """Return a time as an operator writes it, see `duration`; what is long is rounded."""
    seconds = int(time.total_seconds())
    for unit, size in _SECONDS.items():
        if seconds >= size and (seconds % size == 0 or seconds >= 100 * size):
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def one_of(*words: str) -> Parser:
    def parse(text: str) -> str:
        if found := [word for word in words if word.lower() == text.lower()]:
            return found[0]
        raise ValueError(f"{text!r} is not one of {', '.join(words)}")

    return parse


def yes(text: str) -> bool:
    return bool(one_of("yes", "no")(text) == "yes")


def metrics_file(text: str) -> str:
    # node_exporter leaves a file with another ending alone.
    if text and not (Path(text).is_absolute() and text.endswith(".prom")):
        raise ValueError(f"{text!r} is not the whole path of a file that ends in .prom")
    return text
