"""A minimal Debian system in a folder, for the tests that boot it or build an image from it.

It is made once, with debootstrap, and kept in the user's cache. SUITE chooses another Debian than
12, the oldest that the unit is for (systemd 252).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
SUITE = os.environ.get("SUITE", "bookworm")
PACKAGES = ["systemd", "systemd-sysv", "python3", "python3-venv", "make", "cron"]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "loyalty-microservice")


@contextmanager
def lock_cache(tools: Mapping[str, str]) -> Iterator[None]:
    """Check that the tools are installed, and hold a lock, so that no other run uses the folder."""
    tools = {"debootstrap": "debootstrap", **tools}
    if missing := [package for tool, package in tools.items() if not shutil.which(tool)]:
        pytest.exit(f"something is missing: apt-get install {' '.join(missing)}", 1)
    # End well also on SIGTERM; and a shell's background job ignores SIGINT.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def remove_empty_groups(*names: str) -> Iterator[None]:
    """At the end, remove the empty control groups with these names."""
    own = {line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()}
    tops = {
        Path(hierarchy, group.lstrip("/"), name)
        for hierarchy in ("/sys/fs/cgroup", *map(str, Path("/sys/fs/cgroup").glob("*")))
        for group in {"/", *own}
        for name in names
    }
    try:
        yield
    finally:
        for top in tops:
            for folder, _, _ in os.walk(top, topdown=False):
                with suppress(OSError):
                    Path(folder).rmdir()


def prepare_root() -> Path:
    """Return the root folder, which must not be changed; create it on first use."""
    root = CACHE / f"root-{SUITE}-{_digest(*PACKAGES)}"
    if not root.exists():
        unfinished = root.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        # In separate namespaces, all mounts and processes of debootstrap end when it ends.
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command += ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
        _prepare([*command, SUITE, str(unfinished)])
        (unfinished / "etc/hosts").write_text("127.0.0.1 localhost\n", encoding="ascii")
        unfinished.rename(root)
    return root


def download_wheels(root: Path) -> Path:
    """Return a folder with the pinned packages for the Python in `root`, made once."""
    (python,) = root.glob("usr/lib/python3.[0-9]*")
    version = python.name.removeprefix("python")
    requirements = TOP / "requirements.lock"
    folder = CACHE / f"wheels-{version}-{_digest(requirements.read_text(encoding='utf-8'))}"
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
        pip += ["--python-version", version, "--dest", str(unfinished)]
        _prepare([*pip, "--require-hashes", "--requirement", str(requirements)])
        unfinished.rename(folder)
    return folder


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def _prepare(command: Sequence[str]) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        pytest.exit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-2000:]}", 1)
