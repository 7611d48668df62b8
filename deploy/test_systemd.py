"""The units under a real systemd: `sudo make test-systemd`. Not part of `make test`.

A small Debian is booted with systemd-nspawn, in memory over a cached root folder, so that every
run begins with a new machine and nothing has to be cleaned up. It shares the network of this one,
where a real MongoDB with authentication runs, and sees the sources read-only in /src.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, TypeVar

import pytest
from bson import ObjectId
from pymongo.database import Database

from config import VERSION
from deploy import debian
from sandbox.mongod import Deployment, bind_to_parent

T = TypeVar("T")

# The first run makes the root folder, however slow the network is.
pytestmark = [pytest.mark.machine, pytest.mark.timeout(1200)]

TOP = debian.TOP

README = (TOP / "deploy/README.md").read_text(encoding="utf-8")
UNIT = "loyalty-microservice.service"
SETTINGS = Path("/etc/loyalty-microservice/loyalty.env")
BOOKS = SETTINGS.with_name("books.env")  # of a second shop
DROP_INS = Path(f"/etc/systemd/system/{UNIT}.d")
# Instead of the unit's 30 s and 5 s, which would only make the tests slow.
WATCHDOG = 3
QUICKER = {"WatchdogSec": WATCHDOG, "RestartSec": 1}

# Every kind of character that some shell, unit or URI stumbles over; the token is what is sought.
TOKEN = secrets.token_hex(8)
PASSWORD = f"{TOKEN}/%n$HOME${{X}}#@:?'\"\\"


# The machine


class Machine:
    """A booted Debian; `leader` is its process 1, as this machine sees it."""

    def __init__(self, leader: int) -> None:
        self.leader = leader

    def run(self, *command: str, **env: str) -> str:
        """Run a command in the machine as root; return its output, errors included."""
        done = self.call(*command, **env)
        if done.returncode:
            pytest.fail(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}")
        return done.stdout

    def call(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
        clean = ["env", "-i", path, *(f"{name}={value}" for name, value in env.items())]
        return subprocess.run(
            ["nsenter", f"--target={self.leader}", "--all", *clean, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )

    def path(self, inside: Path) -> Path:
        """Return where this machine sees a file of that one."""
        return Path(f"/proc/{self.leader}/root", *inside.parts[1:])

    def write(self, inside: Path, text: str) -> None:
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        path.write_text(text, encoding="utf-8")

    def systemctl(self, *arguments: str) -> str:
        return self.run("systemctl", *arguments)

    def make(self, *arguments: str, source: str = "/src") -> str:
        # No index but the wheels from the cache: the machine needs no network for them.
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels", "PIP_NO_CACHE_DIR": "1"}
        return self.run("make", "--directory", source, *arguments, **pip)

    def show(self, name: str) -> str:
        """Return one property of the unit."""
        return self.systemctl("show", "--value", f"--property={name}", UNIT).strip()

    def state(self) -> str:
        return f"{self.show('ActiveState')} ({self.show('SubState')})"

    def journal(self, *arguments: str) -> str:
        return self.run("journalctl", "--no-pager", f"--unit={UNIT}", *arguments)

    def main_process(self) -> int:
        """Return the service's process, by the number that it has on this machine."""
        inside = int(self.show("MainPID"))
        for status in Path("/proc").glob("[0-9]*/status"):
            with suppress(OSError):  # it has just ended
                numbers = _field(status.read_text(), "NSpid")
                if len(numbers) > 1 and int(numbers[-1]) == inside:
                    outside = int(numbers[0])
                    if _pid_namespace(outside) == _pid_namespace(self.leader):
                        return outside
        pytest.fail(f"no process {inside}: {self.state()}")


def _field(status: str, name: str) -> list[str]:
    found = re.search(rf"^{name}:\s*(.*)$", status, re.MULTILINE)
    return found[1].split() if found else []


def _pid_namespace(process: int) -> str:
    return str(Path(f"/proc/{process}/ns/pid").readlink())


def _wait_for(what: str, ready: Callable[[], T], seconds: float = 30.0) -> T:
    deadline = time.monotonic() + seconds
    while not (result := ready()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds:g} s")
        time.sleep(0.05)
    return result


@pytest.fixture(scope="session", autouse=True)
def _alone() -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.exit("booting a systemd needs root: sudo make test-systemd", 1)
    with debian.alone({"systemd-nspawn": "systemd-container"}):
        yield


