"""JSON for programs: the results on stdout and the log, as the documents show them."""

from __future__ import annotations

import json
import re
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from conftest import ROOT, Command, settings_for
from pymongo.database import Database

from loyalty.commands import once
from loyalty.heartbeat import Heartbeat
from loyalty.history import History
from loyalty_microservice import main

PAGES = ("docs/json.md", "docs/logs-and-metrics.md")
DOCUMENT = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
ADA = ObjectId("66abcdefabcdefabcdefabcd")
Capture = pytest.CaptureFixture[str]
Shop = Database[Any]


@pytest.fixture
def shop(database: Shop) -> Shop:
    """Ada has 2 shipped orders and no points; Bob has 3 points; one customer is unknown."""
    database.users.insert_many([{"_id": ADA}, {"_id": "bob", "loyalty_points": 3}])
    orders = [(str(ADA), "Shipped"), (ADA, "Shipped"), ("stranger", "Shipped"), (ADA, "Pending")]
    database.orders.insert_many([{"customer_id": c, "status": s} for c, s in orders])
    return database


def shape(value: Any) -> Any:
    """Return the keys and types of a document; of a list, those of its first element."""
    match value:
        case dict():
            return {name: shape(inner) for name, inner in value.items()}
        case list():
            return [shape(inner) for inner in value[:1]]
        case str() if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", value):
            return "time"
    return type(value).__name__


def example(call: str, number: int = 0) -> Any:
    """Return an example of what a call prints, from the section that describes it."""
    found = re.findall(rf"`{call}`(?:(?!\n#).)*?```json\n(.*?)```", DOCUMENT, re.DOTALL)
    return json.loads(found[number])


def test_every_document_has_the_keys_and_types_of_the_documented_example(
    shop: Shop, command: Command, capsys: Capture
) -> None:
    def printed(code: int, *arguments: str, **settings: str) -> Any:
        assert command("--json", *arguments, **settings) == code
        return json.loads(capsys.readouterr().out)

    check = printed(0, "--check-config", ORDER_STATUSES="Shipped,Sent")
    assert shape(check) == shape(example("--check-config --json"))
    assert check["settings"]["ORDER_STATUSES"] == ["Shipped", "Sent"]
    assert check["statuses"][0] == {"status": "Shipped", "orders": 3, "counted": True}
    assert "mongodb://" not in str(check)
    dry = printed(1, "--dry-run")
    assert shape(dry) == shape(example("--dry-run --json"))
    assert dry["largest_changes"] == [
        {"user": "'bob'", "from": "3", "to": 0},
        {"user": str(ADA), "from": "null", "to": 2},
    ]
    assert shape(dry) == shape(check["dry_run"])
    unknown = printed(1, "--dry-run", "--customer", "nobody")
    assert unknown == {
        "customers": [
            {"customer": "nobody", "orders": [], "users": [], "similar_ids": [], "changes": []}
        ]
    }
    assert command("--unknown-customers") == 0
    assert json.loads(capsys.readouterr().out) == example("--unknown-customers")
    result = printed(0, "--once")
    assert shape(result) == shape(example("--once --json"))
    assert (result["outcome"], result["users"], result["changed"]) == ("succeeded", 2, 2)
    assert "stranger" not in str(result)  # an id may be an e-mail address
    now = datetime.now(UTC)
    assert abs(datetime.fromisoformat(result["finished_at"]) - now) < timedelta(minutes=1)
    status = printed(0, "--status")
    assert shape(status) == shape(example("--status --json"))
    record = status["recounts"][0]
    assert {name: record[name] for name in result.keys() - {"users"}} == {
        name: value for name, value in result.items() if name != "users"
    }
    assert record["host"] == socket.gethostname()
    assert record["settings"]["order_statuses"] == ["Shipped"]
    one = printed(0, "--once", "--customer", str(ADA))
    assert shape(one) == shape(example("--once --customer ID --json"))
    (customer,) = one["customers"]
    assert customer["users"] == [{"user": str(ADA), "from": "2", "to": 2}]
    (change,) = customer["changes"]
    assert (change["recount"], change["from"], change["to"]) == (result["_id"], "no field", 2)


def test_the_lines_of_changes_and_undo_have_the_documented_keys_and_types(
    shop: Shop, command: Command, capsys: Capture
) -> None:
    def lines(code: int, *arguments: str) -> list[Any]:
        assert command("--json", *arguments) == code
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    (result,) = lines(0, "--once")
    changes = lines(0, "--changes", "last")
    assert changes == lines(0, "--changes", result["_id"])
    expected = [{"user": str(ADA), "from": "no field", "to": 2}]
    expected.append({"user": "'bob'", "from": "3", "to": 0})
    assert sorted(changes, key=str) == sorted(expected, key=str)
    assert example("--changes ID --json") in changes
    shop.users.update_one({"_id": "bob"}, {"$set": {"loyalty_points": 4}})
    dry = lines(1, "--undo", "last", "--dry-run")
    undone = lines(1, "--undo", "last")
    assert dry[0] == undone[0] == example("--undo ID --json")
    assert shape(undone[1]) == shape(example("--undo ID --json", 1))
    assert undone[1] == {**dry[1], "written": True}
    assert (undone[1]["recount"], undone[1]["restored"]) == (result["_id"], 1)
    (status,) = lines(1, "--status")
    assert shape(status["recounts"][1]) == shape(example("--status --json")["recounts"][0])
    assert (status["fresh"], status["undone_recount"]) == (False, result["_id"])
    documented = re.findall(r"^\| `(\w+)` \|", DOCUMENT.split("## Records")[1], re.MULTILINE)
    assert status["recounts"][0].keys() <= set(documented)


