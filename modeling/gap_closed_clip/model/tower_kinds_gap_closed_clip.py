"""
What the model has to know of a tower, be it timm's or one of transformers': its class, the sizes that it takes and
gives, what represents an image or a text in it, and which of its weights have no part in that.
"""

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


TIMM = "timm_wrapper"
# RoBERTa and its kin number positions from behind their padding id.
POSITIONS_AFTER_PADDING = (
    "altclip_text_model",
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
# The text halves of CLIPs. In the first the end-of-text token stands for the text, in the second the last position,
# which only a text of full length has learned to use: SigLIP was trained on padded texts and without a mask.
END_OF_TEXT = ("clip_text_model", "clipseg_text_model", "metaclip_2_text_model")
FULL_LENGTH = ("siglip_text_model", "siglip2_text_model")


def build_tower(config: PreTrainedConfig, **kwargs) -> PreTrainedModel:
    """
    A tower with new weights; `kwargs` are those of `from_config` (`dtype`, ...).

    `AutoModel` doesn't know every half of a CLIP; those have their class's name from their configuration's.
    """
    if type(config) in AutoModel._model_mapping or not (found := _tower_class(config)):
        return AutoModel.from_config(config, **kwargs)
    return found._from_config(config, **kwargs)


def first_channels(vision_model: PreTrainedModel) -> int | None:
    """Channels that the first convolution of an image tower takes; None where there is none."""
    first = next((module for module in vision_model.modules() if isinstance(module, nn.Conv2d)), None)
    return None if first is None else first.in_channels


def check_layout(shape: tuple[int, ...], channels: int | None) -> None:
    """
    Says what is wrong with pixels of this shape, where torch would speak of weights.

    Raises:
        ValueError: gray images, or a batch without its dimension.
    """
    if channels is None:  # a tower of patches
        return
    if len(shape) == 4 and shape[1] == 1 and channels > 1:
        raise ValueError(
            f"pixel_values have the shape {shape}, one gray channel, and the image tower takes three, (B, 3, height, "
            "width): let the processor make them of the images, or repeat the channel, "
            "pixel_values.expand(-1, 3, -1, -1)."
        )
    if len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3)):
        raise ValueError(
            f"pixel_values have the shape {shape}: they are a batch, (B, 3, height, width), also of one image."
        )


def image_width(vision_model: PreTrainedModel) -> int:
    """Features of an image's pooled representation."""
    if is_timm(vision_model):
        return vision_model.timm_model.head_hidden_size
    return token_width(vision_model)


def token_width(vision_model: PreTrainedModel) -> int:
    """Features of one of an image's tokens, or of one place of a convolutional network's last map."""
    if is_timm(vision_model):
        return vision_model.timm_model.num_features
    config = vision_model.config
    if widths := getattr(config, "hidden_sizes", None):  # of the stages of a convolutional network
        return widths[-1]
    width = getattr(config, "hidden_size", None) or getattr(config, "hidden_dim", None)
    if width is None:
        raise ValueError(
            f"A {config.model_type} model does not say how wide its features are: name another image tower."
        )
    return width


def text_width(text_config: PreTrainedConfig) -> int:
    """Features of a text's pooled representation."""
    own = getattr(text_config, "projection_size", None) or getattr(text_config, "project_dim", None)  # SigLIP, AltCLIP
    return own or text_config.hidden_size


def fixed_image_size(vision_model: PreTrainedModel) -> tuple[int, int] | None:
    """(height, width) where a timm model takes no other size, else None: those of transformers interpolate."""
    if not is_timm(vision_model):
        return None
    patch_embed = getattr(vision_model.timm_model, "patch_embed", None)  # convolutional networks have none
    if patch_embed is None or not getattr(patch_embed, "strict_img_size", False):
        return None
    if patch_embed.num_patches == 0:
        raise ValueError(
            f"The image tower's img_size {patch_embed.img_size} is less than one patch {patch_embed.patch_size}."
        )
    return tuple(patch_embed.img_size)


def patch_size(vision_model: PreTrainedModel) -> tuple[int, int] | None:
    """What height and width of an image have to be multiples of; None where there are no patches."""
    if is_timm(vision_model):
        patch_embed = getattr(vision_model.timm_model, "patch_embed", None)
        if patch_embed is None or getattr(patch_embed, "dynamic_img_pad", False):
            return None
        return tuple(patch_embed.patch_size)
    return _patch_size(vision_model.config)


