"""Towers and processors of the modalities that training adds to image and text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch.distributed as dist
from PIL.Image import Image
from transformers import AutoFeatureExtractor, CLIPImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..conversion.preprocessing import load_image_processor
from ..model.configuration_checks_gap_closed_clip import tower_config
from ..model.configuration_gap_closed_clip import GapClosedClipConfig
from ..model.processing_gap_closed_clip import image_processor_for
from ..model.record_processing_gap_closed_clip import ArrayProcessor, RecordProcessor
from ..model.record_values_gap_closed_clip import is_missing
from ..model.tower_kinds_gap_closed_clip import build_tower, is_timm
from ..model.towers_gap_closed_clip import forget_origin, load_published, load_tower
from .arguments import ModelArguments
from .modalities import FurtherColumns
from .tower_descriptions import RECORD, model_type_of, pretrained_name


logger = logging.get_logger(__name__)


@dataclass
class Further:
    """
    A further modality that training adds.

    Args:
        entry: of `config.modalities`.
        processor: of its values.
        tower: with its weights; None starts from scratch.
    """

    entry: dict[str, Any]
    processor: Any
    tower: PreTrainedModel | None = None


def new_modalities(args: ModelArguments, given: FurtherColumns, trained: Mapping[str, Any]) -> dict[str, Further]:
    """
    The modalities of the training pairs that are not `trained` yet, in order.

    Raises:
        ValueError: a column without a value, or values that are nothing for the modality's tower.
        OSError: a tower that can't be found.
    """
    found = {}
    for name, columns in given.columns.items():
        if name in trained:
            continue
        entry = (args.modalities or {}).get(name) or {}
        made = _record(name, entry, given) if isinstance(columns, list) else _of_column(name, entry, given)
        found[name] = made
    return found


def _record(name: str, entry: Mapping[str, Any], given: FurtherColumns) -> Further:
    columns, descriptions = given.columns[name], entry.get("fields") or {}
    others = {one.get("relative_to") for one in descriptions.values()}
    fields = [
        {"name": column, **descriptions[column]} if column in descriptions else column
        for column in columns
        if column not in others  # the other date of a date is no field of its own
    ]
    rows = given.values(name)
    try:
        processor = RecordProcessor.fit(rows, fields)
    except ValueError as error:
        raise ValueError(
            f"data.modalities.{name}: {error} What its values do not tell of a field, model.modalities.{name}.fields "
            "says."
        ) from error
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
        print(describe_record(name, processor, rows), flush=True)
    sizes = {"num_numbers": processor.num_numbers, "categories": processor.category_sizes}
    settings = {**(entry.get("tower") or {}), "model_type": RECORD, **sizes}
    tower = tower_config(settings, f"model.modalities.{name}.tower")
    if hasattr(tower, "schema"):
        tower.schema = processor.digest
    return Further({"tower": tower, "pooling": entry.get("pooling")}, processor)


def describe_record(name: str, processor: RecordProcessor, rows: Sequence[Mapping[str, Any] | None]) -> str:
    """A sentence on what the training rows, None where a sample has no record, taught of each field."""
    told = []
    for field in processor.fields:
        if field["kind"] == "category":
            words = field["categories"]
            examples = ", ".join(word if len(word) <= 20 else f"{word[:19]}…" for word in words[:3])
            learned = f"{len(words)} words ({examples}{', ...' if len(words) > 3 else ''})"
        else:
            unit = "years " if field["kind"] == "date" else ""
            learned = f"{unit}{field['mean']:.4g} ± {field['std']:.4g}"
        lacking = sum(row is None or is_missing(row.get(field["name"])) for row in rows)
        missing = f", missing in {lacking / len(rows):.1%}" if lacking else ""
        told.append(f"{field['name']}: {field['kind']}, {learned}{missing}")
    return f"What {len(rows):,} training pairs taught of {name}: {'; '.join(told)}."


def _of_column(name: str, entry: Mapping[str, Any], given: FurtherColumns) -> Further:
    """Of one column, of files of images or of arrays."""
    value, described = given.first(name), f"model.modalities.{name}.tower"
    source, pooling = entry["tower"], entry.get("pooling")
    is_image = isinstance(value, Image)
    if isinstance(source, str):
        source = pretrained_name(described, source)
        tower, has_pooler = _published(source, is_image)
        if pooling == "pooler" and not has_pooler:
            raise ValueError(
                f"model.modalities.{name}.pooling is 'pooler', and {source} has no weights of one, so that it would "
                "start at random: use 'cls' or 'mean'."
            )
        pooling = pooling if has_pooler else pooling or "cls"
    else:
        tower = _build(tower_config({"model_type": model_type_of(source), **source}, described), described)
    processor = _image_processor if is_image else partial(_array_processor, name, value)
    return Further({"tower": tower.config, "pooling": pooling}, processor(tower, source, described), tower)


def _published(source: str, is_image: bool) -> tuple[PreTrainedModel, bool]:
    """A tower with its weights, and whether its pooler, if it has one, has them too."""
    if is_image:
        tower, has_pooler = load_tower(source, {}, "vision_model")
    else:
        tower, missing = load_published(source, {})
        has_pooler = not missing
    forget_origin(tower.config, tower.config)
    return tower, has_pooler


def _build(config: PreTrainedConfig, described: str) -> PreTrainedModel:
    try:
        return build_tower(config)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{described} can't be built: {error}") from error


def _image_processor(tower: PreTrainedModel, source: Any, described: str) -> Any:
    if is_timm(tower):
        return image_processor_for(tower)
    if isinstance(source, str):
        return load_image_processor(source, described=f"{described}={source!r}")
    size = getattr(tower.config, "image_size", None)
    if size is None:
        raise ValueError(f"{described}: a {tower.config.model_type} model does not say what images it takes.")
    height, width = (size, size) if isinstance(size, int) else size
    crop = {"height": height, "width": width}
    return CLIPImageProcessor(size={"shortest_edge": height} if height == width else crop, crop_size=crop)


def _array_processor(name: str, value: Any, tower: PreTrainedModel, source: Any, described: str) -> Any:
    """A waveform goes through the feature extractor of a published tower; what has more dimensions is ready."""
    try:
        shape = np.asarray(value, dtype=np.float32).shape
    except (TypeError, ValueError) as error:
        raise ValueError(f"data.modalities.{name}: the first value is no array of numbers ({error}).") from error
    if len(shape) == 1 and isinstance(source, str):
        try:
            return AutoFeatureExtractor.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError):
            logger.info(f"{source} has no feature extractor: arrays of {name} go into its tower as they are.")
    return ArrayProcessor(tower.main_input_name, shape)


def with_modalities(config: GapClosedClipConfig, new: Mapping[str, Further]) -> dict[str, dict[str, Any]]:
    """The modalities of a configuration and behind them the new ones, as a value of its field `modalities`."""
    return {**(config.modalities or {}), **{name: further.entry for name, further in new.items()}}


__all__ = ["Further", "new_modalities", "with_modalities"]
