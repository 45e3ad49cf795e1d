"""Several modalities of one sample as one query."""

from collections.abc import Mapping

import torch
from torch import Tensor


def fuse(embeds: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> Tensor:
    """
    The query of several modalities: unit(sum_m w_m z_m), (B, D).

    Args:
        embeds: by the names of modalities, (B, D) unit vectors, as `outputs.embeds` gives them; rows of zeros where a
            sample lacks a modality, which is then found by its others.
        weights: by name, such as `config.fusion_weights`; default: all 1, the plain mean.

    Returns:
        Unit vectors; a row of zeros where a sample has none of the modalities.

    Raises:
        ValueError: no embeddings, embeddings of different shapes, or a modality without a weight.
    """
    if not embeds:
        raise ValueError("fuse: there are no embeddings to put together.")
    shapes = {name: tuple(z.shape) for name, z in embeds.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"fuse: the embeddings are of different shapes, {shapes}: give a row for each sample.")
    if missing := [name for name in embeds if weights is not None and name not in weights]:
        raise ValueError(f"fuse: there is no weight of {', '.join(missing)}, only of {', '.join(weights or ())}.")
    scale = {name: 1.0 if weights is None else float(weights[name]) for name in embeds}
    summed = torch.stack([scale[name] * z for name, z in embeds.items()]).sum(0)
    return torch.nn.functional.normalize(summed, dim=-1)


__all__ = ["fuse"]
