"""The `captioning:` section: a decoder that writes captions on an encoder."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..model.captioning_gap_closed_clip import MAX_NEW_TOKENS
from .arguments import check_tower


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
            if (getattr(self, name) or 0) < 0:
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


__all__ = ["CaptioningArguments"]
