"""Modalities beyond image and text: whether the data, `model.modalities` and a checkpoint's belong together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..checkpoint import further_modalities
from ..data.images import open_file
from ..data.modalities import has_modality
from ..messages import did_you_mean
from ..model.configuration_gap_closed_clip import GapClosedClipConfig
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from ..model.record_processing_gap_closed_clip import RecordProcessor
from .arguments import ModelArguments
from .tower_descriptions import RECORD, model_type_of


logger = logging.get_logger(__name__)

# Rows of a stream that a record's schema is learned from.
STREAMED_ROWS = 2000


@dataclass
class FurtherColumns:
    """
    What training pairs have beyond image and text.

    Args:
        columns: `data.modalities` of all sources: by name a list of columns (a record), or one column.
        pairs: the training pairs, with a column of each name.
    """

    columns: dict[str, Any] = field(default_factory=dict)
    pairs: Dataset | IterableDataset | None = None

    def values(self, name: str) -> list[Any]:
        """
        What each training pair has of a modality, None where it has none; of a stream, the first pairs.

        Raises:
            ValueError: no pair has any.
        """
        assert self.pairs is not None
        rows = self.pairs.select_columns([name])
        if isinstance(rows, IterableDataset):
            rows = islice(rows, STREAMED_ROWS)
        found = [row[name] if has_modality(row, name) else None for row in rows]
        if all(value is None for value in found):
            raise ValueError(self.empty(name))
        return found

    def first(self, name: str) -> Any:
        """
        The first value of a modality in the training pairs: a decoded image, an array or nested lists, a record.

        Raises:
            ValueError: no pair has any.
        """
        assert self.pairs is not None
        rows = self.pairs.select_columns([name])
        for row in islice(rows, STREAMED_ROWS if isinstance(rows, IterableDataset) else None):
            if has_modality(row, name):
                return _opened(row[name], name)
        raise ValueError(self.empty(name))

    def empty(self, name: str) -> str:
        """The message about a modality that no pair has."""
        columns = self.columns[name]
        listed = ", ".join(columns) if isinstance(columns, list) else columns
        return f"data.modalities.{name}: no training pair has a value in {listed}. Leave {name} out."


def _opened(value: Any, name: str) -> Any:
    """A value as it is, an image or .npy file decoded."""
    if not isinstance(value, dict) or not set(value) <= {"bytes", "path"}:
        return value
    return open_file(value, name)


def check_modalities(args: ModelArguments, columns: Mapping[str, Any]) -> None:
    """
    Checks whether `model.modalities`, those of the checkpoint and `data.modalities` belong together.

    Args:
        columns: `data.modalities` of all sources.

    Raises:
        ValueError: a modality that one of them lacks or has as something else, with the fields.
    """
    described = args.modalities or {}
    trained = {} if args.checkpoint is None else further_modalities(args.checkpoint)
    for name in described:
        if name in trained:
            raise ValueError(
                f"model.modalities.{name} is described, and model.checkpoint {args.checkpoint} brings its own: leave "
                f"one of them out, or call the new modality something else than {name}."
            )
        if name not in columns:
            hint = did_you_mean(name, columns, otherwise=": name its columns there.") if columns else "."
            raise ValueError(f"model.modalities.{name} is described, and data.modalities has no {name!r}{hint}")
    for name, found in columns.items():
        if name in trained:
            _check_kind(name, found, trained[name]["tower"].model_type, f"in model.checkpoint {args.checkpoint}")
        else:
            _check_described(name, found, described.get(name) or {})
    known = {*trained, *columns}
    for name in args.freeze_modalities:
        if name not in known:
            raise ValueError(f"model.freeze_modalities: unknown modality {name!r}{did_you_mean(name, known)}")


def _check_described(name: str, columns: Any, entry: Mapping[str, Any]) -> None:
    tower = entry.get("tower")
    if isinstance(columns, list):
        if isinstance(tower, str):
            raise ValueError(
                f"model.modalities.{name}.tower is {tower!r}, and data.modalities.{name} is a list of columns, which "
                f"is a record: its tower starts from scratch. To give that tower a column, write {name}: {columns[0]}."
            )
        if tower is not None:
            _check_kind(name, columns, model_type_of(tower), "in model.modalities")
        unknown = [one for one in entry.get("fields") or {} if one not in columns]
        if unknown:
            hint = did_you_mean(unknown[0], columns)
            raise ValueError(f"model.modalities.{name}.fields: data.modalities.{name} has no {unknown[0]!r}{hint}")
        return
    if tower is None:
        raise ValueError(
            f"data.modalities.{name} is the column {columns!r}, and nothing says which tower takes it: set "
            f"model.modalities.{name}.tower, a Hub id or folder, or a mapping with a model_type. For a record of "
            f"single values write a list: {name}: [{columns}]."
        )
    if entry.get("fields"):
        raise ValueError(f"model.modalities.{name}.fields is for records, and data.modalities.{name} is one column.")
    if not isinstance(tower, str):
        _check_kind(name, columns, model_type_of(tower), "in model.modalities")


def _check_kind(name: str, columns: Any, model_type: str, where: str) -> None:
    if isinstance(columns, list) == (model_type == RECORD):
        return
    given = "a list of columns, a record," if isinstance(columns, list) else f"the column {columns!r}"
    kind = "a record's" if model_type == RECORD else f"of type {model_type!r}"
    raise ValueError(f"data.modalities.{name} is {given} and the tower of {name} {where} is {kind}.")


def try_modalities(model: GapClosedClipModel, processor: GapClosedClipProcessor, given: FurtherColumns) -> None:
    """
    Runs the first value of each modality through its processor and tower, which shows now whether they go together.

    Raises:
        ValueError: they don't.
    """
    was_training = model.training
    try:
        for name in given.columns:
            if model.config.modalities[name]["tower"].model_type == RECORD:
                continue  # made for one another; `check_records` has seen those of a checkpoint
            inputs = processor(**{name: [given.first(name)]})
            with torch.no_grad():
                inputs = {key.removeprefix(f"{name}_"): values.to(model.device) for key, values in inputs.items()}
                model.eval().get_features(name, **inputs)
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"data.modalities.{name}: its tower, a {model.config.modalities[name]['tower'].model_type} model, can't "
            f"take the first value of {given.columns[name]!r}: {error}"
        ) from error
    finally:
        model.train(was_training)


def check_records(checkpoint: str, name: str, processor: RecordProcessor, given: FurtherColumns) -> None:
    """
    Checks whether the records of the training pairs are of the schema that a checkpoint was trained with.

    Raises:
        ValueError: fields differ, or their values; with what differs.
    """
    rows = given.values(name)
    known, columns = processor.column_names, given.columns[name]
    lacking = [one for one in known if one not in columns]
    beyond = [one for one in columns if one not in known]
    where = f"data.modalities.{name} and model.checkpoint {checkpoint}"
    if lacking or beyond:
        differences = [f"the data lack {', '.join(lacking)}"] if lacking else []
        differences += [f"the checkpoint knows no {', '.join(beyond)}"] if beyond else []
        raise ValueError(
            f"{where} have other fields: {'; '.join(differences)}. Its record is of {', '.join(known)}: name those, "
            "or call the record something else, for a tower of its own."
        )
    try:
        ids = processor(rows)["categories"]
    except ValueError as error:
        raise ValueError(f"{where} do not go together: {error}") from error
    categories = [one["name"] for one in processor.fields if one["kind"] == "category"]
    for column, one in enumerate(categories):
        there = int((ids[:, column] > 0).sum())
        unknown = int((ids[:, column] == 1).sum())
        if unknown and unknown == there:
            raise ValueError(
                f"{where} do not go together: the checkpoint knows none of the {there} values of {one!r}."
            )
        if unknown:
            logger.warning(
                f"{unknown} of {there} values of {one!r} in data.modalities.{name} are unknown to {checkpoint} and "
                "count as 'unknown'."
            )


def check_held_out_records(
    processor: GapClosedClipProcessor,
    held_out: Mapping[str, Dataset | IterableDataset],
    columns: Mapping[str, Any],
) -> None:
    """
    Reads the records of the held-out pairs, so that a bad one is not met when the model has been trained.

    Args:
        held_out: {split: pairs}; of a stream none are read.
        columns: `data.modalities` of all sources.

    Raises:
        ValueError: a record that the schema of the training pairs does not take; with the split.
    """
    records = {name: processor.modality_processors[name] for name, one in columns.items() if isinstance(one, list)}
    for split, pairs in held_out.items():
        for name in records if isinstance(pairs, Dataset) else ():
            if name not in pairs.column_names:
                continue
            try:
                records[name]([row[name] if has_modality(row, name) else None for row in pairs.select_columns(name)])
            except ValueError as error:
                raise ValueError(f"data.modalities.{name}, {split} pairs: {error}") from error


def trained_as_heads(args: ModelArguments, config: GapClosedClipConfig) -> list[str]:
    """The further modalities whose towers train as projections do: of records, and those starting at random."""
    return [
        name
        for name, entry in (config.modalities or {}).items()
        if entry["tower"].model_type == RECORD
        or isinstance((args.modalities or {}).get(name, {}).get("tower"), Mapping)
    ]


__all__ = [
    "FurtherColumns",
    "check_held_out_records",
    "check_modalities",
    "check_records",
    "trained_as_heads",
    "try_modalities",
]
