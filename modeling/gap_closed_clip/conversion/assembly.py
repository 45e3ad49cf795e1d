"""Any CLIP to a [`GapClosedClipModel`] and its processor, with the same embeddings."""

import copy
import json
import math
from collections.abc import Set
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn
from transformers.utils import cached_file

from ..folder_errors import check_finite
from ..model.configuration_gap_closed_clip import GapClosedClipConfig, check_field_names
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from ..model.tower_kinds_gap_closed_clip import check_poolings, image_width, text_width
from ..model.towers_gap_closed_clip import forget_origin
from .open_clip import is_open_clip, open_clip_parts
from .parts import ClipParts, Reference
from .transformers_clip import transformers_parts


# Largest difference of a coordinate of a unit vector from what the source library gives.
TOLERANCE = 1e-4
Layers = list[tuple[Tensor, Tensor | None]]


def from_clip(
    name: str | Path, revision: str | None = None, allow_pickle: bool = False, **config_kwargs
) -> tuple[GapClosedClipModel, GapClosedClipProcessor]:
    """
    Takes over a CLIP of transformers (CLIP, SigLIP, ChineseCLIP, a VisionTextDualEncoder, ...) or of open_clip
    (BiomedCLIP, ...): towers, projections, temperature, image processor and tokenizer, in float32. Until it is
    trained, its embeddings are those of the source; a CLIP of transformers is asked for those of an image and two
    texts, to make sure.

    Args:
        name: a folder or a Hub id.
        revision: of a Hub id.
        allow_pickle: whether pickled weights may be read, by `torch.load(weights_only=True)`, where there are no
            others.
        config_kwargs: fields of [`GapClosedClipConfig`], e.g. the weights of the objective. The centering is there by
            default and does nothing before training, or `gap-closed-clip center`, sets it. Another `image_pooling` or
            `text_pooling` than the source's own changes what images or texts are embedded as.

    Raises:
        OSError: it can't be found.
        ValueError: it is no CLIP, a part of it is missing or can't be expressed, weights that are not finite, or
            pickled weights without a yes.
    """
    name = str(name)
    config = _config(name, revision)
    if config.get("model_type") == GapClosedClipConfig.model_type:
        raise ValueError(f"{name} is a model of ours: load it by gap_closed_clip.checkpoint.load_checkpoint.")
    if not _has_both_towers(config) and is_open_clip(name, revision):  # beside which timm's config.json may lie
        parts = open_clip_parts(name, revision, allow_pickle)
    else:
        parts = transformers_parts(name.removeprefix("local-dir:").removeprefix("hf-hub:"), revision, allow_pickle)
    try:
        model, processor = assemble(parts, **{"taken_over_from": _public_name(name, parts), **config_kwargs})
    except (RuntimeError, ValueError) as error:  # shapes, or a pooling that a tower doesn't have
        raise ValueError(f"{name} can't be taken over: {error}") from error
    check_finite(name, model)  # before it is compared: NaN differs from NaN
    if parts.reference is not None:
        changed = _changed_on_purpose(parts, model.config)
        _compare(name, model, processor, parts.reference, {"image", "text"} - changed)
    return model, processor


def _changed_on_purpose(parts: ClipParts, config: GapClosedClipConfig) -> set[str]:
    """The modalities whose pooling is another one than the source's; none if a pooling of ours stands in for it."""
    own = {"image_pooling": parts.image_pooling, "text_pooling": parts.text_pooling}
    try:
        sources = SimpleNamespace(text_config=config.text_config, **own)
        check_poolings(sources, parts.vision_model, parts.text_model)
    except ValueError:  # the source's is none of ours
        return set()
    return {field.removesuffix("_pooling") for field, pooling in own.items() if getattr(config, field) != pooling}


def is_foreign(name: str | Path, revision: str | None = None) -> bool:
    """Whether a folder or a Hub id holds a CLIP of another library, or of transformers, and none of ours."""
    config = _config(name, revision)
    if config.get("model_type") == GapClosedClipConfig.model_type:
        return False
    return _has_both_towers(config) or is_open_clip(str(name), revision)


