"""
The objective: contrastive loss, Align True Pairs and Centroid Uniformity, as pure functions of embeddings.

Sources: Grassucci, Cicchetti, Comminiello, "Closing the gap in multimodal medical representation alignment",
arXiv 2602.20046, and for more than two modalities "Closing the Modality Gap Aligns Group-Wise Semantics",
arXiv 2601.18525.

Embeddings are a list of M >= 2 tensors of shape (N, D), one for each modality. Row i of every tensor belongs to sample
i, and the first modality is the anchor. Rows are expected to be unit vectors; a row of zeros is allowed, its cosine
with every row is 0. Everything is computed in float32, or in float64 where the embeddings are float64, also under
autocast.

Samples may lack modalities. Each pair of modalities is then compared over the samples that have both, exactly as if
the batch had no others, and a sample's centroid is that of the modalities it has.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed_gap_closed_clip import gather_rows, world_size
from .loss_inputs_gap_closed_clip import (
    Pairs,
    SharedSamples,
    anchor_pairs,
    check_loss_inputs,
    excluded_pairs,
    scale_of,
    without_samples,
    zero_absent,
)
from .tiled_gap_closed_clip import GlobalBatch, tiled_contrastive_loss, tiled_uniformity_loss


# From this many rows on, the N x N matrices are by default visited in tiles and not kept.
TILED_FROM = 1024


class GapClosedLoss(NamedTuple):
    """The weighted sum of the objective's terms, and the terms before weighting; each is a scalar tensor."""

    loss: Tensor
    contrastive_loss: Tensor
    align_loss: Tensor
    uniformity_loss: Tensor


def gap_closed_loss(
    embeddings: list[Tensor],
    logit_scale: Tensor | float,
    group_ids: Tensor | None = None,
    contrastive_weight: float | Tensor = 1.0,
    align_weight: float | Tensor = 1.0,
    uniformity_weight: float | Tensor = 1.0,
    across_processes: bool = False,
    tiled: bool | None = None,
    modality_mask: Tensor | None = None,
    pairs: Pairs | None = None,
) -> GapClosedLoss:
    """
    The combined objective (arXiv 2602.20046, total loss) of one batch.

    Where `align_weight` or `uniformity_weight` is the number 0, that term has its value, for the log, but no gradient:
    nothing is computed or kept for a backward pass.

    Args:
        embeddings: M >= 2 tensors of shape (N, D), whose rows are unit vectors; the first is the anchor.
        logit_scale: a number or a tensor of one, 1 / temperature (not its logarithm, as CLIP's checkpoints hold it).
        group_ids: integers of shape (N,) or (N, G). Samples that agree in any column are not negatives of each other.
        contrastive_weight, align_weight, uniformity_weight: weights of the terms.
        across_processes: compute the loss of the global batch, which all processes of the process group hold together;
            each may hold any number of rows. Every process gets the same loss, and gradients that are exact once
            DistributedDataParallel or FSDP has averaged them.
        tiled: never keep an N x N matrix; the result is the same up to rounding. By default from `TILED_FROM` rows on.
            Across processes the loss is always tiled.
        modality_mask: bool, (N, M): False where a sample lacks a modality; its row may hold anything, even NaN, and
            gets a gradient of 0. The contrastive and the align term of a pair of modalities are those of the samples
            that have both; their mean is over the pairs that any sample has both of, and 0 if there is none. Samples
            without any modality are left out of the uniformity term. Either all processes give a mask or none.
        pairs: the pairs of modalities, by their places in `embeddings`, that the contrastive and the align term
            compare; by default the anchor with each of the others.

    Raises:
        ValueError: there are fewer than two modalities, their shapes differ, they have no row, `group_ids` has
            another number of rows, `logit_scale` is no single positive number, `modality_mask` is not (N, M) or not
            bool, or `pairs` is empty, has a pair twice, or one that is not two different modalities.
    """
    check_loss_inputs(embeddings, group_ids, modality_mask, pairs)
    logit_scale = scale_of(logit_scale, embeddings[0])
    if modality_mask is not None:
        modality_mask = modality_mask.to(embeddings[0].device)
        embeddings = zero_absent(embeddings, modality_mask)
    across_processes = across_processes and world_size() > 1
    if tiled is None:
        tiled = len(embeddings[0]) >= TILED_FROM
    with_gradients = torch.is_grad_enabled()
    with torch.autocast(embeddings[0].device.type, enabled=False):
        terms: TiledTerms | DenseTerms
        if not (tiled or across_processes):
            terms = DenseTerms(embeddings, logit_scale, group_ids, modality_mask, pairs)
        elif modality_mask is None:
            terms = TiledTerms(embeddings, logit_scale, group_ids, across_processes, pairs)
        else:
            terms = PartialTiledTerms(modality_mask, embeddings, logit_scale, group_ids, across_processes, pairs)
        # Also of weight 0 this term keeps its gradient: DistributedDataParallel refuses a scale that gets none.
        contrastive = terms.contrastive()
        with torch.set_grad_enabled(with_gradients and not _is_zero(align_weight)):
            align = terms.align()
        with torch.set_grad_enabled(with_gradients and not _is_zero(uniformity_weight)):
            uniformity = terms.uniformity()
        loss = contrastive_weight * contrastive + align_weight * align + uniformity_weight * uniformity
    return GapClosedLoss(loss, contrastive, align, uniformity)


