"""The Grafana dashboard for the service's metrics. `make dashboard` writes it as JSON.

Grafana 10.1 or newer. Change this file, not the JSON.
"""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

FILE = Path(__file__).with_name("grafana-dashboard.json")
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
SHOP = '{database=~"$database"}'
TARGET = "{{database}}.{{users}}.{{field}}"  # the labels of a legend
SECONDS = "s"
NUMBER = "short"
PANELS_PER_ROW = 2

# Each panel: title, unit, and its queries by legend.
PANELS: list[tuple[str, str, dict[str, str]]] = [
    (
        "Time since the last successful recount",
        SECONDS,
        {
            TARGET: f"time() - loyalty_last_success_timestamp_seconds{SHOP}",
            f"{TARGET} stale": f"2 * loyalty_interval_seconds{SHOP}",
        },
    ),
    (
        "Age of the points",
        SECONDS,
        {
            TARGET: f"time() - loyalty_as_of_timestamp_seconds{SHOP}",
            # 0 without live updates.
            f"{TARGET} live updates": f"time() - (loyalty_live_as_of_timestamp_seconds{SHOP} > 0)",
        },
    ),
    (
        "Recounts in the last day, by outcome",
        NUMBER,
        # increase() extrapolates to numbers that are not whole.
        {f"{TARGET} {{{{outcome}}}}": f"round(increase(loyalty_recounts_total{SHOP}[1d]))"},
    ),
    ("Duration of the last recount", SECONDS, {TARGET: f"loyalty_recount_duration_seconds{SHOP}"}),
    (
        "Users",
        NUMBER,
        {
            f"{TARGET} all": f"loyalty_users{SHOP}",
            f"{TARGET} changed by the last recount": f"loyalty_changed_users{SHOP}",
        },
    ),
    ("Failed updates", NUMBER, {TARGET: f"loyalty_failed_updates{SHOP}"}),
    (
        "Counted orders that earn nothing",
        NUMBER,
        {
            f"{TARGET} unknown customer": f"loyalty_orders_of_unknown_customers{SHOP}",
            f"{TARGET} no customer": f"loyalty_orders_without_customer{SHOP}",
        },
    ),
    ("Live updates are running", NUMBER, {TARGET: f"loyalty_live{SHOP}"}),
    ("Pending changes", NUMBER, {TARGET: f"loyalty_live_waiting{SHOP}"}),
    ("Age of the oldest pending change", SECONDS, {TARGET: f"loyalty_live_lag_seconds{SHOP}"}),
]


def build() -> str:
    """Return the dashboard as JSON."""
    shops = dashboard.QueryVariable("database").datasource(SOURCE)
    shops = shops.query("label_values(loyalty_users, database)").multi(True).include_all(True)
    board = (
        dashboard.Dashboard("Loyalty Microservice")
        .uid("loyalty-microservice")
        .tags(["loyalty"])
        .time("now-7d", "now")
        .refresh("1m")
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(shops.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED))
    )
    for title, unit, queries in PANELS:
        board = board.with_panel(_build_panel(title, unit, queries))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def _build_panel(title: str, unit: str, queries: dict[str, str]) -> timeseries.Panel:
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST)
    panel = timeseries.Panel().title(title).unit(unit).min(0).datasource(SOURCE)
    panel = panel.span(24 // PANELS_PER_ROW).height(7)
    panel = panel.legend(legend.placement(LegendPlacement.BOTTOM).show_legend(True))
    for number, (name, query) in enumerate(queries.items()):
        target = prometheus.Dataquery().expr(query).legend_format(name)
        panel = panel.with_target(target.ref_id("AB"[number]))
    return panel


if __name__ == "__main__":
    FILE.write_text(build(), encoding="utf-8")
