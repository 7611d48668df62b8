"""The events of the change stream: which of them can change a count, and for which customers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import bson
from bson import Regex, Timestamp

from config import Settings
from loyalty.mongo.values import Document
from loyalty.recount.customer_ids import canonicalize, is_mixed_case
from loyalty.recount.order_filter import counted_orders, other_conditions

INVALIDATING_EVENTS = ["drop", "rename", "dropDatabase", "invalidate"]
"""Events of the collection as a whole. The change stream ends after one of them."""

NEVER = Timestamp(0, 0)
"""A cluster time before all others."""


def build_change_stream_pipeline(settings: Settings) -> list[Document]:
    """Return the pipeline that selects the events that can change a count, with ids only."""
    updated_fields = {"$objectToArray": {"$ifNull": ["$updateDescription.updatedFields", {}]}}
    changed_paths: list[Document] = [
        {"$map": {"input": updated_fields, "in": "$$this.k"}},
        {"$ifNull": ["$updateDescription.removedFields", []]},
    ]
    names = [settings.status_field, settings.customer_field]
    if conditions := other_conditions(settings):
        # Only the outermost field: the event of a change in `items.sku` may name `items.0.sku`.
        names += sorted({name.split(".")[0] for name in conditions})
        truncated_arrays = {"$ifNull": ["$updateDescription.truncatedArrays", []]}
        changed_paths.append({"$map": {"input": truncated_arrays, "in": "$$this.field"}})
    # An update of `a.b` also changes the fields `a` and `a.b.c`.
    changes_a_field = [_begins_with_expr("$$this", name) for name in names]
    changes_a_field += [_begins_with_expr(name, "$$this") for name in names]
    changes_any_field = {
        "$anyElementTrue": [
            {"$map": {"input": {"$concatArrays": changed_paths}, "in": {"$or": changes_a_field}}}
        ]
    }
    return [
        {
            "$match": {
                "$or": [
                    {"operationType": {"$in": ["delete", "replace", *INVALIDATING_EVENTS]}},
                    {"operationType": "insert", **counted_orders(settings, "fullDocument.")},
                    {"operationType": "update", "$expr": changes_any_field},
                ]
            }
        },
        {
            "$project": {
                "operationType": 1,
                "clusterTime": 1,
                "documentKey": 1,
                f"fullDocument.{settings.customer_field}": 1,
                f"fullDocumentBeforeChange.{settings.customer_field}": 1,
            }
        },
    ]


def _begins_with_expr(path: str, prefix: str) -> Document:
    """Return an expression: whether `path` is `prefix` or in it. `a.b` is in `a`, `ab` is not."""
    return {"$eq": [{"$indexOfBytes": [{"$concat": [path, "."]}, {"$concat": [prefix, "."]}]}, 0]}


@dataclass(slots=True)
class PendingChanges:
    """Customers to recount at `cluster_time` or later, and orders whose customer is to be found."""

    reported_until: Timestamp = NEVER
    """The change stream has reported every change before this cluster time."""
    cluster_time: Timestamp = NEVER
    """The time of the newest change."""
    customers: dict[bytes, Any] = field(default_factory=dict)
    """Canonical ids by their BSON: an id may be a document, which has no hash."""
    orders: list[Any] = field(default_factory=list)
    """The `_id` of updated orders: their events do not contain the customer."""
    has_mixed_case_ids: bool = False

    def __len__(self) -> int:
        return len(self.customers) + len(self.orders)

    def add_customer(self, customer: Any) -> None:
        """Add a customer by the id as stored in an order."""
        if _is_queryable(customer):
            canonical = canonicalize(customer)
            self.customers[bson.encode({"": canonical})] = canonical
            self.has_mixed_case_ids |= is_mixed_case(customer)


def read_watermark(resume_token: Mapping[str, Any] | None) -> Timestamp:
    """Return the cluster time before which the change stream has reported every change.

    The token of a batch, also of an empty one, names the time up to which the server, or each of
    its shards, has read the oplog for the stream. It is a KeyString in hexadecimal digits that
    begins with a timestamp: 82, then seconds and increment of 4 bytes each (resume_token.h in the
    server's source). Without a token that can be read, the result is NEVER.
    """
    data = (resume_token or {}).get("_data")
    match = re.match("82([0-9A-Fa-f]{8})([0-9A-Fa-f]{8})", str(data))
    return Timestamp(int(match[1], 16), int(match[2], 16)) if match else NEVER


def _is_queryable(customer: Any) -> bool:
    """Return whether a user can have this id, and a query for it compares for equality.

    A query interprets an array, a regular expression or a document of operators differently.
    """
    if isinstance(customer, dict):
        return not any(name.startswith("$") for name in customer)
    return customer is not None and customer != "" and not isinstance(customer, list | Regex)
