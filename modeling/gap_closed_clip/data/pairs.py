"""From any source's rows to the canonical columns of a pair: image (undecoded), caption, image_id, label, the rest.

What can be wrong with a row is checked here: for all rows at once, or when streaming as each row passes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value

from ..messages import shorten, suggest
from .arguments import DataArguments
from .hashing import stable_hash


logger = getLogger(__name__)

RAW_IMAGE = Image(decode=False)
CANONICAL_COLUMNS = ("image", "caption", "image_id", "label")


@dataclass
class Columns:
    """Which of a source's columns mean what."""

    image: str
    caption: str
    image_id: str | None
    labels: list[str]
    # Scalar columns that are kept as they are.
    extras: list[str]
    # Class names of each label column that holds numbers of classes, else None.
    class_names: list[list[str] | None]
    # Folder that relative image paths start from.
    root: Path | None
    # What errors call the source.
    where: str

    def caption_of(self, value: Any) -> str:
        return "" if value is None else str(value).strip()

    def path_of(self, value: str | None) -> str | None:
        """Full path of a path or URL in the source."""
        if not value or "://" in value or self.root is None:
            return value or None
        return str(self.root / value)

    def id_of(self, path: str) -> str:
        """The path from `root` on: the same on every machine."""
        if self.root is not None and Path(path).is_relative_to(self.root):
            return Path(path).relative_to(self.root).as_posix()
        return path

    def label_of(self, values: Iterable[Any]) -> str:
        """The label columns' values of one row joined by " / "; "" if one is missing."""
        parts = []
        for value, names in zip(values, self.class_names, strict=True):
            if value is None or value == "" or (names is not None and value < 0):  # -1: a ClassLabel not given
                return ""
            if names is not None:
                value = names[value]
            parts.append(", ".join(map(str, value)) if isinstance(value, list) else str(value))
        return " / ".join(parts)


def find_columns(features: Features, args: DataArguments, where: str, root: Path | None) -> Columns:
    """Look up the configured columns.

    Raises:
        ValueError: a column does not exist (names the nearest and all there are) or holds something else.
    """
    image_id = args.image_id_column or ("image_id" if "image_id" in features else None)
    labels = args.label_columns or (["label"] if "label" in features else [])
    wanted = [("image_column", args.image_column), ("caption_column", args.caption_column)]
    wanted += [("image_id_column", image_id)] + [("label_columns", name) for name in labels]
    wanted += [("fold_column", args.fold_column if args.folds else None)]
    for argument, name in wanted:
        if name is not None and name not in features:
            hint = suggest(name, list(features), "columns")
            raise ValueError(f"{where} has no column '{name}' (data.{argument}). {hint}")
    if not is_text(features[args.caption_column]):
        raise ValueError(
            f"The column '{args.caption_column}' of {where} holds {features[args.caption_column]}, not text; "
            "data.caption_column must name a column of captions."
        )
    if not _holds_images(features[args.image_column]):
        raise ValueError(
            f"The column '{args.image_column}' of {where} holds {features[args.image_column]}; data.image_column must "
            "name a column of images, image bytes or file paths."
        )
    taken = {args.image_column, args.caption_column, *CANONICAL_COLUMNS}
    extras = [n for n, feature in features.items() if n not in taken and isinstance(feature, (Value, ClassLabel))]
    class_names = [features[n].names if isinstance(features[n], ClassLabel) else None for n in labels]
    return Columns(args.image_column, args.caption_column, image_id, labels, extras, class_names, root, where)


