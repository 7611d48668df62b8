"""One run of the service, or of a rival, as a process of its own: what it took, and did."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.shop import DATABASE, Shop, Wrong
from sandbox.mongod import Deployment

ROOT = Path(__file__).parents[1]
OURS, ALONE = "ours", "alone"  # with two ranges at a time, and with one

# A small process in between, since a child's peak memory starts with that of who forks it.
_MEASURED = """
import json, os, sys, time
start = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
numbers = [time.perf_counter() - start, usage.ru_maxrss / 1024]
print(json.dumps([os.waitstatus_to_exitcode(status), *numbers]))
"""


@dataclass(frozen=True)
class Run:
    """Seconds of the process and of the recount in it; MB; users written; and what is wrong."""

    seconds: float
    recount: float
    client_mb: float
    server_cpu: float
    wire_mb: float
    written_mb: float
    wrong: Wrong


Results = dict[str, list[Run]]


class MeasurementError(Exception):
    """A measured process failed, or did not do what it is measured for; the text has its log."""


class Bench:
    """Measures what is run against one shop."""

    def __init__(self, deployment: Deployment, shop: Shop) -> None:
        self.deployment = deployment
        self._shop = shop
        self._empty = deployment.folder / "empty.env"
        self._empty.touch(mode=0o600)
        self.port = deployment.servers[0].port

    def rounds(self, n: int, names: Sequence[str], state: str, *, port: int = 0) -> Results:
        """Run all of `names` in turn, `n` times, always from `state`; through `port` if given."""
        results: Results = {name: [] for name in names}
        for _ in range(n):
            for name in names:
                run = self._run(name, state, port)
                print(f"  {state} {name}: {run.seconds:.2f} s", file=sys.stderr, flush=True)
                results[name].append(run)
        return results

    def _run(self, name: str, state: str, port: int) -> Run:
        rival = ["-m", "bench.rivals", name]
        ours = ["loyalty_microservice.py", "--once", "--env-file", str(self._empty)]
        command = [sys.executable, *(ours if name in (OURS, ALONE) else rival)]
        uri = self.deployment.uri_for(database=DATABASE)
        if port:  # what the replica set says of its address must not lead past the relay
            uri = f"mongodb://127.0.0.1:{port}/{DATABASE}?directConnection=true"
        self._shop.restore(state)
        before = self._counters()
        process = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MEASURED, *command],
            cwd=ROOT,
            env={"MONGODB_URI": uri, **({"COUNT_WORKERS": "1"} if name == ALONE else {})},
            capture_output=True,
            text=True,
            check=True,
        )
        cpu, wire, written_mb = (b - a for a, b in zip(before, self._counters(), strict=True))
        code, seconds, memory = json.loads(process.stdout.splitlines()[-1])
        recount = re.search(r"exact=true seconds=([\d.]+)", process.stderr)
        if code or (name == OURS and not recount):
            raise MeasurementError(f"{name}: exit code {code}\n{process.stderr}")
        alone = float(recount[1]) if recount else 0.0
        return Run(seconds, alone, memory, cpu, wire / 1e6, written_mb, self._shop.wrong())

    def _counters(self) -> tuple[float, float, float]:
        """Return CPU seconds, bytes of its network, and users written, since the server started."""
        status = self._shop.status()
        ticks = Path(f"/proc/{status['pid']}/stat").read_text().rpartition(")")[2].split()[11:13]
        network = status["network"]
        return (
            sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
            network["bytesIn"] + network["bytesOut"],
            status["metrics"]["document"]["updated"],
        )


def middle(runs: Iterable[Run], of: Callable[[Run], float] = lambda run: run.seconds) -> float:
    return median(map(of, runs))


def worst(runs: Iterable[Run]) -> Wrong:
    """Return what was wrong after the worst of these runs."""
    return max((run.wrong for run in runs), key=lambda wrong: wrong.stale + wrong.missing)
