"""The exact centering of trained projections, in place of the running means of training."""

from typing import Any

import torch
from datasets import Dataset
from datasets.utils import tqdm
from torch.utils.data import DataLoader

from ..data import PairCollator
from ..model.modeling_gap_closed_clip import GapClosedClipModel


@torch.no_grad()
def recenter(
    model: GapClosedClipModel, pairs: Dataset, collator: PairCollator, batch_size: int, num_workers: int
) -> None:
    """
    Sets the running means of a trained model's centering to the exact ones of the training pairs as inference sees
    them. A model without centering is left as it is.

    The running mean of training lags behind the weights and is that of augmented images; the exact one closes what gap
    that leaves. (As "precise" statistics do for BatchNorm: Wu and Johnson, arXiv 2105.07576, section 3.)
    """
    if not model.config.center_projections:
        return
    training = model.training
    model.eval()
    plain = PairCollator(collator.processor, None, collator.max_length, collator.window)
    loader = DataLoader(pairs, batch_size, collate_fn=plain, num_workers=num_workers)
    sums: dict[str, torch.Tensor | int] = {"image": 0, "text": 0}
    for batch in tqdm(loader, desc="Centering"):
        batch = {name: value.to(model.device) for name, value in batch.items()}
        pixel_values = batch.pop("pixel_values")
        batch.pop("group_ids")
        sums["image"] += model.get_image_features(pixel_values).pooler_output.sum(0)
        sums["text"] += model.get_text_features(**batch).pooler_output.sum(0)
    # Features come centered by the running mean: what is left of their mean is its error.
    # (.add_ and not +=, which would put the tensor a second time on what peft wraps the module in)
    centerings: dict[str, Any] = {"image": model.visual_centering, "text": model.text_centering}
    for name, centering in centerings.items():
        centering.running_mean.add_(sums[name] / len(pairs))
    model.train(training)


__all__ = ["recenter"]
