"""Queries of several modalities: one unit vector of an image and a record together, for one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .losses_gap_closed_clip import unit_vectors


def fuse(embeds: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> Tensor:
    """
    The weighted sum of a sample's embeddings in several modalities, as a unit vector.

    Args:
        embeds: {modality: (B, D)} unit vectors; a row of zeros where a sample lacks the modality.
        weights: what each modality counts, as `config.fusion_weights` has them. Modalities weigh alike with None, and
            where one of `embeds` has no weight, since nothing measured says what it counts beside the others.

    Returns:
        (B, D). A sample that has one modality alone has that one's embedding, whatever it weighs; one that has none, a
        row of zeros.

    Raises:
        ValueError: there are no embeddings, or of different shapes.
    """
    if not embeds or len({tuple(each.shape) for each in embeds.values()}) > 1:
        shapes = {name: tuple(each.shape) for name, each in embeds.items()}
        raise ValueError(f"To fuse are {shapes}: give embeddings (B, D) of one modality or more, all of one shape.")
    known = weights is not None and all(name in weights for name in embeds)
    stacked = torch.stack(list(embeds.values()))  # (M, B, D)
    scale = stacked.new_tensor([weights[name] if known else 1.0 for name in embeds])  # type: ignore[index]
    summed = (scale[:, None, None] * stacked).sum(0)
    # Of weight 0 alone: what else should such a query ask for?
    return unit_vectors(torch.where(summed.any(-1, keepdim=True), summed, stacked.sum(0)))


__all__ = ["fuse"]
