"""open_clip's image towers and its image preprocessing, in transformers."""

from typing import Any

from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel, TimmWrapperConfig, TimmWrapperModel
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..model.image_processing_gap_closed_clip import GapClosedClipImageProcessor
from .open_clip_weights import (
    PLAIN_BLOCKS,
    Layers,
    Weights,
    activation,
    check_fields,
    load_weights,
    norm_eps,
    renamed,
    take,
    take_layers,
    take_matrix,
)


SECTION = "vision_cfg"
# Without effect in use (patch_dropout is for training), or for other kinds of image towers than the one at hand.
WITHOUT_EFFECT = ("patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "output_tokens", "image_size")
OF_TIMM = ("timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias")
TRAINING_OF_TIMM = ("timm_drop", "timm_drop_path")
OF_VIT = (
    "layers",
    "width",
    "head_width",
    "mlp_ratio",
    "patch_size",
    "pos_embed_type",  # either kind is saved with the weights
    "final_ln_after_pool",  # the same for a single token
    "act_kwargs",
    "norm_kwargs",
)
FIXED = {"attentional_pool": False, "no_ln_pre": False, "pool_type": "tok", **PLAIN_BLOCKS}
VIT_NAMES = {
    "conv1": "embeddings.patch_embedding",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}


def image_tower(fields: dict[str, Any], weights: Weights, quick_gelu: bool) -> tuple[PreTrainedModel, Layers]:
    """
    The image tower and its projection; what represents an image is the tower's `pooler_output`.

    Args:
        fields: `vision_cfg`.
        weights: those that begin with `visual.` are moved out.
        quick_gelu: of open_clip's own towers; timm's have their own activation.

    Raises:
        ValueError: there is no such tower in transformers, or the weights are of another one.
    """
    weights = take(weights, "visual.")
    if fields.get("timm_model_name"):
        return _timm_tower(fields, weights)
    return _vit(fields, weights, quick_gelu)


def image_size(fields: dict[str, Any]) -> tuple[int, int]:
    """(height, width) that the tower takes."""
    size = fields.get("image_size", 224)
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def image_processor(fields: dict[str, Any], size: tuple[int, int]) -> GapClosedClipImageProcessor:
    """
    open_clip's `image_transform` for inference, with its defaults.

    Args:
        fields: `preprocess_cfg`.
        size: (height, width) of the image tower, which goes before that of `fields`, as in open_clip.

    Raises:
        ValueError: a field has a value that open_clip or the image processor doesn't know.
    """
    known = ("size", "mean", "std", "interpolation", "resize_mode", "fill_color")
    check_fields("preprocess_cfg", fields, known, {"mode": "RGB"})
    fields = {name: value for name, value in fields.items() if value is not None}
    resize_mode, interpolation = fields.get("resize_mode", "shortest"), fields.get("interpolation", "bicubic")
    # open_clip resizes by "bicubic", too, where training chose at random.
    resampling = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    if interpolation not in (*resampling, "random"):
        raise ValueError(f"preprocess_cfg.interpolation is {interpolation!r}: known are bicubic, bilinear, random.")
    height, width = size
    if resize_mode not in ("shortest", "squash") or (resize_mode == "shortest" and height != width):
        raise ValueError(
            f"preprocess_cfg.resize_mode is {resize_mode!r} for images of {height} x {width}: the image processor "
            "knows 'squash', and 'shortest' for square images. Set resize_mode to 'squash' if that will do."
        )
    return GapClosedClipImageProcessor(
        size={"shortest_edge": height} if resize_mode == "shortest" else {"height": height, "width": width},
        crop_size={"height": height, "width": width},
        resample=resampling.get(interpolation, Image.Resampling.BICUBIC),
        image_mean=_channels(fields.get("mean", OPENAI_CLIP_MEAN)),
        image_std=_channels(fields.get("std", OPENAI_CLIP_STD)),
    )


def _vit(fields: dict[str, Any], weights: Weights, quick_gelu: bool) -> tuple[PreTrainedModel, Layers]:
    layers, patch_size = fields.get("layers", 12), fields.get("patch_size", 16)
    if not isinstance(layers, int):
        raise ValueError(f"{SECTION}.layers is {layers}: CLIP's own ResNets are not in transformers.")
    check_fields(SECTION, fields, (*OF_VIT, *WITHOUT_EFFECT, *OF_TIMM, *TRAINING_OF_TIMM), FIXED)
    height, width = image_size(fields)
    if height != width or not isinstance(patch_size, int):
        raise ValueError(f"{SECTION}: CLIPVisionModel takes square images and patches alone, not {height} x {width}.")
    hidden_size = fields.get("width", 768)
    config = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=int(hidden_size * fields.get("mlp_ratio", 4.0)),
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // fields.get("head_width", 64),
        image_size=height,
        patch_size=patch_size,
        hidden_act=activation(SECTION, fields, quick_gelu),
        layer_norm_eps=norm_eps(SECTION, fields),
    )
    projection = take_matrix(weights, "proj")
    model = CLIPVisionModel(config).eval()
    load_weights(model, renamed(weights, VIT_NAMES), "image")
    return model, projection


def _timm_tower(fields: dict[str, Any], weights: Weights) -> tuple[PreTrainedModel, Layers]:
    check_fields(SECTION, fields, (*OF_TIMM, *TRAINING_OF_TIMM, *OF_VIT, *WITHOUT_EFFECT, *FIXED), {})
    pool, added = fields.get("timm_pool", "avg"), fields.get("timm_proj", "linear")
    if pool in ("abs_attn", "rot_attn") or (not pool and added in (None, "", "none")):
        raise ValueError(
            f"{SECTION}.timm_pool is {pool!r} with timm_proj {added!r}: only the pooling of timm's models themselves "
            "can be taken over, e.g. 'token' or 'avg'."
        )
    trunk = take(weights, "trunk.")
    model = _timm_model(fields["timm_model_name"], pool, trunk)
    projection = take_layers(weights, ("head.proj", "head.mlp.fc1", "head.mlp.fc2"))
    if weights or len(projection) != {"linear": 1, "mlp": 2}.get(added, 0):
        raise ValueError(f"{SECTION}.timm_proj is {added!r}, which does not fit the weights of visual.head.")
    classifier = model.timm_model.pretrained_cfg.get("classifier")
    if not added and isinstance(classifier, str):  # timm's own classifier is the projection
        projection = take_layers(trunk, (classifier,))
    load_weights(model.timm_model, trunk, "image")
    return model, projection


def _timm_model(name: str, pool: str, weights: Weights) -> TimmWrapperModel:
    """The model with the pooling that open_clip sets; '' is that of the architecture."""
    arguments = {"global_pool": pool} if pool else {}
    try:
        model = TimmWrapperModel(TimmWrapperConfig(architecture=name, model_args=arguments))
        moved_norm = "norm.weight" in weights and isinstance(getattr(model.timm_model, "norm", None), nn.Identity)
        if moved_norm:
            # timm normalises after average pooling, where it is asked for as the model is made. open_clip sets it
            # afterwards, and the norm stays before it.
            flag = "use_fc_norm" if type(model.timm_model).__name__ == "Eva" else "fc_norm"
            model = TimmWrapperModel(TimmWrapperConfig(architecture=name, model_args={**arguments, flag: False}))
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{SECTION}: timm makes no model timm_model_name {name!r} with timm_pool {pool!r} ({error})"
        ) from error
    return model.eval()


def _channels(value: float | list[float] | tuple[float, ...]) -> list[float]:
    return list(value) if isinstance(value, list | tuple) else [value] * 3


__all__ = ["image_processor", "image_size", "image_tower"]
