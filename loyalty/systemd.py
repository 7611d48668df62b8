"""The service's side of systemd's protocols: notifications, the watchdog and the environment."""

import os
import socket
from contextlib import suppress
from math import inf
from pathlib import Path

# systemd sets these for the main process only, or with another value for each process.
_MAIN_PROCESS_VARIABLES = {
    "JOURNAL_STREAM",
    "NOTIFY_SOCKET",
    "SYSTEMD_EXEC_PID",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
}


def notify(*assignments: str) -> None:
    """Send assignments such as "READY=1" in one message, see sd_notify(3).

    Without systemd, or when it does not listen, nothing happens.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # only a leading @ stands for a null byte
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, suppress(OSError):
        sender.sendto("\n".join(assignments).encode(), address)


def watchdog_seconds() -> float:
    """Return the time within which systemd expects "WATCHDOG=1", see sd_watchdog_enabled(3).

    Infinite without a watchdog, and if the watchdog is meant for another process.
    """
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return inf
    return int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 or inf


def update_environment() -> None:
    """Copy the environment written by `systemctl reload` into this process.

    systemd reads EnvironmentFile= again for each command of a unit, but cannot change the
    environment of a process that runs. So ExecReload= of the unit leaves its own environment in a
    file in the runtime directory, with a null byte after each variable. Without that file nothing
    changes.
    """
    directory = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if not directory:
        return
    try:
        content = Path(directory, "environment").read_bytes()
    except FileNotFoundError:
        return
    found = dict(line.split("=", 1) for line in os.fsdecode(content).split("\0") if "=" in line)
    for name in (os.environ.keys() | found.keys()) - _MAIN_PROCESS_VARIABLES:
        if name in found:
            os.environ[name] = found[name]
        else:
            del os.environ[name]
