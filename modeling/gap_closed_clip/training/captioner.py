"""From the `model:` and `captioning:` sections of a configuration to a captioner and its processor."""

from collections.abc import Iterable

import torch
from datasets import Dataset
from transformers import AutoConfig, PreTrainedConfig

from ..checkpoint import is_captioner, load_captioner
from ..evaluation import embed_pairs, modality_means
from ..model.captioning_gap_closed_clip import GapClosedClipForConditionalGeneration
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from ..model.towers_gap_closed_clip import longest_text
from .arguments import ModelArguments
from .captioning import CaptioningArguments
from .encoder import build_model_and_processor, with_config
from .towers import pretrained_name


def build_captioner(
    args: CaptioningArguments, model_args: ModelArguments, captions: Iterable[str]
) -> tuple[GapClosedClipForConditionalGeneration, GapClosedClipProcessor]:
    """
    The captioner that training starts from: one that is trained already, or a new one around the encoder that the
    `model:` section describes.

    Raises:
        ValueError, OSError: as `build_model_and_processor` and `from_clip`; captions longer than the decoder takes.
    """
    if model_args.checkpoint is not None and is_captioner(model_args.checkpoint):
        model, processor = _trained_captioner(args, model_args)
    else:
        clip_model, processor = build_model_and_processor(model_args, captions)
        decoder = _decoder(args, clip_model)
        model = GapClosedClipForConditionalGeneration.from_clip(
            clip_model, processor.tokenizer, decoder, args.num_layers, **args.config_fields()
        )
    limit = longest_text(model.config.decoder_config)
    if args.max_new_tokens >= limit:  # found now: not when the first caption is written, after training
        raise ValueError(
            f"captioning.max_new_tokens is {args.max_new_tokens}, but the decoder takes {limit} tokens with the one "
            f"that begins a caption: use {limit - 1} or less."
        )
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, limit)
    model.generation_config.update(max_new_tokens=args.max_new_tokens, num_beams=args.num_beams)
    if args.encoders == "frozen":
        model.freeze_encoder()
    else:
        _train_encoder(model, args, model_args)
    return model, processor


def _train_encoder(
    model: GapClosedClipForConditionalGeneration, args: CaptioningArguments, model_args: ModelArguments
) -> None:
    """Switches gradients on where the loss reaches; without the space's objective no caption goes through a tower."""
    clip, embeds_captions = model.gap_closed_clip, args.objective_weight > 0
    clip.logit_scale.requires_grad_(clip.config.learnable_temperature and embeds_captions)
    clip.text_projection.requires_grad_(embeds_captions)
    clip.freeze_towers(vision=model_args.freeze_vision, text=model_args.freeze_text or not embeds_captions)


def _trained_captioner(
    args: CaptioningArguments, model_args: ModelArguments
) -> tuple[GapClosedClipForConditionalGeneration, GapClosedClipProcessor]:
    if args.decoder is not None or args.num_layers is not None:
        raise ValueError(
            f"model.checkpoint {model_args.checkpoint} is a captioner and brings its decoder: leave "
            "captioning.decoder and captioning.num_layers out."
        )
    model, processor = load_captioner(model_args.checkpoint)
    changes = {**args.config_fields(), **model_args.config}
    for name in ("decoder_memory", "decoder_embedding_tokens"):
        if changes[name] != getattr(model.config, name):
            raise ValueError(
                f"model.checkpoint {model_args.checkpoint} is a captioner with {name}={getattr(model.config, name)}, "
                f"and {changes[name]} is asked for: its weights are of that shape. Set the captioning section "
                "accordingly."
            )
    generation_config = model.generation_config
    model = with_config(model, changes, model_args.checkpoint)
    model.generation_config = generation_config
    return model, processor


def _decoder(args: CaptioningArguments, clip_model: GapClosedClipModel) -> str | PreTrainedConfig | None:
    if args.decoder is None or isinstance(args.decoder, str):
        return None if args.decoder is None else pretrained_name("captioning.decoder", args.decoder)
    text = clip_model.config.text_config
    shape = {"vocab_size": text.vocab_size, "max_position_embeddings": text.max_position_embeddings}
    fixed = {"is_decoder": True, "add_cross_attention": True, "use_cache": True}
    return AutoConfig.for_model(**{"model_type": "bert", **shape, **args.decoder, **fixed})


def mean_shift(
    model: GapClosedClipForConditionalGeneration, processor: GapClosedClipProcessor, pairs: Dataset, **kwargs
) -> torch.Tensor:
    """
    (D,): mean text minus mean image embedding of pairs, the usual correction (as in Liang et al., NeurIPS 2022).

    Args:
        pairs: of the training.
        kwargs: of `embed_pairs`.
    """
    image_mean, text_mean = modality_means(embed_pairs(model.gap_closed_clip, processor, pairs, **kwargs))
    return torch.from_numpy(text_mean - image_mean).float()


__all__ = ["build_captioner", "mean_shift"]
