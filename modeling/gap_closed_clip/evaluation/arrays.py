"""Embeddings that others have computed: pairs of `.npy` files, or a `.safetensors` file with two tensors."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..data.tables import as_table, other_separator
from ..messages import shorten, suggest
from .pair_embeddings import Columns, PairEmbeddings
from .post_hoc import unit


ENDINGS = (".npy", ".safetensors")
SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass
class ArrayFiles:
    """
    Where the embeddings of one model lie.

    Args:
        image, text: two `.npy` files; or one `.safetensors` file as both.

    Raises:
        ValueError: they are no such files.
    """

    image: str
    text: str

    @classmethod
    def parse(cls, word: str) -> "ArrayFiles":
        """`images.npy,texts.npy` or `both.safetensors`."""
        files = word.split(",")
        endings = [Path(file).suffix for file in files]
        if endings == [".safetensors"]:
            return cls(word, word)
        if endings != [".npy", ".npy"]:
            raise ValueError(
                f"{word}: embeddings are two arrays, images first, `images.npy,texts.npy`, or one file with two "
                "tensors, `both.safetensors`."
            )
        if files[0] == files[1]:
            raise ValueError(f"{word}: images and captions are two arrays, and one file is named twice.")
        return cls(*files)


def is_arrays(word: str) -> bool:
    """Whether a word of the command line names embeddings: one file or more with the ending of an array."""
    return any(file.endswith(ENDINGS) for file in word.split(","))


def load_arrays(files: ArrayFiles, columns: Columns | None = None) -> PairEmbeddings:
    """
    The embeddings of N pairs, row i of both arrays belonging together; made unit vectors.

    Args:
        columns: of the N pairs, where more is known of them; default: every row is an image and a caption of its own.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no arrays of floats (N, D) of one shape, values that are not finite, rows of zeros, or another
            number of pairs than in `columns`.
    """
    arrays = _read_safetensors(files.image) if files.image == files.text else _read_npy(files)
    (image_name, image), (text_name, text) = arrays.items()
    for name, array in arrays.items():
        _check(name, array)
    if image.shape != text.shape:
        raise ValueError(
            f"{image_name} has the shape {image.shape} and {text_name} {text.shape}: row i of both is one pair, so "
            "repeat the embedding of an image that has several captions (and say so with image_ids)."
        )
    columns = columns or columns_of_rows(len(image))
    if len(columns.image_ids) != len(image):
        raise ValueError(
            f"{image_name} has {len(image)} rows and there are {len(columns.image_ids)} pairs: the embeddings have to "
            "be of the same pairs that have an image and a caption, in their order."
        )
    image, text = (unit(array).astype(np.float32) for array in (image, text))
    return PairEmbeddings(image, text, *columns)


def columns_of_rows(
    number: int, image_ids: str | None = None, caption_ids: str | None = None, labels: str | None = None
) -> Columns:
    """
    What is known of N pairs that only their embeddings tell of.

    Args:
        number: N.
        image_ids, caption_ids: where the ids are: a text file with a line for each pair, or `table.csv:column`; rows
            of one id are one image, or one caption. Default: every row is one of its own.
        labels: where the labels are; an empty line is no label. Default: there are none.

    Raises:
        FileNotFoundError, ValueError: a file or column that isn't there, has another number of rows, or ids that are
            empty.
    """
    own = [str(row) for row in range(number)]
    images = own if not image_ids else _read_ids("image_ids", image_ids, number)
    captions = own if not caption_ids else _numbered(_read_ids("caption_ids", caption_ids, number))
    found = [""] * number if not labels else read_lines("labels", labels, number)
    return Columns(images, captions, found, [""] * number)


def read_lines(setting: str, place: str, number: int) -> list[str]:
    """
    The lines of a text file, or a column of a table (`table.csv:column`, or of a .tsv).

    Args:
        setting: that asks for them, for messages.
        place: the file, or file and column.
        number: how many there have to be.

    Raises:
        FileNotFoundError, ValueError: as `columns_of_rows`.
    """
    path, _, column = place.partition(":") if not Path(place).is_file() else (place, "", "")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{setting}: there is no file {path}.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{setting}: {path} is no text in UTF-8 ({error}).") from error
    if column or as_table(Path(path)).kind in SEPARATORS:
        lines = _column(setting, path, text, column)
        while len(lines) > number and not lines[-1]:  # empty lines at the end of the file
            lines.pop()
    else:
        lines = [line.strip() for line in io.StringIO(text)]  # str.splitlines splits at form feeds, too
    if len(lines) != number:
        raise ValueError(f"{setting}: {place} has {len(lines)} rows and there are {number} pairs.")
    return lines


def _read_ids(setting: str, place: str, number: int) -> list[str]:
    """`read_lines` of ids, none of which is empty: all rows without an id would be one image, or one caption."""
    ids = read_lines(setting, place, number)
    if empty := [row for row, identifier in enumerate(ids) if not identifier]:
        raise ValueError(
            f"{setting}: {place} has no id in {len(empty)} of {number} rows (counted from 0: {shorten(empty)}): give "
            f"each an id of its own, or leave {setting} out, and every row is one of its own."
        )
    return ids


def _column(setting: str, path: str, text: str, column: str) -> list[str]:
    try:
        separator = SEPARATORS.get(as_table(Path(path)).kind, ",")
        names, *rows = list(csv.reader(io.StringIO(text), delimiter=separator)) or [[]]
        if column not in names and (other := other_separator(names)):
            names, *rows = list(csv.reader(io.StringIO(text), delimiter=other))
    except csv.Error as error:
        raise ValueError(
            f"{setting}: {path} is no table that can be read ({error}): is there a quotation mark without its second?"
        ) from error
    if column not in names:
        what = f"no column '{column}'" if column else "several columns; name one, as in " + f"{path}:COLUMN"
        raise ValueError(f"{setting}: {path} has {what}. {suggest(column, names, 'columns')}")
    place = names.index(column)
    # An empty line is a row of a single column, which has no value, and none of several.
    return [row[place].strip() if len(row) > place else "" for row in rows if row or len(names) == 1]


def _numbered(ids: list[str]) -> list[str]:
    """Numbers in the place of ids: captions are compared without their case, and ids that differ in it are others."""
    numbers = {identifier: str(number) for number, identifier in enumerate(dict.fromkeys(ids))}
    return [numbers[identifier] for identifier in ids]


def _read_npy(files: ArrayFiles) -> dict[str, np.ndarray]:
    arrays = {}
    for file in (files.image, files.text):
        if not Path(file).is_file():
            raise FileNotFoundError(f"There is no file {file}.")
        try:
            arrays[file] = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(
                f"{file} is no array of numbers that can be read ({error}): save it with numpy.save(file, array)."
            ) from error
    return arrays


def _read_safetensors(file: str) -> dict[str, np.ndarray]:
    if not Path(file).is_file():
        raise FileNotFoundError(f"There is no file {file}.")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({error}).") from error
    by_kind = {kind: [name for name in tensors if kind in name] for kind in ("image", "text")}
    if any(len(names) != 1 for names in by_kind.values()) or by_kind["image"] == by_kind["text"]:
        raise ValueError(
            f"{file} holds the tensors {shorten(sorted(tensors)) or 'none'}: it needs one with 'image' in its name "
            "and one with 'text', as image_embeds and text_embeds."
        )
    found = {f"{name} of {file}": tensors[name] for (name,) in by_kind.values()}
    # float32: numpy has no bfloat16
    return {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in found.items()}


def _check(name: str, array: np.ndarray) -> None:
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} is of {array.dtype}: embeddings are floats (float16, float32, float64).")
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name} has the shape {array.shape}: embeddings are (N, D), a row for each pair.")
    if len(bad := np.flatnonzero(~np.isfinite(array).all(axis=1))):
        raise ValueError(f"{name} has NaN or infinite values, in {len(bad)} rows: {shorten(bad.tolist())}.")
    if len(zero := np.flatnonzero(~np.any(array, axis=1))):
        raise ValueError(f"{name} has {len(zero)} rows of zeros, which have no direction: {shorten(zero.tolist())}.")


__all__ = ["ArrayFiles", "columns_of_rows", "is_arrays", "load_arrays", "read_lines"]
