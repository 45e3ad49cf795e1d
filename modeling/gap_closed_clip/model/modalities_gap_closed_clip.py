"""
Modalities beyond image and text: how the configuration describes them, and the names of their inputs.

A further modality is an entry of `config.modalities`: {"tower": the configuration of its tower, "pooling": what stands
for a sample in it}. Its inputs have their tower's names behind its own: `record_numbers`, `audio_input_values`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args, get_origin

import torch
from transformers import AutoConfig, PreTrainedConfig

from .record_tower_gap_closed_clip import GapClosedClipRecordConfig


IMAGE_AND_TEXT = ("image", "text")
POOLINGS = ("cls", "mean", "pooler")
MAIN_INPUTS = {"image": "pixel_values", "text": "input_ids"}
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
# What begins the name of another input of the model, or is a column of pairs, a metric or an argument of a processor.
RESERVED = (
    *("image", "images", "text", "texts", "caption", "captions", "label", "labels", "source", "window", "augment"),
    *(
        "present",
        "pixel",
        "input",
        "attention",
        "token",
        "position",
        "group",
        "modality",
        "pooled",
        "shared",
        "output",
        "return",
    ),
    *(
        "videos",
        "common",
        "chat",
        "mean",
        "further",
        "logits",
        "logit",
        "embeds",
        "loss",
        "anchor",
        "use",
        "vision",
        "decoder",
    ),
)


MOST_LAYERS = 1000
LARGEST_SIZE = 2**24  # of a vocabulary, an input, a layer
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "depth", "layers", "depths")
SIZES = ("size", "dim", "dims", "heads", "features", "channels", "width", "vocab", "positions", "embeddings", "length")
# Of timm's arguments those that load weights, or change what a tower takes and gives.
NO_MODEL_ARGS = (
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "features_only",
)


class SubConfigs:
    """
    The towers' configurations that transformers looks for in one: as a class attribute those that every configuration
    has, of an instance also `NAME_config` of each further modality.
    """

    def __init__(self, *names: str):
        self.names = names

    def __get__(self, config: PreTrainedConfig | None, owner: type) -> dict[str, Any]:
        further = {} if config is None else config.__dict__.get("modalities") or {}
        return dict.fromkeys((*self.names, *(f"{name}_config" for name in further)), AutoConfig)


def read_modalities(value: Any) -> dict[str, dict[str, Any]]:
    """
    The entries of `config.modalities`, checked, with towers as configurations; of a mapping by name, or of a list of
    mappings with a name each.

    Raises:
        ValueError: a name that can't be one, an entry with other keys or without a tower, an unknown pooling.
    """
    found = {}
    if isinstance(value, list) and all(isinstance(entry, Mapping) and "name" in entry for entry in value):
        names = [entry["name"] for entry in value]
        if len(set(map(str, names))) < len(names):
            raise ValueError(f"modalities are {', '.join(map(str, names))}: one is there twice.")
        value = {entry["name"]: {key: entry[key] for key in entry if key != "name"} for entry in value}
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(
            f"modalities is {value!r:.80}: it maps the names of modalities to their towers, or lists them, each "
            "with a name and a tower."
        )
    check_modality_names(list(value or {}))
    for name, entry in (value or {}).items():
        if not isinstance(entry, Mapping) or "tower" not in entry or not set(entry) <= {"tower", "pooling"}:
            keys = sorted(map(str, entry)) if isinstance(entry, Mapping) else entry
            raise ValueError(
                f"modalities.{name} is {keys!r}: it is a mapping with a tower (a mapping with a model_type) and, "
                "where the tower's own choice will not do, a pooling."
            )
        if entry.get("pooling") not in (None, *POOLINGS):
            raise ValueError(f"modalities.{name}.pooling is {entry['pooling']!r}: use one of {', '.join(POOLINGS)}.")
        tower = tower_config(entry["tower"], f"modalities.{name}.tower")
        found[name] = {"tower": tower, "pooling": entry.get("pooling")}
    return found


def check_modality_names(names: Sequence[str]) -> None:
    """
    Checks that modalities beyond image and text can have these names.

    Raises:
        ValueError: one is no name in small letters, means something else already, or begins another one.
    """
    for name in names:
        problem = None
        if not isinstance(name, str) or not name.isidentifier() or name != name.lower() or name.startswith("_"):
            problem = "it must be of small letters, digits and '_', and begin with a letter"
        elif name.split("_")[0] in RESERVED or hasattr(torch.nn.ModuleDict(), name):
            problem = "this name, or what it begins with, means something else already"
        for other in names:
            if isinstance(other, str) and problem is None and other != name and other.startswith(f"{name}_"):
                problem = f"the inputs of '{other}' would begin alike"
        if problem is not None:
            raise ValueError(
                f"A modality cannot be called {name!r}: {problem}. Choose another name, such as 'record', 'audio' or "
                "'lateral'."
            )


def tower_config(value: Any, described: str) -> PreTrainedConfig:
    """
    A tower's configuration, of a mapping with a `model_type`.

    Args:
        described: what errors call it.

    Raises:
        ValueError: it has no model_type, or one that transformers doesn't know.
    """
    if isinstance(value, PreTrainedConfig):
        return value
    if not isinstance(value, Mapping) or "model_type" not in value:
        raise ValueError(f"{described} has no model_type: give a mapping with one, for example 'bert'.")
    check_tower_settings(value, described)
    settings = dict(value)
    model_type = settings.pop("model_type")
    if model_type == GapClosedClipRecordConfig.model_type:
        return GapClosedClipRecordConfig(**settings)
    try:
        return AutoConfig.for_model(model_type, **settings)
    except ValueError as error:
        if "model_type" not in str(error) and "identifier" not in str(error):
            raise
        raise ValueError(f"{described}: transformers knows no model_type {model_type!r}.") from error


def check_types(config: PreTrainedConfig, hints: Mapping[str, Any]) -> None:
    """
    Checks that the fields of a configuration are of the types that they are declared with; of lists and mappings not
    what is in them.

    Raises:
        ValueError: one is not, as in a file that was changed by hand.
    """
    for name, hint in hints.items():
        kinds = [get_origin(option) or option for option in (get_args(hint) or (hint,))]
        value = getattr(config, name)
        if Any in kinds or (isinstance(value, bool) and bool in kinds):
            continue
        kinds += [int] if float in kinds else []
        if isinstance(value, bool) or not isinstance(value, tuple(kinds)):
            expected = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds)).replace("NoneType", "null")
            raise ValueError(f"{name} is {value!r:.100}: it has to be {expected}.")


def check_tower_settings(settings: Any, described: str) -> None:
    """
    Checks what a mapping says of a tower before anything is built of it: not what only the tower's own code knows, but
    what would load a file, or build for minutes.

    Args:
        settings: fields of a configuration.
        described: what errors call it.

    Raises:
        ValueError: a number of layers or a size that no tower has; arguments of timm that load weights, or have the
            tower take other images than the processor gives.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"{described} is {settings!r:.100}: it is a mapping of names to values.")
    for name, value in settings.items():
        _check_size(f"{described}.{name}", str(name), value)
    arguments = settings.get("model_args")
    if arguments is None:
        return
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{described}.model_args is {arguments!r:.100}: it is a mapping of arguments of timm.")
    for name, value in arguments.items():
        if name in NO_MODEL_ARGS and value not in (None, False, ""):
            raise ValueError(
                f"{described}.model_args.{name} is {value!r:.100}: leave it out. Weights come from a folder or a Hub "
                "id in the place of the whole mapping."
            )
        _check_size(f"{described}.model_args.{name}", str(name), value)


