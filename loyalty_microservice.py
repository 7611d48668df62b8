#!/usr/bin/env python3
"""The entry point: handles signals during the imports, then runs `loyalty.cli`."""

import os
import signal
import sys


def _is_daemon() -> bool:
    """Return whether the arguments start the daemon, which has no option but --env-file."""
    return all(a.startswith("--env-file") for a in sys.argv[1:] if a.startswith("-"))


def _exit_on_early_signal(number: int, _frame: object) -> None:
    # A daemon that is stopped has succeeded; a command that is stopped has not done its work.
    os._exit(0 if _is_daemon() else 128 + number)


# The imports take a second. A command keeps this handler of SIGTERM until it ends. The handler may
# interrupt a write, because every write can be repeated.
if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _exit_on_early_signal)
    if _is_daemon():  # SIGHUP waits until the daemon runs, which then reloads its settings
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})

from loyalty.cli import main, run_process

__all__ = ["main"]

if __name__ == "__main__":
    run_process()
