"""Hashes that are the same in every process and every run; Python's own `hash` of a text is not."""

import hashlib


def stable_hash(value: str | bytes) -> int:
    """A hash of 63 bits, so that it fits a signed int64: BLAKE2b with 8 bytes of output, without the lowest bit."""
    data = value.encode() if isinstance(value, str) else value
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def hash_of_bytes(data: bytes) -> str:
    """The id of an image without a name: a hash of its content, as text."""
    return f"{stable_hash(data):016x}"


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


def group_ids(image_id: str, caption: str) -> tuple[int, int]:
    """Hashes of a pair's image and of its caption. Pairs that share one of them are not negatives of each other."""
    return stable_hash(image_id), stable_hash(normalize_caption(caption))
