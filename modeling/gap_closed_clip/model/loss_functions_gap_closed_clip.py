"""
The terms of the objective as pure functions of embeddings, by means of N x N matrices, which autograd keeps. What the
embeddings are is said in `losses_gap_closed_clip`, where the terms become one loss.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .loss_inputs_gap_closed_clip import Pairs, SharedSamples, anchor_pairs, without_samples


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
        off_diagonal = ~torch.eye(logits.shape[0], dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(excluded & off_diagonal, -math.inf)
    target = torch.arange(logits.shape[0], device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(
    anchor: Tensor,
    other: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    excluded: Tensor | None = None,
    samples: Tensor | None = None,
) -> Tensor:
    """
    SigLIP's loss between two modalities (Zhai et al., arXiv 2303.15343, eq. 1): -1/N sum over i, j of
    log sigmoid(y_ij (logit_scale * anchor_i . other_j + logit_bias)), where y is 1 for true pairs, i = j, and -1
    elsewhere.

    Args:
        anchor, other: (N, D) each.
        logit_bias: scalar, b of the paper.
        excluded: (N, N), bool: pairs that are no negatives and are left out. The diagonal always counts.
        samples: (N,), bool: False for samples that are left out, with all of their pairs; N stays the number of rows.
    """
    is_true = torch.eye(anchor.shape[0], dtype=torch.bool, device=anchor.device)
    logits = logit_scale * anchor @ other.T + logit_bias  # (N, N)
    losses = -F.logsigmoid(torch.where(is_true, logits, -logits))
    left_out = None if excluded is None else excluded & ~is_true
    if samples is not None:
        left_out = without_samples(left_out, samples)
    if left_out is not None:
        losses = losses.masked_fill(left_out, 0.0)
    return losses.sum() / anchor.shape[0]


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
    return pairwise_uniformity_loss(centroids, centroids, excluded)


def pairwise_uniformity_loss(x: Tensor, y: Tensor, excluded: Tensor | None = None) -> Tensor:
    """
    log( mean over i != j of exp(-2 || x_i - y_j ||^2) ): the uniformity of Wang and Isola (arXiv 2005.10242) where x
    and y are one tensor, and the cross-modal uniformity of Fahim et al. (arXiv 2405.18570) where they are two
    modalities.

    Args:
        x, y: (N, D) each.
        excluded: (N, N), bool: pairs that are left out of the mean, as the diagonal always is. Where no pair is left
            the loss is 0, with a gradient of 0.
    """
    x_norms = x.square().sum(-1)
    y_norms = x_norms if y is x else y.square().sum(-1)
    squared_distances = x_norms[:, None] + y_norms - 2 * x @ y.T  # (N, N)
    ignored = torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
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


__all__ = [
    "align_true_pairs_loss",
    "at_least_float32",
    "centroid_uniformity_loss",
    "centroids_of",
    "contrastive_loss",
    "pairwise_uniformity_loss",
    "sigmoid_loss",
    "unit_vectors",
]
