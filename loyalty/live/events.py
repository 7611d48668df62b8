"""What the change stream tells: which events may change a count, and the customers they mark."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import bson
from bson import ObjectId, Regex, Timestamp

from config import Settings
from loyalty.recount.customer_ids import Document, canonicalize, indexable_variants, is_hex_id

INVALIDATING_EVENTS = ["drop", "rename", "dropDatabase", "invalidate"]
"""What happens to the collection as a whole; after it, a stream tells nothing more."""


def change_stream_pipeline(settings: Settings) -> list[Document]:
    """Return the stages that let through what may change a count, and of that only the ids."""
    fields = [settings.status_field, settings.customer_field]
    changed = {
        "$concatArrays": [
            {"$map": {"input": _pairs("updatedFields"), "in": "$$this.k"}},
            {"$ifNull": ["$updateDescription.removedFields", []]},
        ]
    }
    # A change of `a.b` concerns the fields `a` and `a.b.c`, too.
    concerns = [
        {"$eq": [{"$indexOfBytes": [{"$concat": [one, "."]}, {"$concat": [other, "."]}]}, 0]}
        for name in fields
        for one, other in (("$$this", name), (name, "$$this"))
    ]
    is_ours = {"$anyElementTrue": [{"$map": {"input": changed, "in": {"$or": concerns}}}]}
    shipped = {f"fullDocument.{settings.status_field}": {"$in": list(settings.order_statuses)}}
    customer = settings.customer_field
    return [
        {
            "$match": {
                "$or": [
                    {"operationType": {"$in": ["delete", "replace", *INVALIDATING_EVENTS]}},
                    {"operationType": "insert", **shipped},
                    {"operationType": "update", "$expr": is_ours},
                ]
            }
        },
        {
            "$project": {
                "operationType": 1,
                "clusterTime": 1,
                "documentKey": 1,
                f"fullDocument.{customer}": 1,
                f"fullDocumentBeforeChange.{customer}": 1,
            }
        },
    ]


def _pairs(name: str) -> Document:
    return {"$objectToArray": {"$ifNull": [f"$updateDescription.{name}", {}]}}


@dataclass(slots=True)
class PendingChanges:
    """Customers to be recounted as of `time` or later, and updated orders whose customers are."""

    time: Timestamp = field(default_factory=lambda: Timestamp(0, 0))
    customers: dict[bytes, Any] = field(default_factory=dict)
    orders: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.customers) + len(self.orders)

    def add(self, customer: Any) -> None:
        """Mark a customer, by the id as it stands in an order."""
        if is_queryable_id(customer):
            self.customers[bson.encode({"": customer})] = customer

    def forms(self, odd_forms: dict[ObjectId, set[str]]) -> list[tuple[Any, list[Any]]]:
        """Return each customer's canonical id, with all forms of it; new odd ones are added."""
        own = {}
        for customer in self.customers.values():
            canonical = canonicalize(customer)
            own[bson.encode({"": canonical})] = canonical
            if is_hex_id(customer) and customer not in indexable_variants(canonical):
                odd_forms.setdefault(canonical, set()).add(customer)
        return [(one, [*indexable_variants(one), *_odd(one, odd_forms)]) for one in own.values()]


def _odd(customer: Any, odd_forms: dict[ObjectId, set[str]]) -> set[str]:
    return odd_forms.get(customer, set()) if isinstance(customer, ObjectId) else set()


def is_queryable_id(customer: Any) -> bool:
    """Return whether a user can have this id; what is none would mean something else to the server.

    That is an array, a pattern, and a document of operators.
    """
    if isinstance(customer, dict):
        return not any(name.startswith("$") for name in customer)
    return customer is not None and customer != "" and not isinstance(customer, list | Regex)


def value_at(document: Document | None, path: str) -> Any:
    """Return the value at a dotted path; None if there is none."""
    value: Any = document
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
