"""Hashes that are the same in every process and every run; Python's own `hash` of a text is not."""

import hashlib
from typing import Any


def stable_hash(value: str | bytes) -> int:
    """A hash of 63 bits, so that it fits a signed int64: BLAKE2b with 8 bytes of output, without the lowest bit."""
    data = value.encode() if isinstance(value, str) else value
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def hash_of_bytes(data: bytes) -> str:
    """The id of an image without a name: a hash of its content, as text."""
    return f"{stable_hash(data):016x}"


def digest_of(value: Any) -> str:
    """A digest of nested lists, mappings and arrays by all their values, the same in every process."""
    hashed = hashlib.blake2b(digest_size=16)

    def add(part: Any) -> None:
        if isinstance(part, list | tuple):
            hashed.update(f"list of {len(part)} ".encode())
            for each in part:
                add(each)
        elif isinstance(part, dict):
            add([each for item in sorted(part.items()) for each in item])
        elif hasattr(part, "tobytes"):  # an array
            hashed.update(f"{part.dtype} {part.shape} ".encode() + part.tobytes())
        else:
            hashed.update(repr(part).encode() + b" ")

    add(value)
    return hashed.hexdigest()


def normalize_caption(caption: str) -> str:
    """The form in which captions are compared: those that differ only in case or white space are one caption.

    Raises:
        ValueError: the caption is no text.
    """
    if not isinstance(caption, str):
        raise ValueError(
            f"A caption is {caption!r:.80}; it has to be one text. Of several captions make a row each, and leave out "
            "rows that have none."
        )
    return " ".join(caption.split()).casefold()


def group_ids(image_id: str, caption: str, lacking: str | None = None) -> tuple[int, int]:
    """Hashes of a pair's image and of its caption. Pairs that share one of them are not negatives of each other.

    Args:
        lacking: where further modalities let a pair lack its image or its caption (""): what tells it from all other
            pairs, and so stands in its place.
    """
    normal = normalize_caption(caption)
    if lacking is None:
        return stable_hash(image_id), stable_hash(normal)
    image = stable_hash(image_id) if image_id else stable_hash(f"no image, {lacking}")
    return image, stable_hash(normal) if normal else stable_hash(f"no caption, {lacking}")