@pytest.fixture(scope="session")
def machine(_alone: None) -> Iterator[Machine]:
    root = debian.root_folder()
    command = ["systemd-nspawn", f"--directory={root}", "--volatile=overlay", "--boot"]
    command += ["--machine=loyalty-test", "--register=no", "--resolv-conf=off", "--quiet"]
    command += [
        "--console=pipe",
        f"--bind-ro={TOP}:/src",
        f"--bind-ro={debian.wheels(root)}:/wheels",
    ]
    if not Path("/run/systemd/system").exists():
        command.append("--keep-unit")  # there is no systemd to make a scope for it
    nspawn = _which(command[0])
    with (
        tempfile.TemporaryFile() as console,
        # With --keep-unit, systemd-nspawn leaves these behind.
        debian.no_empty_groups("payload", "supervisor"),
        subprocess.Popen(
            # On SIGTERM it shuts the machine down, so that nothing stays when we are killed.
            bind_to_parent([nspawn, *command[1:]], signal.SIGTERM),
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,  # Ctrl-C is for us, not for it
        ) as process,
    ):
        leader = 0
        try:
            leader = _wait_for(
                "process 1 of the machine", lambda: _leader(process, console), seconds=20
            )
            booted = Machine(leader)
            _wait_for("the end of booting", lambda: _is_up(booted), seconds=60)
            yield booted
        finally:
            # The kernel then ends everything in it, and systemd-nspawn tidies up after itself.
            if leader:
                os.kill(leader, signal.SIGKILL)
            else:
                process.terminate()


def _which(tool: str) -> str:
    path = shutil.which(tool)
    assert path
    return path


def _leader(process: subprocess.Popen[bytes], console: IO[bytes]) -> int:
    if process.poll() is not None:
        console.seek(0)
        pytest.fail(f"systemd-nspawn ended:\n{console.read().decode(errors='replace')}")
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        with suppress(OSError):
            if _field(Path(f"/proc/{child}/status").read_text(), "NSpid")[1:] == ["1"]:
                return int(child)
    return 0


def _is_up(machine: Machine) -> bool:
    return machine.call("systemctl", "is-system-running").stdout.strip() in {"running", "degraded"}


# The shop


class Shop:
    """The database, and the points as plain Python counts them."""

    def __init__(self, deployment: Deployment) -> None:
        self.server = deployment.servers[0]
        self.deployment = deployment
        self.client = deployment.client(serverSelectionTimeoutMS=20_000)
        self.database: Database[dict[str, Any]] = self.client["oms_db"]
        self._random = random.Random(5)
        self.customers = [ObjectId() for _ in range(200)]
        self.database.users.insert_many([{"_id": _id} for _id in self.customers])
        self.sell(2000)

    def uri(self, password: str = PASSWORD) -> str:
        # A lost server is noticed at once, not after 30 s, which would only make the tests slow.
        return self.deployment.uri_for("loyalty", password) + "&serverSelectionTimeoutMS=200"

    def sell(self, orders: int = 50) -> None:
        """Insert orders in the forms and states that are seen in the wild."""
        pick = self._random.choice
        self.database.orders.insert_many(
            [
                {
                    "customer_id": pick((str, lambda c: str(c).upper(), lambda c: c))(
                        pick(self.customers)
                    ),
                    "status": pick(("Shipped", "Shipped", "shipped", "Pending", None)),
                }
                for _ in range(orders)
            ]
        )

    def counted(self) -> dict[ObjectId, int]:
        shipped: Counter[ObjectId] = Counter()
        for order in self.database.orders.find():
            if order["status"] == "Shipped":
                shipped[ObjectId(order["customer_id"])] += 1
        return {customer: shipped[customer] for customer in self.customers}

    def stored(self) -> dict[ObjectId, Any]:
        return {user["_id"]: user.get("loyalty_points") for user in self.database.users.find()}

    def wait_until_exact(self) -> None:
        counted = self.counted()
        _wait_for("the right points", lambda: self.stored() == counted)

    def last_record(self) -> dict[str, Any]:
        record = self.database.loyalty_recounts.find_one(sort=[("finished_at", -1)])
        assert record
        return record


