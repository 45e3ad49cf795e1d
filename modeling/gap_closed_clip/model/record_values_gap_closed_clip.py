"""The values of a record's fields as people write them: numbers, dates, words, and what is missing."""

import datetime
import math
import re
from typing import Any

import numpy as np


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}([T ].*)?")
EMPTY_REMEDY = "Correct it, or leave it empty (None) where it is not known."


class FieldError(ValueError):
    """What is wrong with a value or a field, without the place where it stands."""


def is_missing(value: Any) -> bool:
    """Whether a field is not given: None, NaN (and pandas' NA and NaT), or a text without any character to see."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, np.datetime64 | np.timedelta64):
        return bool(np.isnat(value))
    return isinstance(value, float | np.floating) and math.isnan(value)


def plain(value: Any) -> Any:
    """The value of a numpy scalar or of an array or tensor of no dimension as Python's own.

    Raises:
        FieldError: it is a list, an array, a mapping or another thing of several values.
    """
    if isinstance(value, np.datetime64):
        return value.astype("datetime64[us]").item()
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, str | bool | int | float | datetime.date) or value is None:
        return value
    if type(value).__name__ == "Decimal":
        return float(value)
    kind = "a mapping" if isinstance(value, dict) else f"of type {type(value).__name__}"
    raise FieldError(
        f"{value!r:.60} is {kind}; a field takes one text, number, boolean or date. Make a field of each value."
    )


def as_number(value: Any) -> float | None:
    """The number that a value is or writes; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str):
        value = value.strip()
        if not _NUMBER.fullmatch(value):
            return {"inf": math.inf, "infinity": math.inf}.get(value.lstrip("+-").casefold())
    try:
        return float(value)
    except OverflowError:
        return math.inf


def as_date(value: Any) -> datetime.date | None:
    """The day that a value is or writes (ISO 8601, `2021-03-31`, with or without a time); None if it is none."""
    if isinstance(value, datetime.datetime):
        return value.date()
    if isinstance(value, datetime.date):
        return value
    if isinstance(value, str) and _DATE.fullmatch(value.strip()):
        try:
            return datetime.date.fromisoformat(value.strip()[:10])
        except ValueError:
            return None
    return None


def as_text(value: Any) -> str:
    """A category as it is written: white space made single, `true` and `false`, whole numbers without `.0`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return " ".join(str(value).split())


__all__ = ["EMPTY_REMEDY", "FieldError", "as_date", "as_number", "as_text", "is_missing", "plain"]
