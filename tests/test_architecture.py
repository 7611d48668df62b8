"""The layout of the product: the direction of imports, who may use the driver, sizes of files."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# Top to bottom: a module imports from its own layer and from lower ones. A name stands for the
# module or for the whole package; the longest one that matches counts.
LAYERS = (
    ("loyalty_microservice",),
    ("loyalty.cli",),
    ("loyalty.commands",),
    ("loyalty.service",),  # implements the protocol of a job that the daemon defines
    ("loyalty.daemon", "loyalty.systemd"),
    ("loyalty.live",),
    ("loyalty.recount", "loyalty.history", "loyalty.state", "loyalty.metrics"),
    ("loyalty.heartbeat",),
    ("loyalty.mongo",),
    ("loyalty.env_file",),
    ("config",),
    ("loyalty.mongo.uri", "loyalty.mongo.values"),
    ("loyalty.retry", "loyalty.concurrency", "loyalty.logs", "loyalty.parsers"),
    ("loyalty.errors",),
)

# Not even through another module of the product.
FORBIDDEN = (
    ("loyalty.daemon", "loyalty.recount"),
    ("loyalty.daemon", "loyalty.live"),
    ("loyalty.systemd", "loyalty.recount"),
    ("loyalty.mongo", "loyalty.recount"),
    ("loyalty.mongo", "loyalty.live"),
    ("loyalty.mongo", "loyalty.commands"),
    ("loyalty.recount.tally", "loyalty.mongo.connection"),
    ("loyalty.recount.tally", "loyalty.mongo.driver_errors"),
    ("loyalty.recount.safety", "loyalty.mongo.connection"),
    ("loyalty.recount.safety", "loyalty.mongo.driver_errors"),
)

DEPENDENCIES = {"pymongo", "bson", "schedule", "dotenv"}  # bson is a part of pymongo
WITHOUT_DRIVER = ("loyalty.recount.tally", "loyalty.recount.safety")
MAX_LINES = 250

Imports = dict[str, set[str]]


def product_files(root: Path) -> dict[str, Path]:
    """Return the product's files by the name of their module."""
    paths = [*root.glob("*.py"), *root.glob("loyalty/**/*.py")]
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(paths)
    }


def read_imports(root: Path) -> Imports:
    """Return what each module imports, anywhere in it, other than the standard library."""
    files = product_files(root)
    imports: Imports = {}
    for module, path in files.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{module}: a relative import"
                source = node.module or ""
                names = {f"{source}.{alias.name}" for alias in node.names}
                submodules = names & files.keys()
                found |= submodules
                if submodules != names:
                    found.add(source)
        standard = sys.stdlib_module_names
        imports[module] = {name for name in found if name.partition(".")[0] not in standard}
    return imports


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def layer(module: str) -> int | None:
    """Return the index in LAYERS, 0 for the top, or None for a module that is in no layer."""
    matches = [
        (len(name), number)
        for number, names in enumerate(LAYERS)
        for name in names
        if is_in(module, name)
    ]
    return max(matches)[1] if matches else None


def upward_imports(imports: Imports) -> list[str]:
    """Return the imports whose target is in a higher layer than the module that imports it."""
    return [
        f"{module} imports {target}"
        for module, targets in imports.items()
        for target in sorted(targets & imports.keys())
        if (above := layer(target)) is not None
        and (own := layer(module)) is not None
        and above < own
    ]


def import_cycle(imports: Imports) -> list[str]:
    """Return the modules of one import cycle, or an empty list."""
    graph = {module: targets & imports.keys() for module, targets in imports.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def reachable(imports: Imports, start: str) -> set[str]:
    """Return every module of the product that is imported when `start` is, directly or not."""
    found, pending = set[str](), {start}
    while pending:
        found |= pending
        pending = {t for module in pending for t in imports[module] & imports.keys()} - found
    return found


def forbidden_imports(imports: Imports, rules: Iterable[tuple[str, str]]) -> list[str]:
    return [
        f"{module} imports {target}"
        for package, forbidden in rules
        for module in imports
        if is_in(module, package)
        for target in sorted(reachable(imports, module))
        if is_in(target, forbidden)
    ]


IMPORTS = read_imports(ROOT)


def test_every_module_has_a_layer_and_every_layer_a_module() -> None:
    # A package itself, its __init__, may be outside of the layers, as long as it imports nothing.
    assert [m for m, targets in IMPORTS.items() if layer(m) is None and targets] == []
    names = [name for names in LAYERS for name in names]
    assert [name for name in names if name not in IMPORTS] == []


def test_imports_go_from_top_to_bottom() -> None:
    assert upward_imports(IMPORTS) == []


def test_there_is_no_import_cycle() -> None:
    assert import_cycle(IMPORTS) == []


@pytest.mark.parametrize("rule", FORBIDDEN, ids=lambda rule: f"{rule[0]}-{rule[1]}")
def test_no_module_has_a_forbidden_import(rule: tuple[str, str]) -> None:
    assert any(is_in(module, rule[0]) for module in IMPORTS)
    assert forbidden_imports(IMPORTS, [rule]) == []


@pytest.mark.parametrize("module", WITHOUT_DRIVER)
def test_tally_and_safety_import_no_driver(module: str) -> None:
    assert [name for name in IMPORTS[module] if is_in(name, "pymongo") or is_in(name, "bson")] == []


def test_the_product_imports_its_dependencies_and_itself_only() -> None:
    outside = {
        (module, name)
        for module, targets in IMPORTS.items()
        for name in targets
        if name not in IMPORTS and name.partition(".")[0] not in DEPENDENCIES
    }
    assert outside == set()


@pytest.mark.parametrize("module", product_files(ROOT))
def test_no_file_of_the_product_exceeds_the_line_limit(module: str) -> None:
    lines = product_files(ROOT)[module].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES


def test_each_rule_reports_a_violation(tmp_path: Path) -> None:
    files = {
        "config.py": "from loyalty.errors import ConfigurationError\n",
        "loyalty/errors.py": "import os\n\ndef late() -> None:\n    import config\n",
        "loyalty/daemon.py": "from loyalty import history\nimport requests\n",
        "loyalty/history.py": "from loyalty.recount.tally import Result\n",
        "loyalty/recount/__init__.py": "",
        "loyalty/recount/tally.py": "from loyalty.mongo import connection as c, values\n",
        "loyalty/mongo/connection.py": "from pymongo import MongoClient\n",
        "loyalty/mongo/values.py": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    imports = read_imports(tmp_path)
    assert imports["loyalty.recount.tally"] == {"loyalty.mongo.connection", "loyalty.mongo.values"}
    assert imports["loyalty.daemon"] == {"loyalty.history", "requests"}
    assert upward_imports(imports) == ["loyalty.errors imports config"]
    assert sorted({*import_cycle(imports)}) == ["config", "loyalty.errors"]
    rules = [("loyalty.daemon", "loyalty.recount"), ("loyalty.recount", "loyalty.mongo.connection")]
    assert forbidden_imports(imports, rules) == [
        "loyalty.daemon imports loyalty.recount.tally",
        "loyalty.recount.tally imports loyalty.mongo.connection",
    ]
    assert layer("loyalty.mongo.uri") != layer("loyalty.mongo.connection")
