"""Everything that a run trains, and what it trains it with: once for encoders and captioners."""

from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from ..data import CaptionCollator, PairCollator
from ..evaluation import build_caption_metrics, build_compute_metrics
from ..model.captioning_gap_closed_clip import GapClosedClipForConditionalGeneration
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from ..model.towers_gap_closed_clip import longest_text
from .caption_trainer import GapClosedCaptionTrainer
from .captioning import CaptioningArguments, build_captioner, mean_shift
from .config import RunConfig
from .encoder import build_model_and_processor, set_caption_length
from .lora import AdapterBase
from .precompute import embed_captions_once, pool_captions_once
from .preflight import RunInputs
from .trainer import GapClosedClipTrainer


@dataclass
class RunParts:
    """
    What a Trainer is made of, and what is needed when it has finished.

    Args:
        model: what is trained: an encoder, adapters around one, or a captioner.
        encoder: the encoder in it.
        processor: of the model.
        train_pairs: the training pairs, with columns for what was computed before.
        pair_collator: makes batches of pairs; training's own augmentation included.
        trainer_class, data_collator, compute_metrics: what the Trainer is called with.
        trains_encoder: whether training moves the encoder's projections, and so their centers.
        base: of adapters that are saved as such, the model they belong to.
    """

    model: PreTrainedModel | PeftModel
    encoder: GapClosedClipModel
    processor: GapClosedClipProcessor
    train_pairs: Dataset | IterableDataset
    pair_collator: PairCollator
    trainer_class: type[Trainer]
    data_collator: Callable
    compute_metrics: Callable | None
    trains_encoder: bool = True
    base: AdapterBase | None = None


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
    args, train_pairs = inputs.args, inputs.train_pairs
    encoder, processor = build_model_and_processor(config.model, inputs.captions())
    set_caption_length(train_pairs, encoder, processor, config.data)
    model: PreTrainedModel | PeftModel = encoder
    base = None
    if config.lora is not None:
        base = AdapterBase(encoder, config.model, args.output_dir)
        model = base.adapt(config.lora)
        base = None if config.lora.merge else base
    collator = _pair_collator(config, processor)
    if not inputs.streaming and not any(parameter.requires_grad for parameter in encoder.text_model.parameters()):
        train_pairs = pool_captions_once(train_pairs, encoder, collator, args.eval_batch_size, args.device)
    return RunParts(
        model=model,
        encoder=encoder,
        processor=processor,
        train_pairs=train_pairs,
        pair_collator=collator,
        trainer_class=GapClosedClipTrainer,
        data_collator=collator,
        compute_metrics=None if inputs.eval_pairs is None else build_compute_metrics(inputs.eval_pairs),
        base=base,
    )


def _captioner_parts(config: RunConfig, captioning: CaptioningArguments, inputs: RunInputs) -> RunParts:
    args, train_pairs = inputs.args, inputs.train_pairs
    model, processor = build_captioner(captioning, config.model, inputs.captions())
    _check_caption_length(config, model)
    set_caption_length(train_pairs, model.gap_closed_clip, processor, config.data)
    collator = _pair_collator(config, processor)
    if captioning.train_on == "text":
        model.to(args.device)
        train_pairs = embed_captions_once(train_pairs, model, collator, args.eval_batch_size)
        # Before training, whose evaluations and checkpoints have it, too; a trained captioner may bring another.
        model.set_image_shift(_mean_shift(config, inputs, model, processor) if captioning.mean_shift else None)
    metrics = None
    if args.predict_with_generate and inputs.eval_pairs is not None:
        metrics = build_caption_metrics(inputs.eval_pairs, processor)
    return RunParts(
        model=model,
        encoder=model.gap_closed_clip,
        processor=processor,
        train_pairs=train_pairs,
        pair_collator=collator,
        trainer_class=GapClosedCaptionTrainer,
        data_collator=CaptionCollator(collator),
        compute_metrics=metrics,
        trains_encoder=captioning.encoders == "joint",
    )


def _pair_collator(config: RunConfig, processor: GapClosedClipProcessor) -> PairCollator:
    data = config.data
    return PairCollator(processor, data.augmentation(), data.max_caption_tokens, data.window)


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


__all__ = ["RunParts", "build"]
