"""The heartbeat of live updates."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

HEARTBEAT_INTERVAL = timedelta(seconds=10)
MAX_LIVE_AGE = timedelta(seconds=30)
"""The maximum age of points while live updates are running. An idle server reports its time every
10 s, the heartbeat is written every 10 s, and the rest is for a busy machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """The progress of live updates; times are UTC."""

    live_since: datetime
    as_of: datetime
    """The points include all changes before this cluster time."""
    last_event: datetime | None
    last_update: datetime | None
    users_updated: int
    waiting: int
    """Pending changes: orders and customers that are not counted yet."""
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    """When it was written; in the database by the server's clock."""

    def is_alive(self, now: datetime) -> bool:
        return now - self.at <= 3 * HEARTBEAT_INTERVAL
