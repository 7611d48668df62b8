"""What programs read: JSON on stdout, the log as JSON, metrics; as the README shows them."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from conftest import ROOT, Command, settings_for
from live_stage import live, make_index
from prometheus_client.parser import text_string_to_metric_families
from pymongo.database import Database

from loyalty import concurrency as overlap
from loyalty import metrics as metrics_module
from loyalty.concurrency import ignore_progress
from loyalty.history import Heartbeat, History
from loyalty.metrics import Metrics
from loyalty.recount.tally import Tally
from loyalty.service import Service
from loyalty_microservice import main
from sandbox.mongod import Deployment, wait_until

README = (ROOT / "README.md").read_text()
ALERTS = (ROOT / "deploy/alerts.yml").read_text()
ADA = ObjectId("66abcdefabcdefabcdefabcd")
Shop = Database[Any]


@pytest.fixture
def shop(database: Shop) -> Shop:
    """Ada has 2 shipped orders and no points yet, Bob the reverse; one order is a stranger's."""
    database.users.insert_many([{"_id": ADA}, {"_id": "bob", "loyalty_points": 3}])
    orders = [(str(ADA), "Shipped"), (ADA, "Shipped"), ("stranger", "Shipped"), (ADA, "Pending")]
    database.orders.insert_many([{"customer_id": c, "status": s} for c, s in orders])
    return database


def shape(value: Any) -> Any:
    """Return the keys and types of a document; of a list, those of what it begins with."""
    match value:
        case dict():
            return {name: shape(inner) for name, inner in value.items()}
        case list():
            return [shape(inner) for inner in value[:1]]
        case str() if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", value):
            return "time"
    return type(value).__name__


def example(call: str) -> Any:
    """Return the README's example of what a call prints."""
    found = re.search(rf"`{call}`.*?```json\n(.*?)```", README, re.DOTALL)
    assert found, call
    return json.loads(found[1])


