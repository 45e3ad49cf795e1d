"""Made-up samples of further modalities, to try a model with: records of a schema, arrays of a shape, sounds."""

import datetime
import math
from typing import Any

import numpy as np
from transformers import ImageProcessingMixin

from ..model.modality_processing_gap_closed_clip import check_fit
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from ..model.record_processing_gap_closed_clip import ArrayProcessor, RecordProcessor


def check_modalities(model: GapClosedClipModel, processor: GapClosedClipProcessor) -> None:
    """
    Raises:
        ValueError: model and processor are not of the same modalities in the same order, or a record's tower and
            schema not of the same fields.
    """
    wanted, found = list(model.config.modalities or {}), list(processor.modality_processors)
    if set(wanted) != set(found):
        raise ValueError(
            f"The model embeds {', '.join(model.config.modality_names)}, and its processor makes inputs of "
            f"{', '.join(('image', 'text', *found))}: save GapClosedClipProcessor(..., modality_processors={{name: "
            "processor}) with it, in the model's order."
        )
    check_fit(model.config.modalities, processor.modality_processors)


def made_up(processor: GapClosedClipProcessor) -> dict[str, list[Any]]:
    """
    For each further modality samples that can be written as JSON: two records, one with every field and one that lacks
    most; of others one array, as nested lists. None instead of an image, which JSON has not.
    """
    return {name: _samples(each) for name, each in processor.modality_processors.items()}


def _samples(processor: Any) -> list[Any]:
    if isinstance(processor, RecordProcessor):
        return records(processor)
    if isinstance(processor, ImageProcessingMixin):
        return [None]
    shape = processor.shape if isinstance(processor, ArrayProcessor) else (processor.sampling_rate,)
    return [np.sin(np.arange(math.prod(shape)) / 7).round(4).reshape(shape).tolist()]


def records(processor: RecordProcessor, fields: int | None = None) -> list[dict[str, Any]]:
    """
    Two records of a schema: one that has every field, or the first so many, and one of the last field alone, with
    another value.
    """
    full: dict[str, Any] = {}
    for field in processor.fields[:fields]:
        full |= _values(field, 1.0)
    return [full, _values(processor.fields[-1], -1.0)]


def _values(field: dict[str, Any], deviations: float) -> dict[str, Any]:
    """A field's value, so many standard deviations from its mean; what a date is relative to goes with it."""
    name = field["name"]
    if field["kind"] == "category":
        return {name: field["categories"][0 if deviations > 0 else -1]}
    number = field["mean"] + deviations * field["std"]
    if field["kind"] == "number":
        decimals = max(0, 1 - math.floor(math.log10(field["std"])))  # a tenth of the deviation, as people write it
        return {name: round(number, decimals)}
    try:
        other, fixed = datetime.date.fromisoformat(field["relative_to"]), True
    except ValueError:
        other, fixed = datetime.date(2020, 6, 15), False
    day = other - datetime.timedelta(days=max(round(number * 365.25), 0))
    return {name: day.isoformat()} | ({} if fixed else {field["relative_to"]: other.isoformat()})


__all__ = ["check_modalities", "made_up", "records"]
