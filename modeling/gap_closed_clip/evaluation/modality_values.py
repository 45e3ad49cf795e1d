"""What pairs have of a further modality: which are the same, and the fields of records."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data import normalize_caption
from ..data.hashing import hash_of_bytes
from ..data.image_ids import image_id_of
from ..data.modalities import has_modality
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
        self.ids.append("" if value is None else record_id(value) if record else value_id(value))
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


def is_record(value: Any) -> bool:
    """Whether a value is a mapping of fields: not a file (bytes or path), nor a sound (array)."""
    return isinstance(value, dict) and not set(value) <= {"bytes", "path"} and "array" not in value


def record_id(record: dict[str, Any]) -> str:
    """Equal for records whose given fields have equal values; case and white space of texts do not count."""
    values = {str(field): _comparable(value) for field, value in record.items() if not is_missing(value)}
    return json.dumps(values, sort_keys=True, ensure_ascii=False)


def _comparable(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return normalize_caption(value if isinstance(value, str) else str(value))
    return float(value)


def value_id(value: Any) -> str:
    """Equal for equal arrays, files and images: a path, or a hash of what there is."""
    if isinstance(value, dict) and "array" in value:
        value = value["array"]
    if isinstance(value, list | tuple):
        value = np.asarray(value, dtype=np.float32)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy()
    if isinstance(value, np.ndarray):
        return hash_of_bytes(f"{value.dtype} {value.shape} ".encode() + np.ascontiguousarray(value).tobytes())
    return image_id_of({"image": value})


__all__ = ["ModalityValues", "is_record", "record_id", "value_id", "values_of"]
