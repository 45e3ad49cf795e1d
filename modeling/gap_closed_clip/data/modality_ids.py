"""Ids of what samples have of a further modality: which of them have the same."""

import json
from typing import Any

import numpy as np
import torch

from ..model.record_values_gap_closed_clip import is_missing
from .hashing import hash_of_bytes, normalize_caption
from .image_ids import image_id_of


def id_of(value: Any) -> str:
    """Equal where two samples have the same value: `record_id` of a record, `value_id` of all else."""
    return record_id(value) if is_record(value) else value_id(value)


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


__all__ = ["id_of", "is_record", "record_id", "value_id"]
