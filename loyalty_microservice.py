#!/usr/bin/env python3
"""The entry point: answers signals during the imports, then runs `loyalty.cli`."""

from __future__ import annotations

import os
import signal
import sys


def _exit_on_early_signal(number: int, _frame: object) -> None:
    commands = [a for a in sys.argv[1:] if a.startswith("-") and not a.startswith("--env-file")]
    # A daemon that is stopped has succeeded; a command that is stopped has not done its work.
    is_success = number == signal.SIGTERM and not commands
    os._exit(0 if is_success else 128 + number)


# The imports take a second. Nothing has started until `main` installs its own handlers.
if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _exit_on_early_signal)

from loyalty.cli import main, run_process

__all__ = ["main"]

if __name__ == "__main__":
    run_process()
