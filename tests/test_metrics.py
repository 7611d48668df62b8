"""METRICS_FILE: read with Prometheus' own parser, beside what is stored."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Command, settings_for
from live_harness import live_service, make_index
from prometheus_client.parser import text_string_to_metric_families
from pymongo.database import Database

from loyalty.concurrency import ignore_progress
from loyalty.heartbeat import Heartbeat
from loyalty.metrics import Metrics
from loyalty.service import Service
from loyalty.state import ServiceState
from sandbox.mongod import Deployment, wait_until

ALERTS = (ROOT / "deploy/alerts.yml").read_text()
Shop = Database[Any]


@pytest.fixture
def shop(database: Shop) -> Shop:
    """Ada has 2 shipped orders and no points yet, Bob 3 points and no order.

    One order is of an unknown customer, two have no customer.
    """
    database.users.insert_many([{"_id": "ada"}, {"_id": "bob", "loyalty_points": 3}])
    orders = [("ada", "Shipped"), ("ada", "Shipped"), ("unknown", "Shipped"), ("ada", "Pending")]
    orders += [("", "Shipped"), ("", "Shipped")]
    database.orders.insert_many([{"customer_id": c, "status": s} for c, s in orders])
    return database


def samples(file: Path, **labels: str) -> dict[str, float]:
    """Return the samples with these labels: their values by name and outcome."""
    found = {}
    for family in text_string_to_metric_families(file.read_text()):
        assert family.documentation
        assert family.type == ("counter" if family.name == "loyalty_recounts" else "gauge")
        for sample in family.samples:
            given = dict(sample.labels)
            outcome = given.pop("outcome", "")
            assert given.keys() == {"database", "users", "orders", "field"}
            assert labels.items() <= given.items()
            found[f"{sample.name} {outcome}".strip()] = sample.value
    return found


def test_metrics_count_recounts_by_outcome_and_keep_the_last_success(
    shop: Shop, uri: str, tmp_path: Path
) -> None:
    file = tmp_path / "loyalty.prom"
    settings = settings_for(uri, METRICS_FILE=str(file))
    service = Service(settings, lambda: settings)
    service.run_between(0, ignore_progress)  # as while it waits for the database
    first = samples(file, database=shop.name, users="users", orders="orders")
    counters = {name: value for name, value in first.items() if "recounts_total" in name}
    assert set(counters.values()) == {0}
    assert {name.split()[1] for name in counters} >= {
        "succeeded",
        "incomplete",
        "refused",
        "failed",
    }
    assert first["loyalty_last_success_timestamp_seconds"] == 0
    assert first["loyalty_interval_seconds"] == 7200
    assert stat.S_IMODE(file.stat().st_mode) == 0o644

    service.recount(ignore_progress)
    second = samples(file)
    assert second.keys() == first.keys()
    assert second["loyalty_recounts_total succeeded"] == 1
    assert (second["loyalty_users"], second["loyalty_changed_users"]) == (2, 2)
    assert second["loyalty_orders_of_unknown_customers"] == 1
    assert second["loyalty_orders_without_customer"] == 2
    newest = shop.loyalty_recounts.find_one()
    assert newest
    as_of = newest["as_of"].replace(tzinfo=UTC).timestamp()
    assert second["loyalty_as_of_timestamp_seconds"] == as_of
    assert abs(second["loyalty_last_success_timestamp_seconds"] - as_of) < 60

    shop.users.insert_many([{"_id": n, "loyalty_points": 1} for n in range(20)])
    assert service.recount(ignore_progress).status.startswith("refused")
    with pytest.raises(ZeroDivisionError), service.metrics.count_failures():
        raise ZeroDivisionError
    service.disconnect()
    counted = {"loyalty_recounts_total refused": 1, "loyalty_recounts_total failed": 1}
    assert samples(file) == second | counted
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


def test_failed_updates_are_not_counted_as_changed_users(
    shop: Shop, command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "loyalty.prom"
    shop.users.insert_many({"_id": n} for n in range(1_000))
    shop.command("collMod", "users", validator={"loyalty_points": {"$ne": 2}})
    assert command("--once", METRICS_FILE=str(file)) == 1
    values = samples(file)
    assert values["loyalty_failed_updates"] == 1
    assert values["loyalty_changed_users"] == 1_001


@pytest.mark.parametrize(
    "setting", ["USERS_COLLECTION", "ORDERS_COLLECTION", "USER_POINTS_FIELD", "MONGODB_DATABASE"]
)
def test_the_series_of_two_shops_differ_in_a_label(tmp_path: Path, setting: str) -> None:
    series: list[set[str]] = []
    for value in ("one", 'two \\ with "quotes"' if setting == "USER_POINTS_FIELD" else "two"):
        file = tmp_path / f"{len(series)}.prom"
        Metrics(settings_for("mongodb://h", METRICS_FILE=str(file), **{setting: value})).write()
        assert samples(file)
        series.append({*re.findall(r"^loyalty_users\{.*\}", file.read_text(), re.MULTILINE)})
    assert not series[0] & series[1]


def test_no_increment_is_lost_when_threads_write_concurrently(tmp_path: Path) -> None:
    file = tmp_path / "loyalty.prom"
    metrics = Metrics(settings_for("mongodb://h", METRICS_FILE=str(file)))

    def write() -> None:
        for _ in range(50):
            with suppress(ValueError), metrics.count_failures():
                raise ValueError

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert samples(file)["loyalty_recounts_total failed"] == 200


def test_no_increment_is_lost_when_processes_write_at_once(tmp_path: Path) -> None:
    file = tmp_path / "loyalty.prom"
    program = f"""