@pytest.fixture(scope="session")
def shop(_alone: None) -> Iterator[Shop]:
    with Deployment(auth=True) as deployment:
        shop = Shop(deployment)
        roles = [{"role": "readWrite", "db": "oms_db"}]
        shop.client.admin.command("createUser", "loyalty", pwd=PASSWORD, roles=roles)
        try:
            yield shop
        finally:
            shop.client.close()


# The service


@pytest.fixture(scope="session")
def files_before(machine: Machine) -> set[str]:
    return _files(machine)


def _files(machine: Machine) -> set[str]:
    # systemd keeps its own stamps; the logs of before stay, as they should.
    own = ["-path", "/var/lib/systemd", "-o", "-path", "/var/log"]
    find = ["find", "/", "-xdev", "(", *own, ")", "-prune", "-o", "-print"]
    return set(machine.run(*find).splitlines())


@pytest.fixture(scope="session")
def installed(machine: Machine, shop: Shop, files_before: set[str]) -> str:
    """Install it as the README says; return what was printed."""
    printed = machine.make("install")
    assert machine.path(SETTINGS).read_text() == (TOP / "deploy/loyalty.env").read_text()
    unit = (TOP / "deploy" / UNIT).read_text(encoding="utf-8")
    assert all(f"\n{name}=" in unit for name in QUICKER)
    lines = (f"{name}={seconds}" for name, seconds in QUICKER.items())
    machine.write(DROP_INS / "test.conf", "\n".join(["[Service]", *lines, ""]))
    machine.write(SETTINGS, _settings(shop))
    machine.systemctl("daemon-reload")
    machine.systemctl("enable", "--now", "loyalty-microservice")
    return printed


def _settings(shop: Shop, *more: str) -> str:
    return "\n".join([f"MONGODB_URI={shop.uri()}", "RECOUNT_INTERVAL=1s", *more, ""])


@pytest.fixture
def service(machine: Machine, shop: Shop, installed: str) -> Machine:
    """The machine with the service running, whatever the test before has done."""
    if not shop.server.is_alive:
        shop.server.restart()
        shop.deployment.primary()
    if machine.path(SETTINGS).read_text() != _settings(shop):
        machine.write(SETTINGS, _settings(shop))
        machine.systemctl("restart", UNIT)
    machine.systemctl("start", UNIT)
    shop.wait_until_exact()
    return machine


def test_two_commands_install_it_and_it_is_ready_enabled_and_exact(
    service: Machine, shop: Shop, installed: str
) -> None:
    assert "systemctl enable --now" in installed
    assert service.show("Type") == "notify"
    assert service.state() == "active (running)"
    assert service.show("UnitFileState") == "enabled"
    assert service.path(SETTINGS).stat().st_mode & 0o777 == 0o600
    assert service.path(SETTINGS).parent.stat().st_mode & 0o777 == 0o700
    assert shop.stored() == shop.counted()
    assert shop.last_record()["exact"] is True


def test_it_runs_as_a_user_of_its_own_without_any_privilege(service: Machine) -> None:
    status = Path(f"/proc/{service.main_process()}/status").read_text()
    user = int(_field(status, "Uid")[0])
    assert 61184 <= user <= 65519, "not one of systemd's dynamic users"
    assert {int(value, 16) for value in _field(status, "CapBnd")} == {0}
    assert _field(status, "NoNewPrivs") == ["1"]
    assert _field(status, "Seccomp") == ["2"]


def test_systemd_has_nothing_to_say_about_the_installed_unit(service: Machine) -> None:
    assert service.run("systemd-analyze", "verify", UNIT) == ""
    unit = f"/usr/local/lib/systemd/system/{UNIT}"
    score = "--threshold=13"  # tenths; the exit code says whether it is more
    service.run("systemd-analyze", "security", "--offline=true", "--no-pager", score, unit)


def test_status_shows_the_last_recount_and_the_next(service: Machine, shop: Shop) -> None:
    time_pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    pattern = rf"recounted as of {time_pattern}, [\d,]+ changed; next at {time_pattern}"
    assert re.fullmatch(pattern, service.show("StatusText"))
    assert re.search(rf'Status: "{pattern}"', service.systemctl("status", UNIT))


def test_the_operators_commands_work_beside_it(service: Machine) -> None:
    folder = "/opt/loyalty-microservice"
    command = [f"{folder}/venv/bin/python", f"{folder}/loyalty_microservice.py"]
    command += ["--env-file", str(SETTINGS)]
    service.run(*command, "--check-config")
    # RECOUNT_INTERVAL is a second here, and a status must not be older than two of them.
    fresh = service.run(*command, "--status", RECOUNT_INTERVAL="2h")
    assert "succeeded" in fresh


