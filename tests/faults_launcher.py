"""Runs the service in a process in which something is not as it should be.

- `faults_launcher.py clock FILE [arguments]`: the clock is set to the seconds in FILE.
- `faults_launcher.py pause SECONDS[,SECONDS] [arguments]`: the first pause after a failure is that
  long, and so is, with a second number, a try to connect.
- `faults_launcher.py bugs LIST [arguments]`: recounts raise what LIST says: count:KeyError,...
- `faults_launcher.py recounts NUMBER`: does that many; prints how much memory and files they take.
"""

from __future__ import annotations

import builtins
import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import time_machine

sys.path.insert(0, str(Path(__file__).parents[1]))

import config
import loyalty_microservice
from loyalty import daemon
from loyalty.concurrency import ignore_progress
from loyalty.mongo import connection as mongo
from loyalty.recount.counter import Count
from loyalty.recount.updates import Changes
from loyalty.retry import Backoff, RetryPolicy
from loyalty.service import Service

RECONNECT_EVERY = 10


def clock(file: str) -> None:
    """Set the clock now, and again whenever the file has changed."""
    traveller = time_machine.travel(current := float(Path(file).read_text()), tick=True).start()

    def follow() -> None:
        nonlocal current
        while True:
            time.sleep(0.01)
            if (wanted := float(Path(file).read_text())) != current:
                traveller.move_to(current := wanted)

    threading.Thread(target=follow, daemon=True).start()


def pause(seconds: str) -> None:
    first, *tried = map(float, seconds.split(","))
    policy = RetryPolicy(initial_seconds=first, max_seconds=300, jitter=0)
    daemon.Daemon = partial(daemon.Daemon, backoff=Backoff(policy))  # type: ignore[assignment,misc]
    for connect_seconds in tried:
        mongo.CONNECT_TIMEOUT_SECONDS = connect_seconds


def bugs(listed: str) -> None:
    """Let `count` and `write` of a recount raise what is listed, one by one, then work again."""
    left = [bug.split(":") for bug in listed.split(",")]
    steps: tuple[tuple[str, Any, str], ...]
    steps = (("count", Count, "count_all"), ("write", Changes, "write"))
    for name, kind, method in steps:
        setattr(kind, method, _failing(name, getattr(kind, method), left))


def _failing(name: str, works: Callable[..., Any], left: list[list[str]]) -> Callable[..., Any]:
    def step(*given: Any, **named: Any) -> Any:
        if left and left[0][0] == name:
            raise getattr(builtins, left.pop(0)[1])("SECRET document")
        return works(*given, **named)

    return step


def await_closed_clients() -> None:
    """Wait until the driver's threads are those of one client, or for 5 s if they never are."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        names = [thread.name for thread in threading.enumerate()]
        if len(names) == len(set(names)):
            return
        time.sleep(0.02)


def recounts(number: int) -> None:
    """Do recounts as the daemon does them, each with something to write, some after reconnecting.

    Prints the memory in KiB and the number of open files and threads, after each sixth of them.
    """
    settings = config.load(os.environ)
    service = Service(settings, lambda: settings)
    samples = []
    for done in range(1, number + 1):
        service.recount(ignore_progress)
        assert service._connection
        service._connection.users.update_many({}, {"$set": {settings.points_field: -1}})
        if done % (number // 6) == 0:
            await_closed_clients()
            status = Path("/proc/self/status").read_text()
            memory = int(status.split("VmRSS:")[1].split()[0])
            samples.append(
                (memory, len([*Path("/proc/self/fd").iterdir()]), threading.active_count())
            )
        if done % RECONNECT_EVERY == 0:  # as after a permission was missing
            service._connection.client.close()
            service._connection = None
    print(json.dumps(samples))


if __name__ == "__main__":
    mode, argument, *rest = sys.argv[1:]
    if mode == "recounts":
        recounts(int(argument))
        sys.exit()
    {"clock": clock, "pause": pause, "bugs": bugs}[mode](argument)
    sys.argv[1:] = rest
    runpy.run_path(loyalty_microservice.__file__, run_name="__main__")
