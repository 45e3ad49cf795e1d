"""
The objective as a function of embeddings: contrastive loss, Align True Pairs, Centroid Uniformity, and what other
papers put beside them or in their place. The terms are in `loss_functions_gap_closed_clip`, and in tiles in
`tiled_gap_closed_clip` and `tiled_entries_gap_closed_clip`.

Sources: Grassucci, Cicchetti, Comminiello, "Closing the gap in multimodal medical representation alignment",
arXiv 2602.20046, and for more than two modalities "Closing the Modality Gap Aligns Group-Wise Semantics",
arXiv 2601.18525; for uniformity in each modality and between modalities Fahim, Murphy, Fyshe, "It's Not a Modality
Gap: Characterizing and Addressing the Contrastive Gap", arXiv 2405.18570; for the sigmoid loss Zhai et al., "Sigmoid
Loss for Language Image Pre-Training", arXiv 2303.15343.

Embeddings are a list of M >= 2 tensors of shape (N, D), one for each modality. Row i of every tensor belongs to sample
i, and the first modality is the anchor. Rows are expected to be unit vectors; a row of zeros is allowed, its cosine
with every row is 0. Everything is computed in float32, or in float64 where the embeddings are float64, also under
autocast.

Samples may lack modalities. Each pair of modalities is then compared over the samples that have both, exactly as if
the batch had no others, and a sample's centroid is that of the modalities it has.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .distributed_gap_closed_clip import world_size
from .loss_functions_gap_closed_clip import (
    align_true_pairs_loss,
    at_least_float32,
    centroid_uniformity_loss,
    centroids_of,
    contrastive_loss,
    pairwise_uniformity_loss,
    sigmoid_loss,
    unit_vectors,
)
from .loss_inputs_gap_closed_clip import Pairs, bias_of, check_loss_inputs, scale_of, zero_absent
from .loss_terms_gap_closed_clip import DenseTerms, PartialTiledTerms, TiledTerms


# From this many rows on, the N x N matrices are by default visited in tiles and not kept.
TILED_FROM = 1024
# Terms that are computed only where their weight is not the number 0.
FURTHER_TERMS = ("modality_uniformity", "cross_uniformity")


class GapClosedLoss(NamedTuple):
    """The weighted sum of the objective's terms, and the terms before weighting; each is a scalar tensor."""

    loss: Tensor
    contrastive_loss: Tensor
    align_loss: Tensor
    uniformity_loss: Tensor