class DenseTerms:
    """
    The terms of one batch by means of N x N matrices, which autograd keeps; arguments as for `gap_closed_loss`, with
    rows of zeros where a modality is lacking. No shape depends on how many samples lack it.
    """

    def __init__(
        self,
        embeddings: list[Tensor],
        logit_scale: Tensor,
        group_ids: Tensor | None,
        modality_mask: Tensor | None = None,
        pairs: Pairs | None = None,
    ):
        self.embeddings = [at_least_float32(z) for z in embeddings]
        self.logit_scale = logit_scale.to(self.embeddings[0].dtype)
        self.excluded = excluded_pairs(group_ids, embeddings[0].device)
        self.modality_mask = modality_mask
        self.pairs = pairs or anchor_pairs(len(embeddings))
        self.shared = None if modality_mask is None else SharedSamples.of(modality_mask, self.pairs)

    def contrastive(self) -> Tensor:
        losses = []
        for place, (first, second) in enumerate(self.pairs):
            excluded = self.excluded
            if self.shared is not None:  # the row and the column of another sample keep one logit, whose loss is 0
                excluded = without_samples(excluded, self.shared.samples[place])
            anchor, other = self.embeddings[first], self.embeddings[second]
            losses.append(contrastive_loss(anchor, other, self.logit_scale, excluded))
        return torch.stack(losses).mean() if self.shared is None else self.shared.mean(torch.stack(losses))

    def align(self) -> Tensor:
        return align_true_pairs_loss(self.embeddings, self.pairs, self.shared)

    def uniformity(self) -> Tensor:
        excluded = self.excluded
        if self.modality_mask is not None:
            excluded = without_samples(excluded, self.modality_mask.any(1))
        return centroid_uniformity_loss(self.embeddings, excluded)


