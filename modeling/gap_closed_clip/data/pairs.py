"""
Turns a source's rows into canonical pairs: `image` (undecoded), `caption`, `image_id`, `label`, a column for each
further modality, other scalars. With further modalities a sample may lack some, but one alone is no pair.

What can be wrong with a row is checked here: for all rows at once, or, if they are streamed, as each row passes.
"""

from dataclasses import replace
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetInfo, Features, IterableDataset, Value, concatenate_datasets
from datasets.table import InMemoryTable

from ..messages import cut, shorten
from .addresses import is_address
from .arguments import DataArguments
from .columns import Columns, find_columns, text_of
from .hashing import hash_of_bytes
from .modalities import RAW_IMAGE, is_file, read_modality


logger = getLogger(__name__)

NO_IMAGES, NO_CAPTIONS = " no images", " no captions"  # columns in the place of those that a source does not have


class MissingSplitError(FileNotFoundError, ValueError):
    """A source has no split of the name that it was asked for."""


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

    Returns:
        The pairs. A sample that lacks the image has the `image_id` "", one that lacks the caption the caption "", one
        that lacks a further modality None.

    Raises:
        ValueError: a column is missing, a caption is empty, an image is missing, or one id stands for two images. With
            `args.modalities`: a sample has one modality alone.
    """
    columns = find_columns(rows.features, args, source_name, root)
    rows, columns = _with_all_columns(rows, columns)
    assert columns.image is not None and columns.caption is not None
    images = rows.select_columns(columns.image).with_format("arrow")[:].column(0)
    paths = _paths(pc.struct_field(images, "path").to_pylist(), columns)
    stored = pc.is_valid(pc.struct_field(images, "bytes")).to_pylist()
    captions = [columns.caption_of(caption) for caption in _values(rows, columns.caption)]
    further = _read_modalities(rows, columns)
    present = {name: each for name, (_, each) in further.items()}
    keep = _complete_rows(captions, paths, stored, present, columns, args.on_missing)
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
    elif not all(stored):
        pairs = concatenate_datasets([pairs.remove_columns(columns.image), _with_full_paths(images, paths)], axis=1)
    elif columns.image != "image":
        pairs = pairs.rename_column(columns.image, "image")
    if further:
        pairs = concatenate_datasets([pairs, *(column for column, _ in further.values())], axis=1)
    return pairs if len(keep) == len(pairs) else pairs.select(keep)


def _with_full_paths(images: pa.ChunkedArray, paths: list[str | None]) -> Dataset:
    """The column `image` of images of which some are stored and others are files, with the full paths of these."""
    parts, start = [], 0
    for chunk in images.chunks:
        data, names = (pc.struct_field(chunk, name) for name in ("bytes", "path"))
        full = pa.array(paths[start : start + len(chunk)], pa.string())
        names = pc.if_else(pc.is_valid(data), names, full)
        parts.append(pa.StructArray.from_arrays([data, names], ["bytes", "path"]))
        start += len(chunk)
    table = InMemoryTable(pa.table({"image": pa.chunked_array(parts)}))
    return Dataset(table, info=DatasetInfo(features=Features({"image": RAW_IMAGE})))


def _with_all_columns(rows: Dataset, columns: Columns) -> tuple[Dataset, Columns]:
    """The rows with a column of images, undecoded, and one of captions, both empty where the source has none."""
    if columns.image is None:
        rows = rows.add_column(NO_IMAGES, [None] * len(rows), feature=RAW_IMAGE)
    else:
        rows = rows.cast_column(columns.image, RAW_IMAGE)  # works for a column of paths, too
    if columns.caption is None:
        rows = rows.add_column(NO_CAPTIONS, [""] * len(rows), feature=Value("string"))
    return rows, replace(columns, image=columns.image or NO_IMAGES, caption=columns.caption or NO_CAPTIONS)


def _read_modalities(rows: Dataset, columns: Columns) -> dict[str, tuple[Dataset, list[bool]]]:
    """The column of each further modality, and which rows have it."""
    try:
        return {modality.name: read_modality(modality, rows) for modality in columns.modalities}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{columns.source_name}: {error}") from error


def _paths(values: list[str | None], columns: Columns) -> list[str | None]:
    paths = []
    for index, value in enumerate(values):
        try:
            paths.append(columns.path_of(value))
        except ValueError as error:
            raise ValueError(f"{columns.source_name}, row {index} (from 0): {error}.") from error
    return paths


def _values(rows: Dataset, column: str) -> list:
    return rows.select_columns(column).with_format("arrow")[:].column(0).to_pylist()


def _is_missing(path: str | None, stored: bool) -> bool:
    """Whether an image has neither stored bytes nor a file. Those at addresses are taken to exist."""
    return not stored and (path is None or (not is_address(path) and not is_file(path)))


def _complete_rows(
    captions: list, paths: list, stored: list, present: dict[str, list[bool]], columns: Columns, on_missing: str
) -> list[int]:
    """Indices of the rows that have a caption and an image, or, with further modalities, any two of all. Others raise
    an error or are logged."""
    empty = [index for index, caption in enumerate(captions) if not caption]
    missing = [index for index, image in enumerate(zip(paths, stored, strict=True)) if _is_missing(*image)]
    halves = {"empty captions": empty, "images that do not exist": missing}
    found: dict[str, list[str]] = {}
    if present:
        gone = [index for index in missing if paths[index]]  # a path to nothing is a mistake, not an empty cell
        has = {"image": _all_but(missing, len(captions)), "text": _all_but(empty, len(captions)), **present}
        alone = [index for index in range(len(captions)) if sum(each[index] for each in has.values()) < 2]
        halves = {"images that do not exist": gone, "samples of one modality alone": alone}
        found["samples of one modality alone"] = [f"row {index}: {_names_of(has, index)}" for index in alone]
    found["images that do not exist"] = [
        f"row {index}: '{paths[index]}'" for index in halves["images that do not exist"]
    ]
    found["empty captions"] = [f"row {index}" for index in halves.get("empty captions", ())]
    hint = "Rows are counted from 0, and relative image paths start from data.image_root. "
    report_half_pairs(dict(sorted(found.items())), columns.source_name, on_missing, hint)
    incomplete = {index for indices in halves.values() for index in indices}
    if len(incomplete) == len(captions):
        what = "no sample of two modalities" if present else "no pair of an image and a caption"
        raise ValueError(f"{columns.source_name} holds {what}.")
    keep = [index for index in range(len(captions)) if index not in incomplete]
    if present:
        _tell_what_is_lacking(has, keep, columns.source_name)
    return keep


def _all_but(indices: list[int], number: int) -> list[bool]:
    lacking = set(indices)
    return [index not in lacking for index in range(number)]


def _names_of(has: dict[str, list[bool]], index: int) -> str:
    names = [name for name, present in has.items() if present[index]]
    return f"the {names[0]}" if names else "nothing"


def _tell_what_is_lacking(has: dict[str, list[bool]], keep: list[int], source_name: str) -> None:
    numbers = {name: sum(not present[index] for index in keep) for name, present in has.items()}
    lacking = ", ".join(f"the {name}: {number}" for name, number in numbers.items() if number)
    if lacking:
        logger.warning(
            f"{source_name}: of {len(keep)} samples some lack something ({lacking}). Each counts for those pairs of "
            "modalities that it has."
        )


def _image_ids(rows: Dataset, paths: list, stored: list, keep: list[int], columns: Columns) -> list[str]:
    """The id of each row's image; "" for the rows that are not in `keep`, or have no image."""
    ids = [""] * len(rows)
    if columns.image_id is None:
        for index in keep:
            data = rows[index][columns.image]["bytes"] if stored[index] else None
            if data is not None or paths[index]:
                ids[index] = columns.id_of(paths[index]) if data is None else hash_of_bytes(data)
        return ids
    values = _values(rows, columns.image_id)
    first_rows: dict[str, int] = {}
    for index in keep:
        if _is_missing(paths[index], stored[index]):
            continue
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
    return text_of(value)


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
    return pair["caption"] is not None


