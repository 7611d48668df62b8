"""`make install` and `make uninstall`, the unit, and the version in all files."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from config import VERSION
from deploy import grafana_dashboard

TOP = Path(__file__).resolve().parents[1]
UNIT = "loyalty-microservice.service"
PREFIX = "opt/loyalty-microservice"
SETTINGS = "etc/loyalty-microservice/loyalty.env"
MARKER = f"{PREFIX}/.installed-by-make"
INSTALLED_UNIT = f"usr/local/lib/systemd/system/{UNIT}"

# Replaces Python where a real virtual environment would only take time.
FAKE_PYTHON = """#!/bin/sh
case "$2" in
  venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && touch "$3/bin/pip" "$3/bin/activate";;
  pip) test ! -e "$(dirname "$0")/../../no-network" || exit 1;;
esac
"""


def _make(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    # Without the variables of this test run and of an outer make.
    names = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "DESTDIR", "PREFIX", "PURGE")
    env = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=TOP,
        env=env,
        umask=0o077,  # the strictest umask of an administrator
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def _modules() -> set[Path]:
    return {*TOP.glob("*.py"), *TOP.glob("loyalty/**/*.py")}


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def fake_python(tmp_path: Path) -> str:
    """Return an argument for make that names a Python without pip and network."""
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON, encoding="ascii")
    python.chmod(0o755)
    return f"INSTALL_PYTHON={python}"


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    return tmp_path / "dest"


def _pinned() -> dict[str, str]:
    lines = (TOP / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.partition("#")[0].partition(";")[0].strip() for line in lines)
    return {name: version for name, _, version in (pin.partition("==") for pin in pins) if name}


def _needed(name: str) -> set[str]:
    """Return the package and all packages that it requires, of those that are installed here."""
    required = map(Requirement, distribution(name).requires or [])
    wanted = [one.name for one in required if not one.marker or one.marker.evaluate({"extra": ""})]
    return {name}.union(*map(_needed, wanted))


def test_the_lock_file_has_hashes_of_all_required_packages() -> None:
    text = (TOP / "requirements.lock").read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([a-z][\w-]*)==(\S+) \\\n    --hash=sha256:", text, re.MULTILINE))
    assert _pinned().items() <= locked.items(), "run make lock"
    assert locked.keys() == set().union(*map(_needed, _pinned()))
    # Every line is a package, a hash or a comment: no option, such as the address of an index.
    lines = re.findall(
        r"^(?!#|    #|[a-z][\w-]*==|    --hash=sha256:[0-9a-f]{64}).+", text, re.MULTILINE
    )
    assert lines == []


def test_installation_and_image_accept_only_hashes_of_the_lock_file() -> None:
    for file in ("deploy/install.mk", "deploy/Dockerfile"):
        text = (TOP / file).read_text(encoding="utf-8")
        assert " --require-hashes --requirement requirements.lock\n" in text
        assert "requirements.txt" not in text


def test_the_grafana_dashboard_is_up_to_date() -> None:
    found = grafana_dashboard.FILE.read_text(encoding="utf-8")
    assert found == grafana_dashboard.build(), "run make dashboard"


@pytest.mark.machine  # pip takes a minute
def test_install_copies_the_service_and_its_pinned_requirements_readable_for_all_users(
    dest: Path,
) -> None:
    _make("install", f"DESTDIR={dest}", f"INSTALL_PYTHON={sys.executable}")
    prefix = dest / PREFIX
    modules = {str(path.relative_to(TOP)) for path in _modules()}
    expected = {path.name for path in TOP.glob("*.py")} | {"loyalty", "requirements.lock", "venv"}
    expected.add(Path(MARKER).name)
    assert {path.name for path in prefix.iterdir()} == expected
    assert {f"{PREFIX}/{name}" for name in modules} | {SETTINGS, INSTALLED_UNIT} <= _files(dest)
    private = {dest / SETTINGS, (dest / SETTINGS).parent}
    for path in {dest, *dest.rglob("*")} - private:
        if not path.is_symlink():
            readable = 0o555 if path.is_dir() else 0o444
            assert _mode(path) & readable == readable, f"not all users can read {path}"
            assert not _mode(path) & 0o022, f"other users can write {path}"
    assert _mode(dest / SETTINGS) == 0o600
    assert _mode((dest / SETTINGS).parent) == 0o700

    (packages,) = prefix.glob("venv/lib/python3.*/site-packages")
    versions = {found.name: found.version for found in distributions(path=[str(packages)])}
    assert _pinned().items() <= versions.items()
    command = ["venv/bin/python", "-B", "loyalty_microservice.py", "--version"]
    version = subprocess.run(command, cwd=prefix, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", version)
    # No script with the path of a folder that no longer exists.
    assert all(path.name.startswith("python") for path in prefix.glob("venv/bin/*"))


def test_the_installed_unit_has_the_folders_of_the_installation(
    dest: Path, fake_python: str
) -> None:
    _make("install", f"DESTDIR={dest}", fake_python, "PREFIX=/srv/points", "SYSCONFDIR=/etc/points")
    unit = (dest / INSTALLED_UNIT).read_text(encoding="utf-8")
    program = "/srv/points/venv/bin/python /srv/points/loyalty_microservice.py"
    assert f"\nExecStart={program} --env-file /etc/points/loyalty.env\n" in unit
    assert "\nBindReadOnlyPaths=%t/%N:/etc/points\n" in unit
    assert unit.count("/proc/1/root/etc/points/loyalty.env ") == 2
    assert "/etc/loyalty-microservice" not in unit
    assert (dest / "srv/points/loyalty_microservice.py").exists()
    assert (dest / "etc/points/loyalty.env").exists()


@pytest.mark.parametrize("prefix", ["/home/x", "/root/x", "/tmp/x", "points", "/a b", "/", ""])
def test_a_prefix_that_the_service_cannot_read_is_an_error(
    dest: Path, fake_python: str, prefix: str
) -> None:
    done = _make("install", f"DESTDIR={dest}", fake_python, f"PREFIX={prefix}", check=False)
    assert done.returncode == 2
    assert done.stdout.startswith(f"PREFIX={prefix}: ")
    assert not dest.exists()


def test_install_prints_to_check_before_the_first_start(dest: Path, fake_python: str) -> None:
    printed = _make("install", f"DESTDIR={dest}", fake_python, "SYSCONFDIR=/etc/points").stdout
    steps = [
        "edit /etc/points/loyalty.env",
        "--env-file /etc/points/loyalty.env --check-config",
        "systemctl enable --now loyalty-microservice",
    ]
    positions = [printed.index(step) for step in steps]
    assert positions == sorted(positions)


def test_install_and_uninstall_never_remove_the_sources(fake_python: str) -> None:
    modules = _modules()
    for target in ("install", "uninstall"):
        assert _make(target, fake_python, f"PREFIX={TOP}", check=False).returncode == 2
    assert _modules() == modules


def test_an_upgrade_keeps_the_settings_and_removes_old_modules(
    dest: Path, fake_python: str
) -> None:
    _make("install", f"DESTDIR={dest}", fake_python)
    before = _files(dest)
    (dest / SETTINGS).write_text("MONGODB_URI=mine\n", encoding="ascii")
    (dest / PREFIX / "gone.py").touch()
    (dest / INSTALLED_UNIT).write_text("old", encoding="ascii")
    _make("install", f"DESTDIR={dest}", fake_python)
    assert _files(dest) == before
    assert (dest / SETTINGS).read_text(encoding="ascii") == "MONGODB_URI=mine\n"
    assert _mode(dest / SETTINGS) == 0o600
    assert (dest / INSTALLED_UNIT).read_text() == (TOP / "deploy" / UNIT).read_text()


def test_a_failed_upgrade_leaves_the_old_version_complete(dest: Path, fake_python: str) -> None:
    _make("install", f"DESTDIR={dest}", fake_python)
    module = dest / PREFIX / "loyalty_microservice.py"
    module.write_text("old", encoding="ascii")
    (dest / PREFIX / "no-network").touch()
    assert _make("install", f"DESTDIR={dest}", fake_python, check=False).returncode == 2
    assert module.read_text(encoding="ascii") == "old"
    assert (dest / PREFIX / "venv/bin/python").exists()


def test_uninstall_keeps_the_settings_and_files_that_install_did_not_create(
    dest: Path, fake_python: str
) -> None:
    _make("install", f"DESTDIR={dest}", fake_python)
    (dest / PREFIX / "notes").touch()
    for _ in range(2):  # also when it is repeated
        _make("uninstall", f"DESTDIR={dest}")
        assert _files(dest) == {SETTINGS, MARKER, f"{PREFIX}/notes"}
    _make("install", f"DESTDIR={dest}", fake_python)
    assert (dest / PREFIX / "loyalty_microservice.py").exists()


@pytest.mark.parametrize("target", ["install", "uninstall"])
@pytest.mark.parametrize("file", ["venv/bin/python", "app.py", "loyalty/module.py", ".hidden"])
def test_a_directory_that_install_did_not_create_is_not_touched(
    dest: Path, fake_python: str, target: str, file: str
) -> None:
    (dest / "srv" / file).parent.mkdir(parents=True)
    (dest / "srv" / file).write_text("theirs", encoding="ascii")
    done = _make(target, f"DESTDIR={dest}", fake_python, "PREFIX=/srv", check=False)
    assert done.returncode == 2
    problem = "PREFIX=/srv: the directory is not empty, and make install did not create it"
    assert done.stdout.startswith(problem)
    assert _files(dest) == {f"srv/{file}"}
    assert (dest / "srv" / file).read_text(encoding="ascii") == "theirs"


def test_install_accepts_an_empty_directory(dest: Path, fake_python: str) -> None:
    (dest / "srv").mkdir(parents=True)
    _make("install", f"DESTDIR={dest}", fake_python, "PREFIX=/srv")
    assert (dest / "srv/loyalty_microservice.py").exists()
    _make("uninstall", f"DESTDIR={dest}", fake_python, "PREFIX=/srv", "PURGE=1")
    assert _files(dest) == set()


def test_an_installation_that_failed_can_be_repeated(dest: Path, fake_python: str) -> None:
    Path(fake_python.partition("=")[2]).chmod(0o644)
    assert _make("install", f"DESTDIR={dest}", fake_python, check=False).returncode == 2
    Path(fake_python.partition("=")[2]).chmod(0o755)
    _make("install", f"DESTDIR={dest}", fake_python)
    assert (dest / PREFIX / "venv/bin/python").exists()


def test_purge_removes_settings_and_drop_ins_after_an_uninstall(
    dest: Path, fake_python: str
) -> None:
    _make("install", f"DESTDIR={dest}", fake_python)
    drop_in = dest / f"etc/systemd/system/{UNIT}.d/override.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.touch()
    _make("uninstall", f"DESTDIR={dest}")
    assert drop_in.exists()
    _make("uninstall", f"DESTDIR={dest}", "PURGE=1")
    assert _files(dest) == set()
    assert not (dest / SETTINGS).parent.exists()
    assert not (dest / PREFIX).exists()


def test_loyalty_env_and_env_example_have_the_same_settings() -> None:
    def names(path: Path) -> set[str]:
        text = path.read_text(encoding="utf-8")
        return set(re.findall(r"^#?([A-Z_]+)=", text, re.MULTILINE))

    # With systemd, MONGODB_URI_FILE belongs into a drop-in beside LoadCredential=.
    expected = names(TOP / ".env.example") - {"MONGODB_URI_FILE"}
    assert names(TOP / "deploy/loyalty.env") == expected


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("CHANGELOG.md", r"^## (\S+) \("),
        ("docs/json.md", r'"version": "(.*?)"'),
        ("deploy/Dockerfile", r"^LABEL .*version=(\S+)"),
        ("deploy/cronjob.yaml", r"image: .*:(\S+)"),
        ("deploy/deployment.yaml", r"image: .*:(\S+)"),
    ],
)
def test_every_file_with_a_version_has_the_current_one(file: str, pattern: str) -> None:
    text = (TOP / file).read_text(encoding="utf-8")
    found = re.findall(pattern, text, re.MULTILINE)
    newest = found[:1] if file == "CHANGELOG.md" else found
    assert set(newest) == {VERSION}


def _systemd_analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("systemd-analyze")
    assert tool, "systemd-analyze is missing: apt-get install systemd"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.machine
def test_systemd_reports_no_problem_with_the_unit(tmp_path: Path) -> None:
    # systemd checks that the program exists, and it is not installed here.
    unit = (TOP / "deploy" / UNIT).read_text(encoding="utf-8")
    changed = unit.replace(f"=/{PREFIX}/venv/bin/python ", f"={sys.executable} ")
    assert changed != unit
    (tmp_path / UNIT).write_text(changed, encoding="utf-8")
    done = _systemd_analyze("verify", str(tmp_path / UNIT))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.machine
def test_the_exposure_level_of_the_unit_is_at_most_1_3() -> None:
    unit = str(TOP / "deploy" / UNIT)
    done = _systemd_analyze("security", "--offline=true", "--no-pager", unit)
    score = re.search(r"Overall exposure level for \S+: ([0-9.]+) ", done.stdout)
    assert score, done.stdout + done.stderr
    assert float(score[1]) <= 1.3
