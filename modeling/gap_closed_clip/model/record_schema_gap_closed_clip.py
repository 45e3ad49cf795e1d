"""The fields that a record has: of their descriptions, or guessed by their training values."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from .record_fields_gap_closed_clip import (
    CategoryField,
    DateField,
    NumberField,
    RecordField,
    check_number_of_categories,
    read_each,
)
from .record_values_gap_closed_clip import FieldError, as_date, as_number, as_text, is_missing, plain


FEW_ROWS = 20  # below this many values nothing is concluded from how many differ
LONG = 40  # characters; the values of free text are longer on average
FEW_WORDS = 10  # so many numbers with a unit (1.5T and 3T) may be categories
# Forms of numbers and dates that are not read, which would count as words; the last one as a number.
DECIMAL_COMMA = re.compile(r"[+-]?\d+(,\d+)?")
WITH_UNIT = re.compile(r"[+-]?\d+([.,]\d+)? ?(%|[^\W\d_]{1,5}(/[^\W\d_]{1,5})?)")
OTHER_DATE = re.compile(r"\d{1,2}[./-]\d{1,2}[./-](\d{2}|\d{4})")
DICOM_DATE = re.compile(r"(19|20)\d{2}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])")


def guess_field(name: str, rows: Sequence[dict[str, Any]]) -> RecordField:
    """
    A field of the kind that its training values show: numbers, or texts that write numbers; dates; else categories.

    Raises:
        FieldError: it is empty, free text, an identifier, numbers mixed with words, or numbers or dates in a form that
            is not read.
    """
    values = read_each(rows, lambda row: None if is_missing(row.get(name)) else plain(row[name]))
    if not values:
        raise FieldError("it is empty in every training row. Leave the field out.")
    _check_form(name, [as_text(value) for value in values])
    for read, kind, what in ((as_number, NumberField, "numbers"), (as_date, DateField, "dates")):
        strange = [value for value in values if read(value) is None]
        if not strange:
            return kind(name)
        if len(strange) < len(values) / 2:
            raise FieldError(
                f"most of its values are {what}, but {len(strange)} are not ({_some(strange)}). Correct those or "
                f'leave them empty, or describe the field: {{"name": "{name}", "kind": "{kind.kind}"}} or "category".'
            )
    _check_words(name, [as_text(value) for value in values])
    return CategoryField(name)


def _check_form(name: str, texts: list[str]) -> None:
    def all_are(form: re.Pattern) -> bool:
        return all(map(form.fullmatch, texts))

    kind = "category"
    if all_are(DICOM_DATE):
        kind, what, remedy = "number", "dates without hyphens", "Write them as 2021-03-31."
    elif all_are(OTHER_DATE):
        what, remedy = "dates in another form than ISO's", "Write them as 2021-03-31."
    elif all_are(DECIMAL_COMMA) and any("," in text for text in texts):
        what, remedy = "numbers with a decimal comma", "Write them with a point."
    elif all_are(WITH_UNIT) and len(set(texts)) > FEW_WORDS:
        what, remedy = "numbers with a unit", "Write the numbers alone, all in one unit."
    else:
        return
    raise FieldError(
        f"its values are {what} ({_some(texts)}). {remedy} If they are none, describe the field: "
        f'{{"name": "{name}", "kind": "{kind}"}}.'
    )


def _check_words(name: str, words: list[str]) -> None:
    distinct = set(map(str.casefold, words))
    check_number_of_categories(len(distinct))
    if len(words) < FEW_ROWS or len(distinct) <= len(words) / 2:
        return
    remedy = f'If it is a category all the same, describe it: {{"name": "{name}", "kind": "category"}}.'
    if sum(map(len, distinct)) / len(distinct) > LONG:
        raise FieldError(
            f"it is free text ({_some(words)}), which is for the text tower: make it part of the caption. {remedy}"
        )
    if len(distinct) > 0.9 * len(words):
        raise FieldError(
            f"nearly every training row has a value of its own ({_some(words)}): an identifier tells nothing of other "
            f"patients. Leave the field out. {remedy}"
        )


def _some(values: Sequence[Any]) -> str:
    shown = [f"{value!r:.40}" for value in dict.fromkeys(values)]
    return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")


KINDS: dict[str, type[RecordField]] = {kind.kind: kind for kind in (NumberField, CategoryField, DateField)}


def field_from_dict(description: Any) -> RecordField:
    """
    A field of its description, `{"name": ..., "kind": ..., ...}`.

    Raises:
        ValueError: it has no name, an unknown kind or key, or a value that can't be.
    """
    if not isinstance(description, dict) or not isinstance(description.get("name"), str):
        raise ValueError(f'A field is {description!r:.80}; describe it as {{"name": "age", "kind": "number"}}.')
    options = dict(description)
    name, kind = options.pop("name"), options.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"The field '{name}' is of kind {kind!r}; known are {', '.join(KINDS)}.")
    known = [each.name for each in fields(KINDS[kind]) if each.init and each.name != "name"]
    for key in options:
        if key not in known:
            raise ValueError(f"The field '{name}' has an unknown key {key!r}; a {kind} has {', '.join(known)}.")
    try:
        return KINDS[kind](name, **options)
    except FieldError as error:
        raise ValueError(f"The field '{name}': {error}") from error


def digest_of(fields: Sequence[RecordField]) -> str:
    """
    16 hexadecimal digits of what a tower's weights belong to: kinds and names in the order given, what dates are
    relative to, and the words of categories in order. Not of means, standard deviations and the words' case.
    """
    known = [
        [
            field.kind,
            field.name,
            getattr(field, "relative_to", None),
            [word.casefold() for word in getattr(field, "categories", None) or []],
        ]
        for field in fields
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


__all__ = ["digest_of", "field_from_dict", "guess_field"]
