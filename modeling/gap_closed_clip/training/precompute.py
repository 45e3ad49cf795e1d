"""Computes once what need not be computed in every step: the output of frozen towers for every caption."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset, Sequence, Value

from ..data import PairCollator
from ..evaluation.embed import embed_captions, evaluation_mode
from ..model.captioning_gap_closed_clip import GapClosedClipForConditionalGeneration
from ..model.modeling_gap_closed_clip import GapClosedClipModel


@torch.no_grad()
def pool_captions_once(
    pairs: Dataset, model: GapClosedClipModel, collator: PairCollator, batch_size: int, device: torch.device
) -> Dataset:
    """
    Adds a column `pooled_text` (hidden,), float32: the frozen text tower's output for the pairs' captions.

    Each distinct caption goes through the tower once instead of once an epoch; the collator hands the column on
    instead of tokens. In memory: 4 * hidden bytes a pair.
    """
    model.text_model.to(device).eval()
    pooled: dict[str, np.ndarray] = {}
    batches = collator.distinct_caption_batches(pairs["caption"], batch_size, device, "Frozen text tower")
    for batch, tokens in batches:
        inputs: dict[str, Any] = tokens
        outputs = model.encode_text(**inputs)
        pooled.update(zip(batch, outputs.pooler_output.float().cpu().numpy(), strict=True))
    column = np.stack([pooled[caption] for caption in pairs["caption"]])
    return pairs.add_column("pooled_text", list(column), feature=Sequence(Value("float32"), length=column.shape[1]))


def embed_captions_once(
    pairs: Dataset, model: GapClosedClipForConditionalGeneration, collator: PairCollator, batch_size: int
) -> Dataset:
    """Adds a column `shared_embeds` (D,), float32: the frozen encoder's unit vectors of the pairs' captions."""
    with evaluation_mode(model.gap_closed_clip):
        embeds = embed_captions(model.gap_closed_clip, collator, pairs["caption"], batch_size)
    column = [embeds[caption] for caption in pairs["caption"]]
    return pairs.add_column("shared_embeds", column, feature=Sequence(Value("float32"), length=len(column[0])))


__all__ = ["embed_captions_once", "pool_captions_once"]
