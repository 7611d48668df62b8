#!/usr/bin/env python3
"""The command: parse, load settings, connect, dispatch, exit codes."""

from __future__ import annotations

import os
import signal
import sys


def _exit_on_early_signal(number: int, _frame: object) -> None:
    modes = [a for a in sys.argv[1:] if a.startswith("-") and not a.startswith("--env-file")]
    # A daemon that is told to stop has done so; of anything else, nobody is to think it is done.
    asked_to_stop = number == signal.SIGTERM and not modes
    os._exit(0 if asked_to_stop else 128 + number)


# Nothing has been begun until `main` takes over.
if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _exit_on_early_signal)

import io
import logging

from loyalty.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every terminal has every letter
        sys.stdout.reconfigure(errors="backslashreplace")
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.shutdown()
    os._exit(code)  # the driver's exit handler would wait for each server that does not answer
