"""The service as a separate process, for the tests, the demo, the soak and the benchmark."""

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
STOP_SECONDS = 2.0  # the documented limit from SIGTERM or Ctrl-C to the end


def service_environment(**settings: str) -> dict[str, str]:
    """Return this process's environment with only these of the service's settings."""
    example = PROGRAM.with_name(".env.example").read_text(encoding="utf-8")
    # .env.example names every setting; the other three variables are systemd's.
    removed = {*re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE)}
    removed |= {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}
    return {name: value for name, value in os.environ.items() if name not in removed} | settings


class Process:
    """One run of the service, which appends its output to the file `log`.

    Start it from the main thread: it ends with the thread that starts it.
    """

    def __init__(
        self, *arguments: str, log: Path, program: Path = PROGRAM, **settings: str
    ) -> None:
        if program == PROGRAM and "--env-file" not in arguments:  # not the .env of the user
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
                start_new_session=True,  # Ctrl-C at the terminal does not reach it
            )
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        """Its output so far, up to the last complete line."""
        with self._log.open("rb") as log:
            log.seek(self._start)
            return log.read().rpartition(b"\n")[0].decode(errors="replace")

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()

    @property
    def exit_code(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self._process.poll()

    def catches_sigterm(self) -> bool:
        """Whether it handles SIGTERM. While Python itself starts, the signal just ends it."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return bool(int(status.split("SigCgt:")[1].split()[0], 16) & 1 << (signal.SIGTERM - 1))

    def wait_for(self, text: str, times: int = 1) -> None:
        """Return once that many lines contain `text`. Raises SandboxError."""

        def is_logged() -> bool:
            return sum(text in line for line in self.lines) >= times

        with suppress(SandboxError):
            wait_until(text, lambda: is_logged() or self.exit_code is not None)
        if not is_logged():
            raise SandboxError(f"{text!r} is not in {times} lines of:\n{self.output}")

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, within: float = DEADLINE_SECONDS) -> int:
        """Return the exit code. Raises SandboxError if it takes longer than `within` seconds.

        Time in which its threads were ready and waited for a CPU is subtracted, so that the result
        does not depend on how busy the machine is.
        """
        started = time.monotonic()
        before = queued = self._read_queued_seconds()
        while self.exit_code is None and time.monotonic() - started < DEADLINE_SECONDS + within:
            time.sleep(0.02)
            queued = queued | self._read_queued_seconds()
        seconds = time.monotonic() - started
        waited = sum(queued.values()) - sum(before.values())
        if self.exit_code is None or seconds - waited > within:
            raise SandboxError(
                f"it took {seconds:.1f} s to end, {waited:.1f} s of them waiting for a CPU; "
                f"the limit is {within:g} s (exit code {self.exit_code}):\n{self.output}"
            )
        return self.exit_code

    def _read_queued_seconds(self) -> dict[str, float]:
        """Return the seconds that each thread has waited for a CPU while ready (Linux)."""
        queued: dict[str, float] = {}
        for file in Path(f"/proc/{self.pid}/task").glob("*/schedstat"):
            with suppress(OSError):  # the thread has ended
                queued[file.parent.name] = int(file.read_text(encoding="ascii").split()[1]) / 1e9
        return queued

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal and return the exit code. Raises SandboxError after STOP_SECONDS."""
        self.send_signal(number)
        return self.wait(STOP_SECONDS)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
