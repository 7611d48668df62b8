"""The service's side of systemd's protocols: notifications and the watchdog."""

import os
import socket
from contextlib import suppress
from math import inf


def notify(*assignments: str) -> None:
    """Send assignments such as "READY=1" in one message, see sd_notify(3).

    Without systemd, and after an error of the socket, nothing happens.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # only a leading @ stands for a null byte
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto("\n".join(assignments).encode(errors="replace"), address)


def read_watchdog_seconds() -> float:
    """Return the time within which systemd expects "WATCHDOG=1", see sd_watchdog_enabled(3).

    Infinite without a watchdog, and if the watchdog is meant for another process.
    """
    if (os.environ.get("WATCHDOG_PID") or str(os.getpid())) != str(os.getpid()):
        return inf
    return int(os.environ.get("WATCHDOG_USEC") or 0) / 1e6 or inf
