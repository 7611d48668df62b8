"""The soak: random faults, done to the real service and its database while a shop goes on.

`python -m sandbox.soak MINUTES` prints what it did and saw; exit code 0 if all of it held.
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

from sandbox import faults
from sandbox.mongod import Deployment, Failed, Server, wait_until
from sandbox.service import Process
from sandbox.shop import Shop, count, disagreements, key

PATIENCE = 120.0  # seconds until the service must have recovered
SAMPLE = 100  # users that are compared all along
DATABASE = "oms_db"
# What a server may answer: interrupted, shutting down, no primary, snapshot too old, cursor not
# found, no permission, not authenticated, out of memory, exceeded time limit, write conflict.
CODES = (11601, 91, 10107, 239, 43, 13, 18, 146, 50, 112)


class Soak:
    """One run; `problems` says what did not hold."""

    def __init__(self, deployment: Deployment, client: MongoClient[Any], seed: int) -> None:
        self.problems: list[str] = []
        self.recoveries: defaultdict[str, list[float]] = defaultdict(list)
        self._deployment = deployment
        self._database = client[DATABASE]
        self._rng = random.Random(seed)
        self._log = deployment.folder / "service.log"
        self._shop_closed = threading.Event()
        self.compared = self.right_at_once = 0
        self.longest_wrong = 0.0
        self._service = self._start()
        # The share of each fault; those of whole servers take their time.
        self._faults: dict[Callable[[], None], int] = {
            self.answer_with_an_error: 8,
            self.drop_a_connection: 5,
            self.kill_what_it_does: 5,
            self.kill_the_service: 5,
            self.kill_the_service_in_a_batch: 2,
            self.terminate_the_service: 5,
            self.step_the_primary_down: 3,
            self.kill_the_primary: 1,
            self.kill_a_secondary: 1,
            self.freeze_the_primary: 2,
            self.freeze_all: 2,
        }

    def run(self, seconds: float) -> None:
        """Do faults for that long, then let the shop close and compare."""
        threads = [threading.Thread(target=of) for of in (self._do_business, self._sample)]
        for thread in threads:
            thread.start()
        try:
            self._wait_for_recounts(1)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                (fault,) = self._rng.choices([*self._faults], [*self._faults.values()])
                self._do(fault)
        finally:
            self._shop_closed.set()
            for thread in threads:
                thread.join()
        self._wait_for_recounts(2)  # the first may have begun before
        self._compare("daemon")
        self.terminate_the_service(again=False)
        once = self._start("--once")
        if code := once.wait():
            self.problems.append(f"--once ended with {code}")
        self._compare("--once")
        log = self._log.read_text(errors="replace")
        if "Traceback" in log:
            self.problems.append("a traceback, see the log")

    def _do(self, fault: Callable[[], None]) -> None:
        name = fault.__name__.replace("_", " ")
        with suppress(PyMongoError):  # the one before may still echo: then it is another round
            fault()
        faults.heal(self._deployment)
        healed = time.monotonic()
        if self._service.code is not None:
            self.problems.append(f"{name}: the service ended with {self._service.code}")
            self._service = self._start()
        self._wait_for_recounts(1)
        self.recoveries[name].append(time.monotonic() - healed)

    def answer_with_an_error(self) -> None:
        command = self._rng.choice(["aggregate", "find", "update", "insert", "getMore"])
        self._fail(command, errorCode=self._rng.choice(CODES))

    def drop_a_connection(self) -> None:
        command = self._rng.choice(["aggregate", "find", "update", "insert"])
        self._fail(command, closeConnection=True)

    def _fail(self, command: str, **data: Any) -> None:
        times = self._rng.randint(1, 4)
        with faults.failing(self._deployment.primary(), command, times, **data):
            time.sleep(self._rng.uniform(0.2, 1.5))

    def kill_what_it_does(self) -> None:
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

    def kill_the_service_in_a_batch(self) -> None:
        self._spoil(2000)
        primary = self._deployment.primary()
        with faults.paused(primary, DATABASE, faults.WRITING) as wait_until_reached:
            wait_until_reached()
            self._service.kill()
        self._service = self._start()

    def terminate_the_service(self, *, again: bool = True) -> None:
        time.sleep(self._rng.uniform(0, 1.2))
        wait_until("a signal handler", self._service.catches_sigterm)
        try:
            if code := self._service.stop():
                self.problems.append(f"SIGTERM: exit code {code}")
        except Failed as problem:
            self.problems.append(f"SIGTERM: {problem}")
            self._service.kill()
        if again:
            self._service = self._start()

    def step_the_primary_down(self) -> None:
        faults.step_down(self._deployment.primary())

    def kill_the_primary(self) -> None:
        self._kill(self._deployment.primary())

    def kill_a_secondary(self) -> None:
        self._kill(self._rng.choice(self._secondaries()))

    def _kill(self, server: Server) -> None:
        self._spoil(1000)
        time.sleep(self._rng.uniform(0, 1.2))
        server.kill()
        time.sleep(self._rng.uniform(0, 5))

    def freeze_the_primary(self) -> None:
        self._freeze([self._deployment.primary()])

    def freeze_all(self) -> None:
        self._freeze(self._deployment.servers)

    def _freeze(self, servers: list[Server]) -> None:
        self._spoil(1000)
        time.sleep(self._rng.uniform(0, 1.2))
        for server in servers:
            server.freeze()
        time.sleep(self._rng.uniform(0.2, 6))

    def _secondaries(self) -> list[Server]:
        primary = self._deployment.primary()
        return [server for server in self._deployment.servers if server is not primary]

    def _spoil(self, users: int) -> None:
        """Give users wrong points, so that the next recount has something to write."""
        found = self._database["users"].aggregate([{"$sample": {"size": users}}])
        ids = [user["_id"] for user in found]
        wrong = {"$set": {"loyalty_points": -1}}
        self._database["users"].update_many({"_id": {"$in": ids}}, wrong)

    def _do_business(self) -> None:
        rng = random.Random(self._rng.random())
        with self._deployment.client() as client:
            shop = Shop(client[DATABASE], rng)
            while not self._shop_closed.wait(0.1):
                with suppress(PyMongoError):
                    rng.choice([shop.ship, shop.return_])(rng.randint(1, 50))

    def _sample(self) -> None:
        """Compare some users every few seconds, whether orders move or not."""
        right_at: dict[Any, float] = {}
        with self._deployment.client() as client:
            database = client[DATABASE]
            while not self._shop_closed.wait(3):
                with suppress(PyMongoError):
                    self._compare_sample(database, right_at)

    def _compare_sample(self, database: Database[Any], right_at: dict[Any, float]) -> None:
        """Compare with the counts just before and just after; note when each was last right."""
        before = count(database)
        found = database["users"].find({}, {"loyalty_points": 1}).sort("_id").limit(SAMPLE)
        stored = [(key(user["_id"]), user["loyalty_points"]) for user in found]
        after, now = count(database), time.monotonic()
        for user, points in stored:
            self.compared += 1
            if points in range(min(before[user], after[user]), max(before[user], after[user]) + 1):
                self.right_at_once += 1
                right_at[user] = now
            wrong = now - right_at.setdefault(user, now)
            if wrong > PATIENCE >= self.longest_wrong:
                self.problems.append(f"{user!r} was wrong for {wrong:.0f} s")
            self.longest_wrong = max(self.longest_wrong, wrong)

    def _start(self, *arguments: str) -> Process:
        # Wrong points are many here, so the guard is off; small batches are more to cut off.
        return Process(
            *arguments,
            log=self._log,
            MONGODB_URI=self._deployment.uri_for(database=DATABASE),
            RECOUNT_INTERVAL="2s",
            LIVE_UPDATES=self._rng.choice(["yes", "yes", "no"]),
            MAX_DECREASE_PERCENT="100",
        )

    def _wait_for_recounts(self, number: int) -> None:
        """Return after that many more recounts that succeeded, or when the service has ended."""
        wanted = self._recounts() + number

        def there() -> bool:
            return self._recounts() >= wanted or self._service.code is not None

        wait_until("a recount that succeeds", there, PATIENCE)

    def _recounts(self) -> int:
        return self._log.read_bytes().count(b"outcome=succeeded")

    def _compare(self, what: str) -> None:
        wrong = disagreements(self._database)
        if wrong:
            self.problems.append(f"{what}: {len(wrong)} users have wrong points, as {wrong[0]}")

    def report(self) -> None:
        """Print what was done and seen."""
        rows = sorted(self.recoveries.items())
        log = self._log.read_text(errors="replace")
        print(f"\n{'fault':30} {'times':>5}  seconds until it had recounted: mean, most")
        for name, seconds in rows:
            mean = sum(seconds) / len(seconds)
            print(f"{name:30} {len(seconds):5} {mean:6.1f} {max(seconds):6.1f}")
        print(f"{'all':30} {sum(len(seconds) for _, seconds in rows):5}")
        said = {"recounts that succeeded": "outcome=succeeded", "that failed": "failed error="}
        said |= {"counted again": "counting_again", "not recorded": "record_write_failed"}
        said |= {"live": "live_updates_started", "no longer live": "live_updates_stopped"}
        print("; ".join(f"{name}: {log.count(text)}" for name, text in said.items()))
        share = 100 * self.right_at_once / max(self.compared, 1)
        print(
            f"{self.compared:,} times a user was compared meanwhile: {share:.0f} % were right, and "
            f"the longest time that one was seen wrong is {self.longest_wrong:.0f} s"
        )
        for problem in self.problems:
            print(f"PROBLEM: {problem}")
        print("It did not hold." if self.problems else "All of it held; the points are exact.")


def main() -> int:
    """Run for so many minutes (10) and return the exit code."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    seed = random.SystemRandom().randrange(1_000_000)
    print(f"Faults for {minutes:g} minutes on three servers, seed {seed}", flush=True)
    with ExitStack() as stack:
        deployment = stack.enter_context(Deployment(3, options=faults.OPTIONS))
        client = stack.enter_context(deployment.client())
        Shop(client[DATABASE], random.Random(seed)).fill(users=2_000, orders=10_000)
        client[DATABASE]["orders"].create_index([("status", 1), ("customer_id", 1)])
        soak = Soak(deployment, client, seed)
        try:
            soak.run(60 * minutes)
        except Failed as problem:
            soak.problems.append(str(problem))
        soak.report()
        if soak.problems:
            log = (deployment.folder / "service.log").read_text(errors="replace")
            print("The end of the service's log:", *log.splitlines()[-20:], sep="\n  ")
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
