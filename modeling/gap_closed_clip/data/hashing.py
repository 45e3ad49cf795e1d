"""Ids that are the same in every process and every run (Python's own `hash` of text is not)."""

import hashlib


def stable_hash(value: str | bytes) -> int:
    """A 63-bit hash (0 ... 2^63 - 1, so it fits a signed int64): BLAKE2b's first 8 bytes without the sign."""
    data = value.encode() if isinstance(value, str) else value
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def normalize_caption(caption: str) -> str:
    """The caption without regard to case and white space: captions equal in this form are one caption."""
    return " ".join(caption.split()).casefold()


def group_ids(image_id: str, caption: str) -> tuple[int, int]:
    """What a pair must share with another, one of the two, to be no negative of it."""
    return stable_hash(image_id), stable_hash(normalize_caption(caption))