def test_stop_takes_less_than_two_seconds(service: Machine) -> None:
    started = time.monotonic()
    service.systemctl("stop", UNIT)
    assert time.monotonic() - started < 2
    assert service.state() == "inactive (dead)"
    assert service.show("Result") == "success"
    assert service.show("ExecMainStatus") == "0"


def test_after_sigkill_it_is_restarted_and_exact(service: Machine, shop: Shop) -> None:
    restarts = int(service.show("NRestarts"))
    before = service.main_process()
    os.kill(before, signal.SIGKILL)
    shop.sell()
    _wait_for("a restart", lambda: int(service.show("NRestarts")) == restarts + 1)
    _wait_for("the unit", lambda: service.state() == "active (running)")
    assert service.main_process() != before
    shop.wait_until_exact()


def test_the_watchdog_restarts_a_process_that_hangs(service: Machine, shop: Shop) -> None:
    restarts = int(service.show("NRestarts"))
    before = service.main_process()
    os.kill(before, signal.SIGSTOP)
    shop.sell()
    _wait_for("the watchdog", lambda: service.show("Result") == "watchdog", WATCHDOG + 10)
    _wait_for("a restart", lambda: int(service.show("NRestarts")) == restarts + 1)
    _wait_for("the unit", lambda: service.state() == "active (running)")
    assert not Path(f"/proc/{before}").exists()
    assert "Watchdog timeout" in service.run("journalctl", "--no-pager", f"--unit={UNIT}")
    shop.wait_until_exact()


def test_the_watchdog_is_patient_with_a_slow_database(service: Machine, shop: Shop) -> None:
    restarts, process = service.show("NRestarts"), service.show("MainPID")
    shop.server.suspend()
    try:
        # Not a sleep for luck: to survive this time is what is tested.
        time.sleep(WATCHDOG + 1.5)
        assert (service.show("NRestarts"), service.show("MainPID")) == (restarts, process)
    finally:
        shop.server.resume()
    shop.sell()
    shop.wait_until_exact()
    assert service.show("MainPID") == process


def test_a_lost_database_is_waited_for(service: Machine, shop: Shop) -> None:
    restarts, process = service.show("NRestarts"), service.show("MainPID")
    shop.server.kill()
    _wait_for("the failure", lambda: service.show("StatusText").startswith("failed: "))
    assert service.state() == "active (running)"
    shop.server.start()
    shop.deployment.primary()
    shop.sell()
    shop.wait_until_exact()
    _wait_for("the status", lambda: service.show("StatusText").startswith("recounted "))
    assert (service.show("NRestarts"), service.show("MainPID")) == (restarts, process)


def test_started_without_a_database_it_waits_and_then_becomes_ready(
    service: Machine, shop: Shop
) -> None:
    service.systemctl("stop", UNIT)
    shop.server.kill()
    service.systemctl("start", "--no-block", UNIT)
    _wait_for("the failure", lambda: service.show("StatusText").startswith("failed: "))
    assert service.state() == "activating (start)"
    process = service.show("MainPID")
    shop.server.start()
    shop.deployment.primary()
    shop.sell()
    _wait_for("the unit", lambda: service.state() == "active (running)")
    shop.wait_until_exact()
    assert service.show("MainPID") == process


def test_a_wrong_password_fails_with_78_and_is_not_tried_again(
    service: Machine, shop: Shop
) -> None:
    service.systemctl("stop", UNIT)
    service.write(SETTINGS, f"MONGODB_URI={shop.uri('not' + PASSWORD)}\n")
    assert service.call("systemctl", "start", UNIT).returncode
    # A unit that is to be restarted is "activating (auto-restart)" now.
    assert service.state() == "failed (failed)"
    assert service.show("ExecMainStatus") == "78"
    assert service.show("NRestarts") == "0"
    assert "rejects the user name or password" in service.journal("--lines=5", "--priority=err")


def test_missing_settings_fail_with_78_and_say_what_is_wanted(service: Machine) -> None:
    service.systemctl("stop", UNIT)
    service.path(SETTINGS).unlink()
    assert service.call("systemctl", "start", UNIT).returncode
    assert service.state() == "failed (failed)"
    assert service.show("ExecMainStatus") == "78"
    assert "MONGODB_URI: required" in service.journal("--lines=5", "--priority=err")
    service.write(SETTINGS, "")


