"""A large generated shop without unusual values, and the points that are correct for it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice, zip_longest
from typing import Any, NamedTuple

import bson
from bson import ObjectId
from bson.raw_bson import RawBSONDocument
from pymongo import WriteConcern
from pymongo.collection import Collection
from pymongo.database import Database

from config import load
from loyalty.mongo.values import SIMPLE_COLLATION
from loyalty.recount.index import index_keys
from loyalty.recount.partitions import build_partitions, find_boundaries
from loyalty.recount.pipeline import Scope, build_pipeline
from sandbox.mongod import Deployment
from sandbox.shop import STATUSES, Document

DATABASE = "oms_db"
STATES = {
    "first": "first fill: no user has points yet",
    "quiet": "recount without changes: all points are correct",
    "ordinary": "ordinary recount: 0.1 % of the customers changed",
}
_BATCH = 5_000
_FIRST_USER_TIME = 1_600_000_000
_ORDER_ID, _CUSTOMER = b"\xaa" * 12, b"c" * 24  # placeholders


@dataclass(frozen=True)
class MismatchCount:
    """The number of users with stale points, and without points."""

    stale: int = 0
    missing: int = 0

    def __str__(self) -> str:
        numbers = {"stale": self.stale, "without points": self.missing}
        return ", ".join(f"{n:,} {name}" for name, n in numbers.items() if n) or "none"


class StageProfile(NamedTuple):
    """One stage of an aggregation: its seconds, the documents it returned, its spills to disk."""

    name: str
    seconds: float
    rows: int
    spills: int

    def plus(self, other: StageProfile) -> StageProfile:
        return StageProfile(
            self.name or other.name,
            self.seconds + other.seconds,
            self.rows + other.rows,
            self.spills + other.spills,
        )


class Shop:
    """Orders of about 200 bytes. A few customers have many orders, and many have no points."""

    def __init__(self, deployment: Deployment, orders: int, users: int) -> None:
        self.size, self.customers = orders, users
        self._client = deployment.client()
        concern = WriteConcern("majority")
        self._database = self._client.get_database(DATABASE, write_concern=concern)
        self._settings = load({"MONGODB_URI": deployment.uri_for(database=DATABASE)})
        self._points = [0] * users
        self.orders = self._database.orders
        rng = random.Random(6)  # noqa: S311 -- reproducible, not secret
        _insert(self.orders, self._new_orders(rng))
        changed = set(rng.sample(range(users), max(users // 1000, 1)))
        for state in STATES:
            _insert(self._database[state], self._new_users(state, changed))

    def make_index(self) -> None:
        self.orders.create_index(index_keys(self._settings))

    def restore(self, state: str) -> None:
        """Restore the users of `state`, and wait until the server has written a checkpoint."""
        self._database[state].aggregate([{"$out": "users"}])
        self._client.admin.command("fsync")  # so that no checkpoint falls into a measurement

    def count_mismatches(self) -> MismatchCount:
        users = self._database.users.find({}, {self._settings.points_field: 1}).sort("_id", 1)
        pairs = zip(
            (user.get(self._settings.points_field) for user in users), self._points, strict=True
        )
        found = [stored for stored, expected in pairs if stored != expected]
        return MismatchCount(len(found) - found.count(None), found.count(None))

    @property
    def database(self) -> Database[Document]:
        return self._database

    def find_unshipped(self, limit: int) -> list[tuple[ObjectId, ObjectId]]:
        """Return orders that are not shipped, with their customers."""
        found = self.orders.find({"status": {"$ne": "Shipped"}}, {"customer_id": 1}).limit(limit)
        found.hint([("$natural", 1)])  # with the index they would be sorted by customer
        return [(order["_id"], ObjectId(order["customer_id"])) for order in found]

    def add_shipped_order(self, user: ObjectId) -> None:
        """Add one to the points that are expected for the user."""
        self._points[_user_number(user)] += 1

    def expected_points(self, user: ObjectId) -> int:
        return self._points[_user_number(user)]

    def find_customer(self) -> Any:
        """Return the id of one user."""
        user = self._database.users.find_one({}, {"_id": 1})
        assert user
        return user["_id"]

    def count_users_with_points(self) -> int:
        return self._database.users.count_documents(
            {self._settings.points_field: {"$exists": True}}
        )

    def count_logged_changes(self) -> int:
        total = {"$group": {"_id": None, "n": {"$sum": {"$size": "$changes"}}}}
        return sum(row["n"] for row in self._database.loyalty_changes.aggregate([total]))

    def profile_recount(self) -> list[StageProfile]:
        """Return the stages of a recount by the server's explain, summed over all partitions."""
        self.restore("quiet")
        stages: list[StageProfile] = []
        for part in build_partitions(partial(find_boundaries, self._database.users, "_id")):
            found = self._explain(Scope(part, status_may_be_array=False))
            if len(found) > len(stages):  # a partition of strings has the most stages
                found, stages = stages, found
            stages = [
                a.plus(b)
                for a, b in zip_longest(stages, found, fillvalue=StageProfile("", 0, 0, 0))
            ]
        return stages

    def _explain(self, scope: Scope) -> list[StageProfile]:
        command: Document = {
            "aggregate": "orders",
            "pipeline": build_pipeline(self._settings, scope),
            "cursor": {},
            "allowDiskUse": True,
            "collation": SIMPLE_COLLATION,
        }
        reply = self._database.command("explain", command, verbosity="executionStats")
        stages, before = [], 0
        for stage in reply["stages"]:
            name = next(key for key in stage if key.startswith("$"))
            until = int(stage["executionTimeMillisEstimate"])  # from the start of the pipeline
            label = "$match, the index" if name == "$cursor" else name
            spills = int(stage.get("spills", 0))
            stages.append(
                StageProfile(label, (until - before) / 1000, int(stage["nReturned"]), spills)
            )
            before = until
        return stages

    def status(self) -> dict[str, Any]:
        return self._client.admin.command("serverStatus")

    def order_bytes(self) -> int:
        stats = self._database.command("collStats", "orders")
        return int(stats["avgObjSize"])

    def version(self) -> str:
        return str(self._client.server_info()["version"])

    def close(self) -> None:
        self._client.close()

    def _new_orders(self, rng: random.Random) -> Iterator[bytes]:
        # One template for each percent. The order's id and the customer separate its three parts.
        shipped = _template("Shipped")
        kinds = [(s, shipped if s == "Shipped" else _template(s)) for s in STATUSES]
        templates = [template for status, template in kinds for _ in range(STATUSES[status])]
        ids = [str(_user_id(number)).encode() for number in range(self.customers)]
        points, customers, chance = self._points, self.customers, rng.random
        for number in range(self.size):
            customer = int(customers * chance() ** 3)
            template = templates[int(100 * chance())]
            if template is shipped:
                points[customer] += 1
            head, middle, tail = template
            yield b"".join((head, number.to_bytes(12, "big"), middle, ids[customer], tail))

    def _new_users(self, state: str, changed: set[int]) -> Iterator[bytes]:
        for number, expected in enumerate(self._points):
            user: Document = {"_id": _user_id(number), "name": f"Ada Abara {number}"}
            user["email"] = f"ada.abara.{number}@example.com"
            if state != "first":
                user["loyalty_points"] = expected
            if state == "ordinary" and number in changed:
                user["loyalty_points"] = (
                    expected + 1 if number % 2 or not expected else expected - 1
                )
            yield bson.encode(user)


def _template(status: str) -> tuple[bytes, bytes, bytes]:
    order = {
        "_id": ObjectId(_ORDER_ID),
        "customer_id": _CUSTOMER.decode(),
        "status": status,
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        "total_cents": 4990,
        "currency": "EUR",
        "items": [{"sku": "SKU-004711", "n": 2}],
    }
    head, _, rest = bson.encode(order).partition(_ORDER_ID)
    middle, _, tail = rest.partition(_CUSTOMER)
    return head, middle, tail


def _user_id(number: int) -> ObjectId:
    """Return the id of the user with this number; ids ascend with the numbers."""
    random_part = (number * 0x9E3779B97F4A7C15) % 2**64
    return ObjectId((_FIRST_USER_TIME + number).to_bytes(4, "big") + random_part.to_bytes(8, "big"))


def _user_number(user: ObjectId) -> int:
    return int.from_bytes(user.binary[:4], "big") - _FIRST_USER_TIME


def _insert(collection: Collection[Document], documents: Iterable[bytes]) -> None:
    rows = map(RawBSONDocument, documents)
    raw: Collection[Any] = collection.with_options(write_concern=WriteConcern(1))
    while batch := list(islice(rows, _BATCH)):
        raw.insert_many(batch, ordered=False)
