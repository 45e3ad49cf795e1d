"""An order of the pairs in which no two of a batch share an image or a caption, as far as that is possible."""

from collections import Counter
from collections.abc import Iterator
from logging import getLogger

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

from .hashing import group_ids
from .image_ids import column, image_ids_of


logger = getLogger(__name__)

# Batches that are tried for a pair before it is set aside. Trying more helps hardly any pair, and the surplus pairs,
# which fit nowhere, would try them all.
MAX_PROBES = 64


def group_ids_of(pairs: Dataset) -> list[tuple[int, int]]:
    """The `group_ids` of every pair, as the collator makes them, by the column `image_id` without reading an image.

    An image or a caption that is lacking (the id or the caption is "") has an id of its own, shared with no other.

    Raises:
        ValueError: a column is missing.
    """
    rows = zip(image_ids_of(pairs), column(pairs, "caption"), strict=True)
    return [group_ids(*row, lacking=str(index)) for index, row in enumerate(rows)]


def sources_of(pairs: Dataset) -> list[str]:
    """The name of each pair's source; none where there is no list of sources."""
    try:
        return list(pairs["source"])
    except (KeyError, ValueError):  # which of them, depends on the version of `datasets`
        return []


class DistinctSampler(Sampler[int]):
    """Gives an order of the pairs in each epoch; the batches cut from it hold distinct images and captions.

    1. The last batch, if it will not be full, is drawn at random. So every pair is equally likely to be left out where
       that batch is dropped.
    2. The other pairs are dealt out to the full batches like cards, those with the most frequent image or caption
       first: each goes to the next batch that has room and holds neither its image nor its caption. A pair that finds
       no such batch takes the place of one that can move.
    3. Pairs whose image and caption are unique fill the room that is left.

    An image or a caption that is more frequent than there are batches cannot be kept apart. Such surplus pairs share
    batches, and a warning tells their number. Nothing is dropped, and the loss masks these pairs by their group ids.

    The order differs from epoch to epoch and depends only on the seed and the epoch: call `set_epoch`, as Trainer and
    accelerate do. It takes O(N) time unless most pairs are surplus.

    Args:
        groups: hashes of the image and of the caption of each pair, from `group_ids_of`.
        batch_size: how many consecutive pairs are to be distinct: the batch of one process times the number of
            processes, since accelerate deals consecutive batches out to them.
        seed: fixes the order, together with the epoch.
        drop_last: leave the last batch out if it is not full.

    Raises:
        ValueError: `batch_size` is below 1, or there are no pairs.
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
        # The more frequent of a pair's image and caption: how often it occurs, and a number that identifies it.
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
        """Choose the epoch whose order the next iteration gives."""
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

    def fill_up(self, order: list[int]) -> list[int]:
        """More rows for the last batch of an order, if it is not full: the first ones of it that are distinct."""
        size = len(order) % self.batch_size
        last = order[len(order) - size :]
        return self._take_distinct(order[: len(order) - size], self.batch_size - size, last) if size else []

    def _draw_last_batch(self, permutation: np.ndarray) -> list[int]:
        """The rows of the batch that is not full: the first distinct ones, then others if these are too few."""
        return self._take_distinct(permutation.tolist(), len(self.images) % self.batch_size, [])

    def _take_distinct(self, rows: list[int], number: int, beside: list[int]) -> list[int]:
        """So many of `rows`: the first that share nothing with one another and those `beside`, then others."""
        batch: list[int] = []
        refused: list[int] = []
        taken = {key for row in beside for key in self._keys(row)}
        for row in rows:
            if len(batch) == number:
                return batch
            if taken.isdisjoint(self._keys(row)):
                batch.append(row)
                taken.update(self._keys(row))
            else:
                refused.append(row)
        return batch + refused[: number - len(batch)]

    def _keys(self, row: int) -> tuple[int, int]:
        """A row's image and caption as numbers that cannot be confused: images are >= 0, captions are < 0."""
        return int(self.images[row]), -1 - int(self.captions[row])

    def _deal(self, rows: np.ndarray, random: np.random.Generator) -> list[list[int]]:
        """Deal `rows`, whose number is a multiple of the batch size, out to full batches."""
        num_batches = len(rows) // self.batch_size
        batches: list[list[int]] = [[] for _ in range(num_batches)]
        taken: list[set[int]] = [set() for _ in range(num_batches)]
        shuffled = random.permutation(rows)
        repeated = shuffled[self.frequency[shuffled] > 1]
        # The most frequent first; pairs of one group one after the other, groups of one frequency in random order.
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
        """Put a row that no batch took into one of them, and move a row of that batch to `home`, which has room.

        If no such exchange is found, as always for surplus pairs, the row itself goes to `home`.

        Args:
            row: index of the pair.
            home: index of a batch that has room.
            batches, taken: the rows of each batch, and the keys of their images and captions; both are changed.
            random: chooses the batches to try.
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


class OneSourceSampler(Sampler[int]):
    """Gives an order in which every batch is of one source, and holds distinct images and captions.

    The pairs of each source are ordered by a `DistinctSampler` of its own; the batches of all sources come in random
    order. Their order depends only on the seed and the epoch.

    Args:
        groups: hashes of the image and of the caption of each pair, from `group_ids_of`.
        sources: name of each pair's source.
        batch_size: as of `DistinctSampler`.
        seed: fixes the order, together with the epoch.
        drop_last: leave each source's last batch out if it is not full; else it is filled up with pairs of the source
            that then come twice in the epoch, since a smaller one would shift all batches after it.

    Raises:
        ValueError: a source has fewer pairs than a batch; or as `DistinctSampler`.
    """

    def __init__(
        self,
        groups: list[tuple[int, int]],
        sources: list[str],
        batch_size: int,
        seed: int = 0,
        drop_last: bool = False,
    ):
        check_sizes_of_sources(sources, batch_size)
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        names = np.array(sources)
        self.rows = [np.flatnonzero(names == name) for name in dict.fromkeys(sources)]
        self.samplers = [
            DistinctSampler([groups[row] for row in rows], batch_size, seed, drop_last) for rows in self.rows
        ]

    def __len__(self) -> int:
        return sum(-(-len(sampler) // self.batch_size) for sampler in self.samplers) * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch
        for sampler in self.samplers:
            sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        batches = []
        for rows, sampler in zip(self.rows, self.samplers, strict=True):
            order = list(sampler)
            order += sampler.fill_up(order)
            batches += [rows[order[i : i + self.batch_size]] for i in range(0, len(order), self.batch_size)]
        for index in np.random.default_rng((self.seed, self.epoch)).permutation(len(batches)):
            yield from batches[index].tolist()


def check_sizes_of_sources(sources: list[str], batch_size: int) -> None:
    """
    Check that a batch of each source's pairs alone can be made.

    Args:
        sources: name of each pair's source.

    Raises:
        ValueError: a source has fewer pairs than a batch; with its name.
    """
    for name, number in Counter(sources).items():
        if number < batch_size:
            raise ValueError(
                f"The source '{name}' has {number} training pairs, fewer than one batch of {batch_size}, and "
                "training.mix_sources=false makes every batch of pairs of one source: lower the batch size, leave the "
                "source out, or mix them (mix_sources=true)."
            )


def _renumber(values: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Number the distinct values 0, 1, ...: gives the number of each value, and how often each number occurs."""
    _, numbers, counts = np.unique(np.array(values, dtype=np.int64), return_inverse=True, return_counts=True)
    return numbers, counts
