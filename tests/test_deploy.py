"""What `make install` lays down, and what systemd thinks of the unit."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from config import VERSION

TOP = Path(__file__).resolve().parents[1]
UNIT = "loyalty-microservice.service"
PREFIX = "opt/loyalty-microservice"
SETTINGS = "etc/loyalty-microservice/loyalty.env"
MARKER = f"{PREFIX}/.installed-by-make"
INSTALLED_UNIT = f"usr/local/lib/systemd/system/{UNIT}"

# Stands in for a Python, where making a virtual environment each time would only take long.
QUICK_PYTHON = """#!/bin/sh
case "$2" in
  venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/bin/pip" "$3/bin/activate";;
  pip) test ! -e "$(dirname "$0")/../../no-network" || exit 1;;
esac
"""


def _make(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    # Neither what the test run itself was called with, nor what an outer make left.
    names = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "DESTDIR", "PREFIX", "PURGE")
    env = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=TOP,
        env=env,
        umask=0o077,  # the strictest that an administrator may have
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def _files(top: Path) -> set[str]:
    return {str(path.relative_to(top)) for path in top.rglob("*") if not path.is_dir()}


def _modules() -> set[Path]:
    return {*TOP.glob("*.py"), *TOP.glob("loyalty/**/*.py")}


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def quick(tmp_path: Path) -> str:
    python = tmp_path / "python"
    python.write_text(QUICK_PYTHON, encoding="ascii")
    python.chmod(0o755)
    return f"INSTALL_PYTHON={python}"


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "dest"


def _pinned() -> dict[str, str]:
    lines = (TOP / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.partition("#")[0].partition(";")[0].strip() for line in lines)
    return {name: version for name, _, version in (pin.partition("==") for pin in pins) if name}


@pytest.mark.machine  # a minute of pip, and make test-systemd installs anyway
def test_install_lays_the_service_with_its_pinned_requirements_for_every_user_to_run(
    dest: Path,
) -> None:
    _make("install", f"DESTDIR={dest}", f"INSTALL_PYTHON={sys.executable}")
    prefix = dest / PREFIX
    modules = {str(path.relative_to(TOP)) for path in _modules()}
    tops = {path.name for path in TOP.glob("*.py")} | {"loyalty", "requirements.txt", "venv"}
    tops.add(Path(MARKER).name)
    assert {path.name for path in prefix.iterdir()} == tops
    assert {f"{PREFIX}/{name}" for name in modules} | {SETTINGS, INSTALLED_UNIT} <= _files(dest)
    roots_own = {dest / SETTINGS, (dest / SETTINGS).parent}
    for path in {dest, *dest.rglob("*")} - roots_own:
        if not path.is_symlink():
            wanted = 0o555 if path.is_dir() else 0o444
            assert _mode(path) & wanted == wanted, f"not everyone can read {path}"
            assert not _mode(path) & 0o022, f"others can write {path}"
    assert _mode(dest / SETTINGS) == 0o600
    assert _mode((dest / SETTINGS).parent) == 0o700

    (packages,) = prefix.glob("venv/lib/python3.*/site-packages")
    versions = {found.name: found.version for found in distributions(path=[str(packages)])}
    assert _pinned().items() <= versions.items()
    command = ["venv/bin/python", "-B", "loyalty_microservice.py", "--version"]
    version = subprocess.run(command, cwd=prefix, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", version)
    # No script that holds the path of a folder that is gone.
    assert all(path.name.startswith("python") for path in prefix.glob("venv/bin/*"))


def test_the_unit_gets_the_real_folders(dest: Path, quick: str) -> None:
    _make("install", f"DESTDIR={dest}", quick, "PREFIX=/srv/points", "SYSCONFDIR=/etc/points")
    unit = (dest / INSTALLED_UNIT).read_text(encoding="utf-8")
    assert "\nExecStart=/srv/points/venv/bin/python /srv/points/loyalty_microservice.py\n" in unit
    assert "\nEnvironmentFile=-/etc/points/loyalty.env\n" in unit
    assert (dest / "srv/points/loyalty_microservice.py").exists()
    assert (dest / "etc/points/loyalty.env").exists()


@pytest.mark.parametrize("prefix", ["/home/x", "/root/x", "/tmp/x", "points", "/a b", "/", ""])
def test_a_folder_that_the_service_could_not_see_is_refused(
    dest: Path, quick: str, prefix: str
) -> None:
    done = _make("install", f"DESTDIR={dest}", quick, f"PREFIX={prefix}", check=False)
    assert done.returncode == 2
    assert done.stdout.startswith(f"PREFIX={prefix}: ")
    assert not dest.exists()


def test_the_sources_themselves_are_never_removed(quick: str) -> None:
    modules = _modules()
    for target in ("install", "uninstall"):
        assert _make(target, quick, f"PREFIX={TOP}", check=False).returncode == 2
    assert _modules() == modules


def test_an_upgrade_keeps_the_settings_and_no_old_module(dest: Path, quick: str) -> None:
    _make("install", f"DESTDIR={dest}", quick)
    before = _files(dest)
    (dest / SETTINGS).write_text("MONGODB_URI=mine\n", encoding="ascii")
    (dest / PREFIX / "gone.py").touch()
    (dest / INSTALLED_UNIT).write_text("old", encoding="ascii")
    _make("install", f"DESTDIR={dest}", quick)
    assert _files(dest) == before
    assert (dest / SETTINGS).read_text(encoding="ascii") == "MONGODB_URI=mine\n"
    assert _mode(dest / SETTINGS) == 0o600
    assert (dest / INSTALLED_UNIT).read_text() == (TOP / "deploy" / UNIT).read_text()


def test_an_upgrade_that_fails_leaves_the_old_version_whole(dest: Path, quick: str) -> None:
    _make("install", f"DESTDIR={dest}", quick)
    module = dest / PREFIX / "loyalty_microservice.py"
    module.write_text("old", encoding="ascii")
    (dest / PREFIX / "no-network").touch()
    assert _make("install", f"DESTDIR={dest}", quick, check=False).returncode == 2
    assert module.read_text(encoding="ascii") == "old"
    assert (dest / PREFIX / "venv/bin/python").exists()


def test_uninstall_keeps_the_settings_and_files_that_install_did_not_create(
    dest: Path, quick: str
) -> None:
    _make("install", f"DESTDIR={dest}", quick)
    (dest / PREFIX / "notes").touch()
    for _ in range(2):  # also when it is repeated
        _make("uninstall", f"DESTDIR={dest}")
        assert _files(dest) == {SETTINGS, MARKER, f"{PREFIX}/notes"}
    _make("install", f"DESTDIR={dest}", quick)
    assert (dest / PREFIX / "loyalty_microservice.py").exists()


@pytest.mark.parametrize("target", ["install", "uninstall"])
@pytest.mark.parametrize("file", ["venv/bin/python", "app.py", "loyalty/module.py", ".hidden"])
def test_a_directory_that_install_did_not_create_is_not_touched(
    dest: Path, quick: str, target: str, file: str
) -> None:
    (dest / "srv" / file).parent.mkdir(parents=True)
    (dest / "srv" / file).write_text("theirs", encoding="ascii")
    done = _make(target, f"DESTDIR={dest}", quick, "PREFIX=/srv", check=False)
    assert done.returncode == 2
    assert done.stdout.startswith("PREFIX=/srv: is not empty, and make install did not create it")
    assert _files(dest) == {f"srv/{file}"}
    assert (dest / "srv" / file).read_text(encoding="ascii") == "theirs"


def test_an_empty_directory_is_installed_to(dest: Path, quick: str) -> None:
    (dest / "srv").mkdir(parents=True)
    _make("install", f"DESTDIR={dest}", quick, "PREFIX=/srv")
    assert (dest / "srv/loyalty_microservice.py").exists()
    _make("uninstall", f"DESTDIR={dest}", quick, "PREFIX=/srv", "PURGE=1")
    assert _files(dest) == set()


def test_an_installation_that_failed_can_be_repeated(dest: Path, quick: str) -> None:
    Path(quick.partition("=")[2]).chmod(0o644)
    assert _make("install", f"DESTDIR={dest}", quick, check=False).returncode == 2
    Path(quick.partition("=")[2]).chmod(0o755)
    _make("install", f"DESTDIR={dest}", quick)
    assert (dest / PREFIX / "venv/bin/python").exists()


def test_purge_removes_the_settings_too_also_later(dest: Path, quick: str) -> None:
    _make("install", f"DESTDIR={dest}", quick)
    drop_in = dest / f"etc/systemd/system/{UNIT}.d/override.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.touch()
    _make("uninstall", f"DESTDIR={dest}")
    assert drop_in.exists()
    _make("uninstall", f"DESTDIR={dest}", "PURGE=1")
    assert _files(dest) == set()
    assert not (dest / SETTINGS).parent.exists()
    assert not (dest / PREFIX).exists()


def test_the_sample_settings_are_all_those_of_the_env_example() -> None:
    def names(path: Path) -> set[str]:
        text = path.read_text(encoding="utf-8")
        return set(re.findall(r"^#?([A-Z_]+)=", text, re.MULTILINE))

    # In a unit, MONGODB_URI_FILE goes with LoadCredential= and stands beside it.
    wanted = names(TOP / ".env.example") - {"MONGODB_URI_FILE"}
    assert names(TOP / "deploy/loyalty.env") == wanted


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("CHANGELOG.md", r"^## (\S+) \("),
        ("README.md", r'"version": "(.*?)"'),
        ("deploy/Dockerfile", r"^LABEL .*version=(\S+)"),
        ("deploy/cronjob.yaml", r"image: .*:(\S+)"),
        ("deploy/deployment.yaml", r"image: .*:(\S+)"),
    ],
)
def test_all_that_names_a_version_names_this_one(file: str, said: str) -> None:
    text = (TOP / file).read_text(encoding="utf-8")
    found = re.findall(said, text, re.MULTILINE)
    newest = found[:1] if file == "CHANGELOG.md" else found
    assert set(newest) == {VERSION}


def _systemd_analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("systemd-analyze")
    assert tool, "systemd-analyze is missing: apt-get install systemd"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.machine
def test_systemd_has_nothing_to_say_about_the_unit(tmp_path: Path) -> None:
    # It looks whether the program exists, which here is not installed.
    unit = (TOP / "deploy" / UNIT).read_text(encoding="utf-8")
    changed = unit.replace(f"=/{PREFIX}/venv/bin/python ", f"={sys.executable} ")
    assert changed != unit
    (tmp_path / UNIT).write_text(changed, encoding="utf-8")
    done = _systemd_analyze("verify", str(tmp_path / UNIT))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.machine
def test_systemd_rates_the_exposure_at_most_1_3() -> None:
    unit = str(TOP / "deploy" / UNIT)
    done = _systemd_analyze("security", "--offline=true", "--no-pager", unit)
    score = re.search(r"Overall exposure level for \S+: ([0-9.]+) ", done.stdout)
    assert score, done.stdout + done.stderr
    assert float(score[1]) <= 1.3
