"""What `objective.py` compares: ways to compute the objective of one batch, their time, memory and exactness."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from measure import PeakMemory, clock, is_installed
from torch import Tensor

from gap_closed_clip import gap_closed_loss
from gap_closed_clip.model import tiled_gap_closed_clip
from gap_closed_clip.model.losses_gap_closed_clip import DenseTerms, TiledTerms
from gap_closed_clip.model.tiles_gap_closed_clip import TORCH_TILES


TEMPERATURE = 0.07
PLAIN, OPEN_CLIP, MEMEFF = "plain torch autograd", "open_clip ClipLoss", "memeff"
DENSE, TORCH_TILED, TRITON_TILED = "ours dense", "ours tiled, torch", "ours tiled, Triton"


@dataclass(frozen=True)
class Case:
    """
    The objective and the shape of one batch.

    Args:
        num_rows, dim, dtype: N, D and the dtype of the embeddings.
        terms: "contrastive", that loss alone, or "all", the whole objective.
        modalities: how many there are.
        groups: whether random groups of samples are kept out of the negatives.
    """

    num_rows: int
    dim: int
    dtype: str
    terms: str
    modalities: int
    groups: bool
    device: str


@dataclass
class Inputs:
    """M tensors (N, D) and the scale, all of which get gradients; group ids (N,) or None."""

    embeddings: list[Tensor]
    scale: Tensor
    group_ids: Tensor | None

    @classmethod
    def make(cls, case: Case) -> "Inputs":
        """Random unit vectors, similar to one another within a sample; the same at every call."""
        generator = torch.Generator(case.device).manual_seed(0)
        shape, options = (case.num_rows, case.dim), {"device": case.device, "generator": generator}
        common = torch.randn(shape, **options)
        embeddings = [F.normalize(common + torch.randn(shape, **options), dim=1) for _ in range(case.modalities)]
        group_ids = torch.randint(case.num_rows, (case.num_rows,), **options) if case.groups else None
        scale = torch.tensor(1 / TEMPERATURE, device=case.device)
        return cls([z.to(getattr(torch, case.dtype)) for z in embeddings], scale, group_ids).with_gradients()

    def double(self) -> "Inputs":
        return Inputs([z.detach().double() for z in self.embeddings], self.scale.detach().double(), self.group_ids)

    def with_gradients(self) -> "Inputs":
        for x in (*self.embeddings, self.scale):
            x.requires_grad_()
        return self


def plain_loss(inputs: Inputs, terms: str) -> Tensor:
    """The objective as one writes it down, with N x N matrices and autograd for the rest."""
    anchor, *others = inputs.embeddings
    excluded = None
    if inputs.group_ids is not None:
        excluded = (inputs.group_ids[:, None] == inputs.group_ids).fill_diagonal_(False)
    target = torch.arange(len(anchor), device=anchor.device)
    loss = 0.0
    for other in others:
        logits = inputs.scale * anchor @ other.T
        if excluded is not None:
            logits = logits.masked_fill(excluded, -math.inf)
        loss = loss + (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    if terms == "all":
        loss = loss + sum((other - anchor).square().sum(-1).mean() for other in others)
    loss = loss / len(others)
    if terms == "all":
        centroids = F.normalize(sum(inputs.embeddings) / len(inputs.embeddings), dim=-1)
        weights = (4 * centroids @ centroids.T - 4).exp()  # exp(-2 |a - b|^2) of unit vectors
        ignored = torch.eye(len(anchor), dtype=torch.bool, device=anchor.device)
        ignored = ignored if excluded is None else ignored | excluded
        loss = loss + (weights.masked_fill(ignored, 0).sum() / (~ignored).sum()).log()
    return loss


def open_clip_loss(inputs: Inputs, terms: str) -> Tensor:
    from open_clip.loss import ClipLoss

    anchor, *others = inputs.embeddings
    return sum(ClipLoss()(anchor, other, inputs.scale) for other in others) / len(others)


def memeff_loss(inputs: Inputs, terms: str) -> Tensor:
    from memeff import MemoryEfficientCLIPLoss

    # With its default, stable=True, gradients are scaled otherwise than the loss.
    loss = MemoryEfficientCLIPLoss(TEMPERATURE, normalized_inputs=True, stable=False)
    anchor, *others = inputs.embeddings
    return sum(loss(anchor, other) for other in others) / len(others)


def our_loss(inputs: Inputs, terms: str, tiled: bool) -> Tensor:
    batch = inputs.embeddings, inputs.scale, inputs.group_ids
    if terms == "all":
        return gap_closed_loss(*batch, tiled=tiled).loss
    return (TiledTerms if tiled else DenseTerms)(*batch).contrastive()


METHODS: dict[str, Callable[[Inputs, str], Tensor]] = {
    PLAIN: plain_loss,
    OPEN_CLIP: open_clip_loss,
    MEMEFF: memeff_loss,
    DENSE: partial(our_loss, tiled=False),
    TORCH_TILED: partial(our_loss, tiled=True),
    TRITON_TILED: partial(our_loss, tiled=True),
}


def methods_for(case: Case, chosen: list[str]) -> list[str]:
    """Those of the chosen methods that can compute this case at all."""
    on_gpu, peers = case.device == "cuda", case.terms == "contrastive" and not case.groups
    can_compute = {
        OPEN_CLIP: peers and is_installed("open_clip"),
        MEMEFF: peers and on_gpu and is_installed("memeff"),
        TRITON_TILED: on_gpu and is_installed("triton"),
    }
    return [name for name in METHODS if name in chosen and can_compute.get(name, True)]


@contextmanager
def method_context(name: str, case: Case) -> Iterator[None]:
    """Autocast for the methods that are used with it, and the implementation of tiles that the method's name says."""
    autocast = name in (PLAIN, OPEN_CLIP) and case.dtype == "bfloat16"
    tile_functions = tiled_gap_closed_clip.tile_functions
    if name == TORCH_TILED:
        tile_functions = lambda _: TORCH_TILES  # noqa: E731
    with (
        torch.autocast(case.device, torch.bfloat16, enabled=autocast),
        mock.patch.object(tiled_gap_closed_clip, "tile_functions", tile_functions),
    ):
        yield