class TiledTerms:
    """The terms by means of N x N matrices that are visited in tiles; arguments as for `gap_closed_loss`."""

    def __init__(
        self,
        embeddings: list[Tensor],
        logit_scale: Tensor,
        group_ids: Tensor | None,
        across_processes: bool = False,
        pairs: Pairs | None = None,
    ):
        self.batch = GlobalBatch.gather(embeddings, group_ids, across_processes)
        self.embeddings = [at_least_float32(z) for z in embeddings]  # the rows of this process, with gradients
        self.logit_scale = logit_scale.to(self.embeddings[0].dtype)
        self.pairs = pairs or anchor_pairs(len(embeddings))

    def contrastive(self) -> Tensor:
        losses = [
            tiled_contrastive_loss(self.embeddings[i], self.embeddings[j], self.logit_scale, self.batch, (i, j))
            for i, j in self.pairs
        ]
        return torch.stack(losses).mean()

    def align(self) -> Tensor:
        return self.batch.global_mean(align_true_pairs_loss(self.embeddings, self.pairs))

    def uniformity(self) -> Tensor:
        return tiled_uniformity_loss(centroids_of(self.embeddings), self.all_centroids(), self.batch)

    @torch.no_grad()
    def all_centroids(self) -> Tensor:
        """The centroids of the global batch, (N, D)."""
        all_centroids = centroids_of(self.batch.embeddings)
        if all_centroids.is_cuda:
            # The GPU kernels multiply half precision as it is, which is faster; torch's tiles use float32 anyway.
            all_centroids = all_centroids.to(self.batch.embeddings[0].dtype)
        return all_centroids


class PartialTiledTerms(TiledTerms):
    """
    [`TiledTerms`] of samples that may lack modalities, with rows of zeros where they do. Every process takes part in
    the same collectives and gives all of its embeddings and the scale a gradient, be it 0: what it does depends on the
    mask of the global batch alone.
    """

    def __init__(self, modality_mask: Tensor, *args):
        super().__init__(*args)
        self.modality_mask = gather_rows(modality_mask, self.batch.row_counts)  # (N, M), of the global batch
        self.shared = SharedSamples.of(self.modality_mask, self.pairs)

    @torch.compiler.disable  # shapes that depend on the mask would be compiled again and again
    def contrastive(self) -> Tensor:
        losses = []
        for (i, j), samples in zip(self.pairs, self.shared.samples, strict=True):
            batch = self.batch.select([self.batch.embeddings[i], self.batch.embeddings[j]], samples)
            if len(batch) > 0:
                local = samples[self.batch.local_rows]
                first, second = self.embeddings[i][local], self.embeddings[j][local]
                losses.append(tiled_contrastive_loss(first, second, self.logit_scale, batch, (0, 1)))
        nothing = self._zero() + 0 * self.logit_scale
        return nothing + torch.stack(losses).mean() if losses else nothing

    def align(self) -> Tensor:
        local = SharedSamples(self.shared.samples[:, self.batch.local_rows], self.shared.counts)
        return self.batch.global_sum(align_true_pairs_loss(self.embeddings, self.pairs, local))

    @torch.compiler.disable
    def uniformity(self) -> Tensor:
        samples = self.modality_mask.any(1)
        batch = self.batch.select([self.all_centroids()], samples)
        if len(batch) == 0:
            return self._zero()
        centroids = centroids_of(self.embeddings)[samples[self.batch.local_rows]]
        return tiled_uniformity_loss(centroids, batch.embeddings[0], batch)

    def _zero(self) -> Tensor:
        """0, with a gradient of 0 for the embeddings of all modalities, also of one that no sample has."""
        return torch.stack([z[:0].sum() for z in self.embeddings]).sum()