def test_the_readmes_examples_have_the_keys_and_types_of_what_is_printed(
    shop: Shop, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(code: int, *arguments: str, **settings: str) -> Any:
        assert command("--json", *arguments, **settings) == code
        return json.loads(capsys.readouterr().out)

    dry = printed(1, "--dry-run")
    assert shape(dry) == shape(example("--dry-run --json"))
    assert dry["largest_changes"] == [
        {"user": "'bob'", "from": "3", "to": 0},
        {"user": str(ADA), "from": "none", "to": 2},
    ]
    one = printed(0, "--once", "--customer", str(ADA))
    assert shape(one) == shape(example("--once --customer ID --json"))
    nobody = printed(1, "--dry-run", "--customer", "nobody")
    assert nobody == {"customers": [{"customer": "nobody", "orders": [], "users": []}]}
    once = printed(0, "--once")
    assert shape(once) == shape(example("--once --json"))
    assert (once["outcome"], once["users"], once["changed"]) == ("succeeded", 2, 1)
    assert "stranger" not in str(once)  # nor does the text name unknown customers
    now = datetime.now(UTC)
    assert abs(datetime.fromisoformat(once["finished_at"]) - now) < timedelta(minutes=1)
    status = printed(0, "--status")
    assert shape(status) == shape(example("--status --json"))
    assert {**status["recounts"][0], "users": 2} == {**once, "seconds": pytest.approx(0, abs=60)}
    check = printed(0, "--check-config", ORDER_STATUSES="Shipped,Sent")
    assert shape(check) == shape(example("--check-config --json"))
    assert check["settings"]["ORDER_STATUSES"] == ["Shipped", "Sent"]
    assert "mongodb://" not in str(check)


def test_a_program_sees_the_heartbeat_of_live_updates_as_the_readme_says(
    shop: Shop, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    now = datetime.now(UTC)
    heartbeat = Heartbeat(
        live_since=now, last_event=None, last_update=now, customers_updated=1, waiting=2
    )
    History(shop.loyalty_recounts).write_heartbeat(heartbeat)
    assert command("--status", "--json") == 1  # no recount of everyone has succeeded
    found = json.loads(capsys.readouterr().out)["heartbeat"]
    (said,) = re.findall(r"`heartbeat`, once live updates have been\s+at work: (.*?)\)", README)
    assert set(re.findall(r"`(\w+)`", said)) == found.keys()
    assert (found["alive"], found["waiting"], found["last_event"]) == (True, 2, None)


def test_a_program_gets_the_exit_codes_of_before_and_errors_on_stderr(
    shop: Shop, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--status", "--json") == 1
    status = json.loads(capsys.readouterr().out)
    assert (status["fresh"], status["age_seconds"], status["recounts"]) == (False, None, [])
    shop.users.insert_many([{"_id": n, "loyalty_points": 1} for n in range(20)])
    assert command("--once", "--json") == 65
    said = capsys.readouterr()
    assert said.out == ""
    assert "would lose some" in said.err
    for mode in ([], ["--create-index"]):
        with pytest.raises(SystemExit) as caught:
            main(["--json", *mode])
        assert caught.value.code == 2


def test_the_log_as_json_is_an_object_a_line_also_of_a_bug_and_of_wrong_settings(
    shop: Shop,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def logged() -> list[dict[str, Any]]:
        return [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    monkeypatch.setattr(overlap, "REPORT_SECONDS", 0)
    assert command("--once", LOG_FORMAT="json") == 0
    lines = logged()
    events = [line["event"] for line in lines]
    assert events == ["connected", "points_taken", "writing", "recount"]
    assert lines[2]["fields"].keys() == {"done", "total", "rate"}
    assert lines[-1]["fields"]["changed"] == 2
    monkeypatch.setattr(Tally, "refusal", lambda _: 1 / 0)
    assert command("--once", LOG_FORMAT="json") == 70
    lines += logged()
    assert (lines[-1]["level"], lines[-1]["event"]) == ("ERROR", "bug")
    assert lines[-1]["traceback"].endswith("ZeroDivisionError: division by zero")
    assert command("--once", LOG_FORMAT="json", BATCH_SIZE="x") == 78
    lines += (wrong := logged())
    assert {line["event"] for line in wrong} == {"configuration"}
    (example,) = re.findall(r"```json\n(\{\"time.*\})\n```", README)
    assert {tuple(line) for line in lines} == {tuple(json.loads(example))}


def test_under_the_journal_each_object_has_its_priority_before_it() -> None:
    program = """
import os
stderr = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{stderr.st_dev}:{stderr.st_ino}"
import logging
from loyalty.logs import log_to_stderr, set_log_format
log_to_stderr(); set_log_format("json")
log = logging.getLogger("loyalty")
log.warning("two\\nlines")
try: 1 / 0
except ZeroDivisionError: log.exception("bug")
logging.getLogger("pymongo").error("theirs")
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    lines = ran.stderr.splitlines()
    assert [line[:3] for line in lines] == ["<4>", "<3>", "<3>"]
    events = [json.loads(line[3:])["event"] for line in lines]
    assert events == ["two", "bug", "pymongo"]


def samples(file: Path) -> dict[str, float]:
    """Read the file with Prometheus' own parser: names, with the outcome where there is one."""
    found = {}
    for family in text_string_to_metric_families(file.read_text()):
        assert family.documentation
        assert family.type == ("counter" if family.name == "loyalty_recounts" else "gauge")
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("database")
            found[" ".join([sample.name, *labels.values()])] = sample.value
    return found


def test_metrics_tell_of_recounts_that_succeed_that_are_refused_and_that_fail(
    shop: Shop, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "loyalty.prom"
    settings = settings_for(uri, METRICS_FILE=str(file))
    service = Service(settings, lambda: settings)
    service.run_between(0, ignore_progress)  # while it waits for the database
    first = samples(file)
    counters = {name: value for name, value in first.items() if "recounts_total" in name}
    assert counters == {
        f"loyalty_recounts_total {outcome}": 0
        for outcome in ("succeeded", "incomplete", "refused", "failed")
    }
    assert first["loyalty_last_success_timestamp_seconds"] == 0
    assert first["loyalty_interval_seconds"] == 7200
    assert stat.S_IMODE(file.stat().st_mode) == 0o644

    service.connect()
    service.recount(ignore_progress)
    second = samples(file)
    assert second.keys() == first.keys()
    assert second["loyalty_recounts_total succeeded"] == 1
    assert (second["loyalty_users"], second["loyalty_changed_users"]) == (2, 2)
    newest = shop.loyalty_recounts.find_one()
    assert newest
    as_of = newest["as_of"].replace(tzinfo=UTC).timestamp()
    assert second["loyalty_as_of_timestamp_seconds"] == as_of
    assert abs(second["loyalty_last_success_timestamp_seconds"] - as_of) < 60

    shop.users.insert_many([{"_id": n, "loyalty_points": 1} for n in range(20)])
    assert service.recount(ignore_progress).status.startswith("refused")
    monkeypatch.setattr(Tally, "refusal", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        service.recount(ignore_progress)
    assert service._connection
    service._connection.client.close()
    counted = {"loyalty_recounts_total refused": 1, "loyalty_recounts_total failed": 1}
    assert samples(file) == second | counted
    assert os.listdir(tmp_path) == [file.name]  # noqa: PTH208 -- names are what is wanted


def test_counters_and_the_last_success_outlive_the_process(
    shop: Shop, command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "loyalty.prom"
    file.write_text('loyalty_recounts_total{outcome="succeeded"} 9\nnonsense\n')  # not ours
    for _ in range(2):
        assert command("--once", METRICS_FILE=str(file)) == 0
    before = samples(file)
    assert before["loyalty_recounts_total succeeded"] == 2
    assert command("--once", "--customer", "bob", METRICS_FILE=str(file)) == 0  # of no recount
    shop.create_collection("view", viewOn="users", pipeline=[])
    assert command("--once", METRICS_FILE=str(file), USERS_COLLECTION="view") == 78
    assert samples(file) == before | {"loyalty_recounts_total failed": 1}


def test_live_updates_are_in_the_metrics_while_they_are_at_work(
    deployment: Deployment, database: Shop, tmp_path: Path
) -> None:
    make_index(database)
    file = tmp_path / "loyalty.prom"
    with live(deployment, database, METRICS_FILE=str(file)) as stage:
        assert samples(file)["loyalty_live"] == 0
        stage.update()
        assert samples(file)["loyalty_live"] == 1
        assert samples(file)["loyalty_live_waiting"] == 0
        stream = stage.service._live
        assert stream
        assert stream.lag() == 0
        database.orders.insert_one({"customer_id": 1, "status": "Shipped"})
        wait_until("a mark", stream.waiting)
        wait_until("its age", lambda: stream.lag() > 0.1)
        stage.service._stop_watching()
        stage.service._metrics._write()
        assert samples(file)["loyalty_live"] == 0


def test_metrics_are_written_again_when_they_are_a_minute_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "loyalty.prom"
    metrics = Metrics(settings_for("mongodb://h", METRICS_FILE=str(file)))
    metrics.refresh_if_due()
    file.unlink()
    metrics.refresh_if_due()
    assert not file.exists()
    monkeypatch.setattr(metrics_module, "_KEEP_SECONDS", 0)
    metrics.refresh_if_due()
    assert file.exists()


def test_metrics_that_cannot_be_written_are_one_warning_and_no_failure(
    shop: Shop,
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = str(tmp_path / "nowhere" / "loyalty.prom")
    assert command("--once", METRICS_FILE=file) == 0
    assert f'WARNING no_metrics error="{file}: No such file' in capsys.readouterr().err
    assert command("--check-config", METRICS_FILE=file) == 1
    said = capsys.readouterr().out
    assert f"PROBLEM: METRICS_FILE: {file} cannot be written: No such file" in said
    monkeypatch.setattr(metrics_module, "_KEEP_SECONDS", 0)
    metrics = Metrics(settings_for("mongodb://h", METRICS_FILE=file))
    capsys.readouterr()
    for _ in range(3):
        metrics.refresh_if_due()
    assert capsys.readouterr().err.count("no_metrics") == 1


def test_the_alerts_and_the_readme_name_metrics_that_are_written(tmp_path: Path) -> None:
    file = tmp_path / "loyalty.prom"
    Metrics(settings_for("mongodb://h", METRICS_FILE=str(file))).refresh_if_due()
    exported = {sample.split()[0] for sample in samples(file)}
    name = r"\bloyalty_[a-z]+_(?:[a-z_]+_)?(?:seconds|total)\b"
    assert set(re.findall(name, ALERTS)) <= exported
    section = README.split("## For programs and monitoring")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(loyalty_\w+)", section, re.MULTILINE)) == exported