def is_text(feature: Any) -> bool:
    """Whether a column holds text (or nothing at all: its type is then "null")."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view", "null")


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, dict):
        return bool({"bytes", "path"} & set(feature))
    return (
        isinstance(feature, Image) or is_text(feature) or getattr(feature, "dtype", "") in ("binary", "large_binary")
    )


def to_pairs(rows: Dataset, args: DataArguments, where: str, root: Path | None = None) -> Dataset:
    """Canonical pairs of a source's rows. Images are neither decoded nor copied.

    Args:
        rows: the source.
        args: names the columns and says what to do with half pairs.
        where: what errors call the source.
        root: folder that relative image paths start from.

    Raises:
        ValueError: a column is missing, a caption is empty, an image is missing, or one id stands for two images.
    """
    columns = find_columns(rows.features, args, where, root)
    rows = rows.cast_column(columns.image, RAW_IMAGE)  # of paths, too
    images = rows.select_columns(columns.image).with_format("arrow")[:].column(0)
    paths = [columns.path_of(path) for path in pc.struct_field(images, "path").to_pylist()]
    stored = pc.is_valid(pc.struct_field(images, "bytes")).to_pylist()
    captions = [columns.caption_of(caption) for caption in _values(rows, columns.caption)]
    keep = _complete_rows(captions, paths, stored, columns, args.on_missing)
    ids = _image_ids(rows, paths, stored, keep, columns)
    labels = [columns.label_of(values) for values in zip(*(_values(rows, n) for n in columns.labels), strict=True)]

    pairs = rows.select_columns([columns.image, *columns.extras])
    pairs = pairs.add_column("caption", captions, feature=Value("string"))
    pairs = pairs.add_column("image_id", ids, feature=Value("string"))
    if columns.labels:
        pairs = pairs.add_column("label", labels, feature=Value("string"))
    if not any(stored):
        structs = [{"bytes": None, "path": path} for path in paths]
        pairs = pairs.remove_columns(columns.image).add_column("image", structs, feature=RAW_IMAGE)
    elif columns.image != "image":
        pairs = pairs.rename_column(columns.image, "image")
    return pairs if len(keep) == len(pairs) else pairs.select(keep)


def _values(rows: Dataset, column: str) -> list:
    return rows.select_columns(column).with_format("arrow")[:].column(0).to_pylist()


def _is_missing(path: str | None, stored: bool) -> bool:
    """Whether an image has neither bytes nor a file; URLs are not looked up."""
    return not stored and (path is None or ("://" not in path and not Path(path).is_file()))


def _complete_rows(captions: list, paths: list, stored: list, columns: Columns, on_missing: str) -> list[int]:
    """Indices of the rows with a caption and an image; half pairs raise or are logged."""
    empty = [index for index, caption in enumerate(captions) if not caption]
    missing = [index for index, image in enumerate(zip(paths, stored, strict=True)) if _is_missing(*image)]
    halves = {"empty captions": [f"row {index}" for index in empty]}
    halves["images that do not exist"] = [f"row {index}: '{paths[index]}'" for index in missing]
    problems = "; ".join(f"{what}: {len(which)} ({shorten(which)})" for what, which in halves.items() if which)
    if problems and on_missing == "error":
        raise ValueError(
            f"{columns.where} has half pairs: {problems}, rows counted from 0. Complete the pairs (relative image "
            "paths start from data.image_root), or leave such rows out with data.on_missing=skip."
        )
    if problems:
        logger.warning("%s: skipped %s", columns.where, problems)
    half = {*empty, *missing}
    if len(half) == len(captions):
        raise ValueError(f"{columns.where} holds no pair of an image and a caption.")
    return [index for index in range(len(captions)) if index not in half]


def _image_ids(rows: Dataset, paths: list, stored: list, keep: list[int], columns: Columns) -> list[str]:
    """The id of each row's image, "" outside of `keep`."""
    ids = [""] * len(rows)
    named = None if columns.image_id is None else _values(rows, columns.image_id)
    first = {}
    for index in keep:
        if named is None:
            ids[index] = (
                _bytes_id(rows[index][columns.image]["bytes"]) if stored[index] else columns.id_of(paths[index])
            )
            continue
        ids[index] = "" if named[index] is None else str(named[index])
        if not ids[index]:
            raise ValueError(
                f"{columns.where}, row {index} (from 0): '{columns.image_id}' is empty. Fill it in, or "
                "name another column with data.image_id_column."
            )
        other = first.setdefault(ids[index], index)
        if other != index and not _same_image(rows, other, index, paths, stored, columns):
            raise ValueError(
                f"{columns.where}, rows {other} and {index} (from 0): the id '{ids[index]}' of column "
                f"'{columns.image_id}' stands for two different images. Give each image an id of its own, or name "
                "another column with data.image_id_column."
            )
    return ids


def _same_image(rows: Dataset, one: int, other: int, paths: list, stored: list, columns: Columns) -> bool:
    if stored[one] and stored[other]:
        return rows[one][columns.image]["bytes"] == rows[other][columns.image]["bytes"]
    return paths[one] == paths[other]


def _bytes_id(data: bytes) -> str:
    return f"{stable_hash(data):016x}"


def to_streamed_pairs(
    rows: IterableDataset, args: DataArguments, where: str, root: Path | None = None
) -> IterableDataset:
    """`to_pairs` for a stream: columns are checked now, rows as they pass. That one id stands for two images is not
    noticed. Skipped rows are logged one by one.

    Raises:
        ValueError: as `to_pairs`; for a row, while iterating.
    """
    rows = rows.decode(False) if rows.features is not None else rows
    features = rows.features or Dataset.from_list(list(rows.take(1))).features
    columns = find_columns(features, args, where, root)
    pairs = rows.map(
        partial(_stream_pair, columns=columns, skip=args.on_missing == "skip"),
        with_indices=True,
        remove_columns=list(features),
    )
    return pairs.filter(_is_complete) if args.on_missing == "skip" else pairs


def _is_complete(pair: dict) -> bool:
    return bool(pair["caption"])


def _stream_pair(row: dict, index: int, columns: Columns, skip: bool) -> dict:
    """One canonical row; a half pair raises, or comes back with an empty caption if it is to be skipped."""
    image = row[columns.image]
    if isinstance(image, (bytes, bytearray)):
        image = {"bytes": image, "path": None}
    elif not isinstance(image, dict):
        image = {"bytes": None, "path": image}
    image = {"bytes": image.get("bytes"), "path": columns.path_of(image.get("path"))}
    caption = columns.caption_of(row[columns.caption])
    problem = None if caption else "its caption is empty"
    if _is_missing(image["path"], image["bytes"] is not None):
        problem = f"its image '{image['path']}' does not exist"
    if problem and not skip:
        raise ValueError(
            f"{columns.where}, row {index} (from 0): {problem}. Complete the pair, or leave such rows "
            "out with data.on_missing=skip."
        )
    if problem:
        logger.warning("%s, row %d (from 0): skipped, %s", columns.where, index, problem)
        return {"image": image, "caption": "", "image_id": "", **{name: row[name] for name in columns.extras}}
    if columns.image_id is not None:
        image_id = str(row[columns.image_id])
    else:
        image_id = columns.id_of(image["path"]) if image["bytes"] is None else _bytes_id(image["bytes"])
    pair = {"image": image, "caption": caption, "image_id": image_id}
    if columns.labels:
        pair["label"] = columns.label_of(row[name] for name in columns.labels)
    return pair | {name: row[name] for name in columns.extras}
