"""The processors of the modalities beyond image and text: which there are, how they are saved and what they take."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, FeatureExtractionMixin, ImageProcessingMixin

from .image_processing_gap_closed_clip import GapClosedClipImageProcessor
from .load_images_gap_closed_clip import load_image
from .modalities_gap_closed_clip import check_modality_names
from .record_processing_gap_closed_clip import ArrayProcessor, RecordProcessor, rows_of
from .record_values_gap_closed_clip import is_missing


OURS = {each.__name__: each for each in (ArrayProcessor, GapClosedClipImageProcessor, RecordProcessor)}
SAFE_EDITS = "Only mean, std and allow_later of a field can be edited after training."
TYPE_KEYS = ("modality_processor_type", "image_processor_type", "feature_extractor_type")


def load_modality_processors(processors: dict[str, Any] | None) -> dict[str, Any]:
    """
    Processors by the names of their modalities; descriptions, as processor_config.json has them, become processors.

    Raises:
        ValueError: a modality cannot have such a name, or a description is of no known type.
        TypeError: something that is no processor.
    """
    loaded: dict[str, Any] = {}
    if processors and not isinstance(processors, dict):
        raise ValueError(f"modality_processors is {processors!r:.80}; it is a mapping of names to processors.")
    for name, processor in (processors or {}).items():
        loaded[name] = _load(name, processor) if isinstance(processor, dict) else processor
        if not callable(loaded[name]) or not hasattr(loaded[name], "to_dict"):
            raise TypeError(f"The processor of the modality '{name}' is a {type(processor).__name__}, which is none.")
    check_modality_names(list(loaded))
    return loaded


def _load(name: str, description: dict[str, Any]) -> Any:
    kind = next((description[key] for key in TYPE_KEYS if description.get(key)), None)
    found = OURS.get(str(kind)) or getattr(transformers, str(kind), None)
    bases = (FeatureExtractionMixin, ImageProcessingMixin, ArrayProcessor, RecordProcessor)
    if not isinstance(found, type) or not issubclass(found, bases):
        raise ValueError(
            f"The processor of the modality '{name}' is of type {kind!r}; known are {', '.join(OURS)}, and image "
            "processors and feature extractors of transformers."
        )
    try:
        return found.from_dict(dict(description))
    except ValueError as error:
        raise ValueError(f"The processor of the modality '{name}': {error}") from error


def describe_modality_processors(processors: dict[str, Any]) -> dict[str, Any]:
    """What `load_modality_processors` makes the same processors of."""
    described = {}
    for name, processor in processors.items():
        described[name] = processor.to_dict()
        if not isinstance(processor, ArrayProcessor | RecordProcessor):  # whose order is that of reading
            # `auto_map` is of a folder that an image processor has been saved in.
            described[name] = {key: value for key, value in sorted(described[name].items()) if key != "auto_map"}
    return described


def to_ordered_json(configuration: dict[str, Any], kept: str) -> str:
    """JSON with sorted keys, but for the value of `kept`, whose order counts."""
    ordered = json.loads(json.dumps({key: configuration[key] for key in configuration if key != kept}, sort_keys=True))
    if kept in configuration:
        ordered = dict(sorted({**ordered, kept: configuration[kept]}.items()))
    return json.dumps(ordered, indent=2) + "\n"


def as_samples(processor: Any, values: Any) -> list[Any]:
    """
    What a modality is given, as a list of one value for each sample; None where a sample lacks it. A record without
    any value is none, and so is one of nothing but the date that another field is relative to.
    """
    if isinstance(processor, RecordProcessor):
        rows = rows_of(values)
        dates = set(processor.column_names) - set(processor.field_names)
        given = (row and not all(name in dates or is_missing(value) for name, value in row.items()) for row in rows)
        return [row if has else None for row, has in zip(rows, given, strict=True)]
    if isinstance(processor, ArrayProcessor):
        dimensions = len(processor.shape)
    else:
        dimensions = 3 if isinstance(processor, ImageProcessingMixin) else 1
    if isinstance(values, np.ndarray | torch.Tensor):
        return list(values) if values.ndim > dimensions else [values]
    if not isinstance(values, list | tuple):
        return [values]
    if values and _depth(values) == dimensions and isinstance(_first(values), int | float):
        return [values]  # one array, as nested lists
    return list(values)


def _depth(values: Any) -> int:
    return 1 + _depth(values[0]) if isinstance(values, list | tuple) and values else 0


def _first(values: Any) -> Any:
    return _first(values[0]) if isinstance(values, list | tuple) and values else values


def encode_modality(name: str, processor: Any, samples: Sequence[Any]) -> dict[str, Tensor]:
    """
    The inputs of a modality's tower.

    Args:
        name: of the modality.
        processor: of it.
        samples: B of them, None where a sample lacks it.

    Returns:
        `{name}_{input}` (B, ...) for each input of the tower. Where a sample lacks the modality, zeros; of an
        attention mask, ones, since attention to nothing is not a number.

    Raises:
        ValueError: a sample that the processor does not take; the message names the modality.
    """
    try:
        if isinstance(processor, ArrayProcessor | RecordProcessor):
            encoded = processor(list(samples), return_tensors="pt")
        else:
            encoded = _encode_given(processor, samples)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The modality '{name}': {error}") from error
    return {f"{name}_{key}": values for key, values in encoded.items()}


def _encode_given(processor: Any, samples: Sequence[Any]) -> dict[str, Tensor]:
    """Of an image processor or feature extractor, which know no sample that is not there."""
    places = [index for index, sample in enumerate(samples) if sample is not None]
    given = [samples[index] for index in places]
    encoded = _run(processor, given or [_nothing(processor)])
    if len(given) == len(samples):
        return dict(encoded)
    filled = {}
    for key, values in encoded.items():
        whole = values.new_full((len(samples), *values.shape[1:]), 1 if key.endswith("mask") else 0)
        if given:
            whole[places] = values
        filled[key] = whole
    return filled


def _run(processor: Any, samples: list[Any]) -> BatchFeature:
    if isinstance(processor, ImageProcessingMixin):
        return processor([load_image(sample) for sample in samples], return_tensors="pt")
    rate = getattr(processor, "sampling_rate", None)
    waves = [_wave(sample, rate) for sample in samples]
    padding = {"padding": True} if getattr(processor, "padding_value", None) is not None else {}
    return processor(waves, return_tensors="pt", **padding, **({} if rate is None else {"sampling_rate": rate}))


def _wave(sample: Any, rate: int | None) -> np.ndarray:
    """A waveform (length,) of samples a second as the feature extractor takes them."""
    if isinstance(sample, dict) and "array" in sample:  # as `datasets.Audio` gives it
        if rate is not None and sample.get("sampling_rate") not in (None, rate):
            raise ValueError(f"a waveform has {sample['sampling_rate']} samples a second; resample it to {rate}.")
        sample = sample["array"]
    return np.asarray(sample, dtype=np.float32)


def _nothing(processor: Any) -> Any:
    """A sample that shows which inputs there are, and of which shape."""
    if isinstance(processor, ImageProcessingMixin):
        return Image.new("RGB", (32, 32))
    return np.zeros(getattr(processor, "sampling_rate", None) or 16000, np.float32)


def names_of(processors: Iterable[str]) -> tuple[str, ...]:
    """Names of all modalities in order, for the columns of `modality_mask`."""
    return ("image", "text", *processors)


def check_fit(modalities: dict[str, dict[str, Any]] | None, processors: dict[str, Any]) -> None:
    """
    Checks processors against `config.modalities`; those that only one of both knows are passed over.

    Raises:
        ValueError: their order differs, which `modality_mask` has, or a record's fields are not those that its tower
            was trained with.
    """
    modalities = modalities or {}
    wanted = [name for name in modalities if name in processors]
    found = [name for name in processors if name in modalities]
    if wanted != found:
        raise ValueError(
            f"The model's modalities are {', '.join(wanted)} (modalities in config.json), and its processor has them "
            f"as {', '.join(found)} (modality_processors in processor_config.json): give both one order, the trained."
        )
    for name in wanted:
        # By what it has and not by its class: the processor may be a model folder's, and this file the package's.
        if hasattr(processors[name], "category_sizes"):
            _check_record(name, modalities[name]["tower"], processors[name])


def _check_record(name: str, tower: Any, processor: Any) -> None:
    sizes = getattr(tower, "num_numbers", 0), list(getattr(tower, "categories", None) or [])
    if sizes != (processor.num_numbers, processor.category_sizes):
        raise ValueError(
            f"The tower of '{name}' takes {sizes[0]} numbers and categories of the sizes {sizes[1]}; the processor's "
            f"schema has {processor.num_numbers} and {processor.category_sizes}: the fields in processor_config.json "
            f"are not those that the model was trained with. {SAFE_EDITS}"
        )
    trained = getattr(tower, "schema", None)
    if trained is not None and trained != getattr(processor, "digest", trained):
        raise ValueError(
            f"The fields of '{name}' in processor_config.json are not those that its tower was trained with: their "
            f"order, names, kinds or words were edited. Undo that. {SAFE_EDITS}"
        )


__all__ = [
    "as_samples",
    "check_fit",
    "describe_modality_processors",
    "encode_modality",
    "load_modality_processors",
    "names_of",
    "to_ordered_json",
]
