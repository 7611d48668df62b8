"""What the change stream tells: which events may change a count, and of these only the ids."""

from __future__ import annotations

from typing import Any

from bson import Regex

from config import Settings
from loyalty.ids import Document

ENDS = ["drop", "rename", "dropDatabase", "invalidate"]
"""What happens to the collection as a whole; after it, a stream tells nothing more."""


def stages(settings: Settings) -> list[Document]:
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
                    {"operationType": {"$in": ["delete", "replace", *ENDS]}},
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


def may_have_points(customer: Any) -> bool:
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