def assemble(parts: ClipParts, **config_kwargs) -> tuple[GapClosedClipModel, GapClosedClipProcessor]:
    """
    A model and its processor of a CLIP's parts.

    Args:
        config_kwargs: fields of [`GapClosedClipConfig`] beside those that the parts give.

    Raises:
        ValueError: a field that is not there, or that contradicts the projections; projections of more than two
            layers, or of different widths.
    """
    check_field_names(config_kwargs)
    if own := [name for name in ("vision_config", "text_config") if name in config_kwargs]:
        raise ValueError(f"{own[0]} is that of the model which is taken over: leave it out.")
    layers = {
        "image": parts.image_projection or _identity(image_width(parts.vision_model)),
        "text": parts.text_projection or _identity(text_width(parts.text_model.config)),
    }
    forget_origin(parts.vision_model.config, parts.text_model.config)
    space = _space(layers)
    for field, value in space.items():
        if config_kwargs.get(field, value) != value:
            raise ValueError(f"{field} is {value} in this model, and can't be made {config_kwargs[field]}.")
    fields = {
        "image_pooling": parts.image_pooling,
        "text_pooling": parts.text_pooling,
        "logit_scale_init_value": parts.logit_scale,
        "max_logit_scale": max(100.0, math.exp(parts.logit_scale)),
        "logit_bias": parts.logit_bias,
        **space,
        **config_kwargs,
    }
    config = GapClosedClipConfig(
        # Copies: a new composite config resets the attention implementation of the parts it is given.
        vision_config=copy.deepcopy(parts.vision_model.config),
        text_config=copy.deepcopy(parts.text_model.config),
        **fields,
    )
    model = GapClosedClipModel(config, vision_model=parts.vision_model, text_model=parts.text_model)
    for name, projection in (("image", model.visual_projection), ("text", model.text_projection)):
        linear = [module for module in projection.modules() if isinstance(module, nn.Linear)]
        for module, (weight, bias) in zip(linear, layers[name], strict=True):
            state = {"weight": weight}
            if config.projection_bias:
                state["bias"] = torch.zeros(len(weight)) if bias is None else bias
            module.load_state_dict(state)
    return model.eval(), GapClosedClipProcessor(parts.image_processor, parts.tokenizer)


def _public_name(name: str, parts: ClipParts) -> str:
    """A Hub id; of a folder, which tells of somebody's disk, what kind of model it holds."""
    if not Path(name.removeprefix("local-dir:")).is_dir():
        return name.removeprefix("hf-hub:")
    kinds = (parts.vision_model.config, parts.text_model.config)
    return " + ".join(getattr(kind, "architecture", None) or kind.model_type for kind in kinds)


def _space(layers: dict[str, Layers]) -> dict[str, Any]:
    """The fields of the configuration that say what the projections are."""
    if too_long := [name for name, linear in layers.items() if len(linear) > 2]:
        raise ValueError(f"The {too_long[0]} projection has more than two layers, which can't be taken over.")
    widths = {name: len(linear[-1][0]) for name, linear in layers.items()}
    if widths["image"] != widths["text"]:
        raise ValueError(f"Images are projected to {widths['image']} dimensions and texts to {widths['text']}.")
    hidden = {name: len(linear[0][0]) if len(linear) == 2 else None for name, linear in layers.items()}
    return {
        "projection_dim": widths["image"],
        "projection_hidden_dim": hidden if hidden["image"] != hidden["text"] else hidden["image"],
        "projection_bias": any(bias is not None for linear in layers.values() for _, bias in linear),
    }


def _identity(width: int) -> Layers:
    """The projection of a model that has none, as SigLIP: a linear layer that gives what it takes, and can train."""
    return [(torch.eye(width), None)]


@torch.no_grad()
def _compare(
    name: str,
    model: GapClosedClipModel,
    processor: GapClosedClipProcessor,
    expected: Reference,
    modalities: Set[str],
) -> None:
    """Holds the model's embeddings of an image and some texts, or of one of them, against the source library's."""
    settings = {"padding": True, "truncation": True, "return_tensors": "pt"}
    outputs = model(**processor(images=expected.image, text=expected.texts, **settings))
    for modality in sorted(modalities):
        found = getattr(outputs, f"{modality}_embeds")
        difference = (found - getattr(expected, f"{modality}_embeds")).abs().max().item()
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{name} can't be taken over: its {modality} embeddings would differ by {difference:.2g} from those "
                "that transformers gives."
            )


def _has_both_towers(config: dict[str, Any]) -> bool:
    """Whether a configuration of transformers describes a model with an image and a text tower, other than ours."""
    # Older configurations leave out what is at its default; the name of their type tells as much.
    towers = {"vision_config", "text_config"} <= set(config) or config.get("model_type") in ("clip", "siglip")
    return towers and config.get("model_type") != GapClosedClipConfig.model_type


def _config(name: str | Path, revision: str | None) -> dict[str, Any]:
    """config.json of a folder or a Hub id; empty where there is none, or it can't be read."""
    path = Path(name) / "config.json"
    if not Path(name).is_dir():
        try:
            found = cached_file(
                str(name), "config.json", revision=revision, _raise_exceptions_for_missing_entries=False
            )
        except (OSError, HFValidationError):  # out of reach, or no Hub id, as open_clip's hf-hub:owner/name
            return {}
        if found is None:
            return {}
        path = Path(found)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


__all__ = ["assemble", "from_clip", "is_foreign"]
