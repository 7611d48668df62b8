"""METRICS_FILE: how recounts go, for node_exporter's textfile collector."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import get_args

from config import Settings
from loyalty.errors import RecountRefused
from loyalty.recount.tally import Outcome, Result

log = logging.getLogger("loyalty")

_KEEP_SECONDS = 60.0  # between two writes; after 300 the alert takes the service for dead

_METRICS = {
    "loyalty_recounts_total": "Recounts by outcome",
    "loyalty_last_success_timestamp_seconds": "When a recount last succeeded; 0: none has yet",
    "loyalty_as_of_timestamp_seconds": "The point in time that the points are of",
    "loyalty_recount_duration_seconds": "How long the last successful recount took",
    "loyalty_interval_seconds": "RECOUNT_INTERVAL",
    "loyalty_users": "Users in the last successful recount",
    "loyalty_changed_users": "Users whose points it had to change",
    "loyalty_failed_updates": "Users that the server refused to update in it",
    "loyalty_live": "Whether live updates are at work",
    "loyalty_live_waiting": "Changed orders and customers still to be counted",
    "loyalty_live_lag_seconds": "How long the oldest of them has been waiting",
}

_LIVE = ("loyalty_live", "loyalty_live_waiting", "loyalty_live_lag_seconds")


class Metrics:
    """The METRICS_FILE, whole at any time; without one, nothing happens.

    The file itself is what is remembered: so counters and the last success outlive a restart, and
    runs of `--once` add up.
    """

    def __init__(self, settings: Settings) -> None:
        self._file = Path(settings.metrics_file) if settings.metrics_file else None
        self._database = settings.database  # tells several shops on one machine apart
        self._gauges: dict[str, float] = {
            "loyalty_interval_seconds": settings.recount_interval.total_seconds()
        }
        self.not_live()
        self._written_at = -inf
        self._warned = False

    def refresh_if_due(self) -> None:
        """Write it if that is long ago, to show that the service is there."""
        if time.monotonic() - self._written_at >= _KEEP_SECONDS:
            self._write()

    def live(self, waiting: int, lag: float) -> None:
        """Write how live updates are doing."""
        self._gauges |= dict(zip(_LIVE, (1, waiting, lag), strict=True))
        self._write()

    def not_live(self) -> None:
        self._gauges |= dict.fromkeys(_LIVE, 0)

    @contextmanager
    def count_failures(self) -> Iterator[None]:
        """Count a recount that raises; `recounted` counts the others."""
        try:
            yield
        except Exception as error:
            self._write("refused" if isinstance(error, RecountRefused) else "failed")
            raise

    def record_recount(self, result: Result) -> None:
        self._write(
            result.outcome,
            loyalty_last_success_timestamp_seconds=result.finished_at.timestamp(),
            loyalty_as_of_timestamp_seconds=result.as_of.timestamp(),
            loyalty_recount_duration_seconds=result.seconds,
            loyalty_users=result.totals.users,
            loyalty_changed_users=result.totals.changed,
            loyalty_failed_updates=result.failed_updates,
        )

    def check(self) -> str | None:
        """Return why the file cannot be written, if so."""
        try:
            if self._file is not None:
                tempfile.TemporaryFile(dir=self._file.parent).close()
        except OSError as error:
            return f"METRICS_FILE: {self._file} cannot be written: {error.strerror}"
        return None

    def _write(self, outcome: str = "", **updates: float) -> None:
        """Write it anew. Failing to is a warning, and only the first time."""
        if self._file is None:
            return
        self._written_at = time.monotonic()
        try:
            values = self._load()
            values |= {
                self._sample(name): value for name, value in {**self._gauges, **updates}.items()
            }
            if outcome:
                values[self._sample("loyalty_recounts_total", outcome)] += 1
            _replace(self._file, _text(values))
        except OSError as error:
            if not self._warned:
                log.warning('no_metrics error="%s: %s"', self._file, error.strerror)
            self._warned = True
        else:
            self._warned = False

    def _sample(self, name: str, outcome: str = "") -> str:
        # A name of a database has nothing in it that would have to be escaped.
        labels = f'database="{self._database}"' + (f',outcome="{outcome}"' if outcome else "")
        return f"{name}{{{labels}}}"

    def _load(self) -> dict[str, float]:
        """Return all samples as they stand in the file, else 0."""
        counters, *gauges = _METRICS
        samples = [self._sample(counters, outcome) for outcome in get_args(Outcome)]
        values = dict.fromkeys([*samples, *map(self._sample, gauges)], 0.0)
        with suppress(OSError, ValueError):  # there is none yet, or it is somebody else's
            assert self._file is not None
            for line in self._file.read_text(encoding="utf-8").splitlines():
                sample, _, value = line.rpartition(" ")
                if sample in values:
                    values[sample] = float(value)
        return values


def _text(values: Mapping[str, float]) -> str:
    lines = []
    for name, text in _METRICS.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f"{s} {value:.15g}" for s, value in values.items() if s.startswith(f"{name}{{")]
    return "\n".join(lines) + "\n"


def _replace(path: Path, text: str) -> None:
    """Write a file whole: whoever reads it sees the one before, or this one."""
    # node_exporter takes no file that ends like this one's name.
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f"{path.name}.", delete=False, encoding="utf-8"
    ) as file:
        new = Path(file.name)
        try:
            file.write(text)
            file.flush()
            new.chmod(0o644)  # it is for another user to read
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
