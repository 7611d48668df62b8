"""The demo: the real service beside an invented shop, checked after every recount.

Ctrl-C at any moment ends it with one line and exit code 130, and leaves nothing behind.
"""

from __future__ import annotations

import os
import signal
import sys


def _say_stopped() -> None:
    # On a terminal, write over its own ^C and what stands before it.
    start = "\r\x1b[K" if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else ""
    os.write(2, f"{start}Stopped by Ctrl-C; nothing is left behind.\n".encode())


def _exit_on_early_signal(_number: int, _frame: object) -> None:
    _say_stopped()
    os._exit(130)


# Until `main` takes over, nothing is there that has to be cleaned up.
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
SINGLE_ORDERS = 15  # shipped one at a time, with live updates
INTERVAL = timedelta(seconds=5)
# The shop holds still from this long before a recount is due, so that the two counts can be
# compared. The service itself does not need that.
QUIET = timedelta(seconds=1.5)
PATIENCE = timedelta(seconds=30)
GREEN, RED, BOLD, DIM = "32", "31", "1", "2"


class Interrupt:
    """The handler of Ctrl-C: raises KeyboardInterrupt once, so that nothing disturbs cleaning up.

    An exception from a signal handler can get lost in a destructor, so the flag is looked at, too.
    """

    def __init__(self) -> None:
        self.came = False

    def __call__(self, _number: int, _frame: object) -> None:
        if not self.came:
            self.came = True
            raise KeyboardInterrupt

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
        if self.came:
            raise KeyboardInterrupt


