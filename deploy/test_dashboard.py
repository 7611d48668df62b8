"""The queries of the Grafana dashboard, run by a real Prometheus over the service's metrics.

Part of `make test-container`.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deploy.grafana_dashboard import FILE
from sandbox.mongod import Deployment, bind_to_parent, find_free_port, wait_until
from sandbox.service import Process

CONFIG = """
scrape_configs:
  - job_name: node
    scrape_interval: 1s
    metrics_path: /loyalty.prom
    static_configs:
      - targets: ["127.0.0.1:{port}"]
"""
DASHBOARD = json.loads(FILE.read_text(encoding="utf-8"))
QUERIES = [
    (panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]
]


class _Handler(SimpleHTTPRequestHandler):
    """Serves the metrics file with the type that node_exporter sends."""

    def guess_type(self, path: object) -> str:
        return "text/plain; version=0.0.4"

    def log_message(self, *_: object) -> None:
        """Log nothing: the output of the tests is enough."""


class Prometheus:
    """A Prometheus server that collects from the service, until the process is killed."""

    def __init__(self, folder: Path, metrics_port: int) -> None:
        program = shutil.which("prometheus")
        assert program, "prometheus is missing: apt-get install prometheus"
        config = folder / "prometheus.yml"
        config.write_text(CONFIG.format(port=metrics_port), encoding="utf-8")
        address = f"127.0.0.1:{find_free_port()}"
        command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
        command += [f"--web.listen-address={address}", "--log.level=error"]
        self._url = f"http://{address}/api/v1/"
        self.process = subprocess.Popen(bind_to_parent(command, signal.SIGKILL))

    def get(self, path: str, **parameters: str) -> Any:
        url = f"{self._url}{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> list[float]:
        """Return the current value of each series."""
        result = self.get("query", query=expression)["result"]
        return [float(series["value"][1]) for series in result]

    def has_scraped_twice(self) -> bool:
        """Whether increase() has the two samples that it needs."""
        try:
            return self.query("count_over_time(loyalty_users[1h]) >= 2") != []
        except OSError:  # it is not listening yet
            return False


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    metrics = folder / "metrics" / "loyalty.prom"
    metrics.parent.mkdir()
    handler = partial(_Handler, directory=str(metrics.parent))
    with (
        Deployment() as deployment,
        deployment.client() as client,
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
    ):
        client["oms_db"].users.insert_many([{} for _ in range(100)])
        client["oms_db"].orders.insert_one({"customer_id": None, "status": "Shipped"})
        with Process(
            log=folder / "log",
            MONGODB_URI=deployment.uri,
            LIVE_UPDATES="yes",
            METRICS_FILE=str(metrics),
        ) as service:
            service.wait_for("live_updates_started")
            wait_until("the metrics", metrics.exists)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            started = Prometheus(folder, server.server_port)
            try:
                wait_until("two scrapes", started.has_scraped_twice)
                yield started
            finally:
                started.process.kill()
                started.process.wait()
                server.shutdown()


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_each_query_of_the_dashboard_returns_a_series(
    prometheus: Prometheus, title: str, query: str
) -> None:
    assert prometheus.query(query.replace("$database", "oms_db"))


@pytest.mark.parametrize(
    ("title", "number"),
    [("Users", 100), ("Counted orders that earn nothing", 1), ("Failed updates", 0)],
)
def test_a_panel_shows_the_number_of_the_last_recount(
    prometheus: Prometheus, title: str, number: int
) -> None:
    queries = [query.replace("$database", ".*") for name, query in QUERIES if name == title]
    assert number in [value for query in queries for value in prometheus.query(query)]


def test_the_dashboard_shows_every_metric(prometheus: Prometheus) -> None:
    names = prometheus.get("label/__name__/values", **{"match[]": '{__name__=~"loyalty_.*"}'})
    queries = " ".join(query for _, query in QUERIES)
    assert [name for name in names if f"{name}{{" not in queries] == []


def test_the_dashboard_offers_the_databases_of_the_metrics(prometheus: Prometheus) -> None:
    (variable,) = [one for one in DASHBOARD["templating"]["list"] if one["name"] == "database"]
    assert variable["query"] == "label_values(loyalty_users, database)"
    assert prometheus.get("label/database/values", **{"match[]": "loyalty_users"}) == ["oms_db"]
