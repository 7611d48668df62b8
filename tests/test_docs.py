"""The documents: every snippet is run or checked, and tables and links match the product."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from bson import DBRef, ObjectId
from conftest import ROOT, Command
from pymongo import MongoClient
from pymongo.database import Database

from config import setting_specs
from loyalty_microservice import main
from sandbox.mongod import Deployment
from sandbox.service import Process

Start = Callable[..., Process]

PATHS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "deploy/README.md"]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
README = PAGES["README.md"]
MAX_README_WORDS = 1_300
PROGRAM = "loyalty_microservice.py"


class Snippet(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def _snippets() -> Iterator[Snippet]:
    fence = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
    for page, text in PAGES.items():
        if page == "docs/shapes.md":
            continue  # tests/test_shape_recipes.py runs its recipes
        for found in fence.finditer(text):
            indent, language, code = found.groups()
            line = text.count("\n", 0, found.start()) + 1
            yield Snippet(page, line, language, textwrap.dedent(code) if indent else code)


SNIPPETS = list(_snippets())


def _in_language(*languages: str) -> list[Snippet]:
    return [snippet for snippet in SNIPPETS if snippet.language in languages]


def _table(page: str, heading: str) -> list[list[str]]:
    """Return the rows of the first table below a heading, without the header."""
    section = re.split(rf"^#+ {re.escape(heading)}$", PAGES[page], flags=re.MULTILINE)[1]
    section = re.split(r"^#+ ", section, flags=re.MULTILINE)[0]
    found = re.search(r"^\|[-:| ]+\|\n((?:\|.*\n)+)", section, re.MULTILINE)
    assert found, heading
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in found[1].splitlines()]


def _codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def _help(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main(["--help"])
    return capsys.readouterr().out


# Pages and links


def test_the_readme_has_at_most_1300_words() -> None:
    assert len(README.split()) <= MAX_README_WORDS


def _anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "bench/RESULTS.md"])
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    for target in targets:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        assert not anchor or anchor in _anchors(linked.read_text(encoding="utf-8")), target
    defined = set(re.findall(r"^\[([\w-]+)\]: https://\S+$", text, re.MULTILINE))
    assert set(re.findall(r"\]\[([\w-]+)\]", text)) == defined


def test_the_readme_lists_every_page() -> None:
    listed = {re.findall(r"\((.*?)\)", page)[0] for page, _ in _table("README.md", "Documents")}
    assert listed == {*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"} - {"README.md"}


# One word for one thing: each of these has a standard term in the glossary.
NONSTANDARD = (
    r"\bguard\b|\bnobody\b|\bwhoever\b|\bcapitals\b|\bblanks?\b|\bin one piece\b|\bheld back\b|"
    r"\beverybody\b|\bwhatever\b|\blooks? alike\b|\blet through\b|\bquiet pass|\bheld up\b|"
    r"\bright points\b|\brefuses? (?:the|their|its) update|\bas above\b|\bof those\b|, too\b"
)


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_a_page_uses_the_terms_of_the_glossary(page: str) -> None:
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert re.findall(NONSTANDARD, text, re.IGNORECASE) == []


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_and_settings_in_the_text_exist(page: str) -> None:
    makefiles = [ROOT / "Makefile", ROOT / "deploy/install.mk"]
    known = "".join(file.read_text(encoding="utf-8") for file in makefiles)
    targets = set(re.findall(r"^([a-z-]+):", known, re.MULTILINE))
    assert set(re.findall(r"`(?:sudo )?make ([a-z-]+)", PAGES[page])) <= targets
    settings = {setting.name for setting in setting_specs().values()} | {"MONGODB_URI_FILE"}
    prefixes = {name.partition("_")[0] + "_" for name in settings}
    named = set(re.findall(r"`([A-Z]+_[A-Z_]+)\b", PAGES[page]))
    assert {name for name in named if name.startswith(tuple(prefixes))} <= settings


# Snippets


@pytest.fixture
def shop(client: MongoClient[Any]) -> Iterator[Database[Any]]:
    """A user with 7 shipped orders and 5 stored points, in the database that the pages name."""
    shop = client["oms_db"]
    client.drop_database(shop.name)
    shop.users.insert_one({"_id": 17, "name": "Ada", "loyalty_points": 5})
    shop.orders.insert_many([{"customer_id": 17, "status": "Shipped"} for _ in range(7)])
    yield shop
    client.drop_database(shop.name)


def _run_python(snippet: Snippet, uri: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet.text],
        env={"MONGODB_URI": uri},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stderr == ""
    return ran.stdout


PYTHON_OUTPUT = {
    "README.md": r"17 has 7 points, counted as of [-0-9]+ [:0-9]+ UTC\n",
    "docs/security.md": r"1 documents of the change log changed\n",
    "docs/undo.md": r"[-0-9]+ [.:0-9]+ \S+ 5 -> 7\n",
}


@pytest.mark.xdist_group("oms_db")
@pytest.mark.parametrize("snippet", _in_language("python"), ids=str)
def test_a_python_snippet_prints_the_points(
    snippet: Snippet, shop: Database[Any], deployment: Deployment, command: Command
) -> None:
    assert command("--once", MONGODB_URI=deployment.uri) == 0
    assert re.fullmatch(PYTHON_OUTPUT[snippet.page], _run_python(snippet, deployment.uri))


@pytest.mark.xdist_group("oms_db")
def test_the_documented_erasure_removes_one_user_from_the_change_log(
    shop: Database[Any], deployment: Deployment, command: Command
) -> None:
    shop.users.insert_one({"_id": 18, "loyalty_points": 5})
    assert command("--once", MONGODB_URI=deployment.uri) == 0
    (snippet,) = [one for one in _in_language("python") if one.page == "docs/security.md"]
    shop.users.delete_one({"_id": 17})
    _run_python(snippet, deployment.uri)
    (logged,) = shop.loyalty_changes.find()
    assert logged["changes"] == [{"user": 18, "before": 5, "after": 0}]
    # The other user can still be restored.
    assert command("--undo", "last", MONGODB_URI=deployment.uri) == 0
    assert [*shop.users.find()] == [{"_id": 18, "loyalty_points": 5}]


def _program_calls(text: str) -> list[list[str]]:
    """Return the arguments of each call of the service in a shell snippet."""
    lines = text.replace("\\\n", " ").splitlines()
    calls = [shlex.split(line, comments=True) for line in lines if PROGRAM in line]
    return [call[call.index(next(w for w in call if PROGRAM in w)) + 1 :] for call in calls]


@pytest.mark.xdist_group("oms_db")
def test_the_commands_of_the_quick_start_work_in_their_order(
    shop: Database[Any], deployment: Deployment, command: Command, service: Start
) -> None:
    quick_start = README.split("## Quick start")[1].split("\n## ")[0]
    *commands, daemon = _program_calls(quick_start)
    assert (commands, daemon) == ([["--check-config"], ["--create-index"]], [])
    for arguments in commands:
        assert command(*arguments, MONGODB_URI=deployment.uri) == 0
    assert shop.users.find_one() == {"_id": 17, "name": "Ada", "loyalty_points": 5}
    running = service(MONGODB_URI=deployment.uri)
    running.wait_for("outcome=succeeded")
    assert running.stop() == 0
    assert shop.users.find_one() == {"_id": 17, "name": "Ada", "loyalty_points": 7}


@pytest.mark.xdist_group("oms_db")
def test_the_commands_of_the_undo_page_restore_the_points(
    shop: Database[Any], deployment: Deployment, command: Command
) -> None:
    shop.users.insert_one({"_id": 18})
    before = list(shop.users.find())
    assert command("--once", MONGODB_URI=deployment.uri) == 0
    calls = [
        arguments
        for snippet in SNIPPETS
        if snippet.page == "docs/undo.md"
        for arguments in _program_calls(snippet.text)
    ]
    assert ["--undo", "last"] in calls
    for arguments in calls:
        shows_changes = "--dry-run" in arguments
        if arguments == ["--undo", "last"]:
            assert {user["loyalty_points"] for user in shop.users.find()} == {0, 7}
        code = command(*arguments, MONGODB_URI=deployment.uri)
        assert code in ({0, 1} if shows_changes else {0}), arguments
    assert list(shop.users.find()) == before


def _check_shell(snippet: Snippet, options: set[str]) -> None:
    """Check the syntax, and that options, make targets, units and files of ours exist."""
    subprocess.run(["bash", "-n", "-c", snippet.text], check=True)
    for arguments in _program_calls(snippet.text):
        assert {word for word in arguments if word.startswith("-")} <= options
    makefiles = [ROOT / "Makefile", ROOT / "deploy/install.mk"]
    makefile = "".join(path.read_text(encoding="utf-8") for path in makefiles)
    for target in re.findall(r"\bmake ([a-z-]+)", snippet.text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for file in re.findall(r"(?<![\w/.])(deploy/[\w./-]+|\.env\.\w+|[\w-]+\.txt)", snippet.text):
        assert (ROOT / file).exists(), file
    for name, instance, kind in re.findall(
        r"systemctl [\w -]*?(loyalty-microservice[\w-]*)(@\w*)?(\.\w+)?$",
        snippet.text,
        re.MULTILINE,
    ):
        unit = f"{name}{'@' * bool(instance)}{kind or '.service'}"
        # `make install` makes the template of the service out of the service.
        unit = unit.replace("loyalty-microservice@.", "loyalty-microservice.")
        assert (ROOT / "deploy" / unit).exists(), unit


def _check_text(snippet: Snippet) -> None:
    """Check examples of output: events of the log, and the cron table."""
    events = {_codes(row[0])[0] for row in _table("docs/logs-and-metrics.md", "Log events")}
    for event in re.findall(r"loyalty-microservice\[\d+\]: (\w+)", snippet.text):
        assert event in events


def _check_drop_in(snippet: Snippet) -> None:
    """Check a drop-in of systemd: one section, and settings that exist."""
    drop_in = configparser.RawConfigParser()
    drop_in.read_string(snippet.text)
    assert drop_in.sections() == ["Service"]
    environment = drop_in["Service"].get("environment", "MONGODB_URI_FILE=").partition("=")[0]
    assert environment in {setting.name for setting in setting_specs().values()} | {
        "MONGODB_URI_FILE"
    }


def _check_diagram(snippet: Snippet) -> None:
    """Check that a diagram names collections by their default names."""
    names = set(re.findall(r'\[\("(\w+)"\)\]', snippet.text))
    assert names == {s.default for s in setting_specs().values() if s.name.endswith("_COLLECTION")}


def _check_elsewhere(_: Snippet) -> None:
    """Do nothing: tests/test_json.py and deploy/test_files.py check JSON and YAML."""


CHECKS: dict[str, Callable[[Snippet], None]] = {
    "ini": _check_drop_in,
    "json": lambda snippet: json.loads(snippet.text),
    "mermaid": _check_diagram,
    "text": _check_text,
    "yaml": _check_elsewhere,
}
ELSEWHERE = {
    "json": ("docs/json.md", "docs/logs-and-metrics.md"),
    "yaml": ("deploy/README.md", "docs/operation.md"),
}
# Python and JavaScript are run, by tests of their own. A language without a check fails.
NOT_RUN = [snippet for snippet in SNIPPETS if snippet not in _in_language("python", "js")]


@pytest.mark.parametrize("snippet", NOT_RUN, ids=str)
def test_a_snippet_is_correct(snippet: Snippet, capsys: pytest.CaptureFixture[str]) -> None:
    assert snippet.page in ELSEWHERE.get(snippet.language, PAGES)
    if snippet.language == "sh":
        _check_shell(snippet, set(re.findall(r"--[a-z][a-z-]+", _help(capsys))))
    else:
        CHECKS[snippet.language](snippet)


def _mongosh_snippets(page: str, heading: str = "") -> list[str]:
    """Return the mongosh commands of a page, or of one of its sections."""
    text = PAGES[page]
    if heading:
        text = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^ *```js\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in blocks]


def _run_mongosh(database: Database[Any], text: str) -> Any:
    """Run one command on a collection; return the documents, or the number that it changed."""
    found = re.fullmatch(r"db\.(\w+)\.(updateMany|aggregate|find)\((.*)\)\n", text, re.DOTALL)
    assert found, text
    collection, name, arguments = found.groups()
    method = getattr(database[collection], "update_many" if name == "updateMany" else name)
    result = method(*json.loads(f"[{arguments}]"))
    return result.modified_count if name == "updateMany" else list(result)


def test_the_mongosh_command_for_pre_images_switches_them_on(
    database: Database[Any], pre_images: None
) -> None:
    (snippet,) = _mongosh_snippets("docs/live-updates.md")
    (command,) = re.findall(r"^db\.runCommand\((\{.*\})\)$", snippet, re.MULTILINE)
    database.create_collection("orders")
    database.command(json.loads(re.sub(r"(\w+):", r'"\1":', command)))
    (orders,) = database.list_collections()
    assert orders["options"]["changeStreamPreAndPostImages"] == {"enabled": True}


@pytest.mark.xdist_group("oms_db")
def test_the_steps_of_the_first_installation_keep_and_restore_the_points(
    shop: Database[Any], deployment: Deployment, command: Command
) -> None:
    """One user has 5 points and 7 counted orders, the other one neither points nor orders."""
    page, heading = "docs/operation.md", "First installation on a shop with points"
    section = PAGES[page].split(f"## {heading}")[1].split("\n## ")[0]
    save, compare, remove, restore = _mongosh_snippets(page, heading)
    assert _program_calls(section) == [["--check-config"], ["--dry-run"], ["--once"], ["--once"]]
    shop.users.insert_one({"_id": 18, "name": "Bob"})
    ada, bob = before = list(shop.users.find())
    assert ada == {"_id": 17, "name": "Ada", "loyalty_points": 5}
    _run_mongosh(shop, save)
    assert command("--check-config", MONGODB_URI=deployment.uri) == 0
    assert command("--dry-run", MONGODB_URI=deployment.uri) == 1
    new_field = {"USER_POINTS_FIELD": "loyalty_points_new"}
    assert "USER_POINTS_FIELD=loyalty_points_new" in section
    assert command("--once", MONGODB_URI=deployment.uri, **new_field) == 0
    new = [{**ada, "loyalty_points_new": 7}, {**bob, "loyalty_points_new": 0}]
    assert _run_mongosh(shop, compare) == new
    assert command("--once", MONGODB_URI=deployment.uri) == 0
    assert _run_mongosh(shop, compare) == []
    assert _run_mongosh(shop, remove) == 2
    counted = [{**ada, "loyalty_points": 7}, {**bob, "loyalty_points": 0}]
    assert list(shop.users.find()) == counted
    _run_mongosh(shop, restore)
    assert list(shop.users.find()) == before


@pytest.mark.xdist_group("oms_db")
def test_the_page_on_undo_lists_the_ids_of_recounts_that_changed_points(
    shop: Database[Any], deployment: Deployment, service: Start
) -> None:
    for _ in range(2):  # the second one changes nothing
        assert service("--once", MONGODB_URI=deployment.uri).wait() == 0
    (command,) = _mongosh_snippets("docs/undo.md")
    assert [recount["_id"] for recount in _run_mongosh(shop, command)] == [
        shop.loyalty_changes.distinct("recount")[0]
    ]


@pytest.mark.xdist_group("oms_db")
def test_the_documented_repairs_make_unknown_customers_known(
    shop: Database[Any],
    deployment: Deployment,
    command: Command,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ada = ObjectId("66abcdefabcdefabcdefabcd")
    shop.users.insert_many([{"_id": ada}, {"_id": "bob@example.com"}])
    # In the order of the page: the commands are run in this order.
    unknown: list[tuple[Any, str, Any]] = [
        (" bob@example.com\n", "whitespace around", "bob@example.com"),
        ("17", "number as string", 17),
        (f'ObjectId("{ada}")', "ObjectId as string", ada),
        (DBRef("users", 17), "DBRef", 17),
        ([ada], "array", ada),
        ("Bob@Example.com", "no such user", "bob@example.com"),
    ]
    shop.orders.delete_many({})
    shop.orders.insert_many([{"customer_id": one, "status": "Shipped"} for one, *_ in unknown])
    assert command("--unknown-customers", MONGODB_URI=deployment.uri) == 0
    listed = capsys.readouterr().out
    for _, kind, _ in unknown:
        assert f'"kind": "{kind}"' in listed
    repairs = _mongosh_snippets("docs/operation.md", "Unknown customers")
    assert len(repairs) == len(unknown)
    for repair in repairs:
        assert _run_mongosh(shop, repair) == 1
        assert command("--once", MONGODB_URI=deployment.uri) == 0
    repaired = [order["customer_id"] for order in shop.orders.find(sort=[("_id", 1)])]
    assert repaired == [user for *_, user in unknown]
    assert {user["loyalty_points"] for user in shop.users.find()} == {2}


@pytest.mark.xdist_group("oms_db")
def test_the_page_on_operation_shows_orders_without_customer(
    shop: Database[Any],
    deployment: Deployment,
    command: Command,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found: list[Any] = ["", None, []]
    shop.orders.insert_many([{"customer_id": one, "status": "Shipped"} for one in found])
    query, repair = _mongosh_snippets("docs/operation.md", "Orders without customer")
    assert len(_run_mongosh(shop, query)) == 3
    assert _run_mongosh(shop, repair) == 1
    assert len(_run_mongosh(shop, query)) == 3
    assert not shop.orders.find_one({"customer_id": []})
    assert command("--dry-run", "--customer", "", MONGODB_URI=deployment.uri) == 1
    assert "an order without customer" in capsys.readouterr().out


@pytest.mark.xdist_group("oms_db")
def test_points_stored_as_strings_are_refused_until_they_are_converted(
    shop: Database[Any], deployment: Deployment, command: Command
) -> None:
    shop.users.insert_many([{"_id": n, "loyalty_points": "0"} for n in range(100, 120)])
    assert command("--once", MONGODB_URI=deployment.uri) == 65
    (conversion,) = _mongosh_snippets("docs/operation.md", "Points stored as strings")
    assert _run_mongosh(shop, conversion) == 20
    assert command("--once", MONGODB_URI=deployment.uri) == 0


def test_the_page_on_operation_has_every_alert_and_only_metrics_that_exist() -> None:
    rules = (ROOT / "deploy/alerts.yml").read_text(encoding="utf-8")
    table = [
        _codes(row[0])[0] for row in _table("docs/operation.md", "First command for each alert")
    ]
    assert set(table) == {"loyalty-microservice-alert@", *re.findall(r"- alert: (\w+)", rules)}
    metrics = {_codes(row[0])[0] for row in _table("docs/logs-and-metrics.md", "Metrics")}
    assert set(re.findall(r"\bloyalty_(?:orders|live)\w+", PAGES["docs/operation.md"])) <= metrics


def test_make_test_servers_names_test_files_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (found,) = re.findall(r"^SERVER_TESTS :=.*\\\n(.*)\)\)$", makefile, re.MULTILINE)
    names = found.split()
    assert len(names) > 5
    assert [name for name in names if not (ROOT / f"tests/test_{name}.py").exists()] == []


# Settings and commands


def test_help_and_the_readme_name_the_same_options(capsys: pytest.CaptureFixture[str]) -> None:
    table = {
        word.split()[0]
        for row in _table("README.md", "Commands and exit codes")
        for word in _codes(row[0])
    }
    assert table == set(re.findall(r"--[a-z][a-z-]+", _help(capsys)))


def test_help_and_the_readme_name_the_same_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    section = README.split("## Commands and exit codes")[1].split("\n## ")[0]
    codes = re.findall(r"^\| \*\*(\d+)\*\* \|", section, re.MULTILINE)
    found = re.search(r"exit codes:(.*?)\n\n", _help(capsys), re.DOTALL)
    assert found
    assert re.findall(r"\b\d+\b", found[1]) == codes


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(capsys)
    for setting in setting_specs().values():
        (line,) = re.findall(rf"^  {setting.name} .*", text, re.MULTILINE)
        assert setting.description in line
        assert not setting.default or line.endswith(f"(default: {setting.default})")


def test_the_table_of_settings_has_every_setting_with_its_default() -> None:
    rows = _table("README.md", "Settings")
    table = {_codes(name)[0]: "".join(_codes(default)) for name, default, _ in rows}
    expected = {setting.name: setting.default for setting in setting_specs().values()}
    assert table == expected | {"MONGODB_URI_FILE": "", "MONGODB_DATABASE": "oms_db"}


# Log events and modules


def _logged_events() -> set[str]:
    """Return the event names in the source: the first word of a message, or `event`."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("loyalty/**/*.py")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    functions = r"log\.(?:debug|info|warning|error|exception)|warn_once|warn_on_failure"
    call = rf'(?:{functions})\(\s*f?["\']([a-z_]+)(?=[ "\'])'
    progress = r'\bProgress\("([a-z]+)"'
    return set(re.findall(call, source)) | set(re.findall(progress, source))


