"""One run of the service or of a baseline, as a separate process: its costs and its result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.shop import DATABASE, MismatchCount, Shop
from sandbox.mongod import Deployment

ROOT = Path(__file__).parents[1]
SERVICE, ONE_WORKER, NO_CHANGE_LOG = "service", "one_worker", "no_change_log"
_PROGRAM = ["loyalty_microservice.py", "--env-file", os.devnull]
_SETTINGS: dict[str, dict[str, str]] = {
    SERVICE: {},
    ONE_WORKER: {"COUNT_WORKERS": "1"},
    NO_CHANGE_LOG: {"CHANGES_COLLECTION": "none"},
}

# Runs the command and measures it. It is a small process, since the peak memory of a child starts
# with the memory of its parent.
_MEASURE_COMMAND = """
import json, os, sys, time
start = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
numbers = [time.perf_counter() - start, usage.ru_maxrss / 1024]
print(json.dumps([os.waitstatus_to_exitcode(status), *numbers]))
"""


@dataclass(frozen=True)
class Run:
    """The costs of one process, and the users with wrong points afterwards.

    `recount_seconds` is the recount without the start of the process, 0 for a baseline.
    """

    seconds: float
    recount_seconds: float
    client_mb: float
    server_cpu_seconds: float
    wire_mb: float
    users_written: float
    mismatches: MismatchCount


Results = dict[str, list[Run]]


class MeasurementError(Exception):
    """A measured process failed, or its points were wrong. The text contains its log."""


class Bench:
    """Runs and measures commands on one shop."""

    def __init__(self, deployment: Deployment, shop: Shop) -> None:
        self.deployment = deployment
        self._shop = shop
        self.port = deployment.servers[0].port

    def rounds(self, n: int, names: Sequence[str], state: str, *, port: int = 0) -> Results:
        """Run each of `names` in turn, `n` times, always from `state`; through `port` if given."""
        results: Results = {name: [] for name in names}
        for _ in range(n):
            for name in names:
                run = self._run(name, state, port)
                print(f"  {state} {name}: {run.seconds:.2f} s", file=sys.stderr, flush=True)
                results[name].append(run)
        return results

    def run_service(self, *arguments: str, **settings: str) -> Run:
        """Run one command of the service on the shop as it is."""
        return self._measure([*_PROGRAM, *arguments], settings)

    def _run(self, name: str, state: str, port: int) -> Run:
        self._shop.restore(state)
        command = [*_PROGRAM, "--once"] if name in _SETTINGS else ["-m", "bench.baselines", name]
        return self._measure(command, _SETTINGS.get(name, {}), port)

    def _measure(self, command: Sequence[str], settings: Mapping[str, str], port: int = 0) -> Run:
        """Run a command of Python as a process. Raises MeasurementError if it fails."""
        uri = self.deployment.uri_for(database=DATABASE)
        if port:  # direct: the addresses in the replica set's configuration would bypass the relay
            uri = f"mongodb://127.0.0.1:{port}/{DATABASE}?directConnection=true"
        before = self._counters()
        process = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MEASURE_COMMAND, sys.executable, *command],
            cwd=ROOT,
            env={"MONGODB_URI": uri, **settings},
            capture_output=True,
            text=True,
            check=True,
        )
        cpu, wire, written = (b - a for a, b in zip(before, self._counters(), strict=True))
        code, seconds, memory = json.loads(process.stdout.splitlines()[-1])
        recount = re.search(r"exact=true seconds=([\d.]+)", process.stderr)
        if code or ("--once" in command and not recount):
            raise MeasurementError(f"{' '.join(command)}: exit code {code}\n{process.stderr}")
        recount_seconds = float(recount[1]) if recount else 0.0
        mismatches = self._shop.count_mismatches()
        return Run(seconds, recount_seconds, memory, cpu, wire / 1e6, written, mismatches)

    def _counters(self) -> tuple[float, float, float]:
        """Return the server's CPU seconds, network bytes and updated documents since its start."""
        status = self._shop.status()
        ticks = Path(f"/proc/{status['pid']}/stat").read_text().rpartition(")")[2].split()[11:13]
        network = status["network"]
        return (
            sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
            network["bytesIn"] + network["bytesOut"],
            status["metrics"]["document"]["updated"],
        )


def median_run(
    runs: Iterable[Run], value: Callable[[Run], float] = lambda run: run.seconds
) -> float:
    """Return the median of a value of the runs, by default of their seconds."""
    return median(map(value, runs))


def max_mismatches(runs: Iterable[Run]) -> MismatchCount:
    """Return the mismatches after the run with the most."""
    return max((run.mismatches for run in runs), key=lambda found: found.stale + found.missing)
