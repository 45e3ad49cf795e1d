"""Batches of a stream: the same in one process and in several."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from accelerate import Accelerator
from torch.utils.data import IterableDataset
from transformers import TrainerState


class WholeBatches(IterableDataset):
    """
    A stream's rows without those at its end that fill no step.

    It is no data set of `datasets`, of which accelerate would give each process shards of its own, of any length. This
    one is read by every process, which takes its share of each batch.

    Args:
        rows: the stream.
        size: rows of a step, over all processes, accumulated batches and micro-batches.
        least: so many rows at the end are a step, too, whose last batch is incomplete.
    """

    def __init__(self, rows: datasets.IterableDataset, size: int, least: int):
        self.rows, self.size, self.least = rows, size, least

    def set_epoch(self, epoch: int) -> None:
        """Has the stream shuffled anew."""
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        step: list[dict[str, Any]] = []
        for row in self.rows:
            step.append(row)
            if len(step) == self.size:
                yield from step
                step = []
        if len(step) >= self.least:
            yield from step


@contextmanager
def read_by_each_process(accelerator: Accelerator) -> Iterator[None]:
    """
    Has every process collate its own rows of a stream. By default accelerate has the first one do it for all, and
    can't share batches out whose captions are of different lengths. What the user has set (`dispatch_batches`) holds.
    """
    config = accelerator.dataloader_config
    asked = config.dispatch_batches
    config.dispatch_batches = bool(asked)
    try:
        yield
    finally:
        config.dispatch_batches = asked


def place_in_stream(state: TrainerState, accumulated: int) -> tuple[int, int]:
    """
    How many passes through the stream a checkpoint has behind it, and how many batches of the next one.

    The Trainer does not know how long a pass is and takes the whole training for one. But in the epoch that it notes
    the whole number is that of the passes, and the fraction is the part that the batches of the last pass are of all
    batches of the training.

    Args:
        state: of the checkpoint.
        accumulated: batches of a step (`gradient_accumulation_steps`).
    """
    passes = int(state.epoch)
    return passes, round((state.epoch - passes) * state.max_steps * accumulated)


__all__ = ["WholeBatches", "place_in_stream", "read_by_each_process"]
