"""The fields of a record: what their values are, what is learned of them in training, and what is wrong with one."""

import datetime
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

from .record_values_gap_closed_clip import (
    EMPTY_REMEDY,
    FieldError,
    as_date,
    as_number,
    as_text,
    is_missing,
    plain,
)


MISSING, UNKNOWN = 0, 1  # ids that categories begin with
MOST_CATEGORIES = 10_000
DAYS_OF_A_YEAR = 365.25


@dataclass
class RecordField:
    """
    What all kinds of fields have.

    Args:
        name: of the field, by which rows have its value.
    """

    kind: ClassVar[str]
    name: str

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the values of a row that the field looks at."""
        return (self.name,)

    def to_dict(self) -> dict[str, Any]:
        """The description as it is saved: `name`, `kind`, and what `kind` has beside."""
        described = asdict(self)
        return {"name": described.pop("name"), "kind": self.kind, **described}

    def fit(self, rows: Sequence[dict[str, Any]]) -> None:
        """Learns from training rows what the description leaves open.

        Raises:
            FieldError: what is to be learned can't be; a value is wrong.
        """

    def number(self, row: dict[str, Any]) -> float | None:
        """The value of a row before it is standardised; None where it is missing.

        Raises:
            FieldError: it is no number.
        """
        raise NotImplementedError


@dataclass
class NumberField(RecordField):
    """
    A number, or a text that writes one ("62").

    Args:
        mean, std: of the training values, by which it is standardised; None until they are known.
    """

    kind: ClassVar[str] = "number"
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            number = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            if not number or (value is not None and not math.isfinite(value)):
                raise FieldError(f"its {name} is {value!r}; it must be a number.")
        if self.std is not None and self.std <= 0:
            raise FieldError(f"its std is {self.std}; it must be above 0.")

    def number(self, row: dict[str, Any]) -> float | None:
        value = row.get(self.name)
        if is_missing(value):
            return None
        number = as_number(plain(value))
        if number is None:
            raise FieldError(f"{value!r:.60} is no number. {EMPTY_REMEDY} If the field holds words, it is a category.")
        if math.isnan(number) or math.isinf(number):
            raise FieldError(f"{value!r:.60} is infinite. {EMPTY_REMEDY}")
        return number

    def standardise(self, row: dict[str, Any]) -> float | None:
        """(number - mean) / std; None where it is missing."""
        number = self.number(row)
        if number is None or self.mean is None or self.std is None:
            return None
        standard = (number - self.mean) / self.std
        if abs(standard) > float(np.finfo(np.float32).max):
            raise FieldError(f"{row.get(self.name)!r:.60} is beyond what can be computed with. {EMPTY_REMEDY}")
        return standard

    def fit(self, rows: Sequence[dict[str, Any]]) -> None:
        numbers = read_each(rows, self.number)
        if self.mean is not None and self.std is not None:
            return
        if not numbers:
            raise FieldError("it is empty in every training row. Leave the field out.")
        mean, std = float(np.mean(numbers)), float(np.std(numbers))
        if self.std is None and std <= 1e-12 * max(abs(mean), 1.0):
            raise FieldError(
                f"it is {mean:g} in every training row that has it, and so tells nothing. Leave the field out, or "
                "describe it with a std of its own."
            )
        self.mean = mean if self.mean is None else self.mean
        self.std = std if self.std is None else self.std


@dataclass
class DateField(NumberField):
    """
    A date, taken as the years from it to another one: of a date of birth and one of examination the age.

    Args:
        mean, std: of these years.
        relative_to: the other date: the name of a column of the same row, or a date. Default: the latest one in the
            training rows.
        allow_later: a date may lie after the other one; the years are then below 0. Default: only if `relative_to` is
            learned, since rows to come are often later than those of training.
    """

    kind: ClassVar[str] = "date"
    relative_to: str | None = None
    allow_later: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.relative_to, datetime.date):  # as YAML reads one
            self.relative_to = self.relative_to.isoformat()[:10]
        if self.relative_to is not None and (not isinstance(self.relative_to, str) or not self.relative_to):
            raise FieldError(f"its relative_to is {self.relative_to!r}; it must be a date or the name of a column.")

    @property
    def columns(self) -> tuple[str, ...]:
        other = self.relative_to
        return (self.name,) if other is None or as_date(other) is not None else (self.name, other)

    def number(self, row: dict[str, Any]) -> float | None:
        date, other = self._date(row, self.name), self._other(row)
        if date is None or other is None:
            return None
        if date > other and not self.allow_later:
            raise FieldError(
                f"{date} lies after {other} ({self.relative_to}), which it is relative to. {EMPTY_REMEDY} If it may "
                'be later, describe the field with "allow_later": true.'
            )
        return (other - date).days / DAYS_OF_A_YEAR

    def fit(self, rows: Sequence[dict[str, Any]]) -> None:
        if self.relative_to is None:
            dates = read_each(rows, lambda row: self._date(row, self.name))
            if not dates:
                raise FieldError("it is empty in every training row. Leave the field out.")
            self.relative_to = max(dates).isoformat()
            self.allow_later = True if self.allow_later is None else self.allow_later
        self.allow_later = bool(self.allow_later)
        super().fit(rows)

    def _other(self, row: dict[str, Any]) -> datetime.date | None:
        fixed = as_date(self.relative_to)
        return fixed if fixed is not None or self.relative_to is None else self._date(row, self.relative_to)

    def _date(self, row: dict[str, Any], column: str) -> datetime.date | None:
        value = row.get(column)
        if is_missing(value):
            return None
        date = as_date(plain(value))
        if date is None:
            which = "" if column == self.name else f"{column} is "
            raise FieldError(f"{which}{value!r:.60} is no date. Write it as 2021-03-31. {EMPTY_REMEDY}")
        return date


@dataclass
class CategoryField(RecordField):
    """
    One of some words; case and white space do not count. Whole numbers and booleans count as words.

    Args:
        categories: the words, the most frequent first; None until they are known. Their ids begin with 2.
    """

    kind: ClassVar[str] = "category"
    categories: list[str] | None = None
    _ids: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.categories is None:
            return
        if not isinstance(self.categories, list | tuple) or not self.categories:
            raise FieldError(f"its categories are {self.categories!r:.60}; they must be a list of words.")
        self.categories = [as_text(plain(word)) for word in self.categories]
        self._ids = {word.casefold(): index for index, word in enumerate(self.categories, start=2)}
        if len(self._ids) < len(self.categories) or "" in self._ids:
            raise FieldError("of its categories one is empty, or two differ in nothing but case or white space.")
        check_number_of_categories(len(self._ids))

    @property
    def size(self) -> int:
        """How many ids there are, those of a missing and of an unknown value included."""
        return len(self.categories or ()) + 2

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "categories": self.categories}

    def id(self, row: dict[str, Any]) -> int:
        """0 where the value is missing, 1 where it is no known category, else its number from 2.

        Raises:
            FieldError: it is no single value.
        """
        word = self._word(row)
        return MISSING if word is None else self._ids.get(word.casefold(), UNKNOWN)

    def fit(self, rows: Sequence[dict[str, Any]]) -> None:
        words = read_each(rows, self._word)
        if self.categories is not None:
            return
        if not words:
            raise FieldError("it is empty in every training row. Leave the field out.")
        spellings = Counter(words)
        counts = Counter(word.casefold() for word in words)
        check_number_of_categories(len(counts))
        best: dict[str, str] = {}
        for word, _ in spellings.most_common():
            best.setdefault(word.casefold(), word)
        self.categories = [best[key] for key, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
        self.__post_init__()

    def _word(self, row: dict[str, Any]) -> str | None:
        value = row.get(self.name)
        return None if is_missing(value) else as_text(plain(value))


def check_number_of_categories(categories: int) -> None:
    if categories > MOST_CATEGORIES:
        raise FieldError(
            f"it has {categories:,} categories, more than {MOST_CATEGORIES:,}: most are too rare to be learned, and "
            "an identifier tells nothing of other patients. Leave the field out, or group its values first."
        )


class RowError(FieldError):
    """A `FieldError` and the row that it is in."""

    def __init__(self, error: FieldError, row: int):
        super().__init__(str(error))
        self.row = row


def read_each(rows: Sequence[dict[str, Any]], read: Any) -> list:
    """What is read of each row, without those where the value is missing."""
    values = []
    for index, row in enumerate(rows):
        try:
            value = read(row)
        except FieldError as error:
            raise RowError(error, index) from error
        if value is not None:
            values.append(value)
    return values


__all__ = [
    "CategoryField",
    "DateField",
    "NumberField",
    "RecordField",
    "RowError",
    "check_number_of_categories",
    "read_each",
]