def arguments_for_size(vision_model: PreTrainedModel, size: tuple[int, int]) -> dict[str, Any]:
    """What a tower has to be told for images of a (height, width): to interpolate, where they aren't of its own."""
    if is_timm(vision_model) or not takes(vision_model, "interpolate_pos_encoding"):
        return {}
    own = getattr(vision_model.config, "image_size", None)
    own = (own, own) if isinstance(own, int) else own
    return {} if own is None or tuple(own) == size else {"interpolate_pos_encoding": True}


def pool_image(outputs: ModelOutput, vision_config: PreTrainedConfig, pooling: str, size: tuple[int, int]) -> Tensor:
    """
    (B, hidden) of an image tower's outputs for images of a (height, width); `pooling` as in `config.image_pooling`.

    Raises:
        ValueError: a pooling that the tower doesn't have.
    """
    if pooling == "pooler":
        if outputs.get("pooler_output") is None:
            raise ValueError(
                f"image_pooling is 'pooler', and a {vision_config.model_type} model has none: use 'mean', or 'cls'."
            )
        return outputs.pooler_output.flatten(1)  # a ResNet gives (B, hidden, 1, 1)
    tokens = outputs.last_hidden_state
    if tokens.ndim == 4:  # a map
        if pooling == "cls":
            raise ValueError(
                "image_pooling is 'cls', and a convolutional tower has no tokens: use 'pooler' or 'mean'."
            )
        return tokens.mean((2, 3))
    # Before the patches come a class token, a distillation token, registers; none in Swin and SigLIP.
    prefix = max(tokens.shape[1] - _number_of_patches(vision_config, size), 0)
    if pooling == "mean":
        return tokens[:, prefix:].mean(1)
    if not prefix:
        raise ValueError(
            f"image_pooling is 'cls', and the first token of a {vision_config.model_type} model is a patch: use "
            "'pooler' or 'mean'."
        )
    return tokens[:, 0]


def _patch_size(vision_config: PreTrainedConfig) -> tuple[int, int] | None:
    """(height, width) of a patch of a transformers tower."""
    size = getattr(vision_config, "patch_size", None)
    return None if size is None else (size, size) if isinstance(size, int) else tuple(size)


