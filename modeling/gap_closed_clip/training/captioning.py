"""The `captioning:` section, and from it to a captioner: a decoder that writes captions on an encoder."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import AutoConfig, PreTrainedConfig

from ..checkpoint import is_captioner, load_captioner
from ..evaluation import embed_pairs, modality_means
from ..model.captioning_gap_closed_clip import MAX_NEW_TOKENS, GapClosedClipForConditionalGeneration
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from ..model.tower_kinds_gap_closed_clip import longest_text
from .arguments import ModelArguments, check_tower
from .encoder import build_model_and_processor, in_float32, pretrained_name, set_image_size, with_config
from .release import release_towers


# Length of the noise on the embeddings that a decoder is trained with when it is trained on text: a noisy embedding
# then has a cosine of 0.71 with the clean one, as far away as an image's is.
TEXT_NOISE = 1.0


@dataclass
class CaptioningArguments:
    """A decoder that writes captions: the `captioning:` section. Without the section there is none."""

    train_on: Literal["image", "text"] = field(
        default="image",
        metadata={
            "help": "image: captions are written from images. text: from the captions' own embeddings; no image is "
            "seen in training, and at inference an image's embedding takes the place of the text's."
        },
    )
    decoder: str | dict | None = field(
        default=None,
        metadata={
            "help": "What the decoder starts from: a BERT with the text tower's vocabulary (Hub id, folder, "
            "`package:module/folder`), or a mapping of BertConfig fields for one from scratch. Default: the text "
            "tower's weights."
        },
    )
    num_layers: int | None = field(
        default=None,
        metadata={"help": "Without `decoder`: it starts from the text tower's first so many layers. Default: all."},
    )
    memory: Literal["patches_and_embedding", "embedding"] | None = field(
        default=None,
        metadata={
            "help": "What the decoder attends to. Default: patches_and_embedding of images, embedding where it is "
            "trained on text, which has no patches."
        },
    )
    embedding_tokens: int = field(default=4, metadata={"help": "Tokens that an embedding is spread over."})
    noise: float | None = field(
        default=None,
        metadata={
            "help": "Length (root mean square) of the Gaussian noise on the embedding, in training. Default: 0 with "
            f"images, {TEXT_NOISE:g} with text."
        },
    )
    mean_shift: bool = field(
        default=False,
        metadata={
            "help": "Text: move image embeddings by mean text minus mean image embedding of the training pairs before "
            "the decoder reads them. (Only the means of the images are used.)"
        },
    )
    encoders: Literal["frozen", "joint"] = field(
        default="frozen", metadata={"help": "Keep the encoders as they are, or train them together with the decoder."}
    )
    objective_weight: float = field(
        default=1.0,
        metadata={"help": "Joint: weight of the space's own objective (section model) beside the captioning loss."},
    )
    label_smoothing: float = field(default=0.1, metadata={"help": "Of the captioning loss, in training."})
    max_new_tokens: int = field(default=MAX_NEW_TOKENS, metadata={"help": "Longest caption that is generated."})
    num_beams: int = field(default=1, metadata={"help": "Beams of a generated caption; 1 is greedy."})

    def __post_init__(self):
        for name in ("num_layers", "embedding_tokens", "max_new_tokens", "num_beams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"captioning.{name} is {value}; it must be 1 or more.")
        for name in ("noise", "objective_weight"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ValueError(f"captioning.{name} is {getattr(self, name)}; it must be 0 or more.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"captioning.label_smoothing is {self.label_smoothing}; it must be from 0 to below 1.")
        if self.train_on == "text":
            if self.memory == "patches_and_embedding":
                raise ValueError("captioning.train_on is text, which has no patches: leave captioning.memory out.")
            if self.encoders == "joint":
                raise ValueError(
                    "captioning.train_on is text and captioning.encoders is joint: encoders that train on text alone "
                    "would leave the images behind. Use encoders=frozen."
                )
        elif self.mean_shift:
            raise ValueError(
                "captioning.mean_shift corrects a decoder that has never seen an image: it goes with "
                "captioning.train_on=text."
            )
        if self.decoder is not None and self.num_layers is not None:
            raise ValueError(
                "captioning.num_layers is of the text tower's layers, and captioning.decoder names another decoder: "
                "leave one of them out."
            )
        if isinstance(self.decoder, dict):
            check_tower("captioning.decoder", "text", self.decoder)

    def config_fields(self) -> dict[str, Any]:
        """What the section says, as fields of [`GapClosedClipConfig`]."""
        text = self.train_on == "text"
        return {
            "decoder_memory": self.memory or ("embedding" if text else "patches_and_embedding"),
            "decoder_embedding_tokens": self.embedding_tokens,
            "embedding_noise": self.noise if self.noise is not None else TEXT_NOISE if text else 0.0,
            "label_smoothing": self.label_smoothing,
            "caption_objective_weight": self.objective_weight if self.encoders == "joint" else 0.0,
        }


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
        model, processor = _trained_captioner(args, model_args, model_args.checkpoint)
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
    if clip.temperature.logit_bias is not None:
        clip.temperature.logit_bias.requires_grad_(embeds_captions)
    clip.text_projection.requires_grad_(embeds_captions)
    if not embeds_captions:
        model_args = replace(model_args, freeze_text=True, train_text_blocks=None)
    release_towers(clip, model_args)


def _trained_captioner(
    args: CaptioningArguments, model_args: ModelArguments, checkpoint: str
) -> tuple[GapClosedClipForConditionalGeneration, GapClosedClipProcessor]:
    if args.decoder is not None or args.num_layers is not None:
        raise ValueError(
            f"model.checkpoint {checkpoint} is a captioner and brings its decoder: leave "
            "captioning.decoder and captioning.num_layers out."
        )
    model, processor = load_captioner(checkpoint)
    in_float32(model, checkpoint)
    changes = {**args.config_fields(), **model_args.config}
    for name in ("decoder_memory", "decoder_embedding_tokens"):
        if changes[name] != getattr(model.config, name):
            raise ValueError(
                f"model.checkpoint {checkpoint} is a captioner with {name}={getattr(model.config, name)}, "
                f"and {changes[name]} is asked for: its weights are of that shape. Set the captioning section "
                "accordingly."
            )
    generation_config = model.generation_config
    model = with_config(model, changes, checkpoint)
    if model_args.image_size is not None:
        set_image_size(model.gap_closed_clip, processor, model_args.image_size)
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


__all__ = ["CaptioningArguments", "build_captioner", "mean_shift"]