from contextlib import suppress
from config import load
from loyalty.metrics import Metrics
metrics = Metrics(load({{"MONGODB_URI": "mongodb://h", "METRICS_FILE": {str(file)!r}}}))
for _ in range(50):
    with suppress(ValueError), metrics.count_failures():
        raise ValueError
"""
    writers = [subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert samples(file)["loyalty_recounts_total failed"] == 150


def test_a_temporary_file_that_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "loyalty.prom"
    (tmp_path / "loyalty.prom.tmp").write_text("half of ")
    Metrics(settings_for("mongodb://h", METRICS_FILE=str(file))).write()
    assert samples(file)
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


def test_counters_and_the_last_success_survive_the_process(
    shop: Shop, command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "loyalty.prom"
    file.write_text('loyalty_recounts_total{outcome="succeeded"} 9\nnonsense\n')  # not ours
    for _ in range(2):
        assert command("--once", METRICS_FILE=str(file)) == 0
    before = samples(file)
    assert before["loyalty_recounts_total succeeded"] == 2
    assert command("--once", "--customer", "bob", METRICS_FILE=str(file)) == 0  # not a recount
    shop.client.admin.command("ping")
    assert samples(file) == before


def test_live_updates_are_in_the_metrics_while_they_are_running(
    deployment: Deployment, database: Shop, tmp_path: Path
) -> None:
    database.users.insert_one({"_id": 1})
    make_index(database)
    file = tmp_path / "loyalty.prom"
    with live_service(deployment, database, METRICS_FILE=str(file)) as harness:
        harness.update()
        state = harness.service.state
        assert samples(file)["loyalty_live"] == 1
        assert samples(file)["loyalty_live_waiting"] == 0
        assert state.live_lag_seconds == 0

        def read_newer_time() -> float | None:
            database.other.insert_one({})  # an idle server advances its time every 10 s
            harness.update(0.2)
            assert state.live
            assert state.result
            return state.live.as_of.timestamp() if state.live.as_of > state.result.as_of else None

        as_of = wait_until("a time after the recount", read_newer_time)
        harness.service.metrics.write()
        assert samples(file)["loyalty_live_as_of_timestamp_seconds"] == as_of
        assert samples(file)["loyalty_as_of_timestamp_seconds"] == as_of
        harness.service.disconnect()
        assert state.live is None
        harness.service.metrics.write()
        assert samples(file)["loyalty_live"] == 0
        assert samples(file)["loyalty_live_as_of_timestamp_seconds"] == 0
        assert samples(file)["loyalty_as_of_timestamp_seconds"] == as_of


def test_once_does_not_change_the_metrics_of_live_updates(tmp_path: Path) -> None:
    file = tmp_path / "loyalty.prom"
    settings = settings_for("mongodb://x/", METRICS_FILE=str(file))
    now = datetime.now(UTC)
    live = Heartbeat(
        live_since=now, as_of=now, last_event=None, last_update=None, users_updated=1, waiting=3
    )
    Metrics(settings, ServiceState(live=live, live_lag_seconds=2)).write()
    before = samples(file)
    assert before["loyalty_live_waiting"] == 3
    Metrics(settings).write()
    assert samples(file) == before


def test_the_file_is_written_again_when_it_is_a_minute_old(tmp_path: Path) -> None:
    file = tmp_path / "loyalty.prom"
    settings = settings_for("mongodb://h", METRICS_FILE=str(file))
    metrics = Metrics(settings)
    metrics.refresh_if_due()
    file.unlink()
    metrics.refresh_if_due()
    assert not file.exists()
    metrics = Metrics(settings, ServiceState(), refresh_seconds=0)
    for _ in range(2):
        metrics.refresh_if_due()
        file.unlink()


def test_a_file_that_cannot_be_written_causes_one_warning_and_no_failure(
    shop: Shop, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "missing" / "loyalty.prom")
    assert command("--once", METRICS_FILE=file) == 0
    warning = f'metrics_write_failed error="{file}: No such file'
    assert f"WARNING {warning}" in capsys.readouterr().err
    assert command("--check-config", METRICS_FILE=file) == 1
    output = capsys.readouterr().out
    assert f"METRICS_FILE: {file} cannot be written: No such file" in output


def test_a_metrics_file_that_is_a_directory_is_a_problem(tmp_path: Path) -> None:
    """Docker creates a directory if the file of a volume does not exist."""
    file = tmp_path / "loyalty.prom"
    metrics = Metrics(settings_for("mongodb://h", METRICS_FILE=str(file)))
    assert metrics.find_problem() is None
    file.mkdir()
    assert metrics.find_problem() == f"METRICS_FILE: {file} is a directory"


def test_a_repeated_write_failure_warns_again_after_a_success(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "later"
    file = str(folder / "loyalty.prom")
    warning = "metrics_write_failed"
    metrics = Metrics(settings_for("mongodb://h", METRICS_FILE=file), refresh_seconds=0)
    for _ in range(3):
        metrics.refresh_if_due()
    assert caplog.text.count(warning) == 1
    folder.mkdir()
    metrics.refresh_if_due()
    Path(file).unlink()
    folder.rmdir()
    metrics.refresh_if_due()
    assert caplog.text.count(warning) == 2


def test_the_alerts_name_metrics_that_are_written_and_the_documents_list_all(
    tmp_path: Path,
) -> None:
    file = tmp_path / "loyalty.prom"
    Metrics(settings_for("mongodb://h", METRICS_FILE=str(file))).write()
    exported = {sample.split()[0] for sample in samples(file)}
    name = r"\bloyalty_[a-z]+_(?:[a-z_]+_)?(?:seconds|total)\b"
    assert set(re.findall(name, ALERTS)) <= exported
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    rows = "\n".join(page.read_text() for page in pages)
    assert exported <= set(re.findall(r"^\| `(loyalty_\w+)", rows, re.MULTILINE))
