"""[`RecordProcessor`]: rows of a patient's record to tensors. [`ArrayProcessor`]: arrays of one shape to a tensor."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.utils import logging

from .record_fields_gap_closed_clip import CategoryField, NumberField, RecordField, RowError
from .record_schema_gap_closed_clip import digest_of, field_from_dict, guess_field
from .record_values_gap_closed_clip import FieldError, is_missing


logger = logging.get_logger(__name__)


def rows_of(rows: Any) -> list[dict[str, Any] | None]:
    """
    Rows as a list, one a sample.

    Args:
        rows: mappings of fields to values, None where a sample has no record; one such mapping; a mapping of fields to
            columns; or a data frame (pandas, polars, pyarrow, or a `datasets.Dataset`).

    Raises:
        ValueError: it is none of these, or the columns are not of one length.
    """
    for method, arguments in (("to_pylist", ()), ("to_dicts", ())):  # pyarrow, polars
        if hasattr(rows, method):
            return getattr(rows, method)(*arguments)
    if hasattr(rows, "iloc"):  # pandas
        return rows.to_dict("records")
    if isinstance(rows, dict):
        return _rows_of_mapping(rows)
    if rows is None:
        return [None]
    if not isinstance(rows, Iterable) or isinstance(rows, str | bytes):
        raise ValueError(
            f"Records are {rows!r:.80}; give a list of mappings, such as [{{'age': 62, 'sex': 'female'}}]."
        )
    found = list(rows)
    for index, row in enumerate(found):
        if row is not None and not isinstance(row, dict):
            raise ValueError(
                f"Record, row {index} (from 0): it is {row!r:.80}; a row is a mapping of fields to values, such as "
                "{'age': 62, 'sex': 'female'}, or None where there is no record."
            )
    return found


def _rows_of_mapping(columns: dict[str, Any]) -> list[dict[str, Any] | None]:
    def is_column(values: Any) -> bool:  # an array of no dimension is a value, which has the method len, too
        return not isinstance(values, str | dict) and hasattr(values, "__len__") and getattr(values, "ndim", 1) > 0

    if not columns or not all(map(is_column, columns.values())):
        return [columns]
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The columns of the records are of different lengths: {lengths}.")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class RecordProcessor:
    """
    The schema of a record, and rows to the tensors of a `GapClosedClipRecordModel`.

    Args:
        fields: descriptions, in the order of the tensors:
            `{"name": "age", "kind": "number", "mean": 55.0, "std": 18.0}`,
            `{"name": "sex", "kind": "category", "categories": ["female", "male"]}`,
            `{"name": "birth", "kind": "date", "relative_to": "study_date", "mean": 55.0, "std": 18.0}`, whose number
            is that of the years from it to the other date, which is another column of the row or an ISO date.

    Raises:
        ValueError: a description that is wrong or not complete: `fit` completes it from training rows.
    """

    def __init__(self, fields: Sequence[dict[str, Any]]):
        self._fields = [field_from_dict(description) for description in fields]
        _check_names([field.name for field in self._fields])
        for field in self._fields:
            lacking = [name for name, value in field.to_dict().items() if value is None and name != "allow_later"]
            if lacking:
                raise ValueError(
                    f"The field '{field.name}' has no {' and no '.join(lacking)}: learn them from training rows with "
                    "RecordProcessor.fit(rows, fields)."
                )
        self._numbers = [field for field in self._fields if isinstance(field, NumberField)]
        self._categories = [field for field in self._fields if isinstance(field, CategoryField)]
        self._columns = list(dict.fromkeys(name for field in self._fields for name in field.columns))
        self._warned: set[str] = set()

    @classmethod
    def fit(cls, rows: Any, fields: Sequence[str | dict[str, Any]] | None = None) -> "RecordProcessor":
        """
        Learns kinds, means, standard deviations and vocabularies from training rows.

        A number and a text that writes one are numbers, ISO dates are dates, other texts and booleans are categories.

        Args:
            rows: as `__call__` takes them; None where a sample has no record.
            fields: names or descriptions. What a description says is taken as it is, and the rest learned. Default:
                every field that a row has.

        Raises:
            ValueError: a field that is nowhere, is empty or the same in all rows, free text, an identifier, of more
                than 10,000 categories, or of values of different kinds. The message names it and says what to do.
        """
        given = [(index, row) for index, row in enumerate(rows_of(rows)) if row is not None]
        known = list(dict.fromkeys(name for _, row in given for name in row))
        wanted = known if fields is None else list(fields)
        if not wanted:
            raise ValueError("There are no fields to learn: no row has a record.")
        fitted = []
        for one in wanted:
            name = one["name"] if isinstance(one, dict) and isinstance(one.get("name"), str) else one
            try:
                fitted.append(_fit_field(one, known, [row for _, row in given]))
            except FieldError as error:
                place = f", row {given[error.row][0]} (from 0)" if isinstance(error, RowError) else ""
                raise ValueError(f"Record{place}, field '{name}': {error}") from error
        return cls([field.to_dict() for field in fitted])

    @property
    def fields(self) -> list[dict[str, Any]]:
        """The descriptions of all fields."""
        return [field.to_dict() for field in self._fields]

    @property
    def field_names(self) -> list[str]:
        """Names of all fields in the order of the tensors: the numbers and dates, then the categories."""
        return [field.name for field in (*self._numbers, *self._categories)]

    @property
    def column_names(self) -> list[str]:
        """Names that a row may have: the fields, and what dates are relative to."""
        return list(self._columns)

    def is_lacking(self, record: dict[str, Any]) -> bool:
        """Whether a row has none of the fields: what dates are relative to says nothing by itself."""
        return all(is_missing(record.get(name)) for name in self.field_names)

    @property
    def num_numbers(self) -> int:
        """How many numbers a record has, dates among them."""
        return len(self._numbers)

    @property
    def category_sizes(self) -> list[int]:
        """For each category how many ids it has, 0 (missing) and 1 (unknown) included."""
        return [field.size for field in self._categories]

    @property
    def digest(self) -> str:
        """What a tower's weights belong to, of fields in the tensors' order and words: see `digest_of`."""
        return digest_of([*self._numbers, *self._categories])

    def __call__(self, rows: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """
        Args:
            rows: B of them as `rows_of` takes them: mappings, None where a sample has no record; columns; data frames.
                None, NaN and "" are missing values, and so is a field that a row does not have.
            return_tensors: "pt" or "np"; None for lists.

        Returns:
            `numbers` (B, F_n) float32, standardised, 0 where missing; `numbers_mask` (B, F_n) bool, True where given;
            `categories` (B, F_c) int64, 0 missing, 1 unknown, from 2 on the vocabulary.

        Raises:
            ValueError: a value of another type, an infinite number, a date after the one that it is relative to, or a
                field that the schema does not have; with the row, the field, the value and what to do.
        """
        samples = rows_of(rows)
        self._warn_of_absent(samples)
        numbers = np.zeros((len(samples), self.num_numbers), np.float32)
        mask = np.zeros(numbers.shape, bool)
        categories = np.zeros((len(samples), len(self._categories)), np.int64)
        for index, row in enumerate(samples):
            if row is None:
                continue
            self._check_known(row, index)
            for column, field in enumerate(self._numbers):
                value = _at(index, field, field.standardise, row)
                if value is not None:
                    numbers[index, column], mask[index, column] = value, True
            for column, category in enumerate(self._categories):
                categories[index, column] = _at(index, category, category.id, row)
        data: dict[str, Any] = {"numbers": numbers, "numbers_mask": mask, "categories": categories}
        if return_tensors is None:
            return BatchFeature({name: values.tolist() for name, values in data.items()})
        return BatchFeature(data, tensor_type=return_tensors)

    def _check_known(self, row: dict[str, Any], index: int) -> None:
        for name in row:
            if name not in self._columns:
                near = difflib.get_close_matches(str(name), self._columns, n=1)
                hint = f"Did you mean '{near[0]}'? " if near else ""
                raise ValueError(
                    f"Record, row {index} (from 0), field '{name}' with the value {row[name]!r:.60}: the schema has "
                    f"no such field. {hint}Its fields are: {', '.join(self._columns)}. Leave it out, or rename it."
                )

    def _warn_of_absent(self, samples: list[dict[str, Any] | None]) -> None:
        """Warns once of each field that none of several rows has."""
        given = [row for row in samples if row is not None]
        if len(given) < 2:
            return  # one request may well say no more than it knows
        for name in self._columns:
            if name not in self._warned and not any(name in row for row in given):
                self._warned.add(name)
                logger.warning(
                    f"None of the {len(given)} records has the field '{name}': it counts as missing. If it has "
                    "another name there, rename it."
                )

    def to_dict(self) -> dict[str, Any]:
        """As it is saved in processor_config.json."""
        return {"modality_processor_type": type(self).__name__, "fields": self.fields}

    @classmethod
    def from_dict(cls, description: dict[str, Any]) -> "RecordProcessor":
        """
        Raises:
            ValueError: there are no fields, or one is wrong.
        """
        if not isinstance(description.get("fields"), list):
            raise ValueError("A RecordProcessor is described by a list of fields.")
        return cls(description["fields"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecordProcessor) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{field.name}: {field.kind}' for field in self._fields)})"


def _at(index: int, field: RecordField, read: Any, row: dict[str, Any]) -> Any:
    """What `read` makes of a row; an error names the row and the field."""
    try:
        return read(row)
    except FieldError as error:
        raise ValueError(f"Record, row {index} (from 0), field '{field.name}': {error}") from error


def _fit_field(one: str | dict[str, Any], known: Sequence[str], rows: Sequence[dict[str, Any]]) -> RecordField:
    if isinstance(one, dict) and "kind" not in one and list(one) == ["name"]:
        one = one["name"]
    field = field_from_dict(one) if isinstance(one, dict) else None
    for column in (str(one),) if field is None else field.columns:
        if column not in known:
            near = difflib.get_close_matches(column, known, n=1)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise FieldError(f"no row has '{column}'. {hint}The rows have: {', '.join(map(str, known[:10]))}.")
    if field is None:
        field = guess_field(str(one), rows)
    field.fit(rows)
    return field


def _check_names(names: list[str]) -> None:
    if not names:
        raise ValueError("A record has no fields: describe at least one.")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"A record has two fields of the name '{name}'.")


class ArrayProcessor:
    """
    Arrays of numbers, all of one shape, such as spectrograms, to one tensor.

    Args:
        input_name: what the tower calls it: `input_values`, `pixel_values`, ...
        shape: of each array.

    Raises:
        ValueError: the name is none, or the shape is none.
    """

    def __init__(self, input_name: str, shape: Sequence[int]):
        if not isinstance(input_name, str) or not input_name.isidentifier():
            raise ValueError(f"input_name is {input_name!r}; it must name an input of the tower.")
        if not shape or not all(isinstance(side, int) and side > 0 for side in shape):
            raise ValueError(f"shape is {shape!r}; it must be whole numbers above 0, such as [128, 1024].")
        self.input_name, self.shape = input_name, tuple(shape)

    def __call__(self, arrays: Any, return_tensors: str | None = "pt") -> BatchFeature:
        """
        Args:
            arrays: a list of B of them, each an array, a tensor or nested lists, None where a sample has none; or an
                array or tensor (B, *shape) or (*shape).

        Returns:
            `{input_name}` (B, *shape) float32, zeros where there is none.

        Raises:
            ValueError: an array of another shape, or with a value that is NaN or infinite; with its number.
        """
        one = isinstance(arrays, np.ndarray | torch.Tensor) and arrays.ndim <= len(self.shape)
        several = [arrays] if one else list(arrays)
        stacked = np.zeros((len(several), *self.shape), np.float32)
        for index, array in enumerate(several):
            if array is not None:
                stacked[index] = self._checked(array, index)
        if return_tensors is None:
            return BatchFeature({self.input_name: list(stacked)})
        return BatchFeature({self.input_name: stacked}, tensor_type=return_tensors)

    def _checked(self, array: Any, index: int) -> np.ndarray:
        if isinstance(array, torch.Tensor):
            array = array.detach().cpu().float().numpy()
        try:
            values = np.asarray(array, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.input_name}[{index}] is no array of numbers ({error}).") from error
        if values.shape != self.shape:
            raise ValueError(
                f"{self.input_name}[{index}] has the shape {values.shape}, not {self.shape}: cut or pad it first."
            )
        if not np.isfinite(values).all():
            raise ValueError(
                f"{self.input_name}[{index}] has values that are NaN or infinite: replace them, or give None where "
                "there is no array."
            )
        return values

    def to_dict(self) -> dict[str, Any]:
        """As it is saved in processor_config.json."""
        described = {"input_name": self.input_name, "shape": list(self.shape)}
        return {"modality_processor_type": type(self).__name__, **described}

    @classmethod
    def from_dict(cls, description: dict[str, Any]) -> "ArrayProcessor":
        """
        Raises:
            ValueError: as `ArrayProcessor`.
        """
        return cls(description.get("input_name", ""), description.get("shape", ()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArrayProcessor) and self.to_dict() == other.to_dict()


__all__ = ["ArrayProcessor", "RecordProcessor", "rows_of"]
