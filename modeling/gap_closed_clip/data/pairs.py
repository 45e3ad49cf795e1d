"""Turns a source's rows into canonical pairs: `image` (undecoded), `caption`, `image_id`, `label`, other scalars.

What can be wrong with a row is checked here: for all rows at once, or, if they are streamed, as each row passes.
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
from .hashing import hash_of_bytes


logger = getLogger(__name__)

RAW_IMAGE = Image(decode=False)
CANONICAL_COLUMNS = ("image", "caption", "image_id", "label")
# Columns that `sources.py` adds: a source's own of these names are not kept.
ADDED_COLUMNS = ("augment", "source", "window")


class MissingSplitError(FileNotFoundError, ValueError):
    """A source has no split of the name that it was asked for."""


@dataclass
class Columns:
    """Which columns of a source hold what, and how their values are read.

    Args:
        image, caption: names of these columns.
        image_id: name of the column that identifies an image; None if there is none.
        labels: names of the columns that make up the label.
        extras: names of the scalar columns that are kept as they are.
        class_names: for each label column the names of its classes, if it holds their numbers; else None.
        root: folder that relative image paths start from.
        source_name: what error messages call the source.
    """

    image: str
    caption: str
    image_id: str | None
    labels: list[str]
    extras: list[str]
    class_names: list[list[str] | None]
    root: Path | None
    source_name: str

    def caption_of(self, value: Any) -> str:
        """The caption without white space around it; "" if there is none."""
        return "" if value is None else str(value).strip()

    def path_of(self, value: str | None) -> str | None:
        """The full path of an image file, or its URL; None if the source gives none."""
        if not value or "://" in value or self.root is None:
            return value or None
        return str(self.root / value)

    def id_of(self, path: str) -> str:
        """The image's path relative to `root`, which is the same on every machine."""
        if self.root is not None and Path(path).is_relative_to(self.root):
            return Path(path).relative_to(self.root).as_posix()
        return path

    def label_of(self, values: Iterable[Any]) -> str:
        """The values of one row's label columns joined by " / "; "" if one of them is missing."""
        parts = []
        for value, names in zip(values, self.class_names, strict=True):
            if value is None or value == "" or (names is not None and value < 0):  # -1: a ClassLabel not given
                return ""
            if names is not None:
                value = names[value]
            parts.append(", ".join(map(str, value)) if isinstance(value, list) else str(value))
        return " / ".join(parts)


def find_columns(features: Features, args: DataArguments, source_name: str, root: Path | None) -> Columns:
    """Find the columns that the arguments name among those that the source has.

    Raises:
        ValueError: a column does not exist (the message names the nearest and all there are), or it holds neither
            text nor images.
    """
    image_id = args.image_id_column or ("image_id" if "image_id" in features else None)
    labels = args.label_columns or (["label"] if "label" in features else [])
    wanted: list[tuple[str, str | None]] = [
        ("image_column", args.image_column),
        ("caption_column", args.caption_column),
        ("image_id_column", image_id),
        *(("label_columns", name) for name in labels),
        ("fold_column", args.fold_column if args.folds else None),
    ]
    for argument, name in wanted:
        if name is not None and name not in features:
            hint = suggest(name, list(features), "columns")
            if argument in ("image_id_column", "label_columns", "fold_column"):  # perhaps another source's
                hint += f" If there is none, data.{argument}=null."
            raise ValueError(f"{source_name} has no column '{name}' (data.{argument}). {hint}")
    if not is_text(features[args.caption_column]):
        raise ValueError(
            f"The column '{args.caption_column}' of {source_name} holds {features[args.caption_column]}, not text; "
            "data.caption_column must name a column of captions."
        )
    if not _holds_images(features[args.image_column]):
        raise ValueError(
            f"The column '{args.image_column}' of {source_name} holds {features[args.image_column]}; "
            "data.image_column must name a column of images, image bytes or file paths."
        )
    added = {name for name in ADDED_COLUMNS if not (args.folds and name == args.fold_column)}  # until folds are cut
    taken = {args.image_column, args.caption_column, *CANONICAL_COLUMNS, *added}
    extras = [n for n, feature in features.items() if n not in taken and isinstance(feature, (Value, ClassLabel))]
    class_names = [features[n].names if isinstance(features[n], ClassLabel) else None for n in labels]
    return Columns(args.image_column, args.caption_column, image_id, labels, extras, class_names, root, source_name)


