"""
The objective: contrastive + Align True Pairs + Centroid Uniformity, as pure functions of embeddings.

Grassucci, Cicchetti, Comminiello, "Closing the gap in multimodal medical representation alignment", arXiv 2602.20046;
the form for M modalities is that of "Closing the Modality Gap Aligns Group-Wise Semantics", arXiv 2601.18525.

Embeddings are a list of M >= 2 tensors of shape (N, D), one a modality, row i of each belonging to sample i. They are
expected on the unit sphere (zero rows are allowed and give zero cosines). The first is the anchor. Everything is
computed in float32, or float64 where the embeddings are float64, also under autocast.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed_gap_closed_clip import world_size
from .tiled_gap_closed_clip import GlobalBatch, tiled_contrastive_loss, tiled_uniformity_loss


# Rows from which on the N x N matrices are visited in tiles instead of kept.
TILED_FROM = 1024


class GapClosedLoss(NamedTuple):
    """The weighted sum and its three terms before weighting; each a scalar tensor."""

    loss: Tensor
    contrastive_loss: Tensor
    align_loss: Tensor
    uniformity_loss: Tensor


def gap_closed_loss(
    embeddings: list[Tensor],
    logit_scale: Tensor,
    group_ids: Tensor | None = None,
    contrastive_weight: float | Tensor = 1.0,
    align_weight: float | Tensor = 1.0,
    uniformity_weight: float | Tensor = 1.0,
    across_processes: bool = False,
    tiled: bool | None = None,
) -> GapClosedLoss:
    """
    The combined objective (arXiv 2602.20046, total loss) of one batch.

    A weight of alignment or uniformity that is the number 0 saves the term's backward pass; its value is still told.

    Args:
        embeddings: M >= 2 tensors of shape (N, D) on the unit sphere; the first is the anchor.
        logit_scale: scalar, the *scale* itself (1 / temperature), not its log.
        group_ids: integers of shape (N,) or (N, G). Samples that agree in any column are not negatives of one another.
        contrastive_weight, align_weight, uniformity_weight: weights of the terms.
        across_processes: the batch is that of all processes of the process group, each with any number of rows of its
            own. The loss is that of the global batch on every process, and the gradients become exact by the averaging
            of DistributedDataParallel or FSDP.
        tiled: never keep an N x N matrix; same result to rounding. By default from `TILED_FROM` rows on, and
            always across processes.

    Raises:
        ValueError: fewer than two modalities, shapes that differ, or `group_ids` of another length.
    """
    _check_embeddings(embeddings, group_ids)
    across_processes = across_processes and world_size() > 1
    if tiled is None:
        tiled = len(embeddings[0]) >= TILED_FROM
    with torch.autocast(embeddings[0].device.type, enabled=False):
        if tiled or across_processes:
            terms = _tiled_terms(embeddings, logit_scale, group_ids, across_processes)
        else:
            terms = _dense_terms(embeddings, logit_scale, group_ids)
        contrastive = terms[0]()
        align, uniformity = _evaluate(terms[1], align_weight), _evaluate(terms[2], uniformity_weight)
        loss = contrastive_weight * contrastive + align_weight * align + uniformity_weight * uniformity
    return GapClosedLoss(loss, contrastive, align, uniformity)


def _evaluate(term: Callable[[], Tensor], weight: float | Tensor) -> Tensor:
    """
    A term that counts nothing is computed without what its backward pass would need. (Not so the contrastive one: the
    scale would get no gradient, which DistributedDataParallel refuses.)
    """
    counts_nothing = isinstance(weight, int | float) and weight == 0
    with torch.set_grad_enabled(torch.is_grad_enabled() and not counts_nothing):
        return term()


def _dense_terms(
    embeddings: list[Tensor], logit_scale: Tensor, group_ids: Tensor | None
) -> tuple[Callable[[], Tensor], ...]:
    embeddings = [_at_least_float32(z) for z in embeddings]
    anchor, others = embeddings[0], embeddings[1:]
    scale = logit_scale.to(anchor.dtype)
    excluded = _excluded_pairs(anchor, group_ids)  # (N, N)
    return (
        lambda: torch.stack([contrastive_loss(anchor, other, scale, excluded) for other in others]).mean(),
        lambda: align_true_pairs_loss(embeddings),
        lambda: centroid_uniformity_loss(embeddings, excluded),
    )


def _tiled_terms(
    embeddings: list[Tensor], logit_scale: Tensor, group_ids: Tensor | None, across_processes: bool
) -> tuple[Callable[[], Tensor], ...]:
    batch = GlobalBatch.gather(embeddings, group_ids, across_processes)
    embeddings = [_at_least_float32(z) for z in embeddings]
    anchor, others = embeddings[0], embeddings[1:]
    scale = logit_scale.to(anchor.dtype)

    def contrastive() -> Tensor:
        pairs = [tiled_contrastive_loss(anchor, other, scale, batch, m) for m, other in enumerate(others, start=1)]
        return torch.stack(pairs).mean()

    def uniformity() -> Tensor:
        with torch.no_grad():
            everyone = centroids_of(batch.embeddings)
            # Kernels multiply half precision as it is; torch computes in float32 anyway.
            everyone = everyone.to(batch.embeddings[0].dtype) if everyone.is_cuda else everyone
        return tiled_uniformity_loss(centroids_of(embeddings), everyone, batch)

    return contrastive, lambda: batch.mean_over_rows(align_true_pairs_loss(embeddings)), uniformity


def contrastive_loss(anchor: Tensor, other: Tensor, logit_scale: Tensor, excluded: Tensor | None = None) -> Tensor:
    """
    Symmetric InfoNCE: half the sum of both directions' cross-entropies over `logit_scale * anchor @ other.T`.

    `excluded` (N, N), bool: pairs that are no negatives. The diagonal, the true pairs, always counts.
    """
    logits = logit_scale * anchor @ other.T  # (N, N)
    if excluded is not None:
        off_diagonal = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(excluded & off_diagonal, -math.inf)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def align_true_pairs_loss(embeddings: list[Tensor]) -> Tensor:
    """L_ATP = 1/(M-1) sum over m != a of 1/N sum_i || z_i^m - z_i^a ||^2 (arXiv 2602.20046, Align True Pairs)."""
    anchor, *others = [_at_least_float32(z) for z in embeddings]
    return torch.stack([(other - anchor).square().sum(-1).mean() for other in others]).mean()


def centroid_uniformity_loss(embeddings: list[Tensor], excluded: Tensor | None = None) -> Tensor:
    """
    L_CU = log( mean over i != j of exp(-2 || mu_i - mu_j ||^2) ), mu_i the mean over modalities of z_i brought back to
    the sphere (arXiv 2602.20046, Centroid Uniformity).

    `excluded` (N, N), bool: pairs left out of the mean, the diagonal always among them. Where no pair is left (N = 1,
    or one group only) the loss is 0 with zero gradient.
    """
    centroids = centroids_of(embeddings)  # (N, D)
    squared_norms = centroids.square().sum(-1)
    squared_distances = squared_norms[:, None] + squared_norms - 2 * centroids @ centroids.T  # (N, N)
    ignored = torch.eye(len(centroids), dtype=torch.bool, device=centroids.device)
    ignored = ignored if excluded is None else ignored | excluded
    # -1e4 and not -inf: exp gives exactly 0 all the same, and the gradient stays 0 instead of NaN where nothing is
    # left.
    exponents = (-2 * squared_distances).masked_fill(ignored, -1e4)
    count = (~ignored).sum()
    log_mean = exponents.flatten().logsumexp(0) - count.clamp(min=1).to(exponents.dtype).log()
    return torch.where(count > 0, log_mean, torch.zeros_like(log_mean))


def centroids_of(embeddings: list[Tensor]) -> Tensor:
    """mu_i, the mean over modalities of z_i brought back to the sphere: (N, D), float32 or float64."""
    return unit_vectors(sum(_at_least_float32(z) for z in embeddings) / len(embeddings))


def unit_vectors(x: Tensor) -> Tensor:
    """Rows of x (..., D) at unit length. A row of zeros has no direction: it stays zero and gets no gradient."""
    squared_norm = x.square().sum(-1, keepdim=True)
    is_zero = squared_norm == 0
    return torch.where(is_zero, torch.zeros_like(x), x * squared_norm.masked_fill(is_zero, 1.0).rsqrt())


def scheduled_weight(weight: float | list[list[float]], progress: Tensor) -> float | Tensor:
    """
    Value of a weight at a fraction of training: a scheduled one as a scalar tensor, a constant one as it is.

    Args:
        weight: a number, or points [fraction, value] with rising fractions: linear between points, constant outside
            them.
        progress: scalar tensor in [0, 1]. A tensor, so that torch.compile does not compile anew at every step.
    """
    if isinstance(weight, int | float):
        return weight
    value = torch.full_like(progress, weight[0][1])
    for (start, a), (end, b) in zip(weight, weight[1:], strict=False):
        value = value + (b - a) * ((progress - start) / (end - start)).clamp(0, 1)
    return value


def _excluded_pairs(anchor: Tensor, group_ids: Tensor | None) -> Tensor | None:
    """(N, N) bool, True where i and j agree in any column of `group_ids` (N,) or (N, G); None without ids."""
    if group_ids is None:
        return None
    ids = group_ids.to(anchor.device).reshape(len(group_ids), -1)  # (N, G)
    excluded = torch.zeros(len(ids), len(ids), dtype=torch.bool, device=anchor.device)
    for column in ids.T:
        excluded |= column[:, None] == column
    return excluded


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_embeddings(embeddings: list[Tensor], group_ids: Tensor | None) -> None:
    if len(embeddings) < 2:
        raise ValueError(
            f"The objective compares modalities: give a list of two or more (N, D) tensors, not {len(embeddings)}."
        )
    shapes = [tuple(z.shape) for z in embeddings]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][0] == 0:
        raise ValueError(
            f"Embeddings of shapes {shapes}: every modality needs one (N, D) tensor of the same shape, row i of each "
            "belonging to sample i, and at least one row."
        )
    if group_ids is not None and (group_ids.ndim not in (1, 2) or len(group_ids) != shapes[0][0]):
        raise ValueError(f"group_ids has shape {tuple(group_ids.shape)}: give (N,) or (N, G) with N = {shapes[0][0]}.")


__all__ = [
    "GapClosedLoss",
    "align_true_pairs_loss",
    "centroid_uniformity_loss",
    "centroids_of",
    "contrastive_loss",
    "gap_closed_loss",
    "scheduled_weight",
    "unit_vectors",
]
