"""The demo: the real service with a generated shop, checked after every recount.

Ctrl-C ends it at any time with one line and exit code 130, and all its files are removed.
"""

from __future__ import annotations

import os
import signal
import sys


def _print_stopped() -> None:
    # On a terminal, clear the line with ^C.
    start = "\r\x1b[K" if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else ""
    os.write(2, f"{start}Stopped by Ctrl-C; the database and its folder are removed.\n".encode())


def _exit_on_early_signal(_number: int, _frame: object) -> None:
    _print_stopped()
    os._exit(130)


# Until `main` replaces the handler, there is nothing to clean up.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, _exit_on_early_signal)

import random
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from pymongo.database import Database
from pymongo.errors import PyMongoError

from sandbox.mongod import Deployment, NoMongod, SandboxError
from sandbox.service import PROGRAM, Process
from sandbox.shop import Document, Shop, canonical_key, count_points, find_mismatches

RECOUNTS = 3
LIVE_ORDERS = 15  # shipped one at a time, with live updates
INTERVAL = timedelta(seconds=5)
# No orders change for this time before a recount, so that the two counts can be compared. The
# service itself does not need that.
QUIET_PERIOD = timedelta(seconds=1.5)
TIMEOUT = timedelta(seconds=30)
GREEN, RED, BOLD, DIM = "32", "31", "1", "2"


class Interrupt:
    """The handler of Ctrl-C. It raises KeyboardInterrupt once: nothing interrupts the cleanup.

    Python ignores an exception that is raised during a destructor, so `sleep` raises it again.
    """

    def __init__(self) -> None:
        self.is_set = False

    def __call__(self, _number: int, _frame: object) -> None:
        if not self.is_set:
            self.is_set = True
            raise KeyboardInterrupt

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        if self.is_set:
            raise KeyboardInterrupt


