"""What came of one recount: for the record, the log, people and programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from bson import ObjectId, Timestamp

from loyalty.recount import Totals
from loyalty.writer import Refusing

Outcome = Literal["succeeded", "incomplete", "refused", "failed"]

COUNTS = (
    "counted_orders",
    "changed",
    "increased",
    "decreased",
    "unknown_customers",
    "orders_of_unknown_customers",
    "orders_without_customer",
)
"""The totals that go into a record."""


@dataclass(slots=True)
class Result:
    """One recount, as far as it came."""

    started_at: datetime
    as_of: datetime
    seconds: float = 0.0
    cluster_time: Timestamp | None = None
    """What everything was read at, if `exact`."""
    first_time: Timestamp | None = None
    """The oldest time that anything was read at."""
    exact: bool = False
    odd_forms: dict[ObjectId, set[str]] | None = field(default_factory=dict)
    """The ids in capitals or mixed case, by customer; None if they are not known."""
    finds_customers: bool = False
    """Whether an index leads to the orders of one customer."""
    outcome: Outcome = "succeeded"
    totals: Totals = field(default_factory=Totals)
    refusing: Refusing = field(default_factory=Refusing)
    refusal: str | None = None
    """Why the guard would not let it through."""
    warning: str | None = None
    """What a person should know of it though it is let through."""
    error: str | None = None

    @property
    def finished_at(self) -> datetime:
        return self.started_at + timedelta(seconds=self.seconds)