def test_the_table_of_log_events_has_every_event_that_is_logged() -> None:
    rows = _table("docs/logs-and-metrics.md", "Log events")
    assert {_codes(row[0])[0] for row in rows} == _logged_events()


def test_the_table_of_modules_has_every_module() -> None:
    table = {_codes(row[0])[0] for row in _table("docs/architecture.md", "Modules")}
    files = [*ROOT.glob("*.py"), *ROOT.glob("loyalty/**/*.py")]
    paths = {str(file.relative_to(ROOT)) for file in files if file.name != "__init__.py"}
    folders = {entry for entry in table if entry.endswith("/")}
    assert {path for path in paths if not path.startswith(tuple(folders))} == table - folders
    assert all((ROOT / folder).is_dir() for folder in folders)


@pytest.mark.xdist_group("oms_db")
def test_the_table_of_record_fields_has_every_field(
    shop: Database[Any], deployment: Deployment, command: Command
) -> None:
    assert command("--once", MONGODB_URI=deployment.uri) == 0
    record = shop.loyalty_recounts.find_one()
    assert record
    assert {_codes(row[0])[0] for row in _table("docs/json.md", "Records")} == set(record)


# Measured numbers


def test_every_measured_number_is_in_the_results_beside_its_command() -> None:
    results = (ROOT / "bench/RESULTS.md").read_text(encoding="utf-8").splitlines()
    sections = re.split(r"^## ", PAGES["docs/performance.md"], flags=re.MULTILINE)[1:]
    measured = 0
    for section in sections:
        for row in re.findall(r"^\|(.*)\|$", section, re.MULTILINE):
            numbers = re.findall(r"\b([\d.]+) (?:s|ms|MB) *(?=\||$)", row)
            if not numbers:
                continue
            assert "`make bench" in section
            (orders,) = re.findall(r"\b\d+(?:,000){2}\b", row)
            measured += len(numbers)
            for number in numbers:
                place = re.compile(rf"^\| {orders} \|.*(?<![\d.]){re.escape(number)}(?![\d.])")
                assert any(place.search(line) for line in results), (orders, number)
    assert measured >= 20
    prose = re.sub(r"^\|.*\|$|`[^`]*`", "", "".join(sections), flags=re.MULTILINE)
    assert re.findall(r"\b[\d.]+ (?:s|ms|MB|GB)\b", prose) == []


