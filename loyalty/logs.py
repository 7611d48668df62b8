"""The log on stderr: lines for the journal, lines for people, or one JSON object a line.

The first word of each format string is the name of the event, as in
`log.info("connected host=%s", host)`. Where it is a variable, `extra={"event": name}` repeats the
name. `extra={"fields": {...}}` has the values that programs need.
"""

import json
import logging
import os
import sys
import time
from datetime import UTC, datetime

LOGGER = "loyalty"

log = logging.getLogger(LOGGER)


def log_to_stderr() -> None:
    """Set up logging: for the journal if stderr is connected to it, for people otherwise."""
    handler = logging.StreamHandler()
    handler.setFormatter(_make_formatter("text"))
    # Other libraries only from WARNING on: at DEBUG the driver logs commands and documents.
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    log.setLevel(logging.INFO)


def set_log_format(name: str) -> None:
    """Switch to the log format `name`: `json`, or else lines as `log_to_stderr` sets up."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_make_formatter(name))


class WarnOnce:
    """Log an event as a warning once for each `subject`, and again only after a `reset`."""

    def __init__(self) -> None:
        self._logged: set[tuple[str, str]] = set()

    def __call__(self, event: str, error: object, subject: str = "") -> None:
        if (event, subject) not in self._logged:
            self._logged.add((event, subject))
            log.warning('%s error="%s"', event, error, extra={"event": event})

    def reset(self, event: str, subject: str = "") -> None:
        """Allow the next warning of this event: the operation has succeeded again."""
        self._logged.discard((event, subject))


def escape_control_characters(text: str) -> str:
    r"""Return `text` with every character that is not printable as an escape, such as `\n`.

    A stored value must not start a line of its own in the log, or control a terminal.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _make_formatter(name: str) -> logging.Formatter:
    is_json, under_journal = name.strip().lower() == "json", _is_under_journal()
    line = "%(message)s" if under_journal else "%(asctime)s %(levelname)s %(message)s"
    formatter = _JsonFormatter() if is_json else _TextFormatter(line, "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    return _JournalFormatter(formatter) if under_journal else formatter


class _TextFormatter(logging.Formatter):
    """One line for each event, except that a traceback has several lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 -- the library's name
        return escape_control_characters(super().formatMessage(record))


class _JsonFormatter(logging.Formatter):
    """One object a line, with the same keys in each."""

    def format(self, record: logging.LogRecord) -> str:
        # The formatted message could begin with a stored value.
        event = getattr(record, "event", "") or str(record.msg).partition(" ")[0]
        line = {
            "time": f"{datetime.fromtimestamp(record.created, UTC):%Y-%m-%dT%H:%M:%S.%fZ}",
            "level": record.levelname,
            "event": event if record.name == LOGGER else record.name,
            "message": record.getMessage(),
            "fields": getattr(record, "fields", {}),
            "traceback": self.formatException(record.exc_info) if record.exc_info else None,
        }
        return json.dumps(line)


class _JournalFormatter(logging.Formatter):
    """The journal adds the time, and reads the priority at the start of a line (sd-daemon(3))."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelno
        priority = 3 if level >= logging.ERROR else 4 if level >= logging.WARNING else 6
        lines = self._formatter.format(record).splitlines()
        return "\n".join(f"<{priority}>{line}" for line in lines)


def _is_under_journal() -> bool:
    try:
        stderr = os.fstat(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):  # stderr is closed, or not a file
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"
