"""The points rule, in Python and as expressions for the server. Both must agree."""

from __future__ import annotations

from typing import Any

from config import Settings
from loyalty.mongo.values import Document, is_integer


def points_for(orders: int, settings: Settings) -> int:
    """Return the points for this many counted orders of one customer."""
    return orders * settings.points_per_order


def points_expr(orders: str, settings: Settings) -> Document:
    """Return the expression for the points; `orders` is the path of the number of orders."""
    return {"$multiply": [orders, settings.points_per_order]}


def is_up_to_date(stored: Any, points: int) -> bool:
    """Return whether a stored value is an integer and equals the points."""
    return is_integer(stored) and stored == points


def is_up_to_date_expr(stored: str, orders: str, settings: Settings) -> Document:
    """Return the expression for: the value at the path `stored` is up to date."""
    is_integer_expr = {"$in": [{"$type": stored}, ["int", "long"]]}
    return {"$and": [is_integer_expr, {"$eq": [stored, points_expr(orders, settings)]}]}
