"""The towers: their published weights, and what runs in their layers."""

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from huggingface_hub import list_repo_files
from huggingface_hub.errors import HFValidationError, HTTPError
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .tower_kinds_gap_closed_clip import build_tower, default_text_pooling, first_token_reads_the_text, takes


SENTENCE_POOLING = "1_Pooling/config.json"
PICKLED = r"(open_clip_)?(pytorch|adapter)_model.*\.bin"


def batch_norms(tower: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers of a tower that have a weight and a bias of their own."""
    return [module for module in tower.modules() if isinstance(module, _BatchNorm) and module.affine]


def frozen_batch_norms(tower: nn.Module) -> list[nn.Module]:
    """Those of `batch_norms` that are not trained: their batch statistics are to stay as they are, too."""
    return [
        layer for layer in batch_norms(tower) if not any(parameter.requires_grad for parameter in layer.parameters())
    ]


def run_fused_layers_as_modules(vision_model: PreTrainedModel) -> None:
    """
    Makes every linear layer of a timm tower take adapters (peft).

    timm's attention with a fused `qkv` and a separate bias (EVA, EVA-02, BEiT, Swin v2) reads the layer's weight and
    never calls the layer: an adapter on it gets no gradient and changes no output, and yet changes the model when it
    is merged. timm's own switch makes it call the layer and add the bias behind; the output is the same to rounding.
    """
    for module in vision_model.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True


def not_loaded(what: str, error: OSError) -> OSError:
    """The error to raise for a tower, or its tokenizer, that the library does not find."""
    return OSError(
        f"{what} could not be loaded. Is it a folder with config.json and model.safetensors, or a Hub id, and is the "
        "Hub within reach (network, HF_TOKEN for private ones, HF_HUB_OFFLINE unset)? The library says: "
        f"{str(error).splitlines()[0]}"
    )


@contextmanager
def loading_in_one_line() -> Iterator[None]:
    """
    Keeps transformers from logging its table of the weights that are missing or have other shapes, where the error
    that follows says in one line what is wrong.

    Raises:
        RuntimeError: shapes; with the name of the first weight, in place of the library's "look at the above report".
    """
    library = logging.getLogger("transformers.modeling_utils")
    reports: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if "LOAD REPORT" not in (message := record.getMessage()):
            return True
        reports.append(re.sub(r"\x1b\[[0-9;]*m", "", message))
        return False

    library.addFilter(keep)
    try:
        yield
    except RuntimeError as error:
        misfit = re.search(r"^(\S+)\s*\|\s*MISMATCH", "\n".join(reports), re.MULTILINE)
        if misfit is None:
            raise
        raise RuntimeError(f"The first that has another shape: {misfit[1]}.") from error
    finally:
        library.removeFilter(keep)


def load_image_tower(
    name_or_config: str | PreTrainedConfig, kwargs: dict, pooling: str | None
) -> tuple[PreTrainedModel, str]:
    """
    `load_tower` of images, and what represents an image in it: `pooling`, or where that is None what the tower's own
    weights are for.

    Raises:
        OSError, ValueError: as `load_tower`; a pooler that would start at random.
    """
    model, has_pooler = load_tower(name_or_config, kwargs, "vision_model")
    pooling = pooling or ("pooler" if has_pooler else "cls")
    _check_pooler("image", name_or_config, pooling, has_pooler)
    return model, pooling


def load_text_tower(
    name_or_config: str | PreTrainedConfig, kwargs: dict, pooling: str | None
) -> tuple[PreTrainedModel, str]:
    """The same of texts."""
    model, has_pooler = load_tower(name_or_config, kwargs, "text_model")
    if pooling is None and isinstance(name_or_config, str):
        pooling = _sentence_pooling(name_or_config, kwargs.get("revision"))
    pooling = pooling or default_text_pooling(model.config)
    _check_pooler("text", name_or_config, pooling, has_pooler)
    if pooling == "cls" and isinstance(name_or_config, str) and not first_token_reads_the_text(model):
        other = "pooler" if default_text_pooling(model.config) == "pooler" else "mean"
        raise ValueError(
            f"text_pooling is 'cls', and {name_or_config} reads from left to right, so that its first token knows "
            f"nothing of the text: use text_pooling={other!r}."
        )
    return model, pooling


def _sentence_pooling(name: str, revision: str | None) -> str | None:
    """What represents a text in a model of sentence-transformers, whose folder says so; None in other folders."""
    path: str | None = os.path.join(name, SENTENCE_POOLING)
    if not os.path.isdir(name):
        try:
            path = cached_file(name, SENTENCE_POOLING, revision=revision, _raise_exceptions_for_missing_entries=False)
        except OSError:
            return None
    if path is None or not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    # Before sentence-transformers 6 there was a flag for each mode.
    flags = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
    mode = settings.get("pooling_mode")
    return next((pooling for pooling, flag in flags.items() if pooling == mode or settings.get(flag)), None)


def _check_pooler(modality: str, name: str | PreTrainedConfig, pooling: str, has_pooler: bool) -> None:
    if pooling == "pooler" and not has_pooler:
        raise ValueError(
            f"{modality}_pooling is 'pooler', and {name} has no weights of one, so that it would start at random: use "
            "'cls' or 'mean'."
        )


def load_tower(name_or_config: str | PreTrainedConfig, kwargs: dict, half: str) -> tuple[PreTrainedModel, bool]:
    """
    A tower with its published weights, or one from scratch of a configuration.

    Args:
        half: "vision_model" or "text_model": what it has to be, and what is taken of a whole CLIP.

    Returns:
        The tower, and whether its pooler, if it has one, has its weights from there too: many checkpoints lack them.

    Raises:
        OSError: it can't be found.
        ValueError: its weights are pickled, or of another model; a model that is no such tower.
    """
    if isinstance(name_or_config, PreTrainedConfig):
        return build_tower(name_or_config, **kwargs), True
    model, missing = load_published(name_or_config, kwargs)
    kind = model.config.model_type
    if hasattr(model.config, "text_config"):
        if getattr(model, half, None) is None:
            raise ValueError(f"{name_or_config} is a {kind} model, and no CLIP whose {half} could be taken.")
        return getattr(model, half), True
    argument, takes_it = ("pixel_values", "images") if half == "vision_model" else ("input_ids", "texts")
    if not takes(model, argument):
        raise ValueError(f"{name_or_config} is a {kind} model, which takes no {takes_it}: name another tower.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name_or_config} is a {kind} model, with a decoder of its own: name an encoder alone.")
    return model, not missing


def load_published(name: str, kwargs: dict) -> tuple[PreTrainedModel, list[str]]:
    """
    A model of transformers or timm with its published weights, in float32 as it is to be trained whatever they are
    stored in, and the names of those of its pooler that are missing.

    Raises:
        OSError: it can't be found.
        ValueError: its weights are pickled, others than those of the pooler are missing, or an adapter lies beside.
    """
    try:
        settings = {"use_safetensors": True, "dtype": torch.float32, **kwargs}
        model, info = AutoModel.from_pretrained(name, output_loading_info=True, **settings)
    except OSError as error:
        pickled = pickled_weights(name, kwargs.get("revision"))
        if pickled is None:
            raise not_loaded(repr(name), error) from error
        raise ValueError(
            f"{name} has pickled weights alone ({pickled}), which can run any code when they are read. Name "
            "a copy with model.safetensors: huggingface.co/spaces/safetensors/convert makes one, or save_pretrained."
        ) from error
    refuse_adapter(name, model)
    # A pooler is often missing, and is dropped where it isn't asked for.
    missing = sorted(info["missing_keys"])
    others = [key for key in missing if not key.startswith("pooler.")]
    if others:
        raise ValueError(
            f"{name} lacks {len(others)} weights of a {type(model).__name__} ({others[0]}, ...), which "
            "would start at random: its weights are of another model, or have other names."
        )
    return model, missing


def refuse_adapter(name: str, model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: transformers has put an adapter into the model that lay beside it, so that it has other embeddings
            than its own weights give, and names of weights that could not be loaded again.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"{name} holds a whole model and an adapter beside it, which transformers loads into its base. Move "
            "adapter_config.json and adapter_model.safetensors into a folder of their own. To start from both, merge "
            "them and save that: PeftModel.from_pretrained(model, folder).merge_and_unload()."
        )


def forget_origin(vision_config: PreTrainedConfig, text_config: PreTrainedConfig) -> None:
    """
    Takes out of towers' configurations what is of no use in a model: the folder that they came from, which tells of
    somebody's disk, and the names of the classes of a head that is not there. Hub ids stay.
    """
    for config in (vision_config, text_config):
        if os.path.isdir(config.name_or_path):
            config.name_or_path = ""
    vision_config.id2label, vision_config.label2id = {}, {}


def pickled_weights(name_or_path: str, revision: str | None = None) -> str | None:
    """
    The name of a file of pickled weights in a folder or on the Hub, where there are no others.

    None, too, where the Hub can't be asked.
    """
    if os.path.isdir(name_or_path):
        names = os.listdir(name_or_path)
    else:
        try:
            names = list_repo_files(name_or_path, revision=revision)
        except (HFValidationError, HTTPError, OSError):
            return None
    if any(name.endswith(".safetensors") for name in names):
        return None
    return next((name for name in sorted(names) if re.fullmatch(PICKLED, name)), None)


def pretrained_head(name_or_path: str | PreTrainedConfig, revision: str | None) -> dict[str, Tensor]:
    """
    The weight (D, hidden) and bias (D,) of timm's linear head, `head` (EVA, ViT) or `head.fc` (ConvNeXt), which the
    wrapper drops.
    """
    if not isinstance(name_or_path, str):
        raise ValueError("keep_vision_projection: an image tower from scratch has no pretrained projection to keep.")
    path = cached_file(name_or_path, "model.safetensors", revision=revision)
    with safe_open(path, framework="pt") as weights:
        names = [name for name in weights.keys() if re.fullmatch(r"(timm_model\.)?head\.(fc\.)?weight", name)]
        if not names:
            raise ValueError(
                f"keep_vision_projection: {name_or_path} has no head.weight in model.safetensors; use a CLIP "
                "checkpoint of timm (its name contains _clip_), or leave keep_vision_projection off."
            )
        prefix = names[0].removesuffix("weight")
        weight = weights.get_tensor(names[0])
        has_bias = f"{prefix}bias" in weights.keys()
        bias = weights.get_tensor(f"{prefix}bias") if has_bias else torch.zeros(len(weight), dtype=weight.dtype)
    return {"weight": weight, "bias": bias}


def all_states(output_hidden_states: bool | int | Sequence[int] | None) -> bool | None:
    """
    What to ask a tower for, so that `select_states` finds the states at some indices: all of them, in that case.

    Towers differ in what they make of indices: timm raises on those beyond its last block, which the other tower may
    well have, and drops the other states; BERT leaves the first state out of the count in transformers 5.17.
    """
    return output_hidden_states if isinstance(output_hidden_states, bool | None) else True


def select_states(
    states: tuple[Tensor, ...] | None, output_hidden_states: bool | int | Sequence[int] | None
) -> tuple[Tensor | None, ...] | None:
    """
    All states for a flag. For indices, None in the place of the other states; they count from the end if they are
    negative and, as in transformers, may lie outside.
    """
    if states is None or isinstance(output_hidden_states, bool | None):
        return None if states is None else tuple(states)
    indices = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    number = len(states)
    return tuple(
        state if index in indices or index - number in indices else None for index, state in enumerate(states)
    )


__all__ = [
    "all_states",
    "batch_norms",
    "forget_origin",
    "frozen_batch_norms",
    "load_image_tower",
    "load_published",
    "load_text_tower",
    "load_tower",
    "loading_in_one_line",
    "not_loaded",
    "pickled_weights",
    "pretrained_head",
    "refuse_adapter",
    "run_fused_layers_as_modules",
    "select_states",
]