def _number_of_patches(vision_config: PreTrainedConfig, size: tuple[int, int]) -> int:
    height, width = _patch_size(vision_config) or (1, 1)
    return (size[0] // height) * (size[1] // width)


def pool_text(outputs: ModelOutput, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """(B, hidden) of a text tower's outputs for (B, length) tokens; `pooling` as in `config.text_pooling`."""
    hidden = outputs.last_hidden_state  # (B, length, hidden)
    if pooling == "pooler":
        return outputs.pooler_output
    if pooling == "cls":
        return hidden[:, 0]
    if attention_mask is None:
        return hidden.mean(1)
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


def default_text_pooling(text_config: PreTrainedConfig) -> str:
    """What represents a text where nothing is said: of a CLIP's half its pooler, of others the first token."""
    return "pooler" if text_config.model_type in END_OF_TEXT + FULL_LENGTH else "cls"


def check_poolings(config: Any, vision_model: PreTrainedModel, text_model: PreTrainedModel) -> None:
    """
    Args:
        config: a `GapClosedClipConfig`.

    Raises:
        ValueError: a pooling that a tower doesn't have, or that says nothing of a text.
    """
    if is_timm(vision_model) and config.image_pooling != "pooler":
        raise ValueError(
            f"image_pooling is {config.image_pooling!r}: a timm model pools by itself. Leave it out, and say how in "
            "the tower's model_args={'global_pool': ...}."
        )
    kind = config.text_config.model_type
    if kind in END_OF_TEXT and config.text_pooling != "pooler":
        raise ValueError(
            f"text_pooling is {config.text_pooling!r}: in a {kind} no token but the last has read the whole text. Use "
            "text_pooling='pooler', the end of the text."
        )
    pools_by_itself = kind in END_OF_TEXT + FULL_LENGTH or getattr(text_model, "pooler", None) is not None
    if config.text_pooling == "pooler" and not pools_by_itself:
        raise ValueError(f"text_pooling is 'pooler', and the {kind} has none: use 'cls' or 'mean'.")


def first_position(text_config: PreTrainedConfig) -> int:
    """The position of a text's first token: 0, or behind the padding id where a tower does as RoBERTa does."""
    return text_config.pad_token_id + 1 if text_config.model_type in POSITIONS_AFTER_PADDING else 0


def longest_text(text_config: PreTrainedConfig) -> int:
    """Tokens that a text tower takes."""
    # T5 and its kin count distances, and were trained with n_positions.
    positions: int | None = getattr(text_config, "max_position_embeddings", None)
    if positions is None:
        positions = int(getattr(text_config, "n_positions", 512))
    return positions - first_position(text_config)


def pad_on_the_right(
    input_ids: Tensor, attention_mask: Tensor, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """
    The tokens (B, length), their mask and what else has a value for each token, with padding that stood on the left
    moved to the right: towers count positions from the first token, and were trained so.
    """
    length = attention_mask.shape[1]
    before = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)  # (B, 1): tokens of padding before a text
    order = torch.arange(length, device=attention_mask.device) + before
    order = torch.where(order < length, order, order - length)  # (B, length); ONNX has no % by a length that varies

    def moved(value: Any) -> Any:
        is_of_tokens = isinstance(value, Tensor) and value.shape == order.shape
        return value.gather(1, order.to(value.device)) if is_of_tokens else value

    return moved(input_ids), moved(attention_mask), {name: moved(value) for name, value in inputs.items()}


def fill_to_full_length(
    text_config: PreTrainedConfig, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """
    The tokens (B, length) as the tower was trained on them: those of SigLIP padded to the longest text, with no mask.
    """
    if text_config.model_type not in FULL_LENGTH:
        return input_ids, attention_mask
    if attention_mask is not None:
        input_ids = input_ids.masked_fill(attention_mask == 0, text_config.pad_token_id)
    missing = longest_text(text_config) - input_ids.shape[1]
    return nn.functional.pad(input_ids, (0, missing), value=text_config.pad_token_id), None


def takes(model: nn.Module, argument: str) -> bool:
    """Whether a tower's `forward` names an argument."""
    return argument in inspect.signature(model.forward).parameters


def is_timm(model: PreTrainedModel) -> bool:
    return model.config.model_type == TIMM


def drop_unused_pooler(model: PreTrainedModel, pooling: str) -> None:
    """
    Takes a pooler out where it isn't used: DistributedDataParallel refuses parameters without gradient. One that has
    none stays; a ResNet calls it in any case.
    """
    pooler = getattr(model, "pooler", None)
    if pooling != "pooler" and pooler is not None and any(True for _ in pooler.parameters()):
        calls_it_blindly = model.config.model_type in ("layoutlm", "squeezebert")
        model.pooler = nn.Identity() if calls_it_blindly else None


def unused_parameters(model: PreTrainedModel, pooling: str) -> list[nn.Parameter]:
    """
    Parameters that no image or text moves: the token that stands for hidden patches in pretraining (DINOv2, BEiT), and
    where its own pooler is not asked for, that of a half of a CLIP.
    """
    if is_timm(model):
        return []
    # CLIP normalises the pooled token alone, SigLIP all of them.
    pooler = "head." if "siglip" in model.config.model_type else "post_layernorm."
    return [
        parameter
        for name, parameter in model.named_parameters()
        if name.endswith("mask_token") or (pooling != "pooler" and name.startswith(pooler))
    ]


def unmask(vision_model: PreTrainedModel) -> None:
    """Lets a masked autoencoder see all patches: in pretraining it hides most of them, and goes on to in eval mode."""
    if getattr(vision_model.config, "mask_ratio", None):
        vision_model.config.mask_ratio = 0.0


@torch.no_grad()
def first_token_reads_the_text(text_model: PreTrainedModel) -> bool:
    """Whether the first token's representation depends on the last one: that of a causal tower does not."""
    was_training = text_model.training
    text_model.eval()
    tokens = torch.tensor([[3, 4, 5], [3, 4, 6]], device=text_model.device)
    first, second = text_model(input_ids=tokens).last_hidden_state[:, 0]
    text_model.train(was_training)
    return not torch.equal(first, second)


def _tower_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Of a `SiglipTextConfig`, transformers' `SiglipTextModel`."""
    return getattr(transformers, type(config).__name__.removesuffix("Config") + "Model", None)


__all__ = [
    "TIMM",
    "arguments_for_size",
    "build_tower",
    "check_layout",
    "check_poolings",
    "default_text_pooling",
    "drop_unused_pooler",
    "fill_to_full_length",
    "first_channels",
    "first_position",
    "first_token_reads_the_text",
    "fixed_image_size",
    "image_width",
    "is_timm",
    "longest_text",
    "patch_size",
    "pool_image",
    "pool_text",
    "takes",
    "text_width",
    "token_width",
    "unmask",
    "unused_parameters",
]
