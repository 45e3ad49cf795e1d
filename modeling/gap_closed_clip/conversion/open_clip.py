"""open_clip's models, read from its layout on the Hub without open_clip: `open_clip_config.json` beside weights."""

import json
import os
import pickle
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..messages import shorten
from .open_clip_images import image_processor, image_size, image_tower
from .open_clip_texts import text_tower
from .open_clip_tokenizer import text_tokenizer
from .open_clip_weights import Weights, check_fields
from .parts import ClipParts


CONFIG = "open_clip_config.json"
SAFE_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
PICKLED_WEIGHTS = "open_clip_pytorch_model.bin"
PREFIXES = ("hf-hub:", "local-dir:")
MODEL_FIELDS = (
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "quick_gelu",
    "custom_text",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
)


def is_open_clip(name_or_folder: str | os.PathLike, revision: str | None = None) -> bool:
    """Whether a folder or a Hub id, also in the form `hf-hub:owner/name`, has open_clip's configuration."""
    try:
        return _file(_name(name_or_folder), CONFIG, revision) is not None
    except OSError:
        return False


def open_clip_parts(
    name_or_folder: str | os.PathLike, revision: str | None = None, allow_pickle: bool = False
) -> ClipParts:
    """
    The parts of an open_clip model: its embeddings and inputs are open_clip's own.

    Image towers: open_clip's ViT (as `CLIPVisionModel`) and timm's models. Text towers: Hugging Face encoders, and
    open_clip's own transformer, as `CLIPTextModel` or, without a causal mask, as `SiglipTextModel`.

    Args:
        name_or_folder: a folder with open_clip_config.json, or a Hub id, also as `hf-hub:owner/name`.
        revision: of a Hub id.
        allow_pickle: read pickled weights where there are no others (by torch.load's weights_only).

    Raises:
        OSError: not there or out of reach: the configuration, the weights, a tokenizer, or the configuration of a
            Hugging Face text tower.
        ValueError: the weights are pickled alone; a part of the model has no counterpart in transformers; weights are
            missing, left over or damaged.
    """
    name = _name(name_or_folder)
    config = _read_config(name, revision)
    model_fields = config["model_cfg"]
    vision, text = model_fields["vision_cfg"], model_fields["text_cfg"]
    processor = image_processor(config.get("preprocess_cfg") or {}, image_size(vision))
    tokenizer = text_tokenizer(text, name, revision, lambda file: _file(name, file, revision) is not None)
    weights = _read_weights(name, revision, allow_pickle)
    for tower, prefixes in (("image", ("visual.",)), ("text", ("text.", "transformer."))):
        if not any(key.startswith(prefixes) for key in weights):
            raise ValueError(
                f"{name} has no weights of the {tower} tower ({' or '.join(prefixes)}...): download it again, or save "
                "it whole."
            )
    quick_gelu = bool(model_fields.get("quick_gelu"))
    vision_model, image_projection = image_tower(vision, weights, quick_gelu)
    text_model, text_projection, text_pooling = text_tower(
        text, weights, model_fields["embed_dim"], quick_gelu, tokenizer
    )
    parts = ClipParts(
        vision_model=vision_model,
        text_model=text_model,
        image_projection=image_projection,
        text_projection=text_projection,
        logit_scale=_scalar(name, weights, "logit_scale"),
        logit_bias=_scalar(name, weights, "logit_bias") if "logit_bias" in weights else 0.0,
        image_pooling="pooler",
        text_pooling=text_pooling,
        image_processor=processor,
        tokenizer=tokenizer,
    )
    if weights:
        raise ValueError(f"{name} has weights of unknown use: {shorten(sorted(weights))}")
    return parts


def _name(name_or_folder: str | os.PathLike) -> str:
    name = str(name_or_folder)
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _file(name: str, file: str, revision: str | None) -> str | None:
    """
    The path of a file of a folder or Hub id; None where it has no such file, or the Hub can't be asked.

    Raises:
        OSError: the Hub has no such model, or does not show it.
    """
    if os.path.isdir(name):
        path = os.path.join(name, file)
        return path if os.path.isfile(path) else None
    try:
        return hf_hub_download(name, file, revision=revision)
    except EntryNotFoundError:
        return None
    except (HFValidationError, HTTPError) as error:
        raise OSError(
            f"{name} is neither a folder nor a model on the Hub that can be read: {str(error).strip().splitlines()[0]}"
        ) from error


def _read_config(name: str, revision: str | None) -> dict[str, Any]:
    path = _file(name, CONFIG, revision)
    if path is None:
        raise OSError(
            f"{name} has no {CONFIG}, or the Hub is out of reach (network, HF_TOKEN for private models, "
            "HF_HUB_OFFLINE unset)."
        )
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    fields = (config.get("model_cfg") if isinstance(config, dict) else None) or {}
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(fields)
    if missing:
        raise ValueError(f"{path} is incomplete: model_cfg lacks {', '.join(sorted(missing))}.")
    if "multimodal_cfg" in fields:
        raise ValueError(f"{path} describes a CoCa model (multimodal_cfg), which is not a CLIP and not taken over.")
    check_fields("model_cfg", fields, MODEL_FIELDS, {})
    return config


def _read_weights(name: str, revision: str | None, allow_pickle: bool) -> Weights:
    """All weights by their names in open_clip; what is none is left out."""
    path = next((path for file in SAFE_WEIGHTS if (path := _file(name, file, revision))), None)
    if path is not None:
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}. Copy or download it again.") from error
    path = _file(name, PICKLED_WEIGHTS, revision)
    if path is None:
        raise OSError(
            f"{name} has no weights: there is neither {SAFE_WEIGHTS[0]} nor {PICKLED_WEIGHTS}. Download it again, or "
            "save it whole."
        )
    if not allow_pickle:
        raise ValueError(
            f"{name} has pickled weights alone ({PICKLED_WEIGHTS}). If you trust where they come from, allow them "
            "(allow_pickle=true; export-onnx: --allow-pickle): they are read by torch.load(weights_only=True), which "
            "runs no code of theirs."
        )
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} can't be read as weights alone: {str(error).strip().splitlines()[0]}") from error
    weights = weights.get("state_dict", weights)
    return {key.removeprefix("module."): value for key, value in weights.items() if torch.is_tensor(value)}


def _scalar(name: str, weights: Weights, key: str) -> float:
    if key not in weights:
        raise ValueError(f"{name} has no {key} among its weights.")
    return weights.pop(key).float().reshape(()).item()


__all__ = ["is_open_clip", "open_clip_parts"]
