"""
The further modalities of a request to the endpoint: records as objects, arrays and sounds as lists of numbers.

`handler.py` imports it from the model folder, where the package is not installed. What is wrong with a record is said
in the words of the model's own processor.
"""

import json
from typing import Any

import numpy as np
from transformers import ImageProcessingMixin

from handler_images import PixelBudget, RequestError, kind_of, read_image


MAX_RECORDS = 512  # of a request
MAX_RECORD_LENGTH = 20_000  # characters of a record as JSON
MAX_ARRAYS = 16  # of a request
MAX_NUMBERS = 4_000_000  # of an array


def is_record(processor: Any) -> bool:
    """Whether a modality's processor takes records."""
    return type(processor).__name__ == "RecordProcessor"


def is_image(processor: Any) -> bool:
    """Whether a modality's processor takes images, of another view for one."""
    return isinstance(processor, ImageProcessingMixin)


def is_array(processor: Any) -> bool:
    """Whether a modality's processor takes arrays or sounds, one of which is a list itself."""
    return not is_record(processor) and not is_image(processor)


def read_sample(processor: Any, value: Any, field: str, budget: PixelBudget) -> Any:
    """
    What a modality's processor takes.

    Args:
        field: of the request that holds the value, for messages, e.g. "inputs.records[2]".
        budget: of the request, for images.

    Raises:
        RequestError: it is no record of the schema, no array of the shape, no image, or too large.
    """
    if is_image(processor):
        return read_image(value, field, budget)
    return _record(processor, value, field) if is_record(processor) else _array(processor, value, field)


def _record(processor: Any, value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{field} is {kind_of(value)}: send an object of fields and their values.")
    # Before anything looks for a name that is near to one of a million letters.
    length = len(json.dumps(value, default=str))
    if length > MAX_RECORD_LENGTH:
        raise RequestError(f"{field} is {length} characters long: a record may have {MAX_RECORD_LENGTH}.", 413)
    encoded = _run(processor, value, field)
    if not encoded["numbers_mask"].any() and not encoded["categories"].any():
        raise RequestError(f"{field} has no value: send one of {', '.join(processor.column_names)} or more.")
    return value


def _array(processor: Any, value: Any, field: str) -> np.ndarray:
    if not isinstance(value, list):
        raise RequestError(f"{field} is {kind_of(value)}: send the numbers as a list, of several dimensions nested.")
    try:
        array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        raise RequestError(f"{field} is no array: send numbers, and lists of equal length.") from None
    if array.size > MAX_NUMBERS:
        raise RequestError(f"{field} has {array.size} numbers: an array may have {MAX_NUMBERS}.", 413)
    if not array.size or not np.isfinite(array).all():
        raise RequestError(f"{field} is empty, or holds NaN or infinite numbers.")
    if hasattr(processor, "shape"):
        _run(processor, array, field)
    elif array.ndim != 1:
        raise RequestError(f"{field} has {array.ndim} dimensions: send a sound of one channel as a list of numbers.")
    return array


def _run(processor: Any, value: Any, field: str) -> Any:
    """What the processor makes of one value, with its own words where it refuses."""
    try:
        return processor([value])
    except ValueError as error:
        raise RequestError(f"{field}: {str(error).removeprefix('Record, row 0 (from 0), ')}") from None