def test_check_config_lists_every_problem(shop: Shop, command: Command, capsys: Capture) -> None:
    shop.users.insert_many([{"_id": n, "loyalty_points": 1} for n in range(20)])
    assert command("--check-config", "--json", METRICS_FILE="/nowhere/loyalty.prom") == 1
    found = json.loads(capsys.readouterr().out)
    refusal, metrics = found["problems"]
    assert refusal.startswith("the safety checks would refuse the recount: 21 of the 21 users")
    assert metrics.startswith("METRICS_FILE: /nowhere/loyalty.prom cannot be written")
    assert found["dry_run"]["refusal"] in refusal
    assert command("--check-config", "--json", USERS_COLLECTION="clients") == 1
    found = json.loads(capsys.readouterr().out)
    assert (len(found["problems"]), found["dry_run"]) == (1, None)
    shop.jobs.insert_one({})
    assert command("--check-config", "--json", RECOUNTS_COLLECTION="jobs") == 78
    assert capsys.readouterr().out == ""


def test_the_heartbeat_of_live_updates_has_the_documented_keys(
    shop: Shop, uri: str, command: Command, capsys: Capture
) -> None:
    now = datetime.now(UTC)
    heartbeat = Heartbeat(
        live_since=now, as_of=now, last_event=None, last_update=now, users_updated=1, waiting=2
    )
    History(shop.loyalty_recounts, settings_for(uri)).write_heartbeat(heartbeat)
    assert command("--status", "--json") == 1  # no full recount has succeeded
    found = json.loads(capsys.readouterr().out)["heartbeat"]
    (keys,) = re.findall(r"`heartbeat` is .*? Its keys are (.*?)\.\n", DOCUMENT, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", keys)) == found.keys()
    assert (found["alive"], found["waiting"], found["last_event"]) == (True, 2, None)


def test_exit_codes_are_the_same_with_json_and_errors_print_no_document(
    shop: Shop, command: Command, capsys: Capture
) -> None:
    assert command("--status", "--json") == 1
    status = json.loads(capsys.readouterr().out)
    assert (status["fresh"], status["age_seconds"], status["recounts"]) == (False, None, [])
    shop.users.insert_many([{"_id": n, "loyalty_points": 1} for n in range(20)])
    assert command("--once", "--json") == 65
    said = capsys.readouterr()
    assert said.out == ""
    assert "would lose points" in said.err
    for arguments in ([], ["--create-index"]):
        with pytest.raises(SystemExit) as caught:
            main(["--json", *arguments])
        assert caught.value.code == 2


def test_the_log_as_json_has_the_same_events_as_the_text(
    shop: Shop, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    def text_events() -> list[str]:
        lines = capsys.readouterr().err.splitlines()
        return [line.split()[2] for line in lines if re.match(r"\d{4}-", line)]

    def json_lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    before = list(shop.users.find())
    lines = []
    for arguments, code, values in (
        (["--once"], 0, {}),
        (["--once"], 65, {"ORDER_STATUSES": "shipped"}),
        (["--once"], 78, {"BATCH_SIZE": "x"}),
        (["--status"], 78, {"RECOUNTS_COLLECTION": "none"}),
    ):
        shop.loyalty_recounts.drop()
        assert command(*arguments, **values) == code
        events = text_events()
        shop.loyalty_recounts.drop()
        for user in before:
            shop.users.replace_one({"_id": user["_id"]}, user)
        assert command(*arguments, LOG_FORMAT="json", **values) == code
        lines += (found := json_lines())
        assert [line["event"] for line in found] == events
    events = [line["event"] for line in lines]
    assert events[:4] == ["connected", "safety_warning", "safety_warning", "recount"]
    assert events[4:] == [
        *("connected", "refused", "configuration_problem", "configuration_help", "failed")
    ]
    assert lines[3]["fields"]["changed"] == 2
    monkeypatch.setattr(once, "run_recount", fail)
    assert command("--once", LOG_FORMAT="json") == 70
    *_, last = json_lines()
    assert (last["level"], last["event"]) == ("ERROR", "internal_error")
    assert last["traceback"].endswith("ZeroDivisionError")
    (documented,) = re.findall(r"```json\n(\{\"time.*\})\n```", DOCUMENT)
    assert {tuple(line) for line in [*lines, last]} == {tuple(json.loads(documented))}
    assert json.loads(documented)["event"] in events


def test_a_stored_value_cannot_break_a_json_line(
    shop: Shop, command: Command, capsys: Capture, tmp_path: Path
) -> None:
    shop.orders.insert_one({"status": '\n\x1b[31m{"event": 1}', "customer_id": "x\ny"})
    assert command("--once", LOG_FORMAT="json", LOG_LEVEL="DEBUG") == 0
    for line in capsys.readouterr().err.splitlines():
        assert json.loads(line).keys() >= {"event", "message"}