def value_and_gradients(name: str, case: Case, inputs: Inputs) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    with method_context(name, case):
        loss = METHODS[name](inputs, case.terms)
        # The temperature of memeff is a number and gets no gradient.
        return loss, torch.autograd.grad(loss, [*inputs.embeddings, inputs.scale], allow_unused=True)


def disagreement(name: str, case: Case) -> tuple[float, float]:
    """Relative differences from a dense reference in float64: of the value, and the largest one of the gradients."""
    inputs = Inputs.make(case)
    reference = inputs.double().with_gradients()
    expected_value, expected = value_and_gradients(PLAIN, replace(case, dtype="float64"), reference)
    value, found = value_and_gradients(name, case, inputs)
    of_gradients = [
        ((x.double() - y).abs().max() / y.abs().max()).item()
        for x, y in zip(found, expected, strict=True)
        if x is not None
    ]
    return ((value.double() - expected_value) / expected_value).abs().item(), max(of_gradients)


def timed_step(name: str, case: Case, inputs: Inputs) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    with method_context(name, case):
        start = clock(case.device)
        loss = METHODS[name](inputs, case.terms)
        middle = clock(case.device)
        torch.autograd.grad(loss, [*inputs.embeddings, inputs.scale], allow_unused=True)
        return middle - start, clock(case.device) - middle


def measured_step(name: str, case: Case) -> tuple[float, float, int | None]:
    """Seconds forward, seconds backward, peak bytes beside the embeddings; on CPUs to be run `in_fresh_process`."""
    small = replace(case, num_rows=64)
    timed_step(name, small, Inputs.make(small))  # libraries load, threads start
    inputs = Inputs.make(case)
    with PeakMemory(case.device) as peak:
        forward, backward = timed_step(name, case, inputs)
    return forward, backward, peak.bytes
