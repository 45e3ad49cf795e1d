"""Which epoch it is, as the workers of a DataLoader see it."""

from contextlib import suppress

import torch
from torch import Tensor


class Epoch:
    """
    The number of the epoch, from 0. It lies in shared memory once it is set, so that workers that outlive an epoch
    (`dataloader_persistent_workers`) see the next one, too.

    `shuffled`: whether no batch of several pairs comes again in another epoch. What is in it varies it then.
    """

    def __init__(self) -> None:
        self.shuffled = False
        self._number: Tensor | None = None

    def set(self, number: int) -> None:
        """Tells which epoch begins."""
        if self._number is None:
            self._number = torch.zeros((), dtype=torch.int64)
            with suppress(RuntimeError):  # a machine without shared memory can have no workers either
                self._number.share_memory_()
        self._number.fill_(number)

    def of_batch(self, size: int) -> int:
        """The number, for a batch that may come again; 0 for one that does not."""
        return 0 if self._number is None or (self.shuffled and size > 1) else int(self._number)


__all__ = ["Epoch"]
