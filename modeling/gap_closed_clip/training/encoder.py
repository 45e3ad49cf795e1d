"""From the `model:` section of a configuration to an encoder and the processor that fits it."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from ..checkpoint import load_checkpoint
from ..model.configuration_gap_closed_clip import GapClosedClipConfig
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor, image_processor_for
from ..model.towers_gap_closed_clip import longest_text
from .arguments import ModelArguments
from .towers import check_towers, text_tower, vision_tower


def build_model_and_processor(
    args: ModelArguments, captions: Iterable[str]
) -> tuple[GapClosedClipModel, GapClosedClipProcessor]:
    """
    The model that training starts from, and its processor.

    Args:
        args: the `model:` section.
        captions: of the training pairs; read only for a text tower from scratch, which needs a vocabulary.

    Raises:
        ValueError: a tower is missing, damaged or of the wrong kind, or `args.config` does not fit.
        OSError: a tower or checkpoint that can't be found, is incomplete, or can't be downloaded.
    """
    check_towers(args)
    if args.checkpoint is not None:
        model, processor = _load_checkpoint(args)
    else:
        model, processor = _from_towers(args, captions)
    tokenizer, text_config = processor.tokenizer, model.config.text_config
    if len(tokenizer) > text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the text tower embeds {text_config.vocab_size}: they do "
            "not belong together. Put the tower's own tokenizer into its folder."
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest_text(text_config))
    if args.freeze_vision or args.freeze_text:
        model.freeze_towers(vision=args.freeze_vision, text=args.freeze_text)
    return model, processor


def _load_checkpoint(args: ModelArguments) -> tuple[GapClosedClipModel, GapClosedClipProcessor]:
    model, processor = load_checkpoint(args.checkpoint)
    if args.config:
        model = with_config(model, args.config, args.checkpoint)
    # from_pretrained gives every parameter a gradient; DistributedDataParallel would wait for that of a fixed scale.
    model.logit_scale.requires_grad_(model.config.learnable_temperature)
    return model, processor


def with_config(model: PreTrainedModel, changes: dict[str, Any], checkpoint: str) -> PreTrainedModel:
    """
    The checkpoint's model with other fields of [`GapClosedClipConfig`].

    Raises:
        ValueError: they do not go together, or not with the weights.
    """
    config = GapClosedClipConfig.from_dict(model.config.to_dict() | changes)  # checks the values together
    try:
        return type(model).from_pretrained(None, config=config, state_dict=model.state_dict())
    except RuntimeError as error:  # shapes
        raise ValueError(
            f"model.checkpoint: the weights of {checkpoint} do not fit {changes}. Leave out what changes their "
            "shapes, such as projection_dim."
        ) from error


def _from_towers(args: ModelArguments, captions: Iterable[str]) -> tuple[GapClosedClipModel, GapClosedClipProcessor]:
    vision = vision_tower(args.vision)
    tokenizer, text = text_tower(args.text, captions)
    named = f"model.vision={args.vision!r} or model.text={args.text!r}"
    try:
        model = GapClosedClipModel.from_vision_text_pretrained(
            vision, text, keep_vision_projection=args.keep_vision_projection, **args.config
        )
    except OSError as error:
        raise OSError(f"{named}: {error}") from error
    except (AssertionError, RuntimeError, TypeError) as error:  # model_args that timm refuses, weights that do not fit
        raise ValueError(f"{named} cannot be built: {error}") from error
    return model, GapClosedClipProcessor(image_processor_for(model.vision_model), tokenizer)


__all__ = ["build_model_and_processor", "with_config"]
