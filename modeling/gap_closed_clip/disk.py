"""A folder that is full or may not be written: one error that names it and what helps, whatever library met it."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn


# Of the system: no space, the user's quota, a limit on the size of files.
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "files may not be so large",
}
# Of folders that are other people's, or mounted to be read alone.
LOCKED = {errno.EACCES: "permission denied", errno.EPERM: "permission denied", errno.EROFS: "it can only be read"}
# What libraries that keep no error number say: safetensors, and torch.save's writer.
WORDS = (
    "No space left on device",
    "os error 28",
    "Disk quota exceeded",
    "os error 122",
    "File too large",
    "os error 27",
)
WRITER = ("PytorchStreamWriter failed", "unexpected pos", "iostream error")


class DiskFull(OSError):
    """There is no room for what was being written; the message names the folder and what to do."""


def is_disk_full(error: BaseException | None) -> str:
    """What is full, in words, if that is what an error, or one that led to it, tells of; empty if not."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in FULL:
            return FULL[error.errno]
        text = str(error)
        if isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError":
            if any(words in text for words in (*WORDS, *WRITER)):
                return FULL[errno.ENOSPC]
        error = error.__cause__ or error.__context__
    return ""


@contextmanager
def writing(folder: str | Path, what: str, wanted: int | None = None, consequence: str = "") -> Iterator[None]:
    """
    Around whatever writes into a folder.

    Args:
        folder: where it writes.
        what: is written, e.g. "checkpoint-20".
        wanted: bytes that it takes, if that is known; checked before anything is written.
        consequence: a sentence on the state that a full disk leaves behind, and how to go on.

    Raises:
        DiskFull: there is no room.
        OSError: the folder, one that it lies in, or something in it may not be written.
    """
    if wanted is not None and wanted > free_bytes(folder):
        raise DiskFull(_message("the disk is too full", folder, what, wanted, consequence))
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if full := is_disk_full(error):
            raise DiskFull(_message(full, folder, what, wanted, consequence)) from error
        if locked := _locked(error, Path(folder).absolute()):
            raise OSError(
                f"{what} could not be written: {locked}. Make it writable. {consequence}".rstrip()
            ) from error
        raise


def _locked(error: Exception, folder: Path) -> str:
    """What may not be written, in a folder or above it, and why, if an error tells of that; not of what is read."""
    if not isinstance(error, OSError) or error.errno not in LOCKED or not isinstance(error.filename, str):
        return ""
    path = Path(error.filename).absolute()
    if not (path.is_relative_to(folder) or folder.is_relative_to(path)):
        return ""
    return f"{error.filename}: {LOCKED[error.errno]}"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """
    Lets a file be written whole or not at all.

    Yields:
        a path beside it, with the same suffix, to write to; it takes the file's place at the end.
    """
    path = Path(path)
    draft = path.with_name(f".draft.{path.name}")
    try:
        yield draft
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def free_bytes(folder: str | Path) -> int:
    """What is free on the disk of a folder, which need not be there yet."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.exists())).free


def size_of(folder: str | Path) -> int:
    """Bytes of the files in a folder and below."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def bytes_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of a model's weights, and of what an optimizer keeps of them."""
    kept = [] if optimizer is None else [value for state in optimizer.state.values() for value in state.values()]
    tensors = [*model.parameters(), *model.buffers(), *(value for value in kept if isinstance(value, torch.Tensor))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _message(full: str, folder: str | Path, what: str, wanted: int | None, consequence: str) -> str:
    needs = "" if wanted is None else f" It takes at least {readable_size(wanted)}, and"
    free = f"{needs} {readable_size(free_bytes(folder))} are free there"
    return f"{what} could not be written to {folder}: {full}.{free}. Make room there. {consequence}".rstrip()


def readable_size(number: int) -> str:
    """Bytes in words."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


__all__ = ["DiskFull", "bytes_of", "free_bytes", "is_disk_full", "readable_size", "replacing", "size_of", "writing"]
