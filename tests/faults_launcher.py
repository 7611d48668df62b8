"""Runs the service in a process with one fault.

- `faults_launcher.py clock FILE [arguments]`: the clock is set to the seconds in FILE.
- `faults_launcher.py pause SECONDS[,SECONDS]`: a daemon whose first pause after a failure is that
  long; the second number is the time limit of an attempt to connect.
- `faults_launcher.py bugs LIST`: a daemon whose recounts raise what LIST says: 1:KeyError raises a
  KeyError at the first progress of a recount, and so on, each in a recount of its own.
- `faults_launcher.py recounts NUMBER`: does that many; prints how much memory and files they take.
"""

from __future__ import annotations

import builtins
import json
import logging
import os
import runpy
import sys
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

import time_machine
from pymongo import MongoClient

sys.path.insert(0, str(Path(__file__).parents[1]))

import config
import loyalty_microservice
from loyalty.concurrency import ProgressCallback, ignore_progress
from loyalty.daemon import Daemon, StepOutcome
from loyalty.logs import log_to_stderr
from loyalty.mongo import connection as mongo
from loyalty.retry import Backoff, RetryPolicy
from loyalty.service import Service

RECONNECT_EVERY = 10


def set_clock(file: str) -> None:
    """Set the clock now, and again whenever the file has changed."""
    traveller = time_machine.travel(current := float(Path(file).read_text()), tick=True).start()

    def follow() -> None:
        nonlocal current
        while True:
            time.sleep(0.01)
            if (wanted := float(Path(file).read_text())) != current:
                traveller.move_to(current := wanted)

    threading.Thread(target=follow, daemon=True).start()


def run_daemon(service: Service, backoff: Backoff | None = None) -> None:
    log_to_stderr()
    logging.getLogger("loyalty").setLevel(service.settings.log_level)
    Daemon(service, backoff=backoff).run()
    logging.shutdown()
    os._exit(0)  # as the service does: it does not wait for servers that do not answer


def run_with_pauses(settings: config.Settings, seconds: str) -> None:
    first, *connect_seconds = map(float, seconds.split(","))
    if connect_seconds:
        mongo.CONNECT_TIMEOUT_SECONDS = connect_seconds[0]
    policy = RetryPolicy(initial_seconds=first, max_seconds=300, jitter=0)
    run_daemon(Service(settings, lambda: settings), Backoff(policy))


class FailingService(Service):
    """A service with bugs: `(number of the progress call, name of the exception)`."""

    bugs: list[tuple[int, str]]

    def recount(self, on_progress: ProgressCallback) -> StepOutcome:
        calls = count(1)

        def fail(text: str) -> None:
            if self.bugs and next(calls) == self.bugs[0][0]:
                raise getattr(builtins, self.bugs.pop(0)[1])("SECRET document")
            on_progress(text)

        return super().recount(fail)


def run_with_bugs(settings: config.Settings, listed: str) -> None:
    service = FailingService(settings, lambda: settings)
    bugs = (bug.split(":") for bug in listed.split(","))
    service.bugs = [(int(number), name) for number, name in bugs]
    policy = RetryPolicy(initial_seconds=1, max_seconds=1, jitter=0)
    run_daemon(service, Backoff(policy))


def wait_for_closed_clients() -> None:
    """Wait until only one client has threads of the driver, at most 5 s."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        names = [thread.name for thread in threading.enumerate()]
        if len(names) == len(set(names)):
            return
        time.sleep(0.02)


def measure_recounts(settings: config.Settings, number: int) -> None:
    """Recount like the daemon, each time with something to write, sometimes after reconnecting.

    Prints the memory in KiB and the number of open files and threads, after each sixth of them.
    """
    service = Service(settings, lambda: settings)
    samples = []
    for done in range(1, number + 1):
        service.recount(ignore_progress)
        with MongoClient[Any](settings.mongodb_uri) as client:
            users = client[settings.database][settings.users]
            users.update_many({}, {"$set": {settings.points_field: -1}})
        if done % (number // 6) == 0:
            wait_for_closed_clients()
            status = Path("/proc/self/status").read_text()
            memory = int(status.split("VmRSS:")[1].split()[0])
            samples.append(
                (memory, len([*Path("/proc/self/fd").iterdir()]), threading.active_count())
            )
        if done % RECONNECT_EVERY == 0:  # as after a missing privilege
            service.disconnect()
    print(json.dumps(samples))


if __name__ == "__main__":
    mode, argument, *rest = sys.argv[1:]
    if mode == "clock":
        set_clock(argument)
        sys.argv[1:] = rest
        runpy.run_path(loyalty_microservice.__file__, run_name="__main__")
    settings = config.load(os.environ)
    if mode == "pause":
        run_with_pauses(settings, argument)
    elif mode == "bugs":
        run_with_bugs(settings, argument)
    elif mode == "recounts":
        measure_recounts(settings, int(argument))
