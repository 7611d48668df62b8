"""systemd's protocols, with a socket in place of systemd."""

from __future__ import annotations

import os
import resource
import socket
from math import inf
from pathlib import Path
from uuid import uuid4

import pytest

from loyalty import systemd


@pytest.mark.parametrize("name", ["notify", "loyalty@books", "@"])
def test_a_notification_reaches_a_socket_whose_path_contains_an_at_sign(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _assert_received(str(tmp_path / name), str(tmp_path / name), monkeypatch)


@pytest.mark.parametrize("suffix", ["", "@books"])
def test_a_leading_at_sign_is_an_abstract_socket(
    suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"loyalty-{uuid4().hex}{suffix}"
    _assert_received(f"\0{name}", f"@{name}", monkeypatch)


def _assert_received(address: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", variable)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address)
        receiver.settimeout(10)
        systemd.notify("READY=1", "STATUS=connected")
        assert receiver.recv(4096) == b"READY=1\nSTATUS=connected"


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "@no-such-socket", "x" * 200])
def test_a_notification_without_a_listener_is_dropped(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.notify("READY=1", "STATUS=not UTF-8: \udce4")


def test_a_notification_is_dropped_while_the_process_can_open_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        systemd.notify("WATCHDOG=1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, inf),
        ({"WATCHDOG_USEC": "0"}, inf),
        ({"WATCHDOG_USEC": ""}, inf),
        ({"WATCHDOG_USEC": "100000"}, 0.1),
        ({"WATCHDOG_USEC": "100000", "WATCHDOG_PID": ""}, 0.1),
        ({"WATCHDOG_USEC": "100000", "WATCHDOG_PID": str(os.getpid())}, 0.1),
        ({"WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}, inf),
    ],
)
def test_the_watchdog_is_only_for_the_process_it_names(
    environment: dict[str, str], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert systemd.read_watchdog_seconds() == seconds
