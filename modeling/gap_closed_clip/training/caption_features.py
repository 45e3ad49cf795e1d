"""Computes once what a captioner's frozen encoders give for each image, or for each caption."""

import torch
from datasets import Dataset, Value
from datasets import Sequence as SequenceFeature
from PIL import Image
from torch import Tensor, nn
from transformers.utils import logging

from ..data import PairCollator
from ..data.features import DTYPE, FeaturePairs
from ..data.image_ids import image_ids_of
from ..disk import readable_size
from ..evaluation.embed import embed_captions, evaluation_mode
from ..model.captioning_gap_closed_clip import GapClosedClipForConditionalGeneration
from .precompute import FeatureSettings, Kept, digest_of_weights, image_features, is_frozen


logger = logging.get_logger(__name__)

# An image's patches take a thousand times the room of its embedding: those of many images would fill a disk.
MOST_BYTES = 8 * 2**30


def encode_images_once(
    pairs: Dataset, model: GapClosedClipForConditionalGeneration, collator: PairCollator, settings: FeatureSettings
) -> Dataset | FeaturePairs:
    """
    The pairs with what the decoder reads of their images, `encoded_image` (C,): the unit vector and, where its memory
    has them, the image's patches. As they are where the encoder trains, or runs in every step.

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
    encoder.to(settings.device)
    parts = encoder.parts("image")
    with evaluation_mode(encoder):
        blank = collator.processor.image_processor(Image.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"]
        width = _encoded(model, blank.to(settings.device)).shape[1]
    views = 1 if collator.augmentation is None else settings.views
    needed = len(set(image_ids_of(pairs))) * views * width * DTYPE.itemsize
    if needed > MOST_BYTES:
        logger.warning(
            f"What the frozen encoder gives for the images would take {readable_size(needed)}, so that it runs in "
            "every step instead of once: fewer data.feature_views take less, and captioning.memory=embedding next to "
            "nothing."
        )
        return pairs
    described = {
        "pooling": encoder.config.image_pooling,
        "decoder_memory": model.config.decoder_memory,
        "behind_the_tower": digest_of_weights(nn.ModuleList([parts.projection, parts.centering, parts.map])),
    }
    kept = Kept(encoder, lambda _, inputs: _encoded(model, inputs["pixel_values"]), width, described)
    images = image_features(pairs, encoder, kept, collator, settings, vary=True)
    return FeaturePairs(pairs, images, None, varied=True, image_column="encoded_image")


@torch.no_grad()
def _encoded(model: GapClosedClipForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """(B, C): the unit vectors of images and, where the decoder's memory has them, their patches, one by one."""
    embeds, tokens = model.encode_image(pixel_values)
    if model.config.decoder_memory == "embedding":
        return embeds
    return torch.cat([embeds, tokens.flatten(1).to(embeds.dtype)], dim=1)


def embed_captions_once(
    pairs: Dataset, model: GapClosedClipForConditionalGeneration, collator: PairCollator, batch_size: int
) -> Dataset:
    """Adds a column `shared_embeds` (D,), float32: the frozen encoder's unit vectors of the pairs' captions."""
    with evaluation_mode(model.gap_closed_clip):
        embeds = embed_captions(model.gap_closed_clip, collator, pairs["caption"], batch_size)
    column = [embeds[caption] for caption in pairs["caption"]]
    return pairs.add_column("shared_embeds", column, feature=SequenceFeature(Value("float32"), length=len(column[0])))


__all__ = ["embed_captions_once", "encode_images_once"]
