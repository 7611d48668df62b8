"""The change log: each user's points before and after a full recount, one document a batch.

A batch's changes are inserted before its updates. After a crash the log may hold a change that was
not made; it never lacks one that was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from bson import ObjectId, Timestamp
from pymongo.collection import Collection

from loyalty.history import OWNER_FILTER
from loyalty.mongo.driver_errors import map_driver_errors
from loyalty.mongo.values import LENIENT_CODEC, Document


@dataclass(frozen=True)
class ChangeLog:
    """Where one recount logs its changes: `{…, changes: [{user, before, after}]}`.

    `before` is missing where the user had no points field. Where even the document around a nested
    field was missing, `created` is the path of the outermost part that the update creates.
    """

    collection: Collection[Any]
    recount: ObjectId
    at: datetime
    cluster_time: Timestamp | None
    expires_at: datetime

    def insert(self, changes: Sequence[Document]) -> None:
        """Insert one batch of changes. Raises ServiceError."""
        document = {
            **OWNER_FILTER,
            "recount": self.recount,
            "at": self.at,
            "cluster_time": self.cluster_time,
            "expires_at": self.expires_at,
            "changes": changes,
        }
        with map_driver_errors("insert", self.collection):
            self.collection.insert_one(document)


def find_changes(collection: Collection[Any], recount: ObjectId) -> Iterator[Sequence[Document]]:
    """Yield the batches of changes of a recount, in the order of writing. Raises ServiceError."""
    lenient = collection.with_options(codec_options=LENIENT_CODEC)
    with map_driver_errors("find", collection):
        for batch in lenient.find({**OWNER_FILTER, "recount": recount}, sort=[("_id", 1)]):
            yield batch["changes"]
