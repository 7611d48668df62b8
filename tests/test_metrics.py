"""METRICS_FILE: what is in it, and when it is written."""

from __future__ import annotations

import os
import re
import stat
from datetime import UTC
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from conftest import ROOT, Command, settings_for
from live_stage import live, make_index
from prometheus_client.parser import text_string_to_metric_families
from pymongo.database import Database

from loyalty import metrics as metrics_module
from loyalty.concurrency import ignore_progress
from loyalty.metrics import Metrics
from loyalty.recount.tally import Tally
from loyalty.service import Service
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
    assert service.recount(ignore_progress).startswith("refused")
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