def _stream_pair(row: dict, index: int, columns: Columns, skip: bool) -> dict:
    """The canonical pair of one row. A half pair raises an error, or, with `skip`, has the caption None."""
    caption = columns.caption_of(row.get(columns.caption))
    try:
        image = _undecoded(row.get(columns.image), columns)
    except ValueError as error:
        raise ValueError(f"{columns.source_name}, row {index} (from 0): {error}.") from error
    try:
        further = {modality.name: modality.value_of(row) for modality in columns.modalities}
        problem = _problem(image, caption, further, bool(columns.modalities))
    except FileNotFoundError as error:
        further, problem = {}, str(error)
    if problem and not skip:
        raise ValueError(
            f"{columns.source_name}, row {index} (from 0): {problem}. Complete the pair, or leave such rows out with "
            "data.on_missing=skip."
        )
    if problem:
        logger.warning("%s, row %d (from 0): skipped, %s", columns.source_name, index, problem)
        pair = {"image": image, "caption": None, "image_id": "", **{name: row[name] for name in columns.extras}}
        return pair | dict.fromkeys(modality.name for modality in columns.modalities)
    if _is_missing(image["path"], image["bytes"] is not None):
        image_id = ""
    elif columns.image_id is not None:
        image_id = _given_id(row[columns.image_id], index, columns)
    else:
        image_id = columns.id_of(image["path"]) if image["bytes"] is None else hash_of_bytes(image["bytes"])
    pair = {"image": image, "caption": caption, "image_id": image_id}
    if columns.labels:
        pair["label"] = columns.label_of(row[name] for name in columns.labels)
    return pair | further | {name: row[name] for name in columns.extras}


def _undecoded(image: Any, columns: Columns) -> dict[str, Any]:
    """An image of any kind that a column holds as `{"bytes", "path"}`, with its full path."""
    if isinstance(image, (bytes, bytearray)):
        return {"bytes": image, "path": None}
    if not isinstance(image, dict):
        image = {"bytes": None, "path": image}
    return {"bytes": image.get("bytes"), "path": columns.path_of(image.get("path"))}


def _problem(image: dict[str, Any], caption: str, further: dict[str, Any], may_lack: bool) -> str | None:
    """What makes a row half a pair; None if it is a whole one."""
    missing = _is_missing(image["path"], image["bytes"] is not None)
    if missing and (image["path"] or not may_lack):
        return f"its image '{cut(image['path'])}' does not exist"
    if not may_lack:
        return None if caption else "its caption is empty"
    names = [name for name, has in (("image", not missing), ("text", caption)) if has]
    names += [name for name, value in further.items() if value is not None]
    return None if len(names) >= 2 else f"it has {f'the {names[0]} alone' if names else 'nothing'}"