def _check_size(described: str, name: str, value: Any) -> None:
    for each in value if isinstance(value, list | tuple) else [value]:
        if isinstance(each, bool) or not isinstance(each, int | float):
            continue
        if name in LAYERS and not 0 <= each <= MOST_LAYERS:
            raise ValueError(f"{described} is {each}: use a number of layers, {MOST_LAYERS} at most.")
        if name.split("_")[-1] in SIZES and not -LARGEST_SIZE <= each <= LARGEST_SIZE:
            raise ValueError(f"{described} is {each}: no tower is that large; use {LARGEST_SIZE} at most.")


def pairs_of(names: list[str], anchor: str | None) -> list[tuple[int, int]]:
    """
    Which modalities the objective compares, as indices of `names`: the anchor with each other one; the first instead,
    where there is none of that name; every two, where the anchor is None.
    """
    if anchor is None:
        return [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    first = names.index(anchor) if anchor in names else 0
    return [(first, other) for other in range(len(names)) if other != first]


def inputs_by_modality(names: Iterable[str], inputs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """
    Sorts `forward`'s inputs: {modality: {input of its tower, or "pooled": tensor}} of those that are given, in the
    order of `names`. What belongs to none of them is left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in IMAGE_AND_TEXT:
            known = ("pixel_values",) if name == "image" else TEXT_INPUTS
            mine = {key: inputs[key] for key in known if inputs.get(key) is not None}
            if MAIN_INPUTS[name] not in mine:
                mine = {}
        else:
            prefix = f"{name}_"
            mine = {
                key.removeprefix(prefix): value
                for key, value in inputs.items()
                if key.startswith(prefix) and value is not None
            }
        if inputs.get(f"pooled_{name}") is not None:
            mine = {"pooled": inputs[f"pooled_{name}"]}
        if mine:
            found[name] = mine
    return found


__all__ = [
    "SubConfigs",
    "check_modality_names",
    "check_tower_settings",
    "check_types",
    "inputs_by_modality",
    "pairs_of",
    "read_modalities",
    "tower_config",
]