class FurtherGapClosedLoss(NamedTuple):
    """As [`GapClosedLoss`], where further terms have a weight; None for one of them that has none."""

    loss: Tensor
    contrastive_loss: Tensor
    align_loss: Tensor
    uniformity_loss: Tensor
    modality_uniformity_loss: Tensor | None = None
    cross_uniformity_loss: Tensor | None = None


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
    modality_uniformity_weight: float | Tensor = 0.0,
    cross_uniformity_weight: float | Tensor = 0.0,
    logit_bias: Tensor | float | None = None,
    modality_ids: Tensor | None = None,
) -> GapClosedLoss | FurtherGapClosedLoss:
    """
    The combined objective (arXiv 2602.20046, total loss) of one batch.

    Where `align_weight` or `uniformity_weight` is the number 0, that term has its value, for the log, but no gradient:
    nothing is computed or kept for a backward pass. Where `modality_uniformity_weight` or `cross_uniformity_weight`
    is, there is no such term.

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
        modality_uniformity_weight: of the mean over the modalities of log( mean over i != j of
            exp(-2 ||z_i - z_j||^2) ), each over the samples that have it (arXiv 2405.18570). Modalities that no sample
            has are left out, and so are pairs of samples that agree in `group_ids`.
        cross_uniformity_weight: of the mean over `pairs` of log( mean over i != j of exp(-2 ||x_i - y_j||^2) ), each
            over the samples that have both (arXiv 2405.18570).
        logit_bias: a number or a tensor of one: the contrastive term is then SigLIP's sigmoid loss with this bias
            (arXiv 2303.15343), of which groups, masks and pairs leave out the same as of the softmax. None: InfoNCE.
        modality_ids: integers of shape (N, M), equal where two samples have an equal value of a modality (one record
            of "female, 45"). Such samples are no negatives of each other in the terms that compare that modality;
            where the others are compared, they are, unlike those that agree in `group_ids`. Either all processes give
            them or none.

    Raises:
        ValueError: there are fewer than two modalities, their shapes differ, they have no row, `group_ids` has
            another number of rows, `logit_scale` is no single positive number, `logit_bias` no single finite one,
            `modality_mask` or `modality_ids` is not (N, M), the mask not bool, or `pairs` is empty, has a pair twice,
            or one that is not two different modalities.
    """
    check_loss_inputs(embeddings, group_ids, modality_mask, pairs, modality_ids)
    scale, bias = scale_of(logit_scale, embeddings[0]), bias_of(logit_bias, embeddings[0])
    if modality_mask is not None:
        modality_mask = modality_mask.to(embeddings[0].device)
        embeddings = zero_absent(embeddings, modality_mask)
    across_processes = across_processes and world_size() > 1
    if tiled is None:
        tiled = embeddings[0].shape[0] >= TILED_FROM
    weights = {
        "contrastive": contrastive_weight,
        "align": align_weight,
        "uniformity": uniformity_weight,
        "modality_uniformity": modality_uniformity_weight,
        "cross_uniformity": cross_uniformity_weight,
    }
    with torch.autocast(embeddings[0].device.type, enabled=False):
        terms: TiledTerms | DenseTerms
        if not (tiled or across_processes):
            terms = DenseTerms(embeddings, scale, group_ids, modality_mask, pairs, bias, modality_ids)
        elif modality_mask is None:
            terms = TiledTerms(embeddings, scale, group_ids, across_processes, pairs, bias, modality_ids)
        else:
            terms = PartialTiledTerms(
                modality_mask, embeddings, scale, group_ids, across_processes, pairs, bias, modality_ids
            )
        return _weighted_sum(terms, weights)


def _weighted_sum(
    terms: TiledTerms | DenseTerms, weights: dict[str, float | Tensor]
) -> GapClosedLoss | FurtherGapClosedLoss:
    """The sum of the terms, by their names, with these weights."""
    with_gradients = torch.is_grad_enabled()
    values: dict[str, Tensor] = {}
    loss: Tensor | None = None
    for name, weight in weights.items():
        if name in FURTHER_TERMS and is_zero(weight):
            continue
        # Also of weight 0 contrastive keeps its gradient: DistributedDataParallel refuses a scale that gets none.
        with torch.set_grad_enabled(with_gradients and (name == "contrastive" or not is_zero(weight))):
            value = getattr(terms, name)()
        values[f"{name}_loss"] = value
        loss = weight * value if loss is None else loss + weight * value
    assert loss is not None
    kind = GapClosedLoss if len(values) == len(weights) - len(FURTHER_TERMS) else FurtherGapClosedLoss
    return kind(loss, **values)


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


def is_zero(weight: float | Tensor) -> bool:
    """Whether a weight is the number 0. The value of a tensor is not looked at, which would wait for the GPU."""
    return isinstance(weight, int | float) and weight == 0


__all__ = [
    "TILED_FROM",
    "DenseTerms",
    "FurtherGapClosedLoss",
    "GapClosedLoss",
    "PartialTiledTerms",
    "TiledTerms",
    "align_true_pairs_loss",
    "at_least_float32",
    "centroid_uniformity_loss",
    "centroids_of",
    "contrastive_loss",
    "gap_closed_loss",
    "is_zero",
    "pairwise_uniformity_loss",
    "scheduled_weight",
    "sigmoid_loss",
    "unit_vectors",
]