class Screen:
    """Standard output, with styles on a terminal unless NO_COLOR is set."""

    def __init__(self) -> None:
        self._has_styles = (
            sys.stdout.isatty()
            and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb"
        )

    def print(self, text: str = "", style: str = "") -> None:
        print(("\r\x1b[K" if self._has_styles else "") + self.style(text, style), flush=True)

    def style(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self._has_styles and style and text else text

    def show_progress(self, text: str) -> None:
        """Print a line that the next one replaces. Prints nothing if this is not a terminal."""
        if self._has_styles:
            print(f"\r\x1b[K{self.style(text, DIM)}", end="", flush=True)


class Demo:
    """One run of the demo; `failures` is the number of checks that failed."""

    def __init__(self, interrupt: Interrupt) -> None:
        self.failures = 0
        self._interrupt = interrupt
        self._screen = Screen()

    def run(self) -> int:
        """Show everything and return the exit code."""
        say = self._screen.print
        say("Demo of the Loyalty Microservice", BOLD)
        say("The service runs on a temporary MongoDB for about 30 seconds. Ctrl-C ends the demo.\n")
        self._screen.show_progress("  Starting MongoDB ...")
        with Deployment() as deployment, deployment.client() as client:
            database = client["oms_db"]
            say(f"  MongoDB   {client.server_info()['version']} {deployment.uri}")
            self._screen.show_progress("  Filling the shop ...")
            shop = Shop(database, random.Random())
            shop.fill()
            say("  shop      1,000 customers, 10,000 orders, 3 % of them with unusual values")
            log = deployment.folder / "service.log"
            uri, interval = deployment.uri, f"{INTERVAL.seconds}s"
            with Process(log=log, MONGODB_URI=uri, RECOUNT_INTERVAL=interval) as service:
                say(f"  service   python {PROGRAM.name}, process {service.pid}")
                self._show_recounts(database, shop, service)
                self._stop(service)
            with Process(log=log, MONGODB_URI=uri, LIVE_UPDATES="yes") as service:
                say(f"\nLIVE_UPDATES=yes, process {service.pid}: points within milliseconds", BOLD)
                self._show_live_updates(database, service)
                self._stop(service)
        say("The database and its folder are removed.\n")
        if self.failures:
            say("A CHECK FAILED: see the output.", RED)
            return 1
        say("With your own database:", BOLD)
        say("  cp .env.example .env                                # put your MONGODB_URI there")
        say("  .venv/bin/python loyalty_microservice.py --check-config")
        say("  .venv/bin/python loyalty_microservice.py --dry-run  # writes nothing")
        say("  .venv/bin/python loyalty_microservice.py")
        return 0

    def _show_recounts(self, database: Database[Document], shop: Shop, service: Process) -> None:
        before = _points(database)
        last_write = datetime.now(UTC)
        since = last_write
        compared = 0
        while compared < RECOUNTS:
            record = self._next_record(database, service, since)
            since = record["started_at"]
            if not compared:
                connected = next(line for line in service.lines if " connected " in line)
                self._screen.print(f"  its log   {connected.partition(' INFO ')[2]}")
            if record["outcome"] != "succeeded":
                raise SandboxError(f"a recount {record['outcome']}: {record['error']}")
            after = _points(database)
            self._show(compared + 1, record, before, after)
            # Only this thread changes orders, so they have not changed since `last_write`.
            if record["started_at"] > last_write:
                compared += 1
                self._compare(database, len(after))
            else:
                self._screen.print("  not compared: orders changed during this recount")
            before = after
            if compared < RECOUNTS:
                last_write = self._change_orders(shop, INTERVAL - QUIET_PERIOD)

    def _stop(self, service: Process) -> None:
        code = service.stop()
        self.failures += code != 0
        self._screen.print(f"\nSIGTERM: the service ended with exit code {code}.")

    def _show_live_updates(self, database: Database[Document], service: Process) -> None:
        """Ship single orders, and print the time until the customer's points were correct."""
        service.wait_for("outcome=succeeded")
        # Not the user with the id "": orders with that id earn nothing.
        clean = {"_id": {"$type": "objectId"}}
        users = {str(user["_id"]): user for user in database["users"].find(clean)}
        unshipped = list(
            database["orders"].find({"status": "Paid", "customer_id": {"$in": [*users]}})
        )
        for order in random.sample(unshipped, LIVE_ORDERS):
            user = users[order["customer_id"]]
            expected = count_points(database)[canonical_key(user["_id"])] + 1
            database["orders"].update_one({"_id": order["_id"]}, {"$set": {"status": "Shipped"}})
            seconds = self._wait_for_points(database, service, user["_id"], expected)
            self._screen.print(
                f"  order {order['_id']:>5} of {user['name']:<16} shipped: {expected:>4} points "
                f"after {1000 * seconds:.0f} ms"
            )
            self._interrupt.sleep(random.uniform(0.2, 0.8))
        self._compare(database, len(_points(database)))

    def _wait_for_points(
        self, database: Database[Document], service: Process, user: Any, expected: int
    ) -> float:
        """Return the seconds until the user has these points. Raises SandboxError."""
        started = time.monotonic()
        while (seconds := time.monotonic() - started) < TIMEOUT.total_seconds():
            found = database["users"].find_one({"_id": user}, {"loyalty_points": 1})
            if found and found["loyalty_points"] == expected:
                return seconds
            self._interrupt.sleep(0.002)
        raise SandboxError(f"no live update within {TIMEOUT.seconds} s:\n{_last_lines(service)}")

    def _next_record(
        self, database: Database[Document], service: Process, since: datetime
    ) -> Document:
        deadline = time.monotonic() + TIMEOUT.total_seconds()
        while time.monotonic() < deadline:
            if service.exit_code is not None:
                raise SandboxError(f"the service ended unexpectedly:\n{_last_lines(service)}")
            newer = {"started_at": {"$gt": since}}
            record = database["loyalty_recounts"].find_one(newer, sort=[("started_at", 1)])
            if record:
                return record
            self._interrupt.sleep(0.05)
        raise SandboxError(f"no recount within {TIMEOUT.seconds} s:\n{_last_lines(service)}")

    def _change_orders(self, shop: Shop, duration: timedelta) -> datetime:
        """Ship and return orders for that long. Returns the time of the last change."""
        end = time.monotonic() + duration.total_seconds()
        shipped = returned = 0
        while (left := end - time.monotonic()) > 0:
            shipped += shop.ship_orders(random.randint(4, 12))
            returned += shop.return_orders(random.randint(2, 8))
            self._screen.show_progress(
                f"The shop ships {shipped} orders, {returned} are returned ... "
                f"next recount in {left + QUIET_PERIOD.total_seconds():.0f} s"
            )
            self._interrupt.sleep(0.2)
        last_write = datetime.now(UTC)
        self._screen.print(f"\nThe shop shipped {shipped} orders; {returned} were returned.", DIM)
        self._screen.show_progress("Waiting for the recount ...")
        return last_write

    def _show(
        self, number: int, record: Document, before: dict[str, Any], after: dict[str, Any]
    ) -> None:
        screen = self._screen
        up, down = record["increased"], record["decreased"]
        initialized = record["changed"] - up - down  # users without orders and without points
        screen.print(
            f"\nRecount {number}: {record['changed']:,} of {len(after):,} users changed: "
            f"{up:,} increased, {down:,} decreased"
            + (f", {initialized:,} initialized to 0" if initialized else ""),
            BOLD,
        )
        screen.print(f"  {'top customers':<16} {'before':>7}    {'after':>6}", DIM)
        top = sorted(after, key=lambda user: -after[user][1])[:5]
        for user in top:
            name, new = after[user]
            old = before[user][1]
            difference = new - old if type(old) is int else 0
            style = GREEN if difference > 0 else RED
            row = f"  {name:<16} {str(old)[:7]:>7} -> {new:>6,}"
            screen.print(row + (screen.style(f"{difference:+7,}", style) if difference else ""))
        screen.print(
            f"  orders that earn nothing: {record['orders_without_customer']:,} without customer, "
            f"{record['orders_of_unknown_customers']:,} of unknown customers",
            DIM,
        )

    def _compare(self, database: Database[Document], users: int) -> None:
        mismatches = find_mismatches(database)
        if not mismatches:
            self._screen.print(f"  An independent count agrees for all {users:,} users.", GREEN)
            return
        self.failures += 1
        self._screen.print(f"  AN INDEPENDENT COUNT DIFFERS for {len(mismatches):,} users:", RED)
        for mismatch in mismatches[:5]:
            self._screen.print(
                f"    {mismatch.user!r}: stored {mismatch.stored!r}, counted {mismatch.counted:,}"
            )


def _last_lines(service: Process) -> str:
    return "\n".join(service.lines[-5:])


def _points(database: Database[Document]) -> dict[str, Any]:
    """Return each user's name and stored points, by the `repr` of its `_id`."""
    users = database["users"].find({}, {"name": 1, "loyalty_points": 1})
    return {repr(u["_id"]): (u["name"], u.get("loyalty_points", "none")) for u in users}


def _run(interrupt: Interrupt) -> int:
    try:
        return Demo(interrupt).run()
    except BrokenPipeError:  # the reader of the output has closed it
        _discard_output()
    except (NoMongod, SandboxError, PyMongoError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
    return 1


def _discard_output() -> None:
    """Discard the rest of the output, so that Python can flush it at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def main() -> int:
    """Run the demo and return the exit code."""
    interrupt = Interrupt()
    try:
        signal.signal(signal.SIGINT, interrupt)
        code = _run(interrupt)
        interrupt.is_set = True  # everything is done: ignore Ctrl-C
    except KeyboardInterrupt:
        _discard_output()
        _print_stopped()
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
