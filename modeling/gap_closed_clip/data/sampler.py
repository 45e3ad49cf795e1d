"""Batches in which no two pairs share an image or a caption, as far as that is possible."""

from collections.abc import Iterator
from logging import getLogger

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

from .hashing import group_ids


logger = getLogger(__name__)

# Batches tried for a pair before it is put aside; more find hardly more, and surplus pairs would try them all.
MAX_PROBES = 64


def group_ids_of(pairs: Dataset) -> list[tuple[int, int]]:
    """The collator's `group_ids` of every pair, without touching the images."""
    return [group_ids(*row) for row in zip(pairs["image_id"], pairs["caption"], strict=True)]


class DistinctSampler(Sampler[int]):
    """An order of the pairs for one epoch, such that batches cut from it hold distinct images and captions.

    The last batch, if it is not full, is drawn first, at random: where it is left out, every pair is equally likely
    to be. The others are dealt out to the full batches like cards: the pairs whose image or caption is the most
    frequent first, each to the next batch that has room and neither of the two yet; what finds no place swaps with a
    pair that does; the unique ones last, into what room is left. An image or a caption that is more frequent than
    there are batches cannot be kept apart: the surplus shares batches (nothing is dropped; the loss masks such pairs
    by their group ids), and is logged.

    The order is another in each epoch and depends on nothing but (seed, epoch): call `set_epoch`, as Trainer and
    accelerate do. O(N) unless most pairs are surplus.

    Args:
        groups: (image, caption) hashes of each pair, from `group_ids_of`.
        batch_size: pairs that must be distinct: one process' batch times the number of processes, as accelerate
            hands out consecutive batches to them.
        seed: with the epoch, it fixes the order.
        drop_last: leave the last batch out where it is not full.

    Raises:
        ValueError: `batch_size` below 1, or no pairs.
    """

    def __init__(self, groups: list[tuple[int, int]], batch_size: int, seed: int = 0, drop_last: bool = False):
        if batch_size < 1 or not groups:
            raise ValueError(f"{len(groups)} pairs in batches of {batch_size}: there must be at least 1 of each.")
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        images, captions = zip(*groups, strict=True)
        self.images, image_counts = _renumber(images)
        self.captions, caption_counts = _renumber(captions)
        # The more frequent of a pair's two groups: how often it occurs, and a number of its own.
        by_image, by_caption = image_counts[self.images], caption_counts[self.captions]
        self.frequency = np.maximum(by_image, by_caption)
        self.group = np.where(by_image >= by_caption, self.images, self.captions + len(image_counts))
        num_batches = -(-len(groups) // batch_size)
        surplus = max(int(np.maximum(counts - num_batches, 0).sum()) for counts in (image_counts, caption_counts))
        if surplus:
            logger.warning(
                "%d of %d pairs have an image or a caption that is more frequent than the %d batches of an epoch: "
                "they share a batch and are masked in the loss. Smaller batches keep more of them apart.",
                surplus,
                len(groups),
                num_batches,
            )

    def __len__(self) -> int:
        return len(self.images) // self.batch_size * self.batch_size if self.drop_last else len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """The order that the next iteration takes."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        permutation = random.permutation(len(self.images))
        last = self._draw_last_batch(permutation)
        batches = self._deal(np.setdiff1d(permutation, last, assume_unique=True), random)
        for index in random.permutation(len(batches)):
            yield from random.permutation(batches[index]).tolist()
        if not self.drop_last:
            yield from last

    def _draw_last_batch(self, permutation: np.ndarray) -> list[int]:
        """The rows of the batch that is not full: the first that go together, then whatever is left."""
        size = len(self.images) % self.batch_size
        batch, taken, refused = [], set(), []
        for row in permutation.tolist():
            if len(batch) == size:
                return batch
            if taken.isdisjoint(self._keys(row)):
                batch.append(row)
                taken.update(self._keys(row))
            else:
                refused.append(row)
        return batch + refused[: size - len(batch)]

    def _keys(self, row: int) -> tuple[int, int]:
        """Image and caption of a row as numbers that do not collide: images are >= 0, captions < 0."""
        return int(self.images[row]), -1 - int(self.captions[row])

    def _deal(self, rows: np.ndarray, random: np.random.Generator) -> list[list[int]]:
        """Full batches of `rows`, whose number is a multiple of the batch size."""
        num_batches = len(rows) // self.batch_size
        batches, taken = [[] for _ in range(num_batches)], [set() for _ in range(num_batches)]
        shuffled = random.permutation(rows)
        repeated = shuffled[self.frequency[shuffled] > 1]
        # Most frequent first; the members of a group one after the other, groups of one frequency in random order.
        group_order = random.permutation(self.group.max() + 1)
        repeated = repeated[np.lexsort((group_order[self.group[repeated]], -self.frequency[repeated]))]
        refused, start = [], 0
        for row in repeated.tolist():
            keys = self._keys(row)
            for step in range(min(num_batches, MAX_PROBES)):
                index = (start + step) % num_batches
                if len(batches[index]) < self.batch_size and taken[index].isdisjoint(keys):
                    batches[index].append(row)
                    taken[index].update(keys)
                    start = index + 1
                    break
            else:
                refused.append(row)
        room = [index for index, batch in enumerate(batches) for _ in range(self.batch_size - len(batch))]
        for row in refused:
            self._swap_in(row, room.pop(), batches, taken, random)
        unique = shuffled[self.frequency[shuffled] == 1].tolist()
        for row, index in zip(unique, room, strict=True):
            batches[index].append(row)
        return batches

    def _swap_in(self, row: int, home: int, batches: list, taken: list, random: np.random.Generator) -> None:
        """Put a refused row into a batch that takes it, and one of that batch's rows into `home`, which has room.

        If none is found (always so for surplus), the row itself goes to `home`.
        """
        keys = self._keys(row)
        tries = 0 if self.frequency[row] > len(batches) else MAX_PROBES
        for index in random.integers(len(batches), size=tries).tolist():
            if index == home or not batches[index] or not taken[index].isdisjoint(keys):
                continue
            for place, other in enumerate(batches[index]):
                other_keys = self._keys(other)
                if taken[home].isdisjoint(other_keys):
                    batches[index][place] = row
                    batches[home].append(other)
                    taken[index] = (taken[index] - set(other_keys)) | set(keys)
                    taken[home].update(other_keys)
                    return
        batches[home].append(row)
        taken[home].update(keys)


def _renumber(values: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Number of each value (0, 1, ...), and how often each number occurs."""
    _, numbers, counts = np.unique(np.array(values, dtype=np.int64), return_inverse=True, return_counts=True)
    return numbers, counts
