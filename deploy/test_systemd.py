"""The units under a real systemd: `sudo make test-systemd`. Not part of `make test`.

systemd-nspawn boots a small Debian from a cached root directory, with an overlay in memory: each
run starts with a new machine and leaves nothing behind. The machine uses the network of the host,
where a real MongoDB with authentication runs. The sources are mounted read-only at /src.
"""

from __future__ import annotations

import json
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

# The first run makes the root directory, which takes minutes with a slow network.
pytestmark = [pytest.mark.machine, pytest.mark.timeout(1200)]

TOP = debian.TOP

README = (TOP / "deploy/README.md").read_text(encoding="utf-8")
UNIT = "loyalty-microservice.service"
SETTINGS = Path("/etc/loyalty-microservice/loyalty.env")
COPY = Path("/run/loyalty-microservice/loyalty.env")  # of SETTINGS, for the service
BOOKS = SETTINGS.with_name("books.env")  # of a second shop
DROP_INS = Path(f"/etc/systemd/system/{UNIT}.d")
# In place of the unit's 30 s and 5 s, to make the tests faster.
WATCHDOG_SECONDS = 3
SHORT_TIMES = {"WatchdogSec": WATCHDOG_SECONDS, "RestartSec": 1}

# All characters that are special in a shell, a unit or a URI. Tests search outputs for the token.
TOKEN = secrets.token_hex(8)
PASSWORD = f"{TOKEN}/%n$HOME${{X}}#@:?'\"\\"


# The machine


class Machine:
    """A booted Debian; `leader` is the host's number of its process 1."""

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
        """Return the path on the host of a file in the machine."""
        return Path(f"/proc/{self.leader}/root", *inside.parts[1:])

    def write(self, inside: Path, text: str) -> None:
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
        path.write_text(text, encoding="utf-8")

    def systemctl(self, *arguments: str) -> str:
        return self.run("systemctl", *arguments)

    def make(self, *arguments: str, source: str = "/src") -> str:
        # pip installs the cached wheels: the machine needs no network.
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
        """Return the host's number of the service's main process."""
        inside = int(self.show("MainPID"))
        for status in Path("/proc").glob("[0-9]*/status"):
            with suppress(OSError):  # the process has just ended
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
def _exclusive_use() -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.exit("booting a systemd needs root: sudo make test-systemd", 1)
    with debian.lock_cache({"systemd-nspawn": "systemd-container"}):
        yield