class Screen:
    """Standard output: styled on a terminal, plain text elsewhere or with NO_COLOR."""

    def __init__(self) -> None:
        self._styled = (
            sys.stdout.isatty()
            and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb"
        )

    def say(self, text: str = "", style: str = "") -> None:
        print(("\r\x1b[K" if self._styled else "") + self.styled(text, style), flush=True)

    def styled(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self._styled and style and text else text

    def progress(self, text: str) -> None:
        """Show a line that the next one replaces; only on a terminal."""
        if self._styled:
            print(f"\r\x1b[K{self.styled(text, DIM)}", end="", flush=True)


class Demo:
    """One run of the demo; `failures` counts what was not as it should be."""

    def __init__(self, interrupt: Interrupt) -> None:
        self.failures = 0
        self._interrupt = interrupt
        self._screen = Screen()

    def run(self) -> int:
        """Show everything and return the exit code."""
        say = self._screen.say
        say("Loyalty Microservice, the demo", BOLD)
        say("The real service on a private MongoDB; about 30 seconds, Ctrl-C ends it.\n")
        self._screen.progress("  Starting MongoDB ...")
        with Deployment() as deployment, deployment.client() as client:
            database = client["oms_db"]
            say(f"  MongoDB   {client.server_info()['version']} {deployment.uri}")
            self._screen.progress("  Filling the shop ...")
            shop = Shop(database, random.Random())
            shop.fill()
            say("  shop      1,000 customers, 10,000 orders, 3 % of them dirty on purpose")
            log = deployment.folder / "service.log"
            uri, often = deployment.uri, f"{INTERVAL.seconds}s"
            with Process(log=log, MONGODB_URI=uri, RECOUNT_INTERVAL=often) as service:
                say(f"  service   python {PROGRAM.name}, process {service.pid}")
                self._watch(database, shop, service)
                self._stop(service)
            with Process(log=log, MONGODB_URI=uri, LIVE_UPDATES="yes") as service:
                say(f"\nLIVE_UPDATES=yes, process {service.pid}: no need to wait", BOLD)
                self._ship_one_by_one(database, service)
                self._stop(service)
        say("The database and its folder are gone.\n")
        if self.failures:
            say("SOMETHING WAS WRONG, see above.", RED)
            return 1
        say("With your own database:", BOLD)
        say("  cp .env.example .env                                # put your MONGODB_URI there")
        say("  .venv/bin/python loyalty_microservice.py --check-config")
        say("  .venv/bin/python loyalty_microservice.py --dry-run  # writes nothing")
        say("  .venv/bin/python loyalty_microservice.py")
        return 0

    def _watch(self, database: Database[Document], shop: Shop, service: Process) -> None:
        before = _points(database)
        last_write = datetime.now(UTC)
        since = last_write
        compared = 0
        while compared < RECOUNTS:
            record = self._next_record(database, service, since)
            since = record["started_at"]
            if not compared:
                connected = next(line for line in service.lines if " connected " in line)
                self._screen.say(f"  its log   {connected.partition(' INFO ')[2]}")
            if record["outcome"] != "succeeded":
                raise SandboxError(f"a recount {record['outcome']}: {record['error']}")
            after = _points(database)
            self._show(compared + 1, record, before, after)
            # Nobody but this very thread moves orders, so they stand as they stood at `last_write`.
            if record["started_at"] > last_write:
                compared += 1
                self._compare(database, len(after))
            else:
                self._screen.say("  not compared: orders moved during this recount")
            before = after
            if compared < RECOUNTS:
                last_write = self._trade(shop, INTERVAL - QUIET)

    def _stop(self, service: Process) -> None:
        code = service.stop()
        self.failures += code != 0
        self._screen.say(f"\nSIGTERM: the service ended with exit code {code}.")

    def _ship_one_by_one(self, database: Database[Document], service: Process) -> None:
        """Ship single orders, and say after how long the customer's points were right."""
        service.wait_for("outcome=succeeded")
        users = {str(user["_id"]): user for user in database["users"].find()}
        waiting = list(
            database["orders"].find({"status": "Paid", "customer_id": {"$in": [*users]}})
        )
        for order in random.sample(waiting, SINGLE_ORDERS):
            user = users[order["customer_id"]]
            right = count_points(database)[canonical_key(user["_id"])] + 1
            database["orders"].update_one({"_id": order["_id"]}, {"$set": {"status": "Shipped"}})
            took = self._wait_for_points(database, service, user["_id"], right)
            self._screen.say(
                f"  order {order['_id']:>5} of {user['name']:<16} shipped: {right:>4} points, "
                f"right after {1000 * took:.0f} ms"
            )
            self._interrupt.sleep(random.uniform(0.2, 0.8))
        self._compare(database, len(_points(database)))

    def _wait_for_points(
        self, database: Database[Document], service: Process, user: Any, right: int
    ) -> float:
        """Return the seconds until the user holds these points."""
        started = time.monotonic()
        while (took := time.monotonic() - started) < PATIENCE.total_seconds():
            found = database["users"].find_one({"_id": user}, {"loyalty_points": 1})
            if found and found["loyalty_points"] == right:
                return took
            self._interrupt.sleep(0.002)
        raise SandboxError(f"no live update within {PATIENCE.seconds} s:\n{_end(service)}")

    def _next_record(
        self, database: Database[Document], service: Process, since: datetime
    ) -> Document:
        deadline = time.monotonic() + PATIENCE.total_seconds()
        while time.monotonic() < deadline:
            if service.code is not None:
                raise SandboxError(f"the service ended by itself:\n{_end(service)}")
            newer = {"started_at": {"$gt": since}}
            record = database["loyalty_recounts"].find_one(newer, sort=[("started_at", 1)])
            if record:
                return record
            self._interrupt.sleep(0.05)
        raise SandboxError(f"no recount within {PATIENCE.seconds} s:\n{_end(service)}")

    def _trade(self, shop: Shop, how_long: timedelta) -> datetime:
        """Move orders for so long, and return when the last one was moved."""
        until = time.monotonic() + how_long.total_seconds()
        shipped = returned = 0
        while (left := until - time.monotonic()) > 0:
            shipped += shop.ship_orders(random.randint(4, 12))
            returned += shop.return_orders(random.randint(2, 8))
            self._screen.progress(
                f"The shop ships {shipped} and takes back {returned} ... "
                f"next recount in {left + QUIET.total_seconds():.0f} s"
            )
            self._interrupt.sleep(0.2)
        on_progress = datetime.now(UTC)
        self._screen.say(f"\nThe shop has shipped {shipped} orders and taken back {returned}.", DIM)
        self._screen.progress("Waiting for the recount ...")
        return on_progress

    def _show(
        self, number: int, record: Document, before: dict[str, Any], after: dict[str, Any]
    ) -> None:
        screen = self._screen
        up, down = record["increased"], record["decreased"]
        rest = record["changed"] - up - down  # users who had no number, and no orders
        screen.say(
            f"\nRecount {number}: {record['changed']:,} of {len(after):,} customers changed: "
            f"{up:,} up, {down:,} down" + (f", {rest:,} set to 0" if rest else ""),
            BOLD,
        )
        screen.say(f"  {'top customers':<16} {'before':>7}    {'after':>6}", DIM)
        best = sorted(after, key=lambda user: -after[user][1])[:5]
        for user in best:
            name, now = after[user]
            old = before[user][1]
            difference = now - old if type(old) is int else 0
            style = GREEN if difference > 0 else RED
            row = f"  {name:<16} {str(old)[:7]:>7} -> {now:>6,}"
            screen.say(row + (screen.styled(f"{difference:+7,}", style) if difference else ""))
        screen.say(
            f"  earning nothing: {record['orders_without_customer']:,} orders without customer, "
            f"{record['orders_of_unknown_customers']:,} of unknown customers",
            DIM,
        )

    def _compare(self, database: Database[Document], users: int) -> None:
        wrong = find_mismatches(database)
        if not wrong:
            self._screen.say(f"  An independent count agrees on all {users:,} customers.", GREEN)
            return
        self.failures += 1
        self._screen.say(f"  AN INDEPENDENT COUNT DISAGREES on {len(wrong):,} customers:", RED)
        for one in wrong[:5]:
            self._screen.say(f"    {one.user!r}: stored {one.stored!r}, counted {one.counted:,}")


def _end(service: Process) -> str:
    return "\n".join(service.lines[-5:])


def _points(database: Database[Document]) -> dict[str, Any]:
    """Return each user's name and stored points, by the `_id` as Python writes it."""
    users = database["users"].find({}, {"name": 1, "loyalty_points": 1})
    return {repr(u["_id"]): (u["name"], u.get("loyalty_points", "none")) for u in users}


def _run(interrupt: Interrupt) -> int:
    try:
        return Demo(interrupt).run()
    except BrokenPipeError:  # whoever read the output has had enough
        _mute()
    except (NoMongod, SandboxError, PyMongoError) as error:
        print(f"\nThe demo cannot go on: {error}", file=sys.stderr)
    return 1


def _mute() -> None:
    """Let Python write into nowhere what it still has to write, at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def main() -> int:
    """Run the demo and return the exit code."""
    interrupt = Interrupt()
    try:
        signal.signal(signal.SIGINT, interrupt)
        code = _run(interrupt)
        interrupt.came = True  # too late: all is done
    except KeyboardInterrupt:
        _mute()
        _say_stopped()
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