def test_the_secret_can_be_a_credential(service: Machine, shop: Shop) -> None:
    secret = SETTINGS.with_name("mongodb-uri")
    service.write(secret, shop.uri() + "\n")
    service.write(SETTINGS, "RECOUNT_INTERVAL=1s\n")
    lines = (f"LoadCredential=mongodb-uri:{secret}", "Environment=MONGODB_URI_FILE=%d/mongodb-uri")
    service.write(DROP_INS / "secret.conf", "\n".join(["[Service]", *lines, ""]))
    try:
        service.systemctl("daemon-reload")
        service.systemctl("restart", UNIT)
        shop.sell()
        shop.wait_until_exact()
        environment = Path(f"/proc/{service.main_process()}/environ").read_text()
        assert "MONGODB_URI_FILE=" in environment
        assert TOKEN not in environment
    finally:
        service.path(DROP_INS / "secret.conf").unlink()
        service.path(secret).unlink()
        service.systemctl("daemon-reload")


def test_an_upgrade_and_going_back_keep_the_settings(service: Machine, shop: Shop) -> None:
    def install(source: str, version: str) -> None:
        service.make("install", source=source)
        assert service.path(SETTINGS).read_text() == _settings(shop)
        assert service.state() == "active (running)"
        service.systemctl("restart", UNIT)
        shop.sell()
        shop.wait_until_exact()
        _wait_for(version, lambda: shop.last_record()["version"] == version)

    new = "/root/new"
    service.run("cp", "-r", "/src", new)
    service.run("sed", "-i", 's/^VERSION = .*/VERSION = "99.0"/', f"{new}/config.py")
    install(new, "99.0")
    service.run("rm", "-r", new)
    install("/src", VERSION)


def test_every_line_of_a_traceback_is_an_error_and_nothing_else_is(service: Machine) -> None:
    recount = service.path(Path("/opt/loyalty-microservice/loyalty/recount.py"))
    good = recount.read_text()
    bug = "def _bug(*_: object) -> None:\n    raise RuntimeError('one\\ntwo')\n"
    recount.write_text(f"{good}\n\n{bug}\n\nRecount.refusal = _bug\n")
    try:
        service.systemctl("restart", UNIT)
        _wait_for("the bug", lambda: service.show("StatusText").startswith("failed: a bug"))
    finally:
        recount.write_text(good)
    this_run = f"_SYSTEMD_INVOCATION_ID={service.show('InvocationID')}"
    command = ["journalctl", "--no-pager", "--output=cat", this_run]
    errors = service.run(*command, "--priority=err").splitlines()
    assert [line for line in errors if line.startswith("bug ")]
    assert {"Traceback (most recent call last):", "RuntimeError: one", "two"} <= set(errors)
    assert not [line for line in errors if line.startswith("connected ")]
    assert [line for line in service.run(*command).splitlines() if line.startswith("connected ")]
    service.systemctl("restart", UNIT)


def test_the_journal_has_no_timestamps_and_no_raw_priorities_of_ours(service: Machine) -> None:
    lines = service.journal("--output=cat", "--identifier=loyalty-microservice").splitlines()
    assert [line for line in lines if line.startswith("recount outcome=succeeded ")]
    assert not [line for line in lines if re.match(r"<\d>|\d{4}-\d\d-\d\dT", line)]


def test_metrics_are_written_for_others_to_read_while_it_runs(service: Machine, shop: Shop) -> None:
    file = Path("/run/loyalty-microservice/loyalty.prom")
    service.write(SETTINGS, _settings(shop, f"METRICS_FILE={file}"))
    service.systemctl("restart", UNIT)

    def recounts() -> int:
        text = service.run("setpriv", "--reuid=65534", "--clear-groups", "cat", str(file))
        found = re.search(r'_total{database="oms_db",outcome="succeeded"} (\d+)\n', text)
        return int(found[1]) if found else 0

    _wait_for("metrics", lambda: service.path(file).exists() and recounts() > 1)
    assert "no_metrics" not in service.journal("--output=cat")
    service.systemctl("stop", UNIT)
    assert not service.path(file).exists()


