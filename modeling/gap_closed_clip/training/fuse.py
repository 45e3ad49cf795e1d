"""What a query of several modalities weighs each of them with, measured when training ends."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from datasets.utils import tqdm
from torch import Tensor
from transformers.utils import logging

from ..evaluation import PairEmbeddings
from ..evaluation.embed import evaluation_mode
from ..evaluation.fusion import fusion_weights
from ..model.modeling_gap_closed_clip import GapClosedClipModel


logger = logging.get_logger(__name__)

# Samples that the weights are measured on: three numbers need no more.
SAMPLES = 4096


def set_fusion_weights(model: GapClosedClipModel, batches: Iterable[dict[str, Tensor]]) -> None:
    """
    Sets `config.fusion_weights` to what `evaluation.fusion` makes of some pairs; None where they don't tell, and the
    config of two modalities is left as it is.

    Args:
        model: the encoder, trained and centered.
        batches: inputs of `model`, without augmentation, with `modality_mask`. Read once, up to `SAMPLES` samples.
    """
    if not model.config.modalities:
        return
    try:
        weights = fusion_weights(_embeddings(model, batches))
        if not all(map(math.isfinite, weights.values())):
            raise ValueError(f"the weights are {weights}, since embeddings are not finite.")
    except ValueError as error:
        logger.warning(f"How much each modality counts in a query of several stays open, so all count alike: {error}")
        weights = {}
    model.config.fusion_weights = {name: round(weight, 4) for name, weight in weights.items()} or None


@torch.no_grad()
def _embeddings(model: GapClosedClipModel, batches: Iterable[dict[str, Tensor]]) -> PairEmbeddings:
    """Of those modalities that any sample of the batches has."""
    names = model.config.modality_names
    found: dict[str, list[np.ndarray]] = {}
    masks: list[np.ndarray] = []
    with evaluation_mode(model):
        for batch in tqdm(batches, desc="Weighing modalities", leave=False):
            inputs: dict[str, Any] = {name: value.to(model.device) for name, value in batch.items()}
            outputs = model(**inputs, return_loss=False)
            for name, embeds in outputs.embeds.items():
                found.setdefault(name, []).append(embeds.float().cpu().numpy())
            masks.append(batch["modality_mask"].numpy())
            if sum(map(len, masks)) >= SAMPLES:
                break
    mask = np.concatenate(masks)  # (N, M)
    present = {name: mask[:, names.index(name)] for name in found}
    embeds_of = {name: np.concatenate(parts) for name, parts in found.items()}
    own = [str(row) for row in range(len(mask))]
    return PairEmbeddings(
        image_embeds=embeds_of.pop("image"),
        text_embeds=embeds_of.pop("text"),
        image_ids=own,
        captions=own,
        labels=[""] * len(mask),
        further={name: embeds for name, embeds in embeds_of.items() if present[name].any()},
        present=present,
    )


__all__ = ["set_fusion_weights"]
