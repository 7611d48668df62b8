"""docs/shapes.md: each recipe counts what it shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from bson import json_util
from conftest import ROOT, Command
from pymongo.database import Database

from config import load
from loyalty import cli
from loyalty.env_file import read_env_file
from sandbox.service import Process

Start = Callable[..., Process]

PAGE = (ROOT / "docs/shapes.md").read_text(encoding="utf-8")
WITHOUT_RECIPE = {"CPU time"}
VIEW = "A view"


class Recipe(NamedTuple):
    heading: str
    settings: list[str]
    users: list[dict[str, Any]]
    orders: list[dict[str, Any]]
    view: tuple[str, str, list[Any]] | None

    def __str__(self) -> str:
        return self.heading


def find_blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def read_recipes() -> list[Recipe]:
    recipes = []
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        heading = section.splitlines()[0]
        if heading in WITHOUT_RECIPE:
            continue
        (data,) = find_blocks(section, "json")
        documents = json_util.loads(data)
        view = None
        for code in find_blocks(section, "js"):
            name, source, stages = re.findall(r'"(\w+)", "(\w+)", (\[.*\])\)', code, re.DOTALL)[0]
            view = (name, source, json_util.loads(stages))
        settings = find_blocks(section, "dotenv")
        recipes.append(Recipe(heading, settings, documents["users"], documents["orders"], view))
    return recipes


RECIPES = read_recipes()


def run(arguments: list[str], settings: str, uri: str, folder: Path) -> int:
    file = folder / "env"
    file.touch(mode=0o600)
    file.write_text(f"MONGODB_URI={uri}\n{settings}", encoding="utf-8")
    return cli.main(["--env-file", str(file), *arguments])


def without(document: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the document without the field at a path; an outer document stays."""
    first, _, rest = path.partition(".")
    if not rest:
        return {name: value for name, value in document.items() if name != first}
    return {**document, first: without(document[first], rest)}


def test_the_page_has_all_recipes() -> None:
    assert [recipe.heading for recipe in RECIPES] == [
        "Default",
        "Nested fields",
        "By customer number",
        "By e-mail",
        "DBRef",
        "Soft deletes",
        "One programme year",
        "Two stores",
        "Gifts in a separate field",
        VIEW,
    ]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_writes_the_points_that_it_shows(
    recipe: Recipe, database: Database[Any], uri: str, tmp_path: Path
) -> None:
    users = recipe.users
    for text in recipe.settings:
        file = tmp_path / "settings"
        file.write_text(text, encoding="utf-8")
        values, _ = read_env_file(file)
        points_field = load({"MONGODB_URI": uri, **values}).points_field
        users = [without(user, points_field) for user in users]
    assert users != recipe.users
    database.users.insert_many(users)
    database.orders.insert_many([dict(order) for order in recipe.orders])
    if recipe.view:
        name, source, stages = recipe.view
        database.create_collection(name, viewOn=source, pipeline=stages)
    for settings in recipe.settings:
        expected = 78 if recipe.view else 0
        assert run(["--create-index"], settings, uri, tmp_path) == expected
        assert run(["--check-config"], settings, uri, tmp_path) == 0
        assert run(["--once"], settings, uri, tmp_path) == 0
    for settings in recipe.settings:
        assert run(["--dry-run"], settings, uri, tmp_path) == 0
    stored = {str(user["_id"]): user for user in database.users.find()}
    assert stored == {str(user["_id"]): user for user in recipe.users}


def test_an_address_in_another_case_is_shown_as_similar(
    database: Database[Any], command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    database.users.insert_one({"email": "Bob@example.com"})
    settings = {"USER_KEY_FIELD": "email"}
    assert command("--dry-run", "--customer", "bob@example.com", **settings) == 1
    assert "users with a similar id: 'Bob@example.com'" in capsys.readouterr().out


def test_the_safety_check_refuses_a_new_programme_year_until_it_is_forced(
    database: Database[Any], uri: str, tmp_path: Path
) -> None:
    (recipe,) = [recipe for recipe in RECIPES if recipe.heading == "One programme year"]
    (settings,) = recipe.settings
    database.users.insert_many([{"_id": n, "loyalty_points": 5} for n in range(20)])
    database.orders.insert_many([{**recipe.orders[0], "customer_id": n % 20} for n in range(100)])
    assert run(["--once"], settings, uri, tmp_path) == 65
    assert run(["--once", "--force"], settings, uri, tmp_path) == 0
    assert {user["loyalty_points"] for user in database.users.find()} == {0}


def test_what_a_view_cannot_do(
    database: Database[Any], command: Command, service: Start, uri: str
) -> None:
    (recipe,) = [recipe for recipe in RECIPES if recipe.heading == VIEW]
    assert recipe.view
    name, source, stages = recipe.view
    database.users.insert_many([{"_id": 1}, {"_id": 2}])
    database.orders.insert_many([dict(order) for order in recipe.orders])
    database.create_collection(name, viewOn=source, pipeline=stages)
    database.create_collection("people", viewOn="users", pipeline=[])
    assert command("--once", USERS_COLLECTION="people") == 78
    running = service(MONGODB_URI=uri, ORDERS_COLLECTION=name, LIVE_UPDATES="yes")
    running.wait_for("outcome=succeeded")
    assert "live_updates_unavailable" in running.output
    assert running.stop() == 0
    assert list(database.users.find().sort("_id")) == [
        {"_id": 1, "loyalty_points": 2},
        {"_id": 2, "loyalty_points": 1},
    ]
