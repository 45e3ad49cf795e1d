"""Which modalities of some pairs, and which fields of their records, a model embeds; what it leaves out is said."""

from collections.abc import Collection, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, ProcessorMixin

from ..data.image_ids import image_ids_of
from ..data.modality_ids import is_record
from ..messages import shorten
from ..model.record_processing_gap_closed_clip import RecordProcessor
from .modality_values import ModalityValues


logger = getLogger(__name__)


def further_modalities(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Dataset | IterableDataset,
    model_name: str = "",
    modalities: Collection[str] = (),
) -> tuple[str, ...]:
    """
    The modalities beyond image and text that the model, its processor and the pairs have, in the model's order. What
    else the model or the pairs have is logged, a line each; so are fields of records that only one of them has.

    Args:
        model_name: what the lines call the model; default: the last part of its `name_or_path`.
        modalities: names of columns that are meant as modalities, of which those are told that the model lacks.
    """
    title = model_name or Path(getattr(model, "name_or_path", "") or "").name or "the model"
    known = getattr(processor, "modality_processors", None) or {}
    own = [name for name in getattr(model.config, "modality_names", ())[2:] if name in known]
    for name in modalities:
        if name not in own:
            has = ", ".join(own) or "nothing beyond image and text"
            logger.warning(f"{title} does not embed '{name}' (it has {has}): left out.")
    if not own:
        return ()
    some: Mapping[str, Any] = pairs.features or {}
    columns: Collection[str] | None = pairs.column_names
    if columns is None:  # of some streams they are known when a row has come
        columns = some = next(iter(pairs.take(1)), {})
    found = []
    for name in own:
        if name not in columns:
            logger.warning(f"The pairs have no '{name}', which {title} embeds: left out.")
        elif _has_fields(title, name, known[name], some.get(name)):
            found.append(name)
    return tuple(found)


def _has_fields(title: str, name: str, processor: Any, some: Any) -> bool:
    """Whether a record's fields and those of the data meet; what only one of them has is logged."""
    if not isinstance(processor, RecordProcessor) or not is_record(some):
        return True
    own, given = processor.column_names, list(some)
    if not set(own) & set(given):
        logger.warning(
            f"{title}: of the fields of its {name} ({', '.join(own)}) the data have none ({', '.join(given)}): "
            f"'{name}' is left out."
        )
        return False
    if unknown := [field for field in given if field not in own]:
        be = "is not a field" if len(unknown) == 1 else "are not fields"
        logger.warning(f"{title}: the data's {', '.join(unknown)} {be} of its {name}.")
    if lacking := [field for field in own if field not in given]:
        count = "counts" if len(lacking) == 1 else "count"
        logger.warning(f"{title}: the data's {name} has no {', '.join(lacking)}, which {count} as missing.")
    return True


def check_records(
    pairs: Dataset | IterableDataset, processor: ProcessorMixin, modalities: Sequence[str], model_name: str = ""
) -> None:
    """
    Reads the records of some pairs before anything is embedded; words that the model does not know are logged. Those
    of a stream are read as they come.

    Raises:
        ValueError: a value that a model's schema does not take; with its row.
    """
    for name, schema in _records(processor, modalities).items() if isinstance(pairs, Dataset) else ():
        if not is_record((pairs.features or {}).get(name)):
            continue
        rows = [with_own_fields(row, name, schema)[name] for row in pairs.select_columns(name)]
        try:
            ids = schema(rows, return_tensors="np")["categories"]
        except ValueError as error:
            raise ValueError(f"The pairs' '{name}': {error}") from error
        categories = [field for field in schema.fields if field["kind"] == "category"]
        for column, field in enumerate(categories):
            given, unknown = int((ids[:, column] > 0).sum()), int((ids[:, column] == 1).sum())
            if unknown:
                logger.warning(
                    f"{unknown} of {given} values of {field['name']!r} in the pairs' '{name}' are unknown to "
                    f"{model_name or 'the model'} and count as 'unknown'. It knows {shorten(field['categories'])}."
                )


def fields_of_records(processor: ProcessorMixin, modalities: Sequence[str]) -> dict[str, list[str]]:
    """By the names of those modalities that are records, the fields of which a row has to have one."""
    return {name: known.field_names for name, known in _records(processor, modalities).items()}


def _records(processor: ProcessorMixin, modalities: Sequence[str]) -> dict[str, RecordProcessor]:
    known: dict[str, Any] = getattr(processor, "modality_processors", None) or {}
    return {name: known[name] for name in modalities if isinstance(known.get(name), RecordProcessor)}


def without_reference_dates(
    processor: ProcessorMixin, values: Mapping[str, ModalityValues]
) -> Mapping[str, ModalityValues]:
    """The same without what is no field of the model's records itself, but what another field is relative to."""
    found = dict(values)
    for name, record in _records(processor, tuple(values)).items():
        dates = set(record.column_names) - set(record.field_names)
        if dates:
            records = [
                row and {field: value for field, value in row.items() if field not in dates}
                for row in values[name].records
            ]
            found[name] = ModalityValues(values[name].ids, records)
    return found


def with_image_and_caption(pairs: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """
    Those of some pairs that have both, as they are where all do; how many are left out is logged. Pairs may lack one
    where they were loaded with further modalities, and a lacking image has the id "". A stream stays as it is.
    """
    if isinstance(pairs, IterableDataset) or not {"image_id", "caption"} <= set(pairs.column_names):
        return pairs
    rows = [row for row, both in enumerate(zip(image_ids_of(pairs), pairs["caption"], strict=True)) if all(both)]
    if len(rows) == len(pairs):
        return pairs
    logger.warning(
        f"{len(pairs) - len(rows)} of {len(pairs)} pairs lack the image or the caption, and nothing else is embedded: "
        "left out."
    )
    return pairs.select(rows)


def with_own_fields(row: dict[str, Any], name: str, processor: Any) -> dict[str, Any]:
    """
    A row whose record has just what a schema names, None where it lacks one; None where it has none of the fields.

    Args:
        name: of the modality.
        processor: of the modality; if that is not of records, the row stays as it is.
    """
    record = row.get(name)
    if not isinstance(processor, RecordProcessor) or record is None or not is_record(record):
        return row
    own = {column: record.get(column) for column in processor.column_names}
    return {**row, name: None if processor.is_lacking(own) else own}


__all__ = [
    "check_records",
    "fields_of_records",
    "further_modalities",
    "with_image_and_caption",
    "with_own_fields",
    "without_reference_dates",
]
