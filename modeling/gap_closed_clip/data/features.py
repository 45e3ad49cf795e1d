"""What frozen towers give for images and captions: computed once, kept on disk, and read a batch at a time."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME

from .epoch import Epoch
from .hashing import stable_hash
from .image_ids import image_ids_of
from .sampler import group_ids_of


logger = getLogger(__name__)

DIGEST_SIZE = 16  # bytes
DTYPE = np.dtype(np.float16)
# Columns by which the collator opens a row's images, also those of further modalities.
OF_IMAGES = ("augment", "window")


def default_feature_cache() -> Path:
    """Where features are kept unless `data.feature_cache` says otherwise: beside what was downloaded from the Hub."""
    return Path(HF_HOME) / "gap_closed_clip" / "features"


def digest(*parts: bytes) -> bytes:
    """A digest of `DIGEST_SIZE` bytes of some bytes; the limits of the parts count."""
    hashed = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.digest()


class FeatureStore:
    """Features of items (images in some views, captions) by the items' digests, in a folder that only grows.

    An item counts from the moment its digest is written, which is after its features are on the disk. Whatever a
    killed run or a full disk leaves half-written lies behind the last item, and the next run writes over it. Features
    are read by rows from the file and never held in memory, and each process has a file handle of its own.

    Args:
        folder: of all stores.
        description: everything that features depend on besides the item: the tower's weights, the transforms. Stores
            of different descriptions lie in different subfolders, so that one never meets the features of another.
        views: V, number of views of an item.
        width: C, number of features of a view.

    Raises:
        OSError: the folder can't be written to.
    """

    def __init__(self, folder: str | Path, description: dict[str, Any], views: int, width: int):
        self.views, self.width = views, width
        described = json.dumps({**description, "views": views, "width": width, "dtype": DTYPE.name}, sort_keys=True)
        self.folder = Path(folder) / digest(described.encode()).hex()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "description.json").exists():  # a complete store may be read-only
                (self.folder / "description.json").write_text(described + "\n", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error
        self._features, self._digests = self.folder / "features.bin", self.folder / "digests.bin"
        self._record = views * width * DTYPE.itemsize  # bytes of an item
        self._number = 0  # of items in the files
        self._row_of: dict[bytes, int] = {}
        self._reader: tuple[int, BinaryIO] | None = None  # process id, file
        self._refresh()

    def _unwritable(self, error: OSError) -> OSError:
        return OSError(
            f"The features of frozen towers can't be kept in {self.folder} ({error.strerror}). Name another folder "
            "with data.feature_cache, or set data.feature_views=0 to run the towers in every step."
        )

    def __len__(self) -> int:
        return self._number

    def __getstate__(self) -> dict[str, Any]:
        # A worker of a DataLoader reads by rows; it needs neither the open file nor the digests.
        return self.__dict__ | {"_reader": None, "_row_of": {}}

    def missing(self, digests: Sequence[bytes]) -> list[int]:
        """Positions of the items that are not there yet; of equal ones the first."""
        first = {item: position for position, item in reversed(list(enumerate(digests)))}
        return sorted(position for item, position in first.items() if item not in self._row_of)

    def rows(self, digests: Sequence[bytes]) -> np.ndarray:
        """(N,) int64: the row of each item, for `read`.

        Raises:
            KeyError: an item is not there.
        """
        return np.fromiter((self._row_of[item] for item in digests), dtype=np.int64, count=len(digests))

    @contextmanager
    def writing(self, digests: Sequence[bytes]) -> Iterator[list[int]]:
        """Lets one process at a time append; the others wait, and then find what it has written.

        Args:
            digests: of the items that are wanted. If all are there, nothing is locked and nothing has to be writable.

        Yields:
            The positions of those that are missing.

        Raises:
            OSError: the folder can't be written to.
        """
        missing = self.missing(digests)
        if not missing:
            yield missing
            return
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("Another process is filling %s; waiting for it.", self.folder)
            lock.acquire()
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._refresh()
            yield self.missing(digests)
        finally:
            lock.release()

    def append(self, digests: Sequence[bytes], features: np.ndarray) -> None:
        """Adds items inside `writing()`: when it returns they are safe.

        Args:
            digests: of N items that are not there yet.
            features: (N, V, C).

        Raises:
            ValueError: a feature is NaN or beyond what float16 can hold.
            OSError: the disk is full; what was there before is still there.
        """
        with np.errstate(over="ignore"):
            records = features.astype(DTYPE)
        if not np.isfinite(records).all():
            raise ValueError(
                "A frozen tower gave features that are NaN, infinite or above 65504, which can't be kept as float16. "
                "Set data.feature_views=0 to run the towers in every step."
            )
        number = self._number
        _write_at(self._features, number * self._record, records.tobytes())
        _write_at(self._digests, number * DIGEST_SIZE, b"".join(digests))
        self._row_of.update(zip(digests, range(number, number + len(digests)), strict=True))
        self._number = number + len(digests)

    def read(self, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(n, C) float32: one view of each of n items.

        Args:
            rows: (n,) rows of the items.
            views: (n,) which view of each, from 0.

        Raises:
            OSError: the file is gone, truncated or damaged.
        """
        size = self.width * DTYPE.itemsize
        buffer = bytearray(len(rows) * size)
        target = memoryview(buffer)
        file = self._open()
        for index, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
            file.seek(row * self._record + view * size)
            if file.readinto(target[index * size : (index + 1) * size]) != size:  # type: ignore[attr-defined]
                raise OSError(f"{self._features} has been truncated since this run began. Start the run again.")
        features = np.frombuffer(buffer, DTYPE).reshape(len(rows), self.width)
        if not np.isfinite(features).all():
            raise OSError(f"{self._features} is damaged. Delete the folder {self.folder} and start the run again.")
        return features.astype(np.float32)

    def _open(self) -> BinaryIO:
        """The file, opened by this process: a forked one would share the place where it reads."""
        if self._reader is None or self._reader[0] != os.getpid():
            try:
                self._reader = os.getpid(), open(self._features, "rb", buffering=0)
            except FileNotFoundError as error:
                gone = f"{self._features} has been deleted since this run began. Start the run again."
                raise OSError(gone) from error
        return self._reader[1]

    def _refresh(self) -> None:
        """Looks which items are there."""
        digests = self._digests.read_bytes() if self._digests.is_file() else b""
        size = self._features.stat().st_size if self._features.is_file() else 0
        self._number = min(len(digests) // DIGEST_SIZE, size // self._record)
        self._row_of = {digests[row * DIGEST_SIZE : (row + 1) * DIGEST_SIZE]: row for row in range(self._number)}


def _write_at(path: Path, offset: int, data: bytes) -> None:
    """Writes into a file, cutting off what lies behind, and waits until the disk has it."""
    with open(path, "r+b" if path.exists() else "w+b") as file:
        file.truncate(offset)
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class StoredFeatures:
    """The features of one modality of N pairs.

    Args:
        store: where they are.
        rows: (N,) row of each pair there; -1 for a pair that lacks the modality, whose features are zeros.
    """

    def __init__(self, store: FeatureStore, rows: np.ndarray):
        self.store, self.rows = store, rows

    def read(self, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(n, C) float32: one view of each of n pairs."""
        rows = self.rows[indices]
        there = rows >= 0
        if there.all():
            return self.store.read(rows, views)
        features = np.zeros((len(rows), self.store.width), np.float32)
        features[there] = self.store.read(rows[there], views[there])
        return features


class FeaturePairs(torch.utils.data.Dataset):
    """Pairs whose frozen towers have run: rows for `PairCollator` with `pooled_image` or `pooled_text` or both, or for
    `CaptionCollator` with `encoded_image`.

    A batch is read at once, and where both towers have run, neither an image nor a caption is touched. Which view of
    an image a batch gets depends on the batch's pairs, their order and, where it comes again, the epoch: a run that
    was killed and resumed, which meets the same batches, gets the same views.

    Args:
        pairs: canonical pairs, as `load_pairs` gives them.
        images: features of their images; None where the image tower is to run.
        texts: features of their captions; None where the text tower is to run.
        varied: draw a view of each image at random; without it, always the first, the plain one.
        further: names of the further modalities, whose columns the rows have as well; with them also `present` (2,)
            bool, whether a sample has an image and a caption.
        image_column: what the rows call the features of images.
    """

    def __init__(
        self,
        pairs: Dataset,
        images: StoredFeatures | None,
        texts: StoredFeatures | None,
        varied: bool = False,
        further: Sequence[str] = (),
        image_column: str = "pooled_image",
    ):
        self.image_column, self.epoch = image_column, Epoch()
        self.pairs, self.images, self.texts, self.varied = pairs, images, texts, varied
        self.further = tuple(further)
        self._group_ids = np.array(group_ids_of(pairs), dtype=np.int64).reshape(-1, 2)
        columns = ["image_id", "caption"] if images is not None else pairs.column_names
        wanted = (*self.further, *OF_IMAGES) if self.further else ()
        kept = [name for name in wanted if name in pairs.column_names]
        if images is not None:
            columns = kept if texts is not None else [*columns, *kept]
        self._rest = pairs.select_columns(columns) if columns else None
        self._present = self._find_present() if self.further else None

    def _find_present(self) -> np.ndarray:
        """(N, 2) bool: whether a pair has an image (an id of it) and a caption."""
        columns = zip(image_ids_of(self.pairs), self.pairs["caption"], strict=True)
        return np.array([(bool(image_id), bool(caption)) for image_id, caption in columns]).reshape(-1, 2)

    def select(self, indices: Sequence[int] | np.ndarray) -> "FeaturePairs":
        """Some of the pairs, in this order."""
        positions = np.asarray(indices, dtype=np.int64)

        def some(features: StoredFeatures | None) -> StoredFeatures | None:
            return None if features is None else StoredFeatures(features.store, features.rows[positions])

        return FeaturePairs(
            self.pairs.select(positions),
            some(self.images),
            some(self.texts),
            self.varied,
            self.further,
            self.image_column,
        )

    def plain(self) -> "FeaturePairs":
        """The same pairs with the plain view of every image."""
        return FeaturePairs(self.pairs, self.images, self.texts, further=self.further, image_column=self.image_column)

    def set_epoch(self, epoch: int) -> None:
        """Has batches draw other views than in other epochs."""
        self.epoch.set(epoch)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | str) -> Any:
        """A row, or, by its name, a column of the pairs."""
        return self.pairs[key] if isinstance(key, str) else self.__getitems__([key])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """The rows of a batch, which a DataLoader asks for at once."""
        positions = np.asarray(indices, dtype=np.int64)
        columns: dict[str, Any] = {"group_ids": self._group_ids[positions]}
        if self._present is not None:
            columns["present"] = self._present[positions]
        if self.images is not None:
            columns[self.image_column] = self.images.read(positions, self._views(positions, self.images.store.views))
        if self.texts is not None:
            columns["pooled_text"] = self.texts.read(positions, np.zeros_like(positions))
        rest = [{} for _ in indices] if self._rest is None else self._rest.__getitems__(indices)
        return [row | {name: column[index] for name, column in columns.items()} for index, row in enumerate(rest)]

    def _views(self, positions: np.ndarray, number: int) -> np.ndarray:
        if not self.varied:
            return np.zeros_like(positions)
        seed = positions.tobytes()
        if epoch := self.epoch.of_batch(len(positions)):
            seed += epoch.to_bytes(8, "little")
        return np.random.default_rng(stable_hash(seed)).integers(number, size=len(positions))


__all__ = ["FeaturePairs", "FeatureStore", "StoredFeatures", "default_feature_cache", "digest"]
