"""What need not be computed in every step: a frozen text tower's output, and the centre of trained projections."""

import numpy as np
import torch
from datasets import Dataset, Sequence, Value
from datasets.utils import tqdm
from torch.utils.data import DataLoader

from ..data import PairCollator
from ..model.modeling_gap_closed_clip import GapClosedClipModel


@torch.no_grad()
def pool_captions_once(
    pairs: Dataset, model: GapClosedClipModel, collator: PairCollator, batch_size: int, device: torch.device
) -> Dataset:
    """
    The pairs with a column `pooled_text` (hidden,), float32: the frozen text tower's output for their captions.

    Each distinct caption goes through the tower once instead of once an epoch; the collator hands the column on
    instead of tokens. In memory: 4 * hidden bytes a pair.
    """
    captions = sorted(set(pairs["caption"]), key=len)  # texts of one length need no padding
    model.text_model.to(device).eval()
    pooled: dict[str, np.ndarray] = {}
    for start in tqdm(range(0, len(captions), batch_size), desc="Frozen text tower"):
        batch = captions[start : start + batch_size]
        tokens = {name: value.to(device) for name, value in collator.tokenize(batch).items()}
        pooled.update(zip(batch, model.encode_text(**tokens).pooler_output.float().cpu().numpy(), strict=True))
    column = np.stack([pooled[caption] for caption in pairs["caption"]])
    return pairs.add_column("pooled_text", list(column), feature=Sequence(Value("float32"), length=column.shape[1]))


@torch.no_grad()
def recenter(
    model: GapClosedClipModel, pairs: Dataset, collator: PairCollator, batch_size: int, num_workers: int
) -> None:
    """
    Sets the running means of a trained model's centering to the exact ones of the training pairs as inference sees
    them.

    The running mean of training lags behind the weights and is that of augmented images; the exact one closes what gap
    that leaves. (As "precise" statistics do for BatchNorm: Wu and Johnson, arXiv 2105.07576, section 3.)
    """
    training = model.training
    model.eval()
    plain = PairCollator(collator.processor, None, collator.max_length, collator.window)
    loader = DataLoader(pairs, batch_size, collate_fn=plain, num_workers=num_workers)
    sums = {"image": 0, "text": 0}
    for batch in tqdm(loader, desc="Centering"):
        batch = {name: value.to(model.device) for name, value in batch.items()}
        pixel_values = batch.pop("pixel_values")
        batch.pop("group_ids")
        sums["image"] += model.get_image_features(pixel_values).pooler_output.sum(0)
        sums["text"] += model.get_text_features(**batch).pooler_output.sum(0)
    # Features come centered by the running mean: what is left of their mean is its error.
    # (.add_ and not +=, which would put the tensor a second time on what peft wraps the module in)
    model.visual_centering.running_mean.add_(sums["image"] / len(pairs))
    model.text_centering.running_mean.add_(sums["text"] / len(pairs))
    model.train(training)


__all__ = ["pool_captions_once", "recenter"]
