"""The points rule, in Python and as an expression for the server. Both must agree."""

from __future__ import annotations

from config import Settings
from loyalty.mongo.values import Document


def points_for(orders: int, settings: Settings) -> int:
    """Return the points for this many counted orders of one customer."""
    return orders * settings.points_per_order


def points_expr(orders: str, settings: Settings) -> Document:
    """Return the expression for the points; `orders` is the path of the number of orders."""
    return {"$multiply": [orders, settings.points_per_order]}
