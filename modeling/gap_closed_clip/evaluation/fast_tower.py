"""Towers in the memory layout and precision in which a machine runs them fastest."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .precision import cpu_has_bfloat16


Pool = Callable[[Any, dict[str, Any]], Tensor]

LARGEST_DISTANCE = 1e-2  # cosine distance to the features in float32 that a faster way may have
TRIAL_ITEMS, TRIAL_RUNS = 16, 2


def has_spatial_convolutions(module: nn.Module) -> bool:
    """Whether there are convolutions that gain by channels last; a patch embedding alone is none."""
    return any(
        isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) and m.kernel_size != m.stride for m in module.modules()
    )


@contextmanager
def channels_last(module: nn.Module) -> Iterator[None]:
    """Convolutions run in channels last inside, which is faster; the results are the same up to rounding."""
    if not has_spatial_convolutions(module):
        yield
        return
    module.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        module.to(memory_format=torch.contiguous_format)


class Way(NamedTuple):
    """A memory layout of the weights, and the precision of the computation (None: that of the weights)."""

    layout: torch.memory_format
    dtype: torch.dtype | None

    def __str__(self) -> str:
        layout = "channels last, " if self.layout == torch.channels_last else ""
        return layout + ("weights as they are" if self.dtype is None else str(self.dtype).removeprefix("torch."))


class FastTower:
    """
    A tower in the fastest of a few ways, found by a short trial: channels last for convolutions, bfloat16.

    A way whose features are further than `LARGEST_DISTANCE` (cosine) from those of the weights as they are is passed
    over. Both are compared without their mean over the trial, which all have in common: what tells one item from
    another has to be right. Without gradients, in evaluation mode, which is the caller's to see to.

    A CPU without instructions for bfloat16 is not tried in it.

    Args:
        tower: on its device. `restore` gives its weights the usual layout back.
        pool: (tower, inputs) -> features (n, C).
        inputs: a batch, whose first `TRIAL_ITEMS` rows are for the trial.
        parts: widths of what the features consist of, each of which has to be right; default: one thing.
    """

    def __init__(self, tower: nn.Module, pool: Pool, inputs: dict[str, Tensor], parts: Sequence[int] = ()):
        self.tower, self.pool = tower, pool
        layouts = [torch.contiguous_format]
        if has_spatial_convolutions(tower):
            layouts.append(torch.channels_last)
        trial = {name: value[:TRIAL_ITEMS] for name, value in inputs.items()}
        on_cpu = all(value.device.type == "cpu" for value in trial.values())
        dtypes = (None,) if on_cpu and not cpu_has_bfloat16() else (None, torch.bfloat16)
        as_it_is, *ways = (Way(layout, dtype) for dtype in dtypes for layout in layouts)
        self.way, self.distance = as_it_is, 0.0
        exact, best = self._timed(trial, as_it_is)
        fastest = as_it_is
        for way in ways:
            features, seconds = self._timed(trial, way)
            distance = _distance(features, exact, parts or (exact.shape[1],))
            if seconds < best and distance <= LARGEST_DISTANCE:
                best, fastest, self.distance = seconds, way, max(distance, 0.0)
        self.use(fastest)

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Features (n, C) of inputs of n rows."""
        device = next(iter(inputs.values())).device
        if self.way.layout == torch.channels_last:
            inputs = {
                name: value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
                for name, value in inputs.items()
            }
        with torch.autocast(device.type, self.way.dtype, enabled=self.way.dtype is not None):
            return self.pool(self.tower, inputs)

    def restore(self) -> None:
        """Gives the weights the layout that they are saved in."""
        self.tower.to(memory_format=torch.contiguous_format)

    def use(self, way: Way) -> None:
        self.way = way
        self.tower.to(memory_format=way.layout)

    def _timed(self, inputs: dict[str, Tensor], way: Way) -> tuple[Tensor, float]:
        """Features (n, C) float32 on the CPU, and the seconds of the fastest of a few runs after a first one."""
        self.use(way)
        features = self(inputs).float().cpu()
        seconds = []
        for _ in range(TRIAL_RUNS):
            start = time.perf_counter()
            self(inputs).cpu()  # waits for the device
            seconds.append(time.perf_counter() - start)
        return features, min(seconds)


def _distance(features: Tensor, exact: Tensor, parts: Sequence[int]) -> float:
    """The largest cosine distance between rows of two (n, C), part by part, without the mean of the second."""
    mean = exact.mean(0)
    both = zip((features - mean).split(parts, dim=1), (exact - mean).split(parts, dim=1), strict=True)
    return max((1 - torch.cosine_similarity(*each, dim=1)).max().item() for each in both)


__all__ = ["FastTower", "channels_last", "has_spatial_convolutions"]