@pytest.fixture(scope="session")
def machine(_exclusive_use: None) -> Iterator[Machine]:
    root = debian.prepare_root()
    command = ["systemd-nspawn", f"--directory={root}", "--volatile=overlay", "--boot"]
    command += ["--machine=loyalty-test", "--register=no", "--resolv-conf=off", "--quiet"]
    command += [
        "--console=pipe",
        f"--bind-ro={TOP}:/src",
        f"--bind-ro={debian.download_wheels(root)}:/wheels",
    ]
    if not Path("/run/systemd/system").exists():
        command.append("--keep-unit")  # no systemd on the host could create a scope
    nspawn = _which(command[0])
    with (
        tempfile.TemporaryFile() as console,
        # With --keep-unit, systemd-nspawn does not remove these.
        debian.remove_empty_groups("payload", "supervisor"),
        subprocess.Popen(
            # On SIGTERM systemd-nspawn shuts the machine down, also when the tests are killed.
            bind_to_parent([nspawn, *command[1:]], signal.SIGTERM),
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,  # Ctrl-C is for the tests only
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
            # The kernel then ends all its processes, and systemd-nspawn cleans up.
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
    """The database, and the points that plain Python counts."""

    def __init__(self, deployment: Deployment) -> None:
        self.server = deployment.servers[0]
        self.deployment = deployment
        self.client = deployment.client(serverSelectionTimeoutMS=20_000)
        self.database: Database[dict[str, Any]] = self.client["oms_db"]
        self._random = random.Random(5)
        self.customers = [ObjectId() for _ in range(200)]
        self.database.users.insert_many([{"_id": _id} for _id in self.customers])
        self.add_orders(2000)

    def uri(self, password: str = PASSWORD) -> str:
        # In place of the default of 30 s, to notice a lost server sooner.
        return self.deployment.uri_for("loyalty", password) + "&serverSelectionTimeoutMS=200"

    def add_orders(self, orders: int = 50) -> None:
        """Insert orders with the forms of ids and the statuses that real shops have."""
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

    def counted(self, *statuses: str) -> dict[ObjectId, int]:
        shipped: Counter[ObjectId] = Counter()
        for order in self.database.orders.find():
            if order["status"] in (statuses or ("Shipped",)):
                shipped[ObjectId(order["customer_id"])] += 1
        return {customer: shipped[customer] for customer in self.customers}

    def stored(self) -> dict[ObjectId, Any]:
        return {user["_id"]: user.get("loyalty_points") for user in self.database.users.find()}

    def wait_until_exact(self) -> None:
        counted = self.counted()
        _wait_for("exact points", lambda: self.stored() == counted)

    def last_record(self) -> dict[str, Any]:
        record = self.database.loyalty_recounts.find_one(sort=[("finished_at", -1)])
        assert record
        return record


@pytest.fixture(scope="session")
def shop(_exclusive_use: None) -> Iterator[Shop]:
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
    # systemd has time stamps of its own, and logs stay after an uninstallation.
    own = ["-path", "/var/lib/systemd", "-o", "-path", "/var/log"]
    find = ["find", "/", "-xdev", "(", *own, ")", "-prune", "-o", "-print"]
    return set(machine.run(*find).splitlines())


@pytest.fixture(scope="session")
def installed(machine: Machine, shop: Shop, files_before: set[str]) -> str:
    """Install it as the README describes; return the output."""
    printed = machine.make("install")
    assert machine.path(SETTINGS).read_text() == (TOP / "deploy/loyalty.env").read_text()
    unit = (TOP / "deploy" / UNIT).read_text(encoding="utf-8")
    assert all(f"\n{name}=" in unit for name in SHORT_TIMES)
    lines = (f"{name}={seconds}" for name, seconds in SHORT_TIMES.items())
    machine.write(DROP_INS / "test.conf", "\n".join(["[Service]", *lines, ""]))
    machine.write(SETTINGS, _settings(shop))
    machine.systemctl("daemon-reload")
    machine.systemctl("enable", "--now", "loyalty-microservice")
    return printed


def _settings(shop: Shop, *more: str) -> str:
    return "\n".join([f"MONGODB_URI={shop.uri()}", "RECOUNT_INTERVAL=1s", *more, ""])


@pytest.fixture
def service(machine: Machine, shop: Shop, installed: str) -> Machine:
    """The machine with a running service, whatever state the previous test left."""
    if not shop.server.is_alive:
        shop.server.restart()
        shop.deployment.primary()
    if machine.path(SETTINGS).read_text() != _settings(shop):
        machine.systemctl("stop", UNIT)
        machine.write(SETTINGS, _settings(shop))
        # The safety checks would refuse to take points from all users.
        shop.database.users.update_many({}, {"$unset": {"loyalty_points": ""}})
    machine.systemctl("start", UNIT)
    shop.wait_until_exact()
    return machine


def test_two_commands_install_and_start_the_service(
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


def test_the_service_runs_as_a_dynamic_user_without_privileges(service: Machine) -> None:
    status = Path(f"/proc/{service.main_process()}/status").read_text()
    user = int(_field(status, "Uid")[0])
    assert 61184 <= user <= 65519, "not one of systemd's dynamic users"
    assert {int(value, 16) for value in _field(status, "CapBnd")} == {0}
    assert _field(status, "NoNewPrivs") == ["1"]
    assert _field(status, "Seccomp") == ["2"]


def test_systemd_verifies_the_installed_unit_without_warnings(service: Machine) -> None:
    assert service.run("systemd-analyze", "verify", UNIT) == ""
    unit = f"/usr/local/lib/systemd/system/{UNIT}"
    score = "--threshold=13"  # tenths; the exit code says whether it is more
    service.run("systemd-analyze", "security", "--offline=true", "--no-pager", score, unit)


def test_systemctl_status_shows_the_last_and_the_next_recount(service: Machine, shop: Shop) -> None:
    time_pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    pattern = rf"recounted as of {time_pattern}, [\d,]+ changed; next at {time_pattern}"
    # Each second, it is "recounting" for a moment.
    _wait_for("a status", lambda: re.fullmatch(pattern, service.show("StatusText")))
    line = rf'Status: "{pattern}"'
    _wait_for("a line", lambda: re.search(line, service.systemctl("status", UNIT)))


def test_commands_work_while_the_service_runs(service: Machine) -> None:
    service.run(*_command("--check-config"))
    # RECOUNT_INTERVAL is 1 s here, and points older than two intervals are stale.
    fresh = service.run(*_command("--status"), RECOUNT_INTERVAL="2h")
    assert "succeeded" in fresh


def _messages(machine: Machine) -> str:
    """Return the last messages of the service, without those of systemd."""
    return machine.journal("--identifier=loyalty-microservice", "--lines=20", "--output=cat")


def _command(*arguments: str) -> list[str]:
    folder = "/opt/loyalty-microservice"
    program = [f"{folder}/venv/bin/python", f"{folder}/loyalty_microservice.py"]
    return [*program, "--env-file", str(SETTINGS), *arguments]


def test_reload_reads_the_changed_settings_without_a_restart(service: Machine, shop: Shop) -> None:
    process = service.show("MainPID")
    changed = _settings(shop, "POINTS_PER_ORDER=3").replace("INTERVAL=1s", "INTERVAL=2h")
    tripled = {customer: 3 * points for customer, points in shop.counted().items()}
    service.write(SETTINGS, changed)
    service.systemctl("reload", UNIT)
    _wait_for("three points for each order", lambda: shop.stored() == tripled)

    service.write(SETTINGS, changed.replace("=3", "=many"))
    service.systemctl("reload", UNIT)
    _wait_for("the error", lambda: "reload_failed" in service.journal("--priority=err"))
    _wait_for("the state", lambda: service.state() == "active (running)")
    assert "reload failed, the old settings are kept" in service.show("StatusText")
    assert shop.stored() == tripled
    assert service.show("MainPID") == process

    # Without this setting the safety check refuses to take points from all users.
    service.write(SETTINGS, _settings(shop, "MAX_DECREASE_PERCENT=100"))
    service.systemctl("reload", UNIT)
    shop.wait_until_exact()
    shop.add_orders()
    shop.wait_until_exact()  # the interval is a second again
    assert service.show("MainPID") == process


def test_the_service_counts_what_check_config_shows_despite_a_comment(
    service: Machine, shop: Shop
) -> None:
    line = "ORDER_STATUSES=Shipped,shipped  # the old spelling"
    service.write(SETTINGS, _settings(shop, line))
    wanted = shop.counted("Shipped", "shipped")
    assert wanted != shop.counted()
    checked = json.loads(service.run(*_command("--check-config", "--json"), LOG_LEVEL="ERROR"))
    assert checked["dry_run"]["counted_orders"] == sum(wanted.values())
    for verb in ("reload", "restart"):
        shop.database.users.update_many({}, {"$set": {"loyalty_points": 0}})
        service.systemctl(verb, UNIT)
        _wait_for(f"points after {verb}", lambda: shop.stored() == wanted)


def test_a_misspelt_setting_ends_with_78_at_start_and_is_an_error_at_a_reload(
    service: Machine, shop: Shop
) -> None:
    service.write(SETTINGS, _settings(shop, "ORDER_STATUS=Shipped,shipped"))
    process = service.show("MainPID")
    service.systemctl("reload", UNIT)
    problem = "unknown setting ORDER_STATUS, did you mean ORDER_STATUSES?"
    _wait_for("the error", lambda: f'reload_failed error="{problem}' in service.journal())
    assert service.state() == "active (running)"
    assert service.show("MainPID") == process
    assert service.call("systemctl", "restart", UNIT).returncode
    assert service.state() == "failed (failed)"
    assert service.show("ExecMainStatus") == "78"
    assert service.show("NRestarts") == "0"
    errors = _messages(service)
    assert f'configuration_problem error="{problem}"' in errors
    assert f"configuration_help env_file={SETTINGS} " in errors


def test_only_the_service_can_read_its_copy_of_the_settings(service: Machine) -> None:
    copy = service.path(COPY)
    status = Path(f"/proc/{service.main_process()}/status").read_text()
    user = int(_field(status, "Uid")[0])
    for _ in range(2):  # after the start, and after a reload
        assert copy.stat().st_mode & 0o777 == 0o400
        assert copy.stat().st_uid == user
        assert copy.read_text() == service.path(SETTINGS).read_text()
        service.systemctl("reload", UNIT)
    service.systemctl("stop", UNIT)
    assert not copy.exists()
    assert not list(service.path(Path("/run")).glob("loyalty-microservice*"))


def test_a_copy_that_the_service_replaced_by_a_link_is_overwritten(service: Machine) -> None:
    copy, target = service.path(COPY), service.path(Path("/root/target"))
    target.touch(0o600)
    try:
        copy.unlink()
        copy.symlink_to("/root/target")
        service.systemctl("reload", UNIT)
        assert target.read_text() == ""
        assert not copy.is_symlink()
        assert copy.read_text() == service.path(SETTINGS).read_text()
    finally:
        target.unlink()


def test_type_notify_reload_uses_the_changed_settings(service: Machine, shop: Shop) -> None:
    if int(service.systemctl("--version").split()[1]) < 253:
        pytest.skip("systemd before 253 does not have Type=notify-reload")
    drop_in = DROP_INS / "reload.conf"
    service.write(drop_in, "[Service]\nType=notify-reload\n")
    try:
        service.systemctl("daemon-reload")
        service.systemctl("restart", UNIT)
        service.write(SETTINGS, _settings(shop, "POINTS_PER_ORDER=3"))
        tripled = {customer: 3 * points for customer, points in shop.counted().items()}
        service.systemctl("reload", UNIT)
        _wait_for("three points for each order", lambda: shop.stored() == tripled)
        assert service.state() == "active (running)"
    finally:
        service.path(drop_in).unlink()
        service.systemctl("daemon-reload")
        service.systemctl("restart", UNIT)


def test_stop_takes_less_than_two_seconds(service: Machine) -> None:
    started = time.monotonic()
    service.systemctl("stop", UNIT)
    assert time.monotonic() - started < 2
    assert service.state() == "inactive (dead)"
    assert service.show("Result") == "success"
    assert service.show("ExecMainStatus") == "0"


def test_a_killed_service_is_restarted_and_exact(service: Machine, shop: Shop) -> None:
    restarts = int(service.show("NRestarts"))
    before = service.main_process()
    os.kill(before, signal.SIGKILL)
    shop.add_orders()
    _wait_for("a restart", lambda: int(service.show("NRestarts")) == restarts + 1)
    _wait_for("the unit", lambda: service.state() == "active (running)")
    assert service.main_process() != before
    shop.wait_until_exact()


def test_the_watchdog_restarts_a_process_that_hangs(service: Machine, shop: Shop) -> None:
    restarts = int(service.show("NRestarts"))
    before = service.main_process()
    os.kill(before, signal.SIGSTOP)
    shop.add_orders()
    _wait_for("the watchdog", lambda: service.show("Result") == "watchdog", WATCHDOG_SECONDS + 10)
    _wait_for("a restart", lambda: int(service.show("NRestarts")) == restarts + 1)
    _wait_for("the unit", lambda: service.state() == "active (running)")
    assert not Path(f"/proc/{before}").exists()
    assert "Watchdog timeout" in service.run("journalctl", "--no-pager", f"--unit={UNIT}")
    shop.wait_until_exact()


def test_the_watchdog_does_not_restart_a_service_that_waits_for_the_database(
    service: Machine, shop: Shop
) -> None:
    restarts, process = service.show("NRestarts"), service.show("MainPID")
    shop.server.suspend()
    try:
        # The test is that the service survives this time.
        time.sleep(WATCHDOG_SECONDS + 1.5)
        assert (service.show("NRestarts"), service.show("MainPID")) == (restarts, process)
    finally:
        shop.server.resume()
    shop.add_orders()
    shop.wait_until_exact()
    assert service.show("MainPID") == process


def test_the_service_waits_for_a_lost_database(service: Machine, shop: Shop) -> None:
    restarts, process = service.show("NRestarts"), service.show("MainPID")
    shop.server.kill()
    # A recount repeats its count for 30 s before it fails.
    _wait_for("the failure", lambda: service.show("StatusText").startswith("failed: "), 120)
    assert service.state() == "active (running)"
    shop.server.start()
    shop.deployment.primary()
    shop.add_orders()
    shop.wait_until_exact()
    _wait_for("the status", lambda: service.show("StatusText").startswith("recounted "))
    assert (service.show("NRestarts"), service.show("MainPID")) == (restarts, process)


def test_a_service_that_starts_without_a_database_becomes_ready_later(
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
    shop.add_orders()
    _wait_for("the unit", lambda: service.state() == "active (running)")
    shop.wait_until_exact()
    assert service.show("MainPID") == process


def test_a_wrong_password_ends_the_service_with_78_and_no_restart(
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


def test_a_missing_settings_file_ends_the_service_with_78_and_is_named(service: Machine) -> None:
    service.systemctl("stop", UNIT)
    service.path(SETTINGS).unlink()
    assert service.call("systemctl", "start", UNIT).returncode
    assert service.state() == "failed (failed)"
    assert service.show("ExecMainStatus") == "78"
    assert service.show("NRestarts") == "0"
    error = f"{SETTINGS}: cannot be read: No such file or directory"
    assert error in service.journal("--lines=5", "--priority=err")
    service.write(SETTINGS, "")


def test_settings_without_the_uri_end_the_service_with_78_and_name_the_file(
    service: Machine,
) -> None:
    service.systemctl("stop", UNIT)
    service.write(SETTINGS, "RECOUNT_INTERVAL=1h\n")
    assert service.call("systemctl", "start", UNIT).returncode
    assert service.show("ExecMainStatus") == "78"
    lines = _messages(service)
    assert "MONGODB_URI: required" in lines
    assert f"configuration_help env_file={SETTINGS} " in lines


def test_a_reload_without_the_settings_file_fails_and_the_service_continues(
    service: Machine, shop: Shop
) -> None:
    process = service.show("MainPID")
    service.path(SETTINGS).unlink()
    reload = service.call("systemctl", "reload", UNIT)
    service.write(SETTINGS, _settings(shop))
    assert reload.returncode
    assert service.state() == "active (running)"
    assert f"cannot stat '/proc/1/root{SETTINGS}'" in _messages(service)
    shop.add_orders()
    shop.wait_until_exact()
    assert service.show("MainPID") == process


def test_the_uri_can_be_a_systemd_credential(service: Machine, shop: Shop) -> None:
    secret = SETTINGS.with_name("mongodb-uri")
    service.write(secret, shop.uri() + "\n")
    service.write(SETTINGS, f"RECOUNT_INTERVAL=1s\nMONGODB_URI={shop.uri('not' + PASSWORD)}\n")
    lines = (f"LoadCredential=mongodb-uri:{secret}", "Environment=MONGODB_URI_FILE=%d/mongodb-uri")
    service.write(DROP_INS / "secret.conf", "\n".join(["[Service]", *lines, ""]))
    try:
        service.systemctl("daemon-reload")
        service.systemctl("restart", UNIT)
        shop.add_orders()
        shop.wait_until_exact()
        environment = Path(f"/proc/{service.main_process()}/environ").read_text()
        assert "MONGODB_URI_FILE=" in environment
        assert TOKEN not in environment
    finally:
        service.path(DROP_INS / "secret.conf").unlink()
        service.path(secret).unlink()
        service.systemctl("daemon-reload")


def test_an_upgrade_and_a_downgrade_keep_the_settings(service: Machine, shop: Shop) -> None:
    def install(source: str, version: str) -> None:
        service.make("install", source=source)
        assert service.path(SETTINGS).read_text() == _settings(shop)
        assert service.state() == "active (running)"
        service.systemctl("restart", UNIT)
        shop.add_orders()
        shop.wait_until_exact()
        _wait_for(version, lambda: shop.last_record()["version"] == version)

    new = "/root/new"
    service.run("cp", "-r", "/src", new)
    service.run("sed", "-i", 's/^VERSION = .*/VERSION = "99.0"/', f"{new}/config.py")
    install(new, "99.0")
    service.run("rm", "-r", new)
    install("/src", VERSION)


def test_all_lines_of_a_traceback_have_the_priority_of_an_error(service: Machine) -> None:
    module = service.path(Path("/opt/loyalty-microservice/loyalty/service.py"))
    original = module.read_text()
    failing = "def _fail(*_: object) -> None:\n    raise RuntimeError('one\\ntwo')\n"
    module.write_text(f"{original}\n\n{failing}\n\nService.recount = _fail\n")
    try:
        service.systemctl("restart", UNIT)
        _wait_for("the error", lambda: service.show("StatusText").startswith("failed: internal"))
    finally:
        module.write_text(original)
    this_run = f"_SYSTEMD_INVOCATION_ID={service.show('InvocationID')}"
    command = ["journalctl", "--no-pager", "--output=cat", this_run]
    errors = service.run(*command, "--priority=err").splitlines()
    assert [line for line in errors if line.startswith("internal_error ")]
    assert {"Traceback (most recent call last):", "RuntimeError: one", "two"} <= set(errors)
    assert not [line for line in errors if line.startswith("connected ")]
    assert [line for line in service.run(*command).splitlines() if line.startswith("connected ")]
    service.systemctl("restart", UNIT)


def test_journal_lines_start_with_neither_a_time_nor_a_priority(service: Machine) -> None:
    lines = service.journal("--output=cat", "--identifier=loyalty-microservice").splitlines()
    assert [line for line in lines if line.startswith("recount outcome=succeeded ")]
    assert not [line for line in lines if re.match(r"<\d>|\d{4}-\d\d-\d\dT", line)]


def test_other_users_can_read_the_metrics_while_the_service_runs(
    service: Machine, shop: Shop
) -> None:
    file = Path("/run/loyalty-microservice/loyalty.prom")
    service.write(SETTINGS, _settings(shop, f"METRICS_FILE={file}"))
    service.systemctl("restart", UNIT)

    def recounts() -> int:
        text = service.run("setpriv", "--reuid=65534", "--clear-groups", "cat", str(file))
        found = re.search(r'_total{.*,outcome="succeeded"} (\d+)\n', text)
        return int(found[1]) if found else 0

    _wait_for("metrics", lambda: service.path(file).exists() and recounts() > 1)
    assert "metrics_write_failed" not in service.journal("--output=cat")
    service.systemctl("stop", UNIT)
    assert not service.path(file).exists()


@pytest.fixture(scope="session")
def books(machine: Machine, shop: Shop, installed: str) -> Database[dict[str, Any]]:
    """A second shop on the same server, with its own service."""
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


def test_a_second_shop_uses_the_same_unit_with_its_own_settings(
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
        *(line.replace("loyalty.env", "%i.env") for line in one if "loyalty.env" in line),
        "SyslogIdentifier=loyalty-microservice@%i",
        "User=loyalty-%i",
    ]
    assert len(one) == len(other) - 1
    assert _user_id(service, "loyalty-microservice@books") != _user_id(service, UNIT)


def _user_id(machine: Machine, unit: str) -> str:
    pid = machine.systemctl("show", "--property=MainPID", "--value", unit).strip()
    return machine.run("stat", "--format=%u", f"/proc/{pid}").strip()


def _alerts(machine: Machine) -> list[str]:
    identifier = "--identifier=loyalty-microservice-alert"
    command = ["journalctl", "--no-pager", "--output=cat", "--priority=err", identifier]
    return machine.run(*command).splitlines()


def test_the_timer_checks_the_points_and_stale_points_cause_an_alert(
    service: Machine, books: Database[dict[str, Any]]
) -> None:
    check, alert = "loyalty-microservice-status@books", "loyalty-microservice-alert@"
    wanted = f"{check} has failed; see: systemctl status {check}"
    timer_lines = ("OnActiveSec=", "OnActiveSec=1s", "OnUnitActiveSec=5s", "AccuracySec=1ms")
    (documented,) = re.findall(r"```ini\n(\[Service\]\nExecStart=.* mail .*\n)```", README)
    drop_ins = {
        Path(f"/etc/systemd/system/{check}.timer.d"): "\n".join(["[Timer]", *timer_lines, ""]),
        Path(f"/etc/systemd/system/{alert}.service.d"): documented,
    }
    for folder, text in drop_ins.items():
        service.write(folder / "test.conf", text)
    mail = service.path(Path("/root/mail"))
    journal = ("journalctl", "--no-pager", "--output=cat", f"--unit={check}")
    try:
        with _fake_command(
            service, Path("/usr/local/bin/mail"), 'echo "$@" >/root/mail; cat >>/root/mail'
        ):
            service.systemctl("daemon-reload")
            service.systemctl("enable", "--now", f"{check}.timer")
            _wait_for("two checks", lambda: service.run(*journal).count(" old: fresh, ") >= 2, 60)
            assert wanted not in _alerts(service)
            long_ago = datetime.now(UTC) - timedelta(hours=5)
            books.loyalty_recounts.update_many({}, {"$set": {"as_of": long_ago}})
            _wait_for("an alert", lambda: wanted in _alerts(service), 60)
            _wait_for("the mail", lambda: mail.exists() and " old: STALE, " in mail.read_text())
            assert mail.read_text().startswith(f"-s {check} has failed on ")
            service.systemctl("stop", f"{check}.timer", f"{check}.service")
            _wait_for("the last alert", lambda: not _active(service, f"{alert}*"))
    finally:
        mail.unlink(missing_ok=True)
        service.run("rm", "-r", *map(str, drop_ins))
        service.systemctl("daemon-reload")


def _active(machine: Machine, pattern: str) -> str:
    return machine.systemctl("list-units", "--no-legend", "--state=activating", pattern)


def test_a_service_that_ends_with_78_causes_an_alert(
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
def _fake_command(machine: Machine, command: Path, script: str) -> Iterator[None]:
    """Install a shell script as a command that the machine does not have."""
    machine.write(command, f"#!/bin/sh\n{script}\n")
    machine.path(command).chmod(0o755)
    try:
        yield
    finally:
        machine.path(command).unlink()


def test_cron_recounts_and_sends_mail_only_after_an_error(service: Machine, shop: Shop) -> None:
    (documented,) = re.findall(r"```text\n(MAILTO=.*?)```", README, re.DOTALL)
    line = "0 */2 * * * root "
    assert line in documented
    # cron runs the documented line also when it starts, not only every two hours.
    crontab, stamp = Path("/etc/cron.d/loyalty-microservice"), Path("/run/crond.reboot")
    mail = service.path(Path("/root/mail"))
    service.systemctl("stop", UNIT)
    service.write(crontab, documented + documented.replace(line, "@reboot root "))
    try:
        with _fake_command(service, Path("/usr/sbin/sendmail"), "cat >>/root/mail"):
            shop.add_orders()
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


def test_the_password_is_in_no_property_log_or_process_list(service: Machine, shop: Shop) -> None:
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
    assert TOKEN not in Path(f"/proc/{service.main_process()}/environ").read_text()
    # The search can find the token: it is in the copy of the settings.
    assert TOKEN in service.path(COPY).read_text()


def _command_lines() -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield process.read_text(errors="replace")


def test_uninstall_keeps_the_settings_and_purge_removes_everything(
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
