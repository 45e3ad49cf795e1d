"""The sections and fields of a run's configuration: their types, and what one word `section.field=value` sets."""

import dataclasses
import re
import typing
from typing import Any

from ..data import DataArguments
from ..data.arguments import SOURCE_FIELDS
from ..messages import did_you_mean, nearest
from ..model.configuration_gap_closed_clip import CAPTION_FIELDS, GapClosedClipConfig
from .arguments import GapClosedTrainingArguments, ModelArguments
from .captioning import CaptioningArguments
from .config_types import fits, is_of_names
from .lora import LoraArguments
from .yaml_files import parse_yaml


SECTIONS = ("model", "data", "training", "lora", "captioning")
# Sections that change what is trained by being there, even empty.
OPTIONAL = {"lora": LoraArguments, "captioning": CaptioningArguments}
# What GapClosedClipConfig itself adds to PreTrainedConfig, the towers, what the section `captioning` says and what
# `gap-closed-clip center`, `from_clip` and training write aside: these are set under `model:`.
NOT_SET_BY_HAND = (
    *("vision_config", "text_config", "decoder_config", "modalities"),
    *("embedding_map", "taken_over_from", "fusion_weights"),
)
CONFIG_FIELDS = {
    name: hint
    for name, hint in GapClosedClipConfig.__annotations__.items()
    if name not in (*NOT_SET_BY_HAND, *CAPTION_FIELDS)
}
# What fields are called elsewhere, where no name here is like it, or another one is.
NAMES_ELSEWHERE = {
    "lr": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "batch_size": "training.per_device_train_batch_size",
    "temperature": "model.logit_scale_init_value (the log of 1 / temperature)",
    "embed_dim": "model.projection_dim",
    "dataset": "data.source",
    "path": "data.source",
}
# Fields that hold the name of a file or a folder, or a Hub id, which are looked for as a file first.
NAMES = (
    ("model", "vision"),
    ("model", "text"),
    ("model", "checkpoint"),
    ("data", "source"),
    ("training", "output_dir"),
    ("training", "resume_from_checkpoint"),
    ("captioning", "decoder"),
)
LONGEST_NAME = 255  # bytes, as file systems have it


def fields_of(section: str) -> dict[str, Any]:
    """The names of a section's fields with their type hints."""
    if section == "data":
        return typing.get_type_hints(DataArguments)
    if section in OPTIONAL:
        return typing.get_type_hints(OPTIONAL[section])
    if section == "training":
        return {f.name: f.type for f in dataclasses.fields(GapClosedTrainingArguments) if f.init}
    arguments = {name: hint for name, hint in typing.get_type_hints(ModelArguments).items() if name != "config"}
    return {**arguments, **CONFIG_FIELDS}


def parse_override(text: str) -> tuple[str, list[str], Any]:
    """
    Splits `section.field.key=value` into the section, the names behind it, and the value.

    Raises:
        ValueError: no `key=value`, an unknown or ambiguous name, or a value that is not YAML.
    """
    key, equals, raw = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is neither a .yaml file nor `key=value`, e.g. training.learning_rate=1e-4.")
    section, *names = key.strip().split(".")
    owners = [s for s in SECTIONS if section in fields_of(s)]
    if not names or owners:
        name, names = section, [section, *names]
        if len(owners) > 1:
            raise ValueError(
                f"{name} is a field of {' and '.join(owners)}: write {owners[0]}.{name} or {owners[1]}.{name}."
            )
        if not owners:
            everything = [f"{s}.{field}" for s in SECTIONS for field in fields_of(s)]
            by_name = {field.split(".", 1)[1]: field for field in everything}
            meant = NAMES_ELSEWHERE.get(name) or by_name.get(nearest(name, by_name) or "")
            hint = f"; sections are {', '.join(SECTIONS)}." if meant is None else f": did you mean {meant}?"
            raise ValueError(f"The command line: unknown key {name!r}{hint}")
        section = owners[0]
    if section not in SECTIONS:
        raise ValueError(f"The command line: unknown section {section!r} in {key!r}{did_you_mean(section, SECTIONS)}")
    try:
        return section, names, _read_value(raw)
    except ValueError as error:
        raise ValueError(f"The value of {key!r} is not valid YAML: {raw!r}.") from error


def _read_value(raw: str) -> Any:
    """The value of a word, which has no comments as a file has: in a text, such as a path, ` #` is part of it."""
    value, text = parse_yaml(raw), raw.strip()
    has_comment = re.search(r"(^|\s)#", text) and not text.startswith(("'", '"'))
    return text if has_comment and isinstance(value, str | None) else value


def set_inside(mapping: Any, name: str, keys: list[str], value: Any) -> dict[str, Any]:
    """Returns `mapping` (called `name`; None is an empty one) with `value` at the place that `keys` lead to."""
    if not isinstance(mapping, dict | None):
        raise ValueError(f"The command line: {name} is {mapping!r}, which has no key {keys[0]!r} to set inside it.")
    key, *inner = keys
    mapping = mapping or {}
    if inner:
        value = set_inside(mapping.get(key), f"{name}.{key}", inner, value)
    return {**mapping, key: value}


def check_field(section: str, key: str, value: Any, given_in: str) -> None:
    """
    Checks the name of a field and the type of its value.

    Raises:
        ValueError: an unknown name, with the nearest right one, or a value of another type; begins with `given_in`.
    """
    known = fields_of(section)
    if key not in known:
        others = [s for s in SECTIONS if key in fields_of(s)]
        if others:
            hint = f": it belongs to the section {others[0]!r}."
        elif key in NAMES_ELSEWHERE:
            hint = f": did you mean {NAMES_ELSEWHERE[key]}?"
        else:
            hint = did_you_mean(key, known)
        raise ValueError(f"{given_in}: unknown key {key!r} in section {section!r}{hint}")
    if not fits(value, known[key]):
        expected = known[key].__name__ if isinstance(known[key], type) else str(known[key]).replace("typing.", "")
        raise ValueError(
            f"{given_in}: {section}.{key} is {value!r} ({type(value).__name__}); it has to be {expected}."
        )
    if (section, key) in NAMES and isinstance(value, str):
        longest = max(len(part.encode()) for part in value.split("/"))
        if longest > LONGEST_NAME:
            raise ValueError(
                f"{given_in}: {section}.{key} is {value[:40]!r}...: no file, folder or Hub id has a name of {longest} "
                f"bytes; {LONGEST_NAME} are the most."
            )
    if (section, key) == ("data", "source") and isinstance(value, list):
        _check_entries(value, given_in)


def as_listed(section: str, key: str, value: Any) -> Any:
    """A list of the one name that was given where names are expected: `label_columns=finding`."""
    return [value] if isinstance(value, str) and is_of_names(fields_of(section)[key]) else value


def _check_entries(entries: list, given_in: str) -> None:
    """Checks the values of the entries of a list of sources; `DataArguments` checks everything else about them."""
    for number, entry in enumerate(entries):
        for name, value in entry.items() if isinstance(entry, dict) else ():
            if name in SOURCE_FIELDS and name != "source":
                check_field("data", name, value, f"{given_in}, entry {number} of data.source")


__all__ = [
    "CONFIG_FIELDS",
    "OPTIONAL",
    "SECTIONS",
    "as_listed",
    "check_field",
    "fields_of",
    "parse_override",
    "set_inside",
]
