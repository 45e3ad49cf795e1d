"""What any CLIP is made of, whichever library it comes from."""

from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor


@dataclass
class Reference:
    """An image and texts with what the source library makes of them, to hold the model against that takes over.

    Attributes:
        image: as its own preprocessing takes it.
        texts: as its own tokenizer takes them, of different lengths: a mask that is lost would show.
        image_embeds: (1, D) unit vector.
        text_embeds: (number of texts, D) unit vectors.
    """

    image: Image.Image
    texts: list[str]
    image_embeds: Tensor
    text_embeds: Tensor


@dataclass
class ClipParts:
    """
    Two towers with their weights, what projects their outputs into one space, and what prepares their inputs.

    Attributes:
        vision_model: `TimmWrapperModel`, `CLIPVisionModel`, ...
        text_model: `BertModel` and its family, `CLIPTextModel`, ...
        image_projection: weight (out, in) and bias (out,), or None, of each linear layer in order, with GELU between
            them; an empty list where the pooled output is the embedding.
        text_projection: the same.
        logit_scale: the logarithm of what cosines are multiplied by.
        logit_bias: what is added to the logits (SigLIP); 0 in other models.
        image_pooling: what represents an image: `pooler` (the tower's own `pooler_output`), `cls` (the first token of
            `last_hidden_state`) or `mean` (of its tokens).
        text_pooling: the same of a text; `mean` is over the tokens that `attention_mask` keeps.
        image_processor: images to `pixel_values`.
        tokenizer: texts to `input_ids`; its `model_max_length` is the context length.
        reference: where the source library is at hand, what it makes of an image and a few texts.
    """

    vision_model: PreTrainedModel
    text_model: PreTrainedModel
    image_projection: list[tuple[Tensor, Tensor | None]]
    text_projection: list[tuple[Tensor, Tensor | None]]
    logit_scale: float
    logit_bias: float
    image_pooling: str
    text_pooling: str
    image_processor: BaseImageProcessor
    tokenizer: PreTrainedTokenizerBase
    reference: Reference | None = None


__all__ = ["ClipParts", "Reference"]
