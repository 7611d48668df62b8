"""Where the log goes and how it looks: for the journal, or for people."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from datetime import UTC, datetime

log = logging.getLogger("loyalty")


def log_to_stderr() -> None:
    """Set up logging: for the journal if that is where stderr goes, for people otherwise."""
    handler = logging.StreamHandler()
    handler.setFormatter(_formatter("text"))
    # Other libraries only from WARNING on: at DEBUG the driver logs commands and documents.
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("loyalty").setLevel(logging.INFO)


def set_log_format(form: str) -> None:
    """Let the log be lines for people, or (`json`) objects for programs, from now on."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_formatter(form))


class WarnOnce:
    """Log each event as a warning once, and again only after a `reset`."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def __call__(self, event: str, error: object) -> None:
        if event not in self._logged:
            self._logged.add(event)
            log.warning('%s error="%s"', event, error, extra={"event": event})

    def reset(self, event: str) -> None:
        """Let the next warning of this event be logged: what it warned of works again."""
        self._logged.discard(event)


def _formatter(form: str) -> logging.Formatter:
    is_json, under_journal = form.strip().lower() == "json", _under_journal()
    line = "%(message)s" if under_journal else "%(asctime)s %(levelname)s %(message)s"
    formatter = _JsonFormatter() if is_json else logging.Formatter(line, "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    return _JournalFormatter(formatter) if under_journal else formatter


class _JsonFormatter(logging.Formatter):
    """One object a line, with the same keys in each."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        ours = message.split(maxsplit=1)[0] if record.name == "loyalty" and message else record.name
        trace = self.formatException(record.exc_info) if record.exc_info else None
        line = {
            "time": f"{datetime.fromtimestamp(record.created, UTC):%Y-%m-%dT%H:%M:%S.%fZ}",
            "level": record.levelname,
            "event": getattr(record, "event", ours),
            "message": message,
            "fields": getattr(record, "fields", {}),
            "traceback": trace,
        }
        return json.dumps(line)


class _JournalFormatter(logging.Formatter):
    """The journal adds the time, and takes each line's priority from its start (sd-daemon(3))."""

    def __init__(self, line: logging.Formatter) -> None:
        super().__init__()
        self._line = line

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelno
        priority = 3 if level >= logging.ERROR else 4 if level >= logging.WARNING else 6
        return "\n".join(f"<{priority}>{line}" for line in self._line.format(record).splitlines())


def _under_journal() -> bool:
    try:
        stderr = os.fstat(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):  # closed, or no file
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"
