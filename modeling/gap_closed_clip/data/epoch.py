"""Which epoch it is, as the workers of a DataLoader see it."""

from contextlib import suppress

import torch
from torch import Tensor


class Epoch:
    """
    The number of the epoch, from 0. It lies in shared memory once it is set, so that workers that outlive an epoch
    (`dataloader_persistent_workers`) see the next one, too.
    """

    def __init__(self) -> None:
        self._number: Tensor | None = None

    def set(self, number: int) -> None:
        """Tells which epoch begins."""
        if self._number is None:
            self._number = torch.zeros((), dtype=torch.int64)
            with suppress(RuntimeError):  # a machine without shared memory can have no workers either
                self._number.share_memory_()
        self._number.fill_(number)

    def __int__(self) -> int:
        return 0 if self._number is None else int(self._number)


__all__ = ["Epoch"]
