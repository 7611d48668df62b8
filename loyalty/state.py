"""The state that the service reports: to systemd, in the heartbeat and in the metrics."""

from dataclasses import dataclass

from loyalty.heartbeat import Heartbeat
from loyalty.recount.result import Result


@dataclass
class ServiceState:
    """The last full recount, and the progress of live updates."""

    result: Result | None = None
    live: Heartbeat | None = None
    """None while live updates are off or paused: then the points are those of `result`."""
    live_lag_seconds: float = 0.0

    @property
    def status(self) -> str:
        """One line for systemd."""
        if self.live is not None:
            as_of = f"{self.live.as_of:%Y-%m-%d %H:%M:%S} UTC"
            updated, pending = self.live.users_updated, self.live.waiting
            return f"live, as of {as_of}, {updated:,} users updated, {pending:,} pending changes"
        if self.result is None:
            return "no recount yet"
        changed = f"{self.result.written:,} changed"
        if self.result.failed_updates:
            changed += f", {self.result.failed_updates:,} failed updates"
        return f"recounted as of {self.result.as_of:%Y-%m-%d %H:%M:%S} UTC, {changed}"
