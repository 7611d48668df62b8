"""The soak test: random faults of the service and of its servers, while orders change.

`python -m sandbox.soak MINUTES` prints a report; the exit code is 0 if no check failed.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from pymongo import MongoClient
from pymongo.database import Database
from pymongo.errors import PyMongoError

from loyalty.errors import Exit
from sandbox import faults
from sandbox.mongod import Deployment, SandboxError, Server, wait_until
from sandbox.service import Process
from sandbox.shop import Shop, canonical_key, count_points, find_mismatches

RECOVERY_SECONDS = 120.0  # the limit from a fault to a successful recount, and for wrong points
SAMPLE_SIZE = 100  # users that are compared every few seconds
DATABASE = "oms_db"
# The report says how often the log has them.
LOG_EVENTS = (
    "recount outcome=succeeded",
    "failed",
    "count_retry",
    "snapshot_restarted",
    "record_write_failed",
    "live_updates_started",
    "live_updates_stopped",
)
ERROR_CODES = {
    "Interrupted": 11601,
    "ShutdownInProgress": 91,
    "NotWritablePrimary": 10107,
    "SnapshotTooOld": 239,
    "CursorNotFound": 43,
    "Unauthorized": 13,
    "AuthenticationFailed": 18,
    "ExceededMemoryLimit": 146,
    "MaxTimeMSExpired": 50,
    "WriteConflict": 112,
}


class Soak:
    """One run; `problems` lists every check that failed."""

    def __init__(self, deployment: Deployment, client: MongoClient[Any], seed: int) -> None:
        self.problems: list[str] = []
        self.recoveries: defaultdict[str, list[float]] = defaultdict(list)
        self._deployment = deployment
        self._database = client[DATABASE]
        self._rng = random.Random(seed)
        self._log = deployment.folder / "service.log"
        self._is_finished = threading.Event()
        self._change = threading.Lock()  # held while orders change
        self.comparisons = self.correct_comparisons = 0
        self.max_wrong_seconds = 0.0
        self._service = self._start()
        # Every action with its weight. Faults of a whole server take longer, so they are rarer.
        self._actions: dict[Callable[[], None], int] = {
            self.return_an_error: 8,
            self.drop_a_connection: 5,
            self.kill_its_operations: 5,
            self.kill_the_service: 5,
            self.kill_the_service_during_a_batch: 2,
            self.terminate_the_service: 5,
            self.step_the_primary_down: 3,
            self.kill_the_primary: 1,
            self.kill_a_secondary: 1,
            self.suspend_the_primary: 2,
            self.suspend_all_servers: 2,
            self.undo_the_last_recount: 3,
        }

    def run(self, seconds: float) -> None:
        """Run random actions for that long, then stop changing orders and compare."""
        threads = [
            threading.Thread(target=run) for run in (self._change_orders, self._compare_samples)
        ]
        for thread in threads:
            thread.start()
        try:
            self._wait_for_recounts(1)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                (action,) = self._rng.choices([*self._actions], [*self._actions.values()])
                self._perform(action)
        finally:
            self._is_finished.set()
            for thread in threads:
                thread.join()
        self._wait_for_recounts(2)  # the first may have started before the last change
        self._compare("daemon")
        self.terminate_the_service(restart=False)
        once = self._start("--once")
        if code := once.wait():
            self.problems.append(f"--once ended with {code}")
        self._compare("--once")
        log = self._log.read_text(errors="replace")
        if "Traceback" in log:
            self.problems.append("the log contains a traceback")

    def _perform(self, action: Callable[[], None]) -> None:
        """Run the action, and measure the seconds until the next recount succeeds."""
        name = action.__name__.replace("_", " ")
        with suppress(PyMongoError):  # after the previous action, a server may not be ready yet
            action()
        faults.recover(self._deployment)
        recovered = time.monotonic()
        if self._service.exit_code is not None:
            self.problems.append(f"{name}: the service ended with {self._service.exit_code}")
            self._service = self._start()
        self._wait_for_recounts(1)
        self.recoveries[name].append(time.monotonic() - recovered)

    def return_an_error(self) -> None:
        command = self._rng.choice(["aggregate", "find", "update", "insert", "getMore"])
        self._fail(command, errorCode=self._rng.choice([*ERROR_CODES.values()]))

    def drop_a_connection(self) -> None:
        command = self._rng.choice(["aggregate", "find", "update", "insert"])
        self._fail(command, closeConnection=True)

    def _fail(self, command: str, **data: Any) -> None:
        times = self._rng.randint(1, 4)
        with faults.fail_command(self._deployment.primary(), command, times, **data):
            time.sleep(self._rng.uniform(0.2, 1.5))

    def kill_its_operations(self) -> None:
        with self._deployment.client() as client:
            for _ in range(20):
                for operation in client.admin.aggregate([{"$currentOp": {"allUsers": True}}]):
                    if operation.get("appName") == "loyalty-microservice" and "opid" in operation:
                        client.admin.command("killOp", op=operation["opid"])
                time.sleep(0.05)

    def kill_the_service(self) -> None:
        time.sleep(self._rng.uniform(0, 1.2))
        self._service.kill()
        self._service = self._start()

    def kill_the_service_during_a_batch(self) -> None:
        self._set_wrong_points(2000)
        primary = self._deployment.primary()
        with faults.pause_at(primary, DATABASE, faults.WRITING) as wait_until_reached:
            wait_until_reached()
            self._service.kill()
        self._service = self._start()

    def terminate_the_service(self, *, restart: bool = True) -> None:
        time.sleep(self._rng.uniform(0, 1.2))
        wait_until("a signal handler", self._service.catches_sigterm)
        try:
            if code := self._service.stop():
                self.problems.append(f"SIGTERM: exit code {code}")
        except SandboxError as problem:
            self.problems.append(f"SIGTERM: {problem}")
            self._service.kill()
        if restart:
            self._service = self._start()

    def step_the_primary_down(self) -> None:
        faults.step_down(self._deployment.primary())

    def kill_the_primary(self) -> None:
        self._kill(self._deployment.primary())

    def kill_a_secondary(self) -> None:
        self._kill(self._rng.choice(self._secondaries()))

    def _kill(self, server: Server) -> None:
        self._set_wrong_points(1000)
        time.sleep(self._rng.uniform(0, 1.2))
        server.kill()
        time.sleep(self._rng.uniform(0, 5))

    def suspend_the_primary(self) -> None:
        self._suspend([self._deployment.primary()])

    def suspend_all_servers(self) -> None:
        self._suspend(self._deployment.servers)

    def _suspend(self, servers: list[Server]) -> None:
        self._set_wrong_points(1000)
        time.sleep(self._rng.uniform(0, 1.2))
        for server in servers:
            server.suspend()
        time.sleep(self._rng.uniform(0.2, 6))

    def undo_the_last_recount(self) -> None:
        """Undo a recount while the service runs and orders change, and compare all points."""
        self._set_wrong_points(1000)
        self._wait_for_recounts(1)
        records = self._database["loyalty_recounts"]
        undone = records.count_documents({"outcome": "undone"})
        code = self._start("--undo", "last").wait()
        if code not in (Exit.OK, Exit.FINDINGS):  # FINDINGS: points that have changed since
            self.problems.append(f"--undo last ended with {code}")
        elif code == Exit.OK and records.count_documents({"outcome": "undone"}) != undone + 1:
            self.problems.append("--undo last wrote no record")
        with self._change:
            self._wait_for_recounts(2)  # the first may have started before the undo
            self._compare("a recount after --undo last")

    def _secondaries(self) -> list[Server]:
        primary = self._deployment.primary()
        return [server for server in self._deployment.servers if server is not primary]

    def _set_wrong_points(self, users: int) -> None:
        """Set wrong points for some users, so that the next recount has updates to write."""
        found = self._database["users"].aggregate([{"$sample": {"size": users}}])
        ids = [user["_id"] for user in found]
        wrong = {"$set": {"loyalty_points": -1}}
        self._database["users"].update_many({"_id": {"$in": ids}}, wrong)

    def _change_orders(self) -> None:
        rng = random.Random(self._rng.random())
        with self._deployment.client() as client:
            shop = Shop(client[DATABASE], rng)
            while not self._is_finished.wait(0.1):
                with self._change, suppress(PyMongoError):
                    rng.choice([shop.ship_orders, shop.return_orders])(rng.randint(1, 50))

    def _compare_samples(self) -> None:
        """Compare some users every few seconds, while orders change."""
        last_correct: dict[Any, float] = {}
        with self._deployment.client() as client:
            database = client[DATABASE]
            while not self._is_finished.wait(3):
                with suppress(PyMongoError):
                    self._compare_sample(database, last_correct)

    def _compare_sample(self, database: Database[Any], last_correct: dict[Any, float]) -> None:
        """Compare stored points with counts before and after they are read.

        `last_correct` is the time at which each user's points were last seen correct.
        """
        before = count_points(database)
        found = database["users"].find({}, {"loyalty_points": 1}).sort("_id").limit(SAMPLE_SIZE)
        stored = [(canonical_key(user["_id"]), user["loyalty_points"]) for user in found]
        after, now = count_points(database), time.monotonic()
        for user, points in stored:
            self.comparisons += 1
            if points in range(min(before[user], after[user]), max(before[user], after[user]) + 1):
                self.correct_comparisons += 1
                last_correct[user] = now
            seconds = now - last_correct.setdefault(user, now)
            if seconds > RECOVERY_SECONDS >= self.max_wrong_seconds:
                self.problems.append(f"{user!r} had wrong points for {seconds:.0f} s")
            self.max_wrong_seconds = max(self.max_wrong_seconds, seconds)

    def _start(self, *arguments: str) -> Process:
        # Many users lose points here, so the safety check of decreases is off.
        return Process(
            *arguments,
            log=self._log,
            MONGODB_URI=self._deployment.uri_for(database=DATABASE),
            RECOUNT_INTERVAL="2s",
            LIVE_UPDATES=self._rng.choice(["yes", "yes", "no"]),
            MAX_DECREASE_PERCENT="100",
        )

    def _wait_for_recounts(self, number: int) -> None:
        """Return after that many more successful recounts, or when the service has ended."""
        target = self._count_recounts() + number

        def is_reached() -> bool:
            return self._count_recounts() >= target or self._service.exit_code is not None

        wait_until("a successful recount", is_reached, RECOVERY_SECONDS)

    def _count_recounts(self) -> int:
        return self._log.read_bytes().count(b"outcome=succeeded")

    def _compare(self, writer: str) -> None:
        mismatches = find_mismatches(self._database)
        if mismatches:
            count = len(mismatches)
            self.problems.append(f"{writer}: {count} users with wrong points, e.g. {mismatches[0]}")

    def report(self) -> None:
        """Print the actions, the times of recovery and the problems."""
        rows = sorted(self.recoveries.items())
        log = self._log.read_text(errors="replace")
        print(f"\n{'action':32} {'times':>5}  seconds until the next successful recount: mean, max")
        for name, seconds in rows:
            mean = sum(seconds) / len(seconds)
            print(f"{name:32} {len(seconds):5} {mean:6.1f} {max(seconds):6.1f}")
        print(f"{'all':32} {sum(len(seconds) for _, seconds in rows):5}")
        print("; ".join(f"{event}: {log.count(f' {event} ')}" for event in LOG_EVENTS))
        undone = [*self._database["loyalty_recounts"].find({"outcome": "undone"})]
        restored, others = (
            sum(record[field] for record in undone) for field in ("changed", "not_restored")
        )
        print(f"{len(undone)} undos: {restored:,} users restored, {others:,} had changed since")
        share = 100 * self.correct_comparisons / max(self.comparisons, 1)
        print(
            f"{self.comparisons:,} comparisons of one user: {share:.0f} % were correct; "
            f"the longest time with wrong points: {self.max_wrong_seconds:.0f} s"
        )
        for problem in self.problems:
            print(f"PROBLEM: {problem}")
        print("FAILED." if self.problems else "Passed: the points are exact.")


def main() -> int:
    """Run for that many minutes (default: 10) and return the exit code."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    seed = random.SystemRandom().randrange(1_000_000)
    print(f"Random faults for {minutes:g} minutes on three servers, seed {seed}", flush=True)
    with ExitStack() as stack:
        deployment = stack.enter_context(Deployment(3, options=faults.OPTIONS))
        client = stack.enter_context(deployment.client())
        Shop(client[DATABASE], random.Random(seed)).fill(users=2_000, orders=10_000)
        client[DATABASE]["orders"].create_index([("status", 1), ("customer_id", 1)])
        soak = Soak(deployment, client, seed)
        try:
            soak.run(60 * minutes)
        except SandboxError as problem:
            soak.problems.append(str(problem))
        soak.report()
        if soak.problems:
            log = (deployment.folder / "service.log").read_text(errors="replace")
            print("The last lines of the service's log:", *log.splitlines()[-20:], sep="\n  ")
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
