"""Several sources to one set of pairs: ids and columns that go together."""

from functools import partial
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, LargeList, List, Value
from datasets.features.features import _ArrayXD

from ..model.record_values_gap_closed_clip import as_text
from .columns import text_of
from .modalities import RAW_IMAGE, Modalities
from .pairs import MissingSplitError


TEXT = Value("string")
WINDOW = List(Value("float64"))
MOST_LOOKED_AT = 100  # rows of a stream, to see what its arrays are like
# The columns of a stream of several sources: which others there are is only known once its rows have come.
STREAMED = Features({"image": RAW_IMAGE, **dict.fromkeys(("caption", "image_id", "label", "source"), TEXT)})


def name_source(
    pairs: Dataset | IterableDataset,
    name: str,
    window: list[float] | None = None,
    streaming: bool = False,
    modalities: Modalities | None = None,
) -> Dataset | IterableDataset:
    """Canonical pairs of one source as a part of several: ids get the prefix `name/`, a column `source` has the name.

    Args:
        pairs: of the source, from `load_pairs`.
        name: of the source.
        window: centre and width of the source's intensity window, [] for the images' own, for a column `window`; None
            where all sources have the same.
        streaming: whether the pairs will be streamed; then no columns are kept but those that every source has.
        modalities: the further modalities of all sources. In a stream the values of a record are texts.
    """
    further = modalities or {}
    if isinstance(pairs, IterableDataset):
        features = STREAMED | ({} if window is None else {"window": WINDOW}) | _features_of(pairs, further)
        return pairs.map(partial(_name_row, name=name, window=window, modalities=further), features=Features(features))
    ids = [f"{name}/{image_id}" if image_id else "" for image_id in pairs["image_id"]]
    pairs = pairs.remove_columns("image_id").add_column("image_id", ids, feature=TEXT)
    pairs = pairs.add_column("source", [name] * len(pairs), feature=TEXT)
    if window is not None:
        pairs = pairs.add_column("window", [window] * len(pairs), feature=WINDOW)
    if streaming and "label" not in pairs.column_names:
        pairs = pairs.add_column("label", [""] * len(pairs), feature=TEXT)
    if not streaming:
        return pairs
    kept = [*STREAMED, *(["window"] * (window is not None)), *further]
    pairs = _with_features(pairs, _features_of(pairs, further), keep_all=True)
    return pairs.select_columns(kept)


def _features_of(pairs: Dataset | IterableDataset, modalities: Modalities) -> dict[str, Any]:
    """The type of each further modality's column in a stream of several sources."""
    features: dict[str, Any] = {}
    for name, columns in modalities.items():
        if isinstance(columns, list):
            features[name] = dict.fromkeys(columns, TEXT)
        elif isinstance(pairs, Dataset):
            features[name] = pairs.features.get(name, Value("null"))
        else:
            values = (row.get(name) for row in pairs.take(MOST_LOOKED_AT))
            value = next((value for value in values if value is not None), None)
            is_file = isinstance(value, dict)
            found = Dataset.from_list([{name: value}]).features[name]
            features[name] = RAW_IMAGE if is_file else _as_array(found) or found
    return features


def _name_row(row: dict, name: str, window: list[float] | None, modalities: Modalities) -> dict:
    image_id = f"{name}/{row['image_id']}" if row["image_id"] else ""
    named = {"image_id": image_id, "source": name, "label": row.get("label") or ""}
    for modality, columns in modalities.items():
        value = row.get(modality)
        named[modality] = _as_texts(value, dict.fromkeys(columns, TEXT)) if isinstance(columns, list) else value
    return named if window is None else named | {"window": window}


def _as_texts(record: dict[str, Any] | None, features: dict[str, Any]) -> dict[str, Any] | None:
    """A record with all of these fields; those of type text as texts."""
    if record is None:
        return None
    values = {field: record.get(field) for field in features}
    return {
        field: as_text(value) if features[field] == TEXT and value is not None else value
        for field, value in values.items()
    }


def join_pairs(parts: list[Dataset]) -> Dataset:
    """One set of the parts, one after the other.

    A missing `label` is ""; what else a part lacks is None. A column that is not of one type in all becomes text; one
    of arrays, whatever their numbers are, one of float64.

    Raises:
        ValueError: a modality is of arrays in one part, and of files or of arrays of other dimensions in another.
    """
    names = list(dict.fromkeys(name for part in parts for name in part.column_names))
    features = {name: _common_feature(name, parts) for name in names}
    return datasets.concatenate_datasets([_with_features(part, features) for part in parts])