@pytest.fixture(scope="session")
def books(machine: Machine, shop: Shop, installed: str) -> Database[dict[str, Any]]:
    """A second shop on the same server, with a service of its own."""
    books: Database[dict[str, Any]] = shop.client["books_db"]
    customer = books.users.insert_one({}).inserted_id
    books.orders.insert_many([{"customer_id": customer, "status": "Shipped"} for _ in range(3)])
    roles = [{"role": "readWrite", "db": books.name}]
    shop.client.admin.command("grantRolesToUser", "loyalty", roles=roles)
    machine.run("install", "-m", "0600", "/src/deploy/loyalty.env", str(BOOKS))
    machine.write(BOOKS, _books_settings(shop))
    machine.systemctl("enable", "--now", "loyalty-microservice@books")
    return books


def _books_settings(shop: Shop) -> str:
    return f"MONGODB_URI={shop.uri()}\nMONGODB_DATABASE=books_db\n"


def test_a_second_shop_has_the_same_unit_with_settings_of_its_own(
    service: Machine, books: Database[dict[str, Any]]
) -> None:
    def record_recount() -> bool:
        return [user.get("loyalty_points") for user in books.users.find()] == [3]

    _wait_for("the second shop's points", record_recount)
    assert service.state() == "active (running)"
    assert service.systemctl("is-active", "loyalty-microservice@books").strip() == "active"
    assert service.run("systemd-analyze", "verify", "loyalty-microservice@books.service") == ""
    folder = service.path(Path("/usr/local/lib/systemd/system"))
    one = (folder / UNIT).read_text().splitlines()
    other = (folder / "loyalty-microservice@.service").read_text().splitlines()
    assert [line for line in other if line not in one] == [
        "Description=Loyalty points: counts shipped orders for each customer (%i)",
        "EnvironmentFile=-/etc/loyalty-microservice/%i.env",
        "SyslogIdentifier=loyalty-microservice@%i",
    ]
    assert len(one) == len(other)


def _alerts(machine: Machine) -> list[str]:
    identifier = "--identifier=loyalty-microservice-alert"
    command = ["journalctl", "--no-pager", "--output=cat", "--priority=err", identifier]
    return machine.run(*command).splitlines()


def test_a_timer_looks_at_the_points_and_stale_ones_alert(
    service: Machine, books: Database[dict[str, Any]]
) -> None:
    look, alert = "loyalty-microservice-status@books", "loyalty-microservice-alert@"
    wanted = f"{look} has failed; see: systemctl status {look}"
    quicker = ("OnActiveSec=", "OnActiveSec=1s", "OnUnitActiveSec=5s", "AccuracySec=1ms")
    (documented,) = re.findall(r"```ini\n(\[Service\]\nExecStart=.* mail .*\n)```", README)
    drop_ins = {
        Path(f"/etc/systemd/system/{look}.timer.d"): "\n".join(["[Timer]", *quicker, ""]),
        Path(f"/etc/systemd/system/{alert}.service.d"): documented,
    }
    for folder, text in drop_ins.items():
        service.write(folder / "test.conf", text)
    mail = service.path(Path("/root/mail"))
    said = ("journalctl", "--no-pager", "--output=cat", f"--unit={look}")
    try:
        with _stand_in(
            service, Path("/usr/local/bin/mail"), 'echo "$@" >/root/mail; cat >>/root/mail'
        ):
            service.systemctl("daemon-reload")
            service.systemctl("enable", "--now", f"{look}.timer")
            _wait_for("two looks", lambda: service.run(*said).count(" old: fresh, ") >= 2, 60)
            assert wanted not in _alerts(service)
            long_ago = datetime.now(UTC) - timedelta(hours=5)
            books.loyalty_recounts.update_many({}, {"$set": {"as_of": long_ago}})
            _wait_for("an alert", lambda: wanted in _alerts(service), 60)
            _wait_for("the mail", lambda: mail.exists() and " old: STALE, " in mail.read_text())
            assert mail.read_text().startswith(f"-s {look} has failed on ")
            service.systemctl("stop", f"{look}.timer", f"{look}.service")
            _wait_for("the last alert", lambda: not _active(service, f"{alert}*"))
    finally:
        mail.unlink(missing_ok=True)
        service.run("rm", "-r", *map(str, drop_ins))
        service.systemctl("daemon-reload")


