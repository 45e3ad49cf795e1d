"""What `load_pairs` makes and pairs of one's own may lack: ids of the images; and what to do about missing columns."""

import os
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from ..messages import shorten, suggest
from .columns import is_missing, text_of
from .hashing import hash_of_bytes
from .modalities import has_image


def image_id_of(row: dict[str, Any]) -> str:
    """The id of a row's image: its `image_id` if it has one, else the image's path, else a hash of its content.

    Raises:
        ValueError: there is neither an `image_id` nor an image.
    """
    if not is_missing(row.get("image_id")):
        return text_of(row["image_id"])
    check_columns(row, ("image",))
    image = row["image"]
    if isinstance(image, dict):  # undecoded, from a data set
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    if isinstance(image, bytes | bytearray):
        return hash_of_bytes(bytes(image))
    if isinstance(image, Image.Image):
        return hash_of_bytes(f"{image.mode} {image.size} ".encode() + image.tobytes())
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    if isinstance(image, np.ndarray):
        return hash_of_bytes(f"{image.dtype} {image.shape} ".encode() + np.ascontiguousarray(image).tobytes())
    raise ValueError(
        f"The image of a row is {image!r:.80}, of which no id can be made: give a path, the bytes of a file, a Pillow "
        "image or an array, or add a column 'image_id'."
    )


def image_ids_of(pairs: Any) -> list[str]:
    """The id of each pair's image, "" where it has none. Without an `image_id`, the image is read for it.

    Args:
        pairs: a `datasets.Dataset`, or another that gives a column by its name.

    Raises:
        ValueError: it gives no columns, has neither `image_id` nor `image`, or rows without an id and no images.
    """
    names = getattr(pairs, "column_names", None)
    if names is not None and "image_id" not in names:
        check_columns(names, ("image",))
        return [image_id_of(row) if has_image(row) else "" for row in pairs.select_columns("image")]
    given = list(column(pairs, "image_id"))
    ids = ["" if is_missing(value) else text_of(value) for value in given]
    lacking = [row for row, identifier in enumerate(ids) if not identifier]
    if "image" in (names or ()):
        for row, image in zip(lacking, pairs.select_columns("image").select(lacking), strict=True):
            ids[row] = image_id_of(image) if has_image(image) else ""
    elif unknown := [row for row in lacking if not isinstance(given[row], str)]:
        raise ValueError(
            f"The pairs have no image_id in {len(unknown)} rows (counted from 0: {shorten(unknown)}), and no images "
            "to make one of: give each row the id of its image."
        )
    return ids


def column(pairs: Any, name: str) -> Iterator[Any]:
    """The values of a column.

    Raises:
        ValueError: there is no such column, or the pairs have no columns to ask for.
    """
    if isinstance(pairs, Dataset):
        check_columns(pairs.column_names, (name,))
    try:
        return iter(pairs[name])
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{type(pairs).__name__} gives no column '{name}', by which pairs that share an image or a caption are "
            "known before they are read: use a datasets.Dataset, or set training.distinct_batches=false."
        ) from error


def check_columns(columns: Collection[str], needed: Collection[str]) -> None:
    """Check that rows have the columns that they need.

    Raises:
        ValueError: one is missing; the message names the nearest and all there are.
    """
    for name in needed:
        if name not in columns:
            raise ValueError(
                f"The pairs have no column '{name}'. {suggest(name, list(columns), 'columns')} Call it so, "
                f"dataset.rename_column(..., '{name}') (after remove_columns('{name}') where the name is taken), and "
                "give TrainingArguments remove_unused_columns=False: a Trainer drops the columns that forward does "
                "not name."
            )


__all__ = ["check_columns", "column", "image_id_of", "image_ids_of"]