# Options of the connection string


def test_the_table_of_uri_options_names_every_option_that_is_overridden() -> None:
    rows = _table("docs/connections.md", "Options in the connection string")
    overridden = [_codes(row[0])[0] for row in rows if row[1].startswith("overridden")]
    source = (ROOT / "loyalty/mongo/connection.py").read_text(encoding="utf-8")
    found = re.search(r"^OVERRIDDEN_OPTIONS = \((.*?)^\)", source, re.MULTILINE | re.DOTALL)
    assert found
    assert overridden == re.findall(r'"(\w+)"', found[1])


# Privileges

PRIVILEGES = _table("docs/connections.md", "Privileges for each command")
COLLECTIONS = ("orders", "users", "loyalty_recounts", "loyalty_changes", "")
PASSWORD = "secret"


def _actions(cells: list[str]) -> dict[str, set[str]]:
    """Return the actions by collection, the optional ones included."""
    return {name: set(_codes(cell)) for name, cell in zip(COLLECTIONS, cells, strict=True)}


def _required_actions(cells: list[str]) -> dict[str, set[str]]:
    """Return the actions by collection, without those in parentheses."""
    return _actions([re.sub(r"\(.*?\)", "", cell) for cell in cells])


@pytest.fixture(scope="module")
def secured(authenticated_deployment: Deployment) -> Iterator[Deployment]:
    with authenticated_deployment.client() as client:
        client["oms_db"].users.insert_one({"_id": 1, "loyalty_points": 1})
        client["oms_db"].orders.insert_one({"customer_id": 1, "status": "Shipped"})
        client.admin.command("createRole", "documented", privileges=[], roles=[])
        client.admin.command("createUser", "documented", pwd=PASSWORD, roles=["documented"])
        yield authenticated_deployment
        client.admin.command("dropUser", "documented")
        client.admin.command("dropRole", "documented")
        client.drop_database("oms_db")


