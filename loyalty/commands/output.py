"""The output of all commands: lines, tables and JSON on stdout."""

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from bson import Timestamp

from loyalty.errors import Exit, ServiceError
from loyalty.logs import escape_control_characters
from loyalty.mongo.values import Document
from loyalty.parsers import format_duration


class ResultsNotWritten(ServiceError):
    """stdout cannot be written: its disk is full, for example."""

    exit_code = Exit.FINDINGS


@contextmanager
def _writing_results() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        # `--status | head -1`: the reader has seen enough, and the exit code must not change.
        sys.stdout = io.StringIO()
    except OSError as error:
        raise ResultsNotWritten(f"stdout: {error.strerror}") from error


def print_line(text: str) -> None:
    """Print one line, with control characters escaped. Raises ResultsNotWritten."""
    with _writing_results():
        print(escape_control_characters(text))


def flush_results() -> None:
    """Write what is still buffered. Raises ResultsNotWritten."""
    if sys.stdout is not None:  # None: it was closed before the start
        with _writing_results():
            sys.stdout.flush()


def print_table(*rows: Sequence[str]) -> None:
    """Print rows of cells in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print_line("  " + "  ".join(map(str.ljust, row, widths)).rstrip())


def print_json(document: Document) -> None:
    """Print a document on one line: times as ISO 8601 in UTC, durations in seconds."""
    print_line(json.dumps(document, default=_convert_value))


def _convert_value(value: object) -> object:
    match value:
        case datetime():
            utc = value.astimezone(UTC)
            return utc.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        case timedelta():
            return value.total_seconds()
        case Timestamp():
            return {"t": value.time, "i": value.inc}
    return str(value)


def format_cell(value: object) -> str:
    """Return a value as a table shows it."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case datetime():
            return f"{value:%Y-%m-%d %H:%M:%S}"
        case timedelta():
            return format_duration(value)
        case tuple():
            return ", ".join(value)
    return str(value) or "none"


def pluralize(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
