"""What is searched and searched for: an item's image, text and further modalities, checked."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ImageProcessingMixin

from .fusion_gap_closed_clip import fuse
from .load_images_gap_closed_clip import is_url


IMAGE, TEXT = "image", "text"


def parts_of(item: Any, location: str, further: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    {modality: value} of an item; an image is what `load_image` takes.

    Args:
        item: a text, an image, or a mapping of one or more modalities to what each holds.
        location: where it stands, for the error message.
        further: the processors of further modalities, by name.

    Raises:
        ValueError: it is none of these; a value is not one of its modality.
    """
    further = further or {}
    names = {IMAGE, TEXT, *further}
    if isinstance(item, dict) and (unknown := [key for key in item if key not in names]):
        raise ValueError(_unknown_key(item, unknown[0], location, further))
    if not isinstance(item, dict) or not item:
        kind, value = _image_or_text(item, location, further)
        return {kind: value}
    parts = {}
    for name, value in item.items():
        if value is None and name in (IMAGE, TEXT):
            raise ValueError(f"{location}, {name}: there is no value: give one, or leave {name} out.")
        if name in (IMAGE, TEXT):
            parts[name] = _image_or_text({name: value}, location, further)[1]
        elif isinstance(further[name], ImageProcessingMixin):
            parts[name] = _image_or_text({IMAGE: value}, f"{location}, {name}", further)[1]
        else:
            parts[name] = check_sample(name, further[name], value, location)
    return parts


def _unknown_key(item: dict, key: Any, location: str, further: Mapping[str, Any]) -> str:
    names = (IMAGE, TEXT, *further)
    owner = next((name for name, each in further.items() if key in getattr(each, "column_names", ())), None)
    meant = "" if owner is None else f" It is a field of {owner}: {{'{owner}': {{'{key}': ...}}}}."
    return (
        f"{location}: {item!r:.80} is neither image nor text: its key {key!r:.80} is no modality; there are "
        f"{', '.join(names)}.{meant} Several can be combined, {{'{IMAGE}': ..., '{names[-1]}': ...}}: leave out what "
        "an item lacks."
    )


def check_sample(name: str, processor: Any, value: Any, location: str) -> Any:
    """
    What a further modality holds of one item, if its processor takes it.

    Raises:
        ValueError: the processor's own words, or that nothing is given; with the location.
    """
    place = f"{location}, {name}"
    # By what they have and not by their classes: this may be a model folder's code, and the processor the package's.
    is_record = hasattr(processor, "column_names")
    if is_record and not isinstance(value, dict):
        raise ValueError(f"{place}: {value!r:.80} is no record: give a mapping of fields to values.")
    if value is None:
        raise ValueError(f"{place}: there is no value: give one, or leave {name} out.")
    if is_record or hasattr(processor, "shape"):
        try:
            encoded = processor([value])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}: {str(error).removeprefix('Record, row 0 (from 0), ')}") from error
        if is_record and not encoded["numbers_mask"].any() and not encoded["categories"].any():
            columns = ", ".join(processor.column_names)
            raise ValueError(f"{place}: there is no value: give one of {columns}, or leave {name} out.")
    return value


def together(embeds: Mapping[str, Tensor], weights: Mapping[str, float] | None) -> Tensor:
    """
    Items of several modalities to unit vectors (N, D).

    Args:
        embeds: {modality: (N, D)} unit vectors, rows of zeros where an item lacks the modality.
        weights: `config.fusion_weights`. All weigh alike in an item one of whose modalities has no weight there, since
            nothing measured says what it counts beside the others; and in an item whose modalities all weigh 0.
    """
    plain = fuse(embeds)
    known = {name: z for name, z in embeds.items() if name in (weights or {})}
    if not known:
        return plain
    weighted = fuse(known, weights)
    is_weighted = weighted.any(-1, keepdim=True)  # (N, 1)
    for name in embeds.keys() - known.keys():
        is_weighted &= ~embeds[name].any(-1, keepdim=True)  # what other items have says nothing of this one
    return torch.where(is_weighted, weighted, plain)


def _image_or_text(item: Any, location: str, further: Mapping[str, Any]) -> tuple[str, Any]:
    """("text", the text) or ("image", what `load_image` takes) of an item."""
    types = (str, bytes, bytearray, Image.Image, np.ndarray, Tensor)
    if isinstance(item, dict) and len(item) == 1 and next(iter(item)) in (IMAGE, TEXT):
        kind, value = next(iter(item.items()))
    else:
        kind, value = TEXT if isinstance(item, str) else IMAGE, item
    value = os.fspath(value) if isinstance(value, os.PathLike) and kind == IMAGE else value
    is_vector = isinstance(value, np.ndarray | Tensor) and value.ndim not in (2, 3)
    if not isinstance(value, str if kind == TEXT else types) or is_vector:
        others = "".join(f", {{'{name}': ...}}" for name in further)
        raise ValueError(
            f"{location}: {_shown(item)} is neither image nor text: give a str (a text), a PIL image, a pathlib.Path, "
            f"bytes, an array or tensor (H, W) or (3, H, W), {{'image': path or URL}}{others}, or {{'text': ...}}."
        )
    if kind == IMAGE and isinstance(value, str) and not is_url(value) and not os.path.isfile(value):
        raise ValueError(f"There is no file {value:.200} ({location}).")
    return kind, value


def _shown(item: Any) -> str:
    """An item as an error message names it, on one line."""
    if isinstance(item, np.ndarray | Tensor):
        return f"{type(item).__name__} of the shape {tuple(item.shape)}"
    return f"{item!r:.80}"


__all__ = ["check_sample", "parts_of", "together"]