@pytest.mark.xdist_group("auth")
@pytest.mark.parametrize("row", PRIVILEGES, ids=[row[0] for row in PRIVILEGES])
def test_the_privileges_in_the_table_are_enough(
    row: list[str],
    secured: Deployment,
    command: Command,
    service: Start,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each command works, and warns about nothing, with exactly the documented privileges."""
    required = _required_actions(row[1:])
    privileges = [
        {"resource": {"db": "oms_db", "collection": collection}, "actions": sorted(actions)}
        for collection, actions in required.items()
        if actions
    ]
    uri = secured.uri_for("documented", PASSWORD, "oms_db")
    with secured.client() as client:
        client["oms_db"].users.update_one({"_id": 1}, {"$set": {"loyalty_points": 2}})
        assert command("--once", "--force", MONGODB_URI=secured.uri) == 0
        client.admin.command("updateRole", "documented", privileges=privileges, roles=[])
    capsys.readouterr()
    codes = _codes(row[0])
    if row[0].startswith("daemon"):
        settings = dict(code.split("=") for code in codes)
        daemon = service(MONGODB_URI=uri, **settings)
        daemon.wait_for("outcome=succeeded")
        assert daemon.stop() == 0
        output = daemon.output
    else:
        arguments = codes + ["last"] * (codes[0] in ("--undo", "--changes"))
        assert command(*arguments, MONGODB_URI=uri) == 0
        output = capsys.readouterr().err
    assert not re.findall(r".* (?:WARNING|ERROR) (?!points_decrease).*", output)


def test_the_role_has_the_privileges_of_the_daemon() -> None:
    text = (ROOT / "deploy/mongodb-role.js").read_text(encoding="utf-8")
    names = dict(re.findall(r'^const (\w+) = "(.*)";$', text, re.MULTILINE)) | {'""': ""}
    active: dict[str, set[str]] = {}
    optional: dict[str, set[str]] = {}
    for comment, name, actions in re.findall(
        r'^ +(// )?\{ resource: .*collection: ([\w"]+) \}, actions: \[(.*)\] \},$',
        text,
        re.MULTILINE,
    ):
        group = optional if comment else active
        group.setdefault(names[name], set()).update(re.findall(r'"(\w+)"', actions))
    documented = {row[0]: _actions(row[1:]) for row in PRIVILEGES}
    assert active == documented["daemon"]
    live = documented["daemon with `LIVE_UPDATES=yes`"]
    create_index = documented["`--create-index`"]
    extra = {name: live[name] - active[name] | create_index[name] - active[name] for name in active}
    assert {name: actions for name, actions in extra.items() if actions} == optional
