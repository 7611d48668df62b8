"""The result of a recount: the source of its record, its log line and the commands' output."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from bson import ObjectId, Timestamp

from config import VERSION
from loyalty.logs import log
from loyalty.recount.tally import Totals
from loyalty.recount.updates import UpdateResult

Outcome = Literal["succeeded", "incomplete", "refused", "failed"]
"""The outcome of a recount. The record of an undo has "undone", and a heartbeat "live"."""


@dataclass(frozen=True, slots=True)
class CountResult:
    """How a count was made."""

    snapshots: Sequence[Timestamp] = ()
    """The cluster times that were read at, the oldest first.

    Empty without snapshots; several if the server discarded a snapshot during the count.
    """
    has_usable_indexes: bool = False
    """Whether the server can read one customer's orders and users from indexes."""
    has_mixed_case_ids: bool = False
    """Whether a hex id is neither all lower nor all upper case; checked for live updates only."""

    @property
    def cluster_time(self) -> Timestamp | None:
        """The time that everything was read at, if there is one."""
        return self.snapshots[0] if len(self.snapshots) == 1 else None

    @property
    def exact(self) -> bool:
        """Whether everything was read at one cluster time."""
        return self.cluster_time is not None


@dataclass(slots=True, kw_only=True)
class Result:
    """One recount, of all customers or of some."""

    id: ObjectId = field(default_factory=ObjectId)
    """The `_id` of its record."""
    started_at: datetime
    seconds: float = 0.0
    outcome: Outcome | None = None
    """None until the recount has ended."""
    count: CountResult = CountResult()
    totals: Totals = field(default_factory=Totals)
    refusal: str | None = None
    """Why the safety checks refuse it, also if it is forced."""
    warnings: list[str] = field(default_factory=list)
    updates: UpdateResult = field(default_factory=UpdateResult)
    error: str | None = None

    @property
    def finished_at(self) -> datetime:
        return self.started_at + timedelta(seconds=self.seconds)

    @property
    def as_of(self) -> datetime:
        """The oldest time that anything was read at; the start, without snapshots."""
        snapshots = self.count.snapshots
        return snapshots[0].as_datetime() if snapshots else self.started_at

    @property
    def written(self) -> int:
        """Users whose points were updated."""
        return self.updates.written

    @property
    def failed_updates(self) -> int:
        return self.updates.failed


def build_record(result: Result) -> dict[str, Any]:
    """Return what is recorded of a recount; the commands print the same as JSON."""
    return {
        "_id": result.id,
        "started_at": result.started_at,
        "finished_at": result.finished_at,
        "seconds": result.seconds,
        "as_of": result.as_of,
        "cluster_time": result.count.cluster_time,
        "exact": result.count.exact,
        "outcome": result.outcome,
        **_build_numbers(result),
        "error": result.error,
        "version": VERSION,
    }


def _build_numbers(result: Result) -> dict[str, int]:
    totals = result.totals
    return {
        "counted_orders": totals.counted_orders,
        "changed": result.written,  # without failed updates, which totals.changed includes
        "increased": totals.increased,
        "decreased": totals.decreased,
        "unknown_customers": totals.unknown_customers,
        "orders_of_unknown_customers": totals.orders_of_unknown_customers,
        "orders_without_customer": totals.orders_without_customer,
        "failed_updates": result.failed_updates,
    }


def log_result(result: Result) -> None:
    """Log one line about a full recount."""
    fields: dict[str, object] = {
        "outcome": result.outcome,
        "users": result.totals.users,
        **_build_numbers(result),
        "as_of": f"{result.as_of:%Y-%m-%dT%H:%M:%SZ}",
        "exact": result.count.exact,
        "seconds": round(result.seconds, 1),
    }
    texts = {**fields, "exact": str(result.count.exact).lower()}
    line = " ".join(f"{name}={text}" for name, text in texts.items())
    log.info("recount %s", line, extra={"fields": fields})
    for kind, unknown in result.totals.unknown_by_kind.items():
        largest = ", ".join(text for _, text in sorted(unknown.largest, reverse=True))
        # At DEBUG only: an id may be an e-mail address.
        log.debug('unknown_customers kind="%s" largest="%s"', kind, largest)
