"""The service as a process of its own: for the tests, the demo and the soak."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from sandbox.mongod import DEADLINE_SECONDS, SandboxError, bind_to_parent, wait_until

PROGRAM = Path(__file__).parents[1] / "loyalty_microservice.py"
STOP_SECONDS = 2.0  # the promise: from SIGTERM or Ctrl-C to its end


def service_environment(**settings: str) -> dict[str, str]:
    """Return this process's environment with these settings, and with none of the reader's."""
    example = PROGRAM.with_name(".env.example").read_text(encoding="utf-8")
    # What .env.example names is what there is to set; the rest is systemd's.
    theirs = {*re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE)}
    theirs |= {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}
    return {name: value for name, value in os.environ.items() if name not in theirs} | settings


class Process:
    """One run of the service, its output at the end of `log`.

    Start it from the main thread: it ends with the thread that started it.
    """

    def __init__(
        self, *arguments: str, log: Path, program: Path = PROGRAM, **settings: str
    ) -> None:
        if program == PROGRAM and "--env-file" not in arguments:  # nor the reader's own file
            arguments = ("--env-file", os.devnull, *arguments)
        self._log = log
        with log.open("ab") as output:
            self._start = output.tell()
            self._process = subprocess.Popen(
                bind_to_parent([sys.executable, str(program), *arguments], signal.SIGTERM),
                env=service_environment(**settings),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for us, not for it
            )
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        """What it has said so far, in whole lines."""
        with self._log.open("rb") as log:
            log.seek(self._start)
            return log.read().rpartition(b"\n")[0].decode(errors="replace")

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()

    @property
    def code(self) -> int | None:
        """Its exit code, once it has ended."""
        return self._process.poll()

    def catches_sigterm(self) -> bool:
        """Whether it is past Python's own start, where a signal just ends it."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return bool(int(status.split("SigCgt:")[1].split()[0], 16) & 1 << (signal.SIGTERM - 1))

    def wait_for(self, text: str, times: int = 1) -> None:
        """Return once `text` stands in that many lines. Raises SandboxError."""

        def seen() -> bool:
            return sum(text in line for line in self.lines) >= times

        with suppress(SandboxError):
            wait_until(text, lambda: seen() or self.code is not None)
        if not seen():
            raise SandboxError(f"{text!r} is not {times} times in:\n{self.output}")

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, within: float = DEADLINE_SECONDS) -> int:
        """Return the exit code. Raises SandboxError if that takes longer than `within` seconds.

        Time in which its threads wanted to run and others had the CPU does not count. So it makes
        no difference how busy the machine is, and to wait for anything else does.
        """
        started = time.monotonic()
        before = queued = self._queued()
        while self.code is None and time.monotonic() - started < DEADLINE_SECONDS + within:
            time.sleep(0.02)
            queued = queued | self._queued()
        took = time.monotonic() - started
        lost = sum(queued.values()) - sum(before.values())
        if self.code is None or took - lost > within:
            raise SandboxError(
                f"its end took {took:.1f} s, {lost:.1f} of them without a CPU, and not {within:g} "
                f"(exit code {self.code}):\n{self.output}"
            )
        return self.code

    def _queued(self) -> dict[str, float]:
        """Return for how many seconds each thread has stood in line for a CPU (Linux)."""
        queued: dict[str, float] = {}
        for file in Path(f"/proc/{self.pid}/task").glob("*/schedstat"):
            with suppress(OSError):  # the thread has just ended
                queued[file.parent.name] = int(file.read_text(encoding="ascii").split()[1]) / 1e9
        return queued

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and return the exit code. Raises SandboxError after STOP_SECONDS."""
        self.send(number)
        return self.wait(STOP_SECONDS)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
