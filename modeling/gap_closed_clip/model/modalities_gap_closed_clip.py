"""
Modalities beyond image and text: how the configuration describes them, and the names of their inputs.

A further modality is an entry of `config.modalities`: {"tower": the configuration of its tower, "pooling": what stands
for a sample in it}. Its inputs have their tower's names behind its own: `record_numbers`, `audio_input_values`.
"""

from collections.abc import Iterable, Mapping, Sequence
from keyword import iskeyword
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from .configuration_checks_gap_closed_clip import tower_config


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
    ),
    *("return", "videos", "common", "chat", "mean", "further", "logits", "logit", "embeds", "loss", "anchor"),
    *("use", "vision", "decoder"),
)

# Arguments that are given to processors here, as a whole name: a modality's values are one, too.
OPTIONS = ("self", "kwargs", "truncation", "padding", "max_length", "do_rescale")


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
        elif (
            name.split("_")[0] in RESERVED
            or name in OPTIONS
            or iskeyword(name)
            or hasattr(torch.nn.ModuleDict(), name)
        ):
            problem = "this name, or what it begins with, means something else already"
        for other in names:
            if isinstance(other, str) and problem is None and other != name and other.startswith(f"{name}_"):
                problem = f"the inputs of '{other}' would begin alike"
        if problem is not None:
            raise ValueError(
                f"A modality cannot be called {name!r}: {problem}. Choose another name, such as 'record', 'audio' or "
                "'lateral'."
            )


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
    "inputs_by_modality",
    "pairs_of",
    "read_modalities",
]
