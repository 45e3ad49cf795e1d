"""Everything that a run trains, and what it trains it with: once for encoders and captioners."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..data import CaptionCollator, PairCollator
from ..data.arguments import expand_path
from ..data.features import FeaturePairs, default_feature_cache
from ..evaluation import build_caption_metrics, build_compute_metrics
from ..evaluation.fast_tower import has_spatial_convolutions
from ..model.captioning_gap_closed_clip import GapClosedClipForConditionalGeneration
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from ..model.tower_kinds_gap_closed_clip import image_width, longest_text, token_width
from .adapter_base import AdapterBase
from .arguments import GapClosedTrainingArguments
from .caption_features import embed_captions_once, encode_images_once
from .caption_trainer import GapClosedCaptionTrainer
from .captioning import CaptioningArguments, build_captioner, mean_shift
from .config import RunConfig
from .encoder import build_model_and_processor, set_caption_length
from .fuse import SAMPLES
from .modalities import FurtherColumns, check_held_out_records, trained_as_heads
from .precompute import FeatureSettings, embed_pairs_once, is_frozen
from .preflight import RunInputs
from .tower_descriptions import RECORD
from .trainer import GapClosedClipTrainer


logger = logging.get_logger(__name__)

# Held-out pairs that tell more of a query's weights than training pairs do.
LEAST_HELD_OUT = 100


@dataclass
class RunParts:
    """
    What a Trainer is made of, and what is needed when it has finished.

    Args:
        model: what is trained: an encoder, adapters around one, or a captioner.
        encoder: the encoder in it.
        processor: of the model.
        train_pairs: the training pairs, with what frozen towers gave for them before.
        eval_pairs: likewise the pairs of the evaluations during training, if there are any.
        pair_collator: makes batches of pairs; training's own augmentation included.
        trainer_class, data_collator, compute_metrics: what the Trainer is called with.
        trains_encoder: whether training moves the encoder's projections, and so their centers.
        base: of adapters that are saved as such, the model they belong to.
        pretrained_modalities: further ones whose towers come with trained weights.
    """

    model: PreTrainedModel | PeftModel
    encoder: GapClosedClipModel
    processor: GapClosedClipProcessor
    train_pairs: Dataset | IterableDataset | FeaturePairs
    eval_pairs: Dataset | IterableDataset | FeaturePairs | None
    pair_collator: PairCollator
    trainer_class: type[Trainer]
    data_collator: Callable
    compute_metrics: Callable | None
    trains_encoder: bool = True
    base: AdapterBase | None = None
    pretrained_modalities: tuple[str, ...] = ()

    @property
    def towers_have_run(self) -> bool:
        """
        Whether image and text tower are frozen and have run before, and a record's alone is left: a pass through all
        pairs then costs next to nothing.
        """
        pairs = self.train_pairs
        have_run = isinstance(pairs, FeaturePairs) and pairs.images is not None and pairs.texts is not None
        further = (self.encoder.config.modalities or {}).values()
        return have_run and all(entry["tower"].model_type == RECORD for entry in further)

    def plain_batches(self, args: GapClosedTrainingArguments, pairs: Any = None) -> DataLoader:
        """Batches of the training pairs, or of others, as inference sees them."""
        collator = self.pair_collator
        plain = PairCollator(collator.processor, None, collator.max_length, collator.window)
        pairs = self.train_pairs if pairs is None else pairs
        pairs = pairs.plain() if isinstance(pairs, FeaturePairs) else pairs
        workers = 0 if self.towers_have_run else args.dataloader_num_workers
        return DataLoader(pairs, args.eval_batch_size, collate_fn=plain, num_workers=workers)

    def batches_to_weigh(self, args: GapClosedTrainingArguments) -> DataLoader:
        """
        Batches that tell how much each modality counts in a query of several: of pairs of the evaluations during
        training, if there are enough. What was learned by heart would count for more than it is worth elsewhere.
        """
        held_out, pairs = self.eval_pairs, self.train_pairs
        if isinstance(held_out, Dataset | FeaturePairs) and len(held_out) >= LEAST_HELD_OUT:
            pairs = held_out
        if isinstance(pairs, Dataset | FeaturePairs) and len(pairs) > SAMPLES:
            pairs = pairs.select(np.linspace(0, len(pairs) - 1, SAMPLES).astype(int))
        return self.plain_batches(args, pairs)


def build(config: RunConfig, inputs: RunInputs) -> RunParts:
    """
    Builds what `config` describes, for the pairs of `inputs`.

    Raises:
        ValueError, OSError: towers, a checkpoint, adapters or a decoder that can't be had, or don't go together.
    """
    if config.captioning is not None:
        return _captioner_parts(config, config.captioning, inputs)
    return _encoder_parts(config, inputs)


def _encoder_parts(config: RunConfig, inputs: RunInputs) -> RunParts:
    args, train_pairs, eval_pairs = inputs.args, inputs.train_pairs, inputs.eval_pairs
    given = FurtherColumns(config.data.all_modalities, train_pairs)
    encoder, processor = build_model_and_processor(config.model, inputs.captions(), given)
    check_held_out_records(processor, inputs.held_out, given.columns)
    set_caption_length(train_pairs, encoder, processor, config.data)
    as_heads = trained_as_heads(config.model, encoder.config)
    pretrained = tuple(name for name in encoder.config.modalities or {} if name not in as_heads)
    _warn_of_those_left_behind(encoder, given)
    model: PreTrainedModel | PeftModel = encoder
    base = None
    if config.lora is not None:
        base = AdapterBase(encoder, config.model, args.output_dir, as_heads)
        model = base.adapt(config.lora)
        base = None if config.lora.merge else base
    collator = _pair_collator(config, processor)
    if not is_frozen(encoder.vision_model):
        _convolve_channels_last(encoder)
    settings = feature_settings(config, args)
    if isinstance(train_pairs, Dataset):
        train_pairs = embed_pairs_once(train_pairs, encoder, collator, settings, vary=True)
    if isinstance(eval_pairs, Dataset):
        eval_pairs = embed_pairs_once(eval_pairs, encoder, collator, settings, vary=False)
    metrics = None
    if inputs.eval_pairs is not None:
        metrics = build_compute_metrics(inputs.eval_pairs, args.eval_grouping)
    return RunParts(
        model=model,
        encoder=encoder,
        processor=processor,
        train_pairs=train_pairs,
        eval_pairs=eval_pairs,
        pair_collator=collator,
        trainer_class=GapClosedClipTrainer,
        data_collator=collator,
        compute_metrics=metrics,
        base=base,
        pretrained_modalities=pretrained,
    )


def _warn_of_those_left_behind(encoder: GapClosedClipModel, given: FurtherColumns) -> None:
    unused = " and ".join(name for name in encoder.config.modalities or {} if name not in given.columns)
    if unused:
        logger.warning(
            f"The model takes {unused}, and data.modalities has none: {unused} will not train along, while image and "
            "text move. Name the columns there to keep them aligned."
        )


def _captioner_parts(config: RunConfig, captioning: CaptioningArguments, inputs: RunInputs) -> RunParts:
    args, train_pairs = inputs.args, inputs.train_pairs
    model, processor = build_captioner(captioning, config.model, inputs.captions())
    _check_caption_length(config, model)
    joint = captioning.encoders == "joint"
    set_caption_length(train_pairs, model.gap_closed_clip, processor, config.data, trained=joint)
    collator, tower = _pair_collator(config, processor), model.gap_closed_clip.vision_model
    if captioning.train_on == "text":
        model.to(args.device)
        train_pairs = embed_captions_once(train_pairs, model, collator, args.eval_batch_size)
        # Before training, whose evaluations and checkpoints have it, too; a trained captioner may bring another.
        model.set_image_shift(_mean_shift(config, inputs, model, processor) if captioning.mean_shift else None)
    elif isinstance(train_pairs, Dataset):
        train_pairs = encode_images_once(train_pairs, model, collator, feature_settings(config, args))
    if captioning.train_on == "image":
        _convolve_channels_last(model.gap_closed_clip)
    metrics = None
    if args.predict_with_generate and inputs.eval_pairs is not None:
        metrics = build_caption_metrics(inputs.eval_pairs, processor)
    return RunParts(
        model=model,
        encoder=model.gap_closed_clip,
        processor=processor,
        train_pairs=train_pairs,
        eval_pairs=inputs.eval_pairs,
        pair_collator=collator,
        trainer_class=GapClosedCaptionTrainer,
        data_collator=CaptionCollator(collator, (image_width(tower), token_width(tower))),
        compute_metrics=metrics,
        trains_encoder=joint,
    )


def _convolve_channels_last(encoder: GapClosedClipModel) -> None:
    """Has the convolutions of an image tower that runs in every step take the faster layout; it is saved as ever."""
    if has_spatial_convolutions(encoder.vision_model):
        encoder.vision_model.to(memory_format=torch.channels_last)


def _pair_collator(config: RunConfig, processor: GapClosedClipProcessor) -> PairCollator:
    data = config.data
    return PairCollator(processor, data.augmentation(), data.max_caption_tokens, data.window)


def feature_settings(config: RunConfig, args: GapClosedTrainingArguments) -> FeatureSettings:
    """Where the features of frozen towers are kept, and how they are made."""
    cache = config.data.feature_cache
    return FeatureSettings(
        folder=default_feature_cache() if cache is None else Path(expand_path(cache, "data.feature_cache")),
        views=config.data.feature_views,
        batch_size=args.eval_batch_size,
        num_workers=args.dataloader_num_workers,
        device=args.device,
    )


def _mean_shift(
    config: RunConfig,
    inputs: RunInputs,
    model: GapClosedClipForConditionalGeneration,
    processor: GapClosedClipProcessor,
):
    return mean_shift(
        model,
        processor,
        inputs.train_pairs,
        batch_size=inputs.args.eval_batch_size,
        num_workers=inputs.args.dataloader_num_workers,
        max_length=config.data.max_caption_tokens,
        window=config.data.window,
    )


def _check_caption_length(config: RunConfig, model: GapClosedClipForConditionalGeneration) -> None:
    limit = longest_text(model.config.decoder_config)
    if (config.data.max_caption_tokens or 0) > limit:
        raise ValueError(
            f"data.max_caption_tokens is {config.data.max_caption_tokens}, but the decoder takes {limit} tokens at "
            "most."
        )


__all__ = ["RunParts", "build", "feature_settings"]
