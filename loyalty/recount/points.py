"""The points rule: what counted orders earn, and how a stored value compares with that."""

import math
import re
from typing import Any

from bson import Decimal128

from config import Settings
from loyalty.mongo.values import Document, is_integer

_NUMBER = re.compile(r"\s*[-+]?\d+(\.\d+)?\s*", re.ASCII)


def points_expr(settings: Settings) -> Document:
    """Return the expression for the points that `$orders` counted orders earn."""
    return {"$multiply": ["$orders", settings.points_per_order]}


def is_up_to_date(stored: Any, points: int) -> bool:
    """Return whether a stored value is an integer and equals the points."""
    return is_integer(stored) and stored == points


def is_up_to_date_expr(stored: str, points: int | str) -> Document:
    """Return the expression for: the value at the path `stored` is up to date.

    `points` is a number, or the path of one.
    """
    return {"$and": [{"$in": [{"$type": stored}, ["int", "long"]]}, {"$eq": [stored, points]}]}


def parse_points(stored: Any) -> float:
    """Return a stored value as points; a numeric string counts as its number, all else as 0."""
    if isinstance(stored, str):
        return float(stored) if _NUMBER.fullmatch(stored) else 0
    if isinstance(stored, Decimal128):
        number = stored.to_decimal()
        return 0 if number.is_nan() else float(number)  # float() raises for a signaling NaN
    if isinstance(stored, bool) or not isinstance(stored, int | float) or math.isnan(stored):
        return 0
    return stored