def _active(machine: Machine, pattern: str) -> str:
    return machine.systemctl("list-units", "--no-legend", "--state=activating", pattern)


def test_a_service_that_gives_up_alerts(
    service: Machine, shop: Shop, books: Database[dict[str, Any]]
) -> None:
    service.write(BOOKS, "MONGODB_URI=nonsense\n")
    assert service.call("systemctl", "restart", "loyalty-microservice@books").returncode
    wanted = (
        "loyalty-microservice@books has failed; see: systemctl status loyalty-microservice@books"
    )
    _wait_for("an alert", lambda: wanted in _alerts(service))
    service.write(BOOKS, _books_settings(shop))
    service.systemctl("restart", "loyalty-microservice@books")


@contextmanager
def _stand_in(machine: Machine, command: Path, script: str) -> Iterator[None]:
    """Put a shell script in the place of a command that the machine does not have."""
    machine.write(command, f"#!/bin/sh\n{script}\n")
    machine.path(command).chmod(0o755)
    try:
        yield
    finally:
        machine.path(command).unlink()


def test_cron_recounts_and_mails_only_when_something_is_wrong(service: Machine, shop: Shop) -> None:
    (documented,) = re.findall(r"```text\n(MAILTO=.*?)```", README, re.DOTALL)
    line = "0 */2 * * * root "
    assert line in documented
    # What cron does with the documented line, but when it starts and not on the hour.
    crontab, stamp = Path("/etc/cron.d/loyalty-microservice"), Path("/run/crond.reboot")
    mail = service.path(Path("/root/mail"))
    service.systemctl("stop", UNIT)
    service.write(crontab, documented + documented.replace(line, "@reboot root "))
    try:
        with _stand_in(service, Path("/usr/sbin/sendmail"), "cat >>/root/mail"):
            shop.sell()
            service.path(stamp).unlink(missing_ok=True)
            service.systemctl("restart", "cron")
            shop.wait_until_exact()
            service.write(SETTINGS, f"MONGODB_URI={shop.uri('not' + PASSWORD)}\n")
            service.path(stamp).unlink()
            service.systemctl("restart", "cron")
            _wait_for("the mail", lambda: mail.exists() and "rejects the user" in mail.read_text())
        assert mail.read_text().count("\nTo: ops@example.com\n") == 1
        assert TOKEN not in mail.read_text()
        mail.unlink()
        log = service.run("journalctl", "--no-pager", "--output=cat", "--unit=cron")
        assert log.count("/loyalty_microservice.py --once ") == 2
        assert "rror" not in log
    finally:
        service.path(crontab).unlink()
        service.systemctl("restart", "cron")


def test_the_secret_is_in_no_property_no_log_and_no_process_list(
    service: Machine, shop: Shop
) -> None:
    places = {
        "show": service.systemctl("show", UNIT),
        "status": service.systemctl("status", "--lines=1000", UNIT),
        "cat": service.systemctl("cat", UNIT),
        "the manager's environment": service.systemctl("show-environment"),
        "journal": service.run("journalctl", "--no-pager", "--output=export"),
        "records": repr(list(shop.database.loyalty_recounts.find())),
        "processes": "\n".join(_command_lines()),
    }
    assert "rejects the user name or password" in places["journal"]
    assert "loyalty_microservice.py" in places["processes"]
    assert [place for place, text in places.items() if TOKEN in text] == []
    # The search would find it: root, and nobody else, can see the environment of the process.
    assert TOKEN in Path(f"/proc/{service.main_process()}/environ").read_text()


def _command_lines() -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield process.read_text(errors="replace")


def test_uninstall_leaves_the_settings_and_purge_leaves_nothing(
    service: Machine, shop: Shop, books: Database[dict[str, Any]], files_before: set[str]
) -> None:
    program = "/opt/loyalty-microservice/loyalty_microservice.py"
    assert "\n".join(_command_lines()).count(program) == 2, "one for each shop"
    service.make("uninstall")
    assert program not in "\n".join(_command_lines())
    assert service.show("LoadState") == "not-found"
    left = {Path(file) for file in _files(service) - files_before}
    drop_in = DROP_INS / "test.conf"
    assert left == {SETTINGS, BOOKS, SETTINGS.parent, drop_in, drop_in.parent}
    assert service.path(SETTINGS).read_text() == _settings(shop)
    service.make("uninstall", "PURGE=1")
    assert _files(service) == files_before
