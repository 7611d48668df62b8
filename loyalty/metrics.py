"""METRICS_FILE: the metrics of recounts, for node_exporter's textfile collector."""

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import get_args

from config import Settings
from loyalty.errors import RecountRefused, TooManyFailedUpdates
from loyalty.logs import WarnOnce
from loyalty.recount.result import Outcome, Result
from loyalty.state import ServiceState

_RECOUNTS = "loyalty_recounts_total"
_LAST = "the last recount that succeeded or was incomplete"
_METRICS = {
    _RECOUNTS: "Recounts by outcome",
    "loyalty_last_success_timestamp_seconds": f"Time of {_LAST}; 0 if there is none in this file",
    "loyalty_as_of_timestamp_seconds": "The points include all changes before this time",
    "loyalty_recount_duration_seconds": f"Duration of {_LAST}",
    "loyalty_interval_seconds": "RECOUNT_INTERVAL",
    "loyalty_users": f"Users in {_LAST}",
    "loyalty_changed_users": f"Users that were written by {_LAST}",
    "loyalty_failed_updates": "Failed updates in the last recount that wrote points",
    "loyalty_orders_of_unknown_customers": "Counted orders of unknown customers",
    "loyalty_orders_without_customer": "Counted orders without a customer id",
    "loyalty_live": "1 while live updates are running, otherwise 0",
    "loyalty_live_as_of_timestamp_seconds": (
        "The points include all changes before this time; 0 while live updates are not running"
    ),
    "loyalty_live_waiting": "Pending changes: orders and customers to be counted",
    "loyalty_live_lag_seconds": "Age of the oldest pending change",
}
"""The descriptions. A metric whose name ends in "_total" is a counter, any other a gauge."""


class Metrics:
    """Writes METRICS_FILE; without the setting, nothing happens.

    Each write begins with the values in the file, so counters and the last success continue after a
    restart and between runs of `--once`. Without `state`, the metrics of live updates stay as they
    are. Safe for several threads and processes.
    """

    def __init__(
        self,
        settings: Settings,
        state: ServiceState | None = None,
        *,
        refresh_seconds: float = 60.0,
    ) -> None:
        self._file = Path(settings.metrics_file) if settings.metrics_file else None
        labels = {
            "database": settings.database,
            "users": settings.users,
            "orders": settings.orders,
            "field": settings.points_field,
        }
        self._labels = ",".join(f'{name}="{_escape(text)}"' for name, text in labels.items())
        self._interval_seconds = settings.recount_interval.total_seconds()
        self._state = state
        self._refresh_seconds = refresh_seconds
        self._written_at = -inf
        self._warn_once = WarnOnce()

    def refresh_if_due(self) -> None:
        """Write the file if the last write was `refresh_seconds` ago.

        An alert reports that the service is down when the file is five minutes old.
        """
        if time.monotonic() - self._written_at >= self._refresh_seconds:
            self.write()

    @contextmanager
    def count_failures(self) -> Iterator[None]:
        """Count a recount that raises; `record_recount` counts the others."""
        try:
            yield
        except Exception as error:
            values = {}
            if isinstance(error, TooManyFailedUpdates):
                values["loyalty_failed_updates"] = error.failed_updates
            self.write(values, "refused" if isinstance(error, RecountRefused) else "failed")
            raise

    def record_recount(self, result: Result) -> None:
        """Write the result of a recount that did not raise."""
        totals = result.totals
        values = {
            "loyalty_failed_updates": result.failed_updates,
            "loyalty_last_success_timestamp_seconds": result.finished_at.timestamp(),
            "loyalty_as_of_timestamp_seconds": result.as_of.timestamp(),
            "loyalty_recount_duration_seconds": result.seconds,
            "loyalty_users": totals.users,
            "loyalty_changed_users": result.written,
            "loyalty_orders_of_unknown_customers": totals.orders_of_unknown_customers,
            "loyalty_orders_without_customer": totals.orders_without_customer,
        }
        self.write(values, result.outcome)

    def find_problem(self) -> str | None:
        """Return why the file cannot be written, or None."""
        try:
            if self._file is not None:
                with _lock(self._file.parent), tempfile.TemporaryFile(dir=self._file.parent):
                    if self._file.is_dir():
                        return f"METRICS_FILE: {self._file} is a directory"
        except OSError as error:
            return f"METRICS_FILE: {self._file} cannot be written: {error.strerror}"
        return None

    def write(
        self, values: Mapping[str, float] | None = None, outcome: Outcome | None = None
    ) -> None:
        """Write all metrics, with new `values` of gauges, and count a recount with this outcome.

        A failure causes one warning.
        """
        if self._file is None:
            return
        self._written_at = time.monotonic()
        try:
            with _lock(self._file.parent):
                samples = self._load(self._file)
                for name, value in {**self._read_state(), **(values or {})}.items():
                    samples[self._format_series(name)] = value
                as_of = self._format_series("loyalty_as_of_timestamp_seconds")
                live_as_of = self._format_series("loyalty_live_as_of_timestamp_seconds")
                samples[as_of] = max(samples[as_of], samples[live_as_of])
                if outcome is not None:
                    samples[self._format_series(_RECOUNTS, outcome)] += 1
                _replace(self._file, _format(samples))
        except OSError as error:
            self._warn_once("metrics_write_failed", f"{self._file}: {error.strerror}")
        else:
            self._warn_once.reset("metrics_write_failed")

    def _read_state(self) -> dict[str, float]:
        interval = {"loyalty_interval_seconds": self._interval_seconds}
        if self._state is None:  # `--once`: another process may do live updates
            return interval
        live = self._state.live
        return {
            **interval,
            "loyalty_live": int(live is not None),
            "loyalty_live_as_of_timestamp_seconds": live.as_of.timestamp() if live else 0,
            "loyalty_live_waiting": live.waiting if live else 0,
            "loyalty_live_lag_seconds": self._state.live_lag_seconds,
        }

    def _format_series(self, name: str, outcome: str | None = None) -> str:
        labels = self._labels + (f',outcome="{outcome}"' if outcome else "")
        return f"{name}{{{labels}}}"

    def _load(self, file: Path) -> dict[str, float]:
        """Return the value of each series in the file; 0 for a series that is not in it."""
        all_series = [self._format_series(_RECOUNTS, outcome) for outcome in get_args(Outcome)]
        all_series += [self._format_series(name) for name in _METRICS if name != _RECOUNTS]
        samples = dict.fromkeys(all_series, 0.0)
        with suppress(OSError, ValueError):  # no file yet, or not one of ours
            for line in file.read_text(encoding="utf-8").splitlines():
                series, _, value = line.rpartition(" ")
                if series in samples:
                    samples[series] = float(value)
        return samples


def _escape(text: str) -> str:
    """Escape a label's value, see Prometheus' exposition formats."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _format(samples: Mapping[str, float]) -> str:
    lines = []
    for name, description in _METRICS.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP {name} {description}", f"# TYPE {name} {kind}"]
        lines += [f"{s} {value:.15g}" for s, value in samples.items() if s.startswith(f"{name}{{")]
    return "\n".join(lines) + "\n"


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Let only one thread at a time, in any process, write to a directory."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    """Replace a file as a whole, so that no reader sees an incomplete file."""
    # node_exporter ignores the name, as it does not end in .prom. It is always the same, so
    # that a killed process leaves only one file, which the next write replaces.
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.chmod(0o644)  # node_exporter runs as another user
    temporary.replace(path)