def _common_feature(name: str, parts: list[Dataset]):
    """The type of a column where all parts that have it agree, else text. One without values agrees with any."""
    found = [part.features[name] for part in parts if name in part.column_names]
    typed = [feature for feature in found if feature != Value("null")] or found
    if all(isinstance(feature, dict) for feature in typed):  # records
        fields = dict.fromkeys(field for feature in typed for field in feature)
        return {field: _common_type([each[field] for each in typed if field in each]) for field in fields}
    if any(feature != typed[0] for feature in typed) and not all(isinstance(f, Value | ClassLabel) for f in typed):
        return _common_array(name, typed)
    return _common_type(typed)


def _common_array(name: str, typed: list[Any]) -> Any:
    """The type of arrays that any of some columns can be cast to."""
    arrays = [_as_array(feature) for feature in typed]
    if arrays[0] is None or any(array != arrays[0] for array in arrays):
        kinds = dict.fromkeys("files" if isinstance(f, Image) else f"{f}" for f in typed)
        raise ValueError(
            f"data.source: the modality '{name}' is {' in one source and '.join(kinds)} in another: give all of them "
            "files, or arrays of as many dimensions, or different names."
        )
    return arrays[0]


def _as_array(feature: Any) -> Any:
    """The same arrays of float64, as nested lists; None where a column is not of arrays of numbers."""
    if isinstance(feature, _ArrayXD):
        depth, leaf = len(feature.shape), Value(feature.dtype)
    else:
        depth, leaf = 0, feature
        while isinstance(leaf, List | LargeList):
            depth, leaf = depth + 1, leaf.feature
    if not depth or not isinstance(leaf, Value) or not leaf.dtype.startswith(("int", "uint", "float", "bool")):
        return None
    found: Any = Value("float64")
    for _ in range(depth):
        found = List(found)
    return found


def _common_type(found: list[Any]) -> Any:
    typed = [feature for feature in found if feature != Value("null")] or found
    return typed[0] if all(feature == typed[0] for feature in typed) else TEXT


def _with_features(part: Dataset, features: dict, keep_all: bool = False) -> Dataset:
    """The part with all columns, in this order, of these types; with `keep_all` also its others."""
    for name, feature in features.items():
        if name not in part.column_names:
            part = part.add_column(name, ["" if name == "label" else None] * len(part), feature=feature)
        elif part.features[name] != feature:
            if isinstance(feature, List) and part.features[name] != Value("null"):
                part = part.cast_column(name, feature)
                continue
            values: list[Any]
            if isinstance(feature, dict):
                values = [_as_texts(record, feature) for record in part[name]]
            else:
                values = _as_text(part, name) if feature == TEXT else [None] * len(part)
            part = part.remove_columns(name).add_column(name, values, feature=feature)
    return part if keep_all else part.select_columns(list(features))


def _as_text(part: Dataset, name: str) -> list[str | None]:
    """The values of a column as text; those of classes by their names (a class not given is None)."""
    feature, values = part.features[name], part[name]
    if isinstance(feature, ClassLabel):
        return [None if value is None or value < 0 else feature.names[value] for value in values]
    return [None if value is None else text_of(value) for value in values]


def join_streams(parts: list[IterableDataset]) -> IterableDataset:
    """One stream that takes a row of each part in turn until all have ended; every row comes once.

    Raises:
        ValueError: the installed version of `datasets` cannot do that.
    """
    try:
        return datasets.interleave_datasets(parts, stopping_strategy="all_exhausted_without_replacement")
    except ValueError as error:
        if "stopping_strategy" not in str(error) and "not supported" not in str(error):
            raise
        raise ValueError(
            f"data.streaming of several sources needs a newer version of datasets than {datasets.__version__}, which "
            "takes every row once: pip install -U datasets, or leave streaming off."
        ) from error


def error_of_source(error: OSError | ValueError, name: str, split: str) -> OSError | ValueError:
    """The error with the source's name, and with what to do where the source has no such split."""
    kinds = (MissingSplitError, FileNotFoundError, ConnectionError, OSError, ValueError)
    kind = next(kind for kind in kinds if isinstance(error, kind))
    remedy = ""
    if kind is MissingSplitError and split != "train":
        remedy = f" If there is none, say so in the source's entry, {split}_split: null: it is then left out there."
    return kind(f"data.source, '{name}': {error}{remedy}")
