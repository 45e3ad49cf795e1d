"""What pairs have of a further modality: which are the same, and the fields of records."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..data.modalities import has_modality
from ..data.modality_ids import id_of, is_record
from ..model.record_values_gap_closed_clip import is_missing


class ModalityValues(NamedTuple):
    """
    Of N pairs.

    Args:
        ids: equal where two pairs have the same value; "" where a pair has none.
        records: of a record its given fields by name; None where a pair has none, and in other modalities.
    """

    ids: list[str]
    records: list[dict[str, Any] | None]

    def add(self, value: Any, fields: Sequence[str] | None = None) -> None:
        """Adds the value of one more pair; a record that has none of the fields, where any are named, is none."""
        value = value if value is not None and has_modality({"value": value}, "value") else None
        record = is_record(value)
        if record and fields is not None and all(is_missing(value.get(field)) for field in fields):
            value, record = None, False
        self.ids.append("" if value is None else id_of(value))
        self.records.append({field: each for field, each in value.items() if not is_missing(each)} if record else None)

    def select(self, rows: Sequence[int] | np.ndarray) -> "ModalityValues":
        """Those of some pairs, by their rows."""
        return ModalityValues([self.ids[row] for row in rows], [self.records[row] for row in rows])


def values_of(values: Iterable[Any]) -> ModalityValues:
    """Those of a column's values; of texts "" each row has a value of its own that nothing is known of."""
    found = ModalityValues([], [])
    for row, value in enumerate(values):
        if isinstance(value, str) and value == "":
            found.ids.append(f"row {row}")
            found.records.append(None)
        else:
            found.add(value)
    return found


__all__ = ["ModalityValues", "values_of"]