def contrastive_loss(anchor: Tensor, other: Tensor, logit_scale: Tensor, excluded: Tensor | None = None) -> Tensor:
    """
    Symmetric InfoNCE between two modalities: the mean of the cross-entropies of the rows and of the columns of
    `logit_scale * anchor @ other.T`.

    Args:
        anchor, other: (N, D) each.
        excluded: (N, N), bool: pairs that are not negatives. The diagonal, which holds the true pairs, always counts.
    """
    logits = logit_scale * anchor @ other.T  # (N, N)
    if excluded is not None:
        off_diagonal = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(excluded & off_diagonal, -math.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def align_true_pairs_loss(
    embeddings: list[Tensor], pairs: Pairs | None = None, shared: SharedSamples | None = None
) -> Tensor:
    """
    L_ATP = 1/(M-1) sum over m != a of 1/N sum_i || z_i^m - z_i^a ||^2 (arXiv 2602.20046, Align True Pairs).

    Args:
        pairs: pairs of modalities to compare instead of the first, a, with each of the others.
        shared: for each pair the samples that have both modalities, where not all do. Others have no part.
    """
    embeddings = [at_least_float32(z) for z in embeddings]
    distances = [(embeddings[j] - embeddings[i]).square().sum(-1) for i, j in pairs or anchor_pairs(len(embeddings))]
    if shared is None:
        return torch.stack([squares.mean() for squares in distances]).mean()
    return shared.mean(torch.stack(distances).masked_fill(~shared.samples, 0.0).mean(1))


def centroid_uniformity_loss(embeddings: list[Tensor], excluded: Tensor | None = None) -> Tensor:
    """
    L_CU = log( mean over i != j of exp(-2 || mu_i - mu_j ||^2) ), with mu_i the centroid of sample i, see
    [`centroids_of`] (arXiv 2602.20046, Centroid Uniformity).

    Args:
        excluded: (N, N), bool: pairs that are left out of the mean, as the diagonal always is. Where no pair is left
            (N = 1, or all samples in one group) the loss is 0, with a gradient of 0.
    """
    centroids = centroids_of(embeddings)  # (N, D)
    squared_norms = centroids.square().sum(-1)
    squared_distances = squared_norms[:, None] + squared_norms - 2 * centroids @ centroids.T  # (N, N)
    ignored = torch.eye(len(centroids), dtype=torch.bool, device=centroids.device)
    ignored = ignored if excluded is None else ignored | excluded
    # Not -inf: exp(-1e4) is exactly 0 too, and where no pair is left the gradient stays 0 instead of NaN.
    exponents = (-2 * squared_distances).masked_fill(ignored, -1e4)
    count = (~ignored).sum()
    log_mean = exponents.flatten().logsumexp(0) - count.clamp(min=1).to(exponents.dtype).log()
    return torch.where(count > 0, log_mean, torch.zeros_like(log_mean))


def centroids_of(embeddings: list[Tensor]) -> Tensor:
    """The centroid of each sample, its mean over the modalities scaled to unit length: (N, D), float32 or float64."""
    first, *others = [at_least_float32(z) for z in embeddings]
    return unit_vectors(sum(others, start=first) / len(embeddings))


def unit_vectors(x: Tensor) -> Tensor:
    """The rows of x (..., D) at unit length. A row of zeros has no direction: it stays zero and gets no gradient."""
    squared_norm = x.square().sum(-1, keepdim=True)
    is_zero = squared_norm == 0
    return torch.where(is_zero, torch.zeros_like(x), x * squared_norm.masked_fill(is_zero, 1.0).rsqrt())


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it already is."""
    return x if x.dtype == torch.float64 else x.float()


def scheduled_weight(weight: float | list[list[float]], progress: Tensor) -> float | Tensor:
    """
    The value of a weight at some point of the training: a scalar tensor if it is scheduled, the number if it is not.

    Args:
        weight: a number, or a schedule: points [fraction, value] with rising fractions, linear between two points and
            constant before the first and after the last.
        progress: scalar tensor, the fraction of the training that is done, 0 to 1. It is a tensor so that
            torch.compile does not compile again at every step.
    """
    if isinstance(weight, int | float):
        return weight
    value = torch.full_like(progress, weight[0][1])
    for (start, a), (end, b) in zip(weight, weight[1:], strict=False):
        value = value + (b - a) * ((progress - start) / (end - start)).clamp(0, 1)
    return value


def _is_zero(weight: float | Tensor) -> bool:
    """Whether a weight is the number 0. The value of a tensor is not looked at, which would wait for the GPU."""
    return isinstance(weight, int | float) and weight == 0


__all__ = [
    "TILED_FROM",
    "DenseTerms",
    "GapClosedLoss",
    "PartialTiledTerms",
    "TiledTerms",
    "align_true_pairs_loss",
    "at_least_float32",
    "centroid_uniformity_loss",
    "centroids_of",
    "contrastive_loss",
    "gap_closed_loss",
    "scheduled_weight",
    "unit_vectors",
]
