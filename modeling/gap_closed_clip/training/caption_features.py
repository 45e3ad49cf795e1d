"""Computes once what a captioner's frozen encoder gives for each image, or for each caption."""

import torch
from datasets import Dataset, Value
from datasets import Sequence as SequenceFeature
from PIL import Image
from torch import Tensor
from transformers.utils import logging

from ..data import PairCollator
from ..data.features import DTYPE, FeaturePairs
from ..data.image_ids import image_ids_of
from ..disk import readable_size
from ..evaluation.embed import embed_captions, evaluation_mode
from ..model.caption_encoding_gap_closed_clip import patches_of
from ..model.captioning_gap_closed_clip import GapClosedClipForConditionalGeneration
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.tower_kinds_gap_closed_clip import token_width
from .precompute import FeatureSettings, Kept, image_features, is_frozen, pooled_images


logger = logging.get_logger(__name__)

# An image's patches take some hundred times the room of what represents it: those of many images would fill a disk.
MOST_BYTES = 8 * 2**30


def encode_images_once(
    pairs: Dataset, model: GapClosedClipForConditionalGeneration, collator: PairCollator, settings: FeatureSettings
) -> Dataset | FeaturePairs:
    """
    The pairs with what the decoder needs of the image tower, `encoded_image` (C,): what represents the image and,
    where the decoder's memory has them, its patches. As they are where the encoder trains, or runs in every step.

    Args:
        pairs: canonical pairs, of the training.
        model: the captioner.
        collator: with the augmentation of the training images.

    Raises:
        OSError, ValueError: as `embed_pairs_once`.
    """
    encoder = model.gap_closed_clip
    if not settings.views or not is_frozen(encoder):
        return pairs
    kept = pooled_images(encoder)
    if model.config.decoder_memory != "embedding":
        pixels = _blank_pixels(collator)
        if pixels is None:  # images of different sizes, and of different numbers of patches
            return pairs
        kept = _pooled_images_and_patches(encoder, kept, pixels)
        views = 1 if collator.augmentation is None else settings.views
        needed = len(set(image_ids_of(pairs))) * views * kept.width * DTYPE.itemsize
        if needed > MOST_BYTES:
            logger.warning(
                f"The image tower's patches of all images would take {readable_size(needed)}, so that the tower runs "
                "in every step instead of once: fewer data.feature_views take less, and captioning.memory=embedding "
                "next to nothing."
            )
            return pairs
    images = image_features(pairs, encoder, kept, collator, settings, vary=True)
    return FeaturePairs(pairs, images, None, varied=True, image_column="encoded_image")


def _blank_pixels(collator: PairCollator) -> Tensor | None:
    """(1, 3, height, width) of a blank image; None where the processor makes other sizes of other images."""
    processor = collator.processor.image_processor
    blank = [
        processor(Image.new("RGB", size), return_tensors="pt")["pixel_values"]
        for size in ((64, 64), (96, 64), (64, 96))
    ]
    return blank[0] if all(pixels.shape == blank[0].shape for pixels in blank) else None


def _pooled_images_and_patches(encoder: GapClosedClipModel, pooled: Kept, pixels: Tensor) -> Kept:
    """What represents an image and, behind it, its patches one by one; `pixels` are some image's."""

    def pool(_, inputs: dict[str, Tensor]) -> Tensor:
        outputs = encoder.encode_image(inputs["pixel_values"])
        patches = patches_of(outputs.last_hidden_state, token_width(encoder.vision_model))
        return torch.cat([outputs.pooler_output, patches.flatten(1)], dim=1)

    with evaluation_mode(encoder.vision_model):
        width = pool(None, {"pixel_values": pixels.to(encoder.device)}).shape[1]
    described = pooled.described | {"kept": "pooled and patches"}
    return Kept(pool, width, described, (pooled.width, width - pooled.width))


def embed_captions_once(
    pairs: Dataset, model: GapClosedClipForConditionalGeneration, collator: PairCollator, batch_size: int
) -> Dataset:
    """Adds a column `shared_embeds` (D,), float32: the frozen encoder's unit vectors of the pairs' captions."""
    with evaluation_mode(model.gap_closed_clip):
        embeds = embed_captions(model.gap_closed_clip, collator, pairs["caption"], batch_size)
    column = [embeds[caption] for caption in pairs["caption"]]
    return pairs.add_column("shared_embeds", column, feature=SequenceFeature(Value("float32"), length=len(column[0])))


__all__ = ["embed_captions_once", "encode_images_once"]
