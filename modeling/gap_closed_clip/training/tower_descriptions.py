"""What a mapping in the section `model` says of a tower, checked: a config class takes any keyword without a word."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import BertConfig, PreTrainedConfig, TimmWrapperConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..checkpoint import is_local
from ..messages import did_you_mean
from ..model.configuration_checks_gap_closed_clip import check_tower_settings
from ..model.modalities_gap_closed_clip import POOLINGS, check_modality_names
from ..model.record_tower_gap_closed_clip import GapClosedClipRecordConfig
from .package_towers import package_folder


# What a mapping under model.vision or model.text describes.
TOWER_CONFIGS = {"vision": TimmWrapperConfig, "text": BertConfig}
# Of a record tower the data give these.
RECORD_SIZES = ("num_numbers", "categories")
RECORD = GapClosedClipRecordConfig.model_type


def check_tower(field: str, kind: str, description: dict[str, Any]) -> None:
    """
    Checks the description of a tower from scratch. A config class takes any keyword without a word, so a typo would
    train another tower than the one described.

    Args:
        field: of the configuration; errors name it.
        kind: "vision" or "text".
        description: the mapping in that field.

    Raises:
        ValueError: a key or value that the tower's config does not have.
    """
    config_class = TOWER_CONFIGS[kind]
    check_tower_settings(description, field)
    _check_channels(field, description.get("model_args"))
    settings = dict(description)
    _check_keys(field, config_class, settings)
    if settings.pop("model_type", config_class.model_type) != config_class.model_type:
        raise ValueError(
            f"{field}.model_type is {description['model_type']!r}: a tower from scratch is of type "
            f"{config_class.model_type!r}. Name a folder or a Hub id for another."
        )
    if kind == "vision":
        _check_architecture(field, settings.get("architecture"))
    _check_values(field, config_class, settings)


def _check_channels(field: str, arguments: Mapping[str, Any] | None) -> None:
    channels = (arguments or {}).get("in_chans", 3)
    if channels != 3:
        raise ValueError(
            f"{field}.model_args.in_chans is {channels!r:.100}: images have 3 channels here, gray ones three equal "
            "ones. Leave it out."
        )


def _check_keys(field: str, config_class: type[PreTrainedConfig], settings: Mapping[str, Any]) -> None:
    known = ["model_type", *(f.name for f in fields(config_class)), *config_class.attribute_map]
    for key in settings:
        if key not in known:
            raise ValueError(f"{field}: unknown key {key!r}{did_you_mean(key, known, otherwise='.')}")


def _check_values(field: str, config_class: type[PreTrainedConfig], settings: Mapping[str, Any]) -> None:
    try:
        config_class(**settings)
    except StrictDataclassError as error:
        raise ValueError(f"{field}: {' '.join(str(error).split())}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field}: {error}") from error


def _check_architecture(field: str, architecture: Any) -> None:
    if architecture is None:
        raise ValueError(
            f"{field} describes a tower without `architecture`: name one of timm, e.g. eva02_tiny_patch14_224."
        )
    if not isinstance(architecture, str):
        raise ValueError(f"{field}.architecture is {architecture!r:.100}: it is the name of one of timm.")
    if not timm.is_model(architecture):
        near = did_you_mean(architecture, timm.list_models(), otherwise=" (timm.list_models() names them all).")
        raise ValueError(f"{field}.architecture: timm {timm.__version__} has no {architecture!r}{near}")


def check_modality(name: Any, entry: Any) -> None:
    """
    Checks an entry of `model.modalities`.

    Raises:
        ValueError: a name that can't be one, another key, or a tower's key or value that its config does not have.
    """
    check_modality_names([name])
    field, known = f"model.modalities.{name}", ("tower", "pooling", "fields")
    if not isinstance(entry, Mapping):
        raise ValueError(f"{field} is {entry!r}: it is a mapping with the keys {', '.join(known)}.")
    for key in entry:
        if key not in known:
            raise ValueError(f"{field}: unknown key {key!r}{did_you_mean(key, known, otherwise='.')}")
    if entry.get("pooling") not in (None, *POOLINGS):
        raise ValueError(f"{field}.pooling is {entry['pooling']!r}: use one of {', '.join(POOLINGS)}.")
    tower = entry.get("tower")
    if isinstance(tower, Mapping):
        _check_modality_tower(f"{field}.tower", tower)
    elif tower is not None and not isinstance(tower, str):
        raise ValueError(f"{field}.tower is {tower!r}: name a folder or a Hub id, or describe a tower by a mapping.")
    descriptions = entry.get("fields") or {}
    if not isinstance(descriptions, Mapping) or not all(isinstance(one, Mapping) for one in descriptions.values()):
        raise ValueError(
            f"{field}.fields is {descriptions!r}: it maps columns of the record to what is to be known of them, "
            "such as {birth: {kind: date, relative_to: study_date}}."
        )


def model_type_of(description: Mapping[str, Any]) -> str:
    """The type of the tower that a mapping under `model.modalities` describes: without one a timm tower's or, without
    an architecture, the record tower's."""
    default = TimmWrapperConfig.model_type if "architecture" in description else RECORD
    return description.get("model_type", default)


def _check_modality_tower(field: str, description: Mapping[str, Any]) -> None:
    check_tower_settings(description, field)
    kind, settings = model_type_of(description), dict(description)
    if kind == TimmWrapperConfig.model_type:
        return check_tower(field, "vision", settings)
    if kind == RECORD:
        for key in RECORD_SIZES:
            if key in settings:
                raise ValueError(
                    f"{field}.{key}: leave it out, training takes it from the columns of data.modalities."
                )
        config_class: type[PreTrainedConfig] = GapClosedClipRecordConfig
    elif kind in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[kind]
    else:
        hint = did_you_mean(kind, list(CONFIG_MAPPING.keys()), otherwise=".")
        raise ValueError(f"{field}.model_type: transformers knows no {kind!r}{hint}")
    _check_keys(field, config_class, settings)
    settings.pop("model_type", None)
    _check_values(field, config_class, settings)


def pretrained_name(field: str, name: str) -> str:
    """A Hub id as it is, or a folder (also one in a package), after a look at what can be missing or half-written."""
    name = package_folder(name)
    if not is_local(name):
        return name
    folder = Path(name)
    if not folder.is_dir():
        raise FileNotFoundError(f"{field}: there is no folder {folder}.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{field}: {folder} is no model folder, config.json is missing.")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):  # reads the header, which tells how long the file has to be
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{field}: {path} is truncated or no safetensors file ({error}). Copy or download it again."
            ) from error
    return name


__all__ = ["RECORD", "TOWER_CONFIGS", "check_modality", "check_tower", "model_type_of", "pretrained_name"]
