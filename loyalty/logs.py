"""Where the log goes and how it looks: for the journal, or for people."""

from __future__ import annotations

import logging
import os
import sys
import time


def log_to_stderr() -> None:
    """Set up logging: for the journal if that is where stderr goes, for people otherwise."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JournalFormatter() if _under_journal() else _TerminalFormatter())
    # Other libraries only from WARNING on: at DEBUG the driver logs commands and documents.
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("loyalty").setLevel(logging.INFO)


class _TerminalFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        self.converter = time.gmtime


class _JournalFormatter(logging.Formatter):
    """The journal adds the time, and takes each line's priority from its start (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelno
        priority = 3 if level >= logging.ERROR else 4 if level >= logging.WARNING else 6
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def _under_journal() -> bool:
    try:
        stderr = os.fstat(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):  # closed, or no file
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"
