"""Addresses in columns of images: which are opened."""

import fsspec
from huggingface_hub.constants import ENDPOINT

from ..model.fetch_gap_closed_clip import fetch


# What stands before `::` where `datasets` streams from an archive; other protocols of fsspec copy, run or log in.
ARCHIVES = ("zip", "tar", "gzip", "bz2", "lz4", "xz", "zstd")


def is_address(path: str) -> bool:
    """Whether a path is an address, and no file of this machine."""
    return "://" in path or path[:5].lower() == "file:"


def is_of_hub(address: str) -> bool:
    """Whether `datasets` made an address, of a file on the Hub or inside an archive, while it streamed a data set."""
    *archives, place = address.split("::")
    if any(archive.partition("://")[0] not in ARCHIVES for archive in archives):
        return False
    if not archives and not is_address(place):
        return False
    return not is_address(place) or place.startswith(("hf://", f"{ENDPOINT}/"))


def check_address(path: str | None, allow_urls: bool) -> None:
    """
    Checks that an address in a data set may be opened; whatever is none passes.

    Args:
        allow_urls: of [`DataArguments`]: whether `http` and `https` are.

    Raises:
        ValueError: it may not.
    """
    if not path or not is_address(path) or is_of_hub(path):
        return
    if not path[:8].lower().startswith(("http://", "https://")):
        raise ValueError(f"{path!r:.200} is an address that is never opened: give a file, or what is in it")
    if not allow_urls:
        raise ValueError(
            f"{path!r:.200} is an address, and a data set's addresses are not opened unless data.allow_urls=true"
        )


def read_address(address: str) -> bytes:
    """
    The bytes at an address: of the Hub as `datasets` reads it, of others from public servers alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `fetch`.
    """
    if is_of_hub(address):
        with fsspec.open(address, "rb") as file:
            return file.read()
    return fetch(address, public_only=True)


__all__ = ["check_address", "is_address", "is_of_hub", "read_address"]