def is_text(feature: Any) -> bool:
    """Whether a column holds text. An empty column, whose type is "null", counts as one."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view", "null")


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, dict):
        return bool({"bytes", "path"} & set(feature))
    return (
        isinstance(feature, Image) or is_text(feature) or getattr(feature, "dtype", "") in ("binary", "large_binary")
    )


def report_half_pairs(halves: dict[str, list[str]], source_name: str, on_missing: str, hint: str = "") -> None:
    """Raise an error, or log a warning, if there are halves of pairs.

    Args:
        halves: for each kind of half pair a description of every one, by which its row can be found.
        source_name: what messages call the source.
        on_missing: "error" raises, "skip" logs.
        hint: sentences that help to find and complete the pairs.

    Raises:
        ValueError: there is a half pair, and `on_missing` is "error".
    """
    problems = "; ".join(f"{kind}: {len(found)} ({shorten(found)})" for kind, found in halves.items() if found)
    if problems and on_missing == "error":
        raise ValueError(
            f"{source_name} has half pairs: {problems}. {hint}Complete the pairs, or leave the halves out with "
            "data.on_missing=skip."
        )
    if problems:
        logger.warning("%s: skipped %s", source_name, problems)


def to_pairs(rows: Dataset, args: DataArguments, source_name: str, root: Path | None = None) -> Dataset:
    """Make canonical pairs of a source's rows. Images are neither decoded nor copied.

    Args:
        rows: of the source, with its own columns.
        args: names the columns and says what to do with half pairs.
        source_name: what error messages call the source.
        root: folder that relative image paths start from.

    Raises:
        ValueError: a column is missing, a caption is empty, an image is missing, or one id stands for two images.
    """
    columns = find_columns(rows.features, args, source_name, root)
    rows = rows.cast_column(columns.image, RAW_IMAGE)  # works for a column of paths, too
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
    """Whether an image has neither stored bytes nor a file. URLs are taken to exist."""
    return not stored and (path is None or ("://" not in path and not Path(path).is_file()))


def _complete_rows(captions: list, paths: list, stored: list, columns: Columns, on_missing: str) -> list[int]:
    """Indices of the rows that have a caption and an image. Others raise an error or are logged."""
    empty = [index for index, caption in enumerate(captions) if not caption]
    missing = [index for index, image in enumerate(zip(paths, stored, strict=True)) if _is_missing(*image)]
    halves = {
        "empty captions": [f"row {index}" for index in empty],
        "images that do not exist": [f"row {index}: '{paths[index]}'" for index in missing],
    }
    hint = "Rows are counted from 0, and relative image paths start from data.image_root. "
    report_half_pairs(halves, columns.source_name, on_missing, hint)
    incomplete = {*empty, *missing}
    if len(incomplete) == len(captions):
        raise ValueError(f"{columns.source_name} holds no pair of an image and a caption.")
    return [index for index in range(len(captions)) if index not in incomplete]


def _image_ids(rows: Dataset, paths: list, stored: list, keep: list[int], columns: Columns) -> list[str]:
    """The id of each row's image; "" for the rows that are not in `keep`."""
    ids = [""] * len(rows)
    if columns.image_id is None:
        for index in keep:
            data = rows[index][columns.image]["bytes"] if stored[index] else None
            ids[index] = columns.id_of(paths[index]) if data is None else hash_of_bytes(data)
        return ids
    values = _values(rows, columns.image_id)
    first_rows: dict[str, int] = {}
    for index in keep:
        ids[index] = _given_id(values[index], index, columns)
        other = first_rows.setdefault(ids[index], index)
        if other != index and not _is_same_image(rows, other, index, paths, stored, columns):
            raise ValueError(
                f"{columns.source_name}, rows {other} and {index} (from 0): the id '{ids[index]}' of column "
                f"'{columns.image_id}' stands for two different images. Give each image an id of its own, or name "
                "another column with data.image_id_column."
            )
    return ids


def _given_id(value: Any, index: int, columns: Columns) -> str:
    """The image id that a row gives.

    Raises:
        ValueError: it gives none.
    """
    if value is None or value == "":
        raise ValueError(
            f"{columns.source_name}, row {index} (from 0): '{columns.image_id}' is empty. Fill it in, or name another "
            "column with data.image_id_column."
        )
    return str(value)


def _is_same_image(rows: Dataset, one: int, other: int, paths: list, stored: list, columns: Columns) -> bool:
    if stored[one] and stored[other]:
        return rows[one][columns.image]["bytes"] == rows[other][columns.image]["bytes"]
    return paths[one] == paths[other]


def to_streamed_pairs(
    rows: IterableDataset, args: DataArguments, source_name: str, root: Path | None = None
) -> IterableDataset:
    """As `to_pairs`, for a stream: columns are checked now, each row when it passes.

    Skipped rows are logged one by one. That one id stands for two images is not noticed.

    Raises:
        ValueError: as `to_pairs`; what is wrong with a row is raised while iterating.
    """
    rows = rows.decode(False) if rows.features is not None else rows
    features = rows.features or Dataset.from_list(list(rows.take(1))).features
    columns = find_columns(features, args, source_name, root)
    pairs = rows.map(
        partial(_stream_pair, columns=columns, skip=args.on_missing == "skip"),
        with_indices=True,
        remove_columns=list(features),
    )
    return pairs.filter(_is_complete) if args.on_missing == "skip" else pairs


def _is_complete(pair: dict) -> bool:
    return bool(pair["caption"])


def _stream_pair(row: dict, index: int, columns: Columns, skip: bool) -> dict:
    """The canonical pair of one row. A half pair raises an error, or, with `skip`, gets an empty caption."""
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
            f"{columns.source_name}, row {index} (from 0): {problem}. Complete the pair, or leave such rows out with "
            "data.on_missing=skip."
        )
    if problem:
        logger.warning("%s, row %d (from 0): skipped, %s", columns.source_name, index, problem)
        return {"image": image, "caption": "", "image_id": "", **{name: row[name] for name in columns.extras}}
    if columns.image_id is not None:
        image_id = _given_id(row[columns.image_id], index, columns)
    else:
        image_id = columns.id_of(image["path"]) if image["bytes"] is None else hash_of_bytes(image["bytes"])
    pair = {"image": image, "caption": caption, "image_id": image_id}
    if columns.labels:
        pair["label"] = columns.label_of(row[name] for name in columns.labels)
    return pair | {name: row[name] for name in columns.extras}
