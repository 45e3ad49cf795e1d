"""
A run's configuration: YAML files and `key=value` words become checked sections: `model`, `data`, `training`, `lora`
for adapters, and `captioning` for a decoder.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..data import DataArguments
from ..data.arguments import expand_path
from ..disk import replacing
from ..messages import did_you_mean, nearest
from ..model.configuration_gap_closed_clip import GapClosedClipConfig
from ..model.record_tower_gap_closed_clip import GapClosedClipRecordConfig
from .argument_checks import check_label_smoothing
from .arguments import TOWER_CONFIGS, GapClosedTrainingArguments, ModelArguments
from .captioning import CaptioningArguments
from .config_fields import (
    CONFIG_FIELDS,
    OPTIONAL,
    SECTIONS,
    as_listed,
    check_field,
    fields_of,
    parse_override,
    set_inside,
)
from .lora import LoraArguments
from .yaml_files import read_yaml


# The configurations that come with the package; `configs/` of a checkout is a link to them.
CONFIGS = Path(__file__).parent.parent / "configs"
# Folders in which variables of the environment are filled in here; those of data are filled in where they are read.
FOLDERS = (("model", "checkpoint"), ("training", "output_dir"))
# Fields that belong to the value of another one.
SHAPES = ("projection_dim", "projection_hidden_dim", "projection_bias", "projection_dropout", "image_pooling")
# Which of a source's pairs are held out: what a folder's own configuration says of its source is not said of another.
HELD_OUT = ("folds", "fold")
DISPLACED = {
    ("data", "source"): ("license", "subset"),
    ("model", "checkpoint"): ("vision", "text", "modalities", "keep_vision_projection", *SHAPES, "text_pooling"),
}


@dataclasses.dataclass
class RunConfig:
    """
    A checked configuration.

    Args:
        model: towers, freezing and fields of [`GapClosedClipConfig`].
        data: where the pairs come from.
        training: fields of [`GapClosedTrainingArguments`], not yet made into one (that starts devices and processes).
        lora: adapters; None trains the towers themselves.
        captioning: a decoder; None trains the encoder alone.
        inherited: fields of `training` that were given for another source than this one.

    Raises:
        ValueError: adapters on a tower that is to stay as it is, or together with a decoder.
    """

    model: ModelArguments
    data: DataArguments
    training: dict[str, Any]
    lora: LoraArguments | None = None
    captioning: CaptioningArguments | None = None
    inherited: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)

    def __post_init__(self):
        if self.lora is not None and self.captioning is not None:
            raise ValueError(
                "The sections lora and captioning are both there: train the adapters first (lora.merge=true leaves a "
                "whole model), then the decoder on that."
            )
        if self.captioning is None and self.training.get("predict_with_generate"):
            raise ValueError(
                "training.predict_with_generate is true, and nothing writes captions: add a section captioning (as in "
                "configs/captioning.yaml), or leave it out."
            )
        if self.captioning is not None and self.training.get("mix_sources") is False:
            raise ValueError(
                "training.mix_sources is for encoders alone, whose pairs are compared within a batch: leave it out."
            )
        if self.captioning is not None and self.training.get("contrastive_batch_size") is not None:
            raise ValueError(
                "training.contrastive_batch_size is for encoders alone: with a section captioning set "
                "per_device_train_batch_size (and gradient_accumulation_steps, with frozen encoders)."
            )
        check_label_smoothing(self.training.get("label_smoothing_factor"))
        for tower in self.lora.towers if self.lora else ():
            if getattr(self.model, f"freeze_{tower}"):
                raise ValueError(
                    f"model.freeze_{tower} is true and lora.towers has {tower!r}: an adapter trains what freezing "
                    "keeps as it is. Leave one of them out. (Where there are adapters, all else is frozen anyway.)"
                )
        if self.captioning is not None and (self.data.all_modalities or self.model.modalities):
            raise ValueError(
                "The section captioning is there, and data.modalities: a decoder writes captions of images. Train the "
                "encoder with its modalities first, then the decoder on it without data.modalities."
            )
        self._check_release()

    def _check_release(self) -> None:
        """Checks that what is said of training towers meets towers that train."""
        rest = None
        if self.lora is not None:
            rest = "the section lora is there: of the towers, adapters alone train, at training.learning_rate"
        elif self.captioning is not None and self.captioning.encoders == "frozen":
            rest = "captioning.encoders is frozen"
        elif not any(self.model.trains_tower(name) for name in TOWER_CONFIGS) and not self._may_train_published():
            rest = "model.freeze_vision and model.freeze_text are true"
        given = {f"model.{name}": getattr(self.model, name) for name in ("train_vision_blocks", "train_text_blocks")}
        given["training.tower_learning_rate"] = self.training.get("tower_learning_rate")
        for name, value in given.items():
            if rest is not None and value is not None:
                raise ValueError(f"{name} is {value}, and {rest}. Leave one of them out.")
        if self.captioning is not None and not self.captioning.objective_weight and self.model.train_text_blocks:
            raise ValueError(
                f"model.train_text_blocks is {self.model.train_text_blocks}, and captioning.objective_weight is 0: no "
                "caption goes through the text tower. Leave one of them out."
            )

    def _may_train_published(self) -> bool:
        """Whether a further modality may have a tower with trained weights that trains."""
        described = self.model.modalities or {}
        return any(
            name not in self.model.freeze_modalities
            and not isinstance(columns, list)
            and (self.model.checkpoint is not None or isinstance(described.get(name, {}).get("tower"), str))
            for name, columns in self.data.all_modalities.items()
        )

    @property
    def output_dir(self) -> str:
        """The model folder that the run leaves."""
        return self.training.get("output_dir") or GapClosedTrainingArguments.output_dir

    def described_data(self) -> dict[str, Any]:
        """What a report says of the pairs: the source, and those fields of the data section that were changed."""
        described = {"source": self.data.source, **_changed(self.data)}
        described.pop("feature_cache", None)  # a folder of this machine
        return described

    def training_arguments(self) -> GapClosedTrainingArguments:
        """
        The `training:` section as an object; making it starts devices and processes.

        Raises:
            ValueError: a value that transformers refuses, in whatever way it does.
        """
        try:
            return GapClosedTrainingArguments(**self.training)
        except (ValueError, OSError, ImportError) as error:
            raise type(error)(str(error) if "training." in str(error) else f"training: {error}") from error
        except Exception as error:  # a value of a type that its own checks do not expect
            raise ValueError(f"training: {type(error).__name__}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The sections as plain values, as in a YAML file; values at their default are left out."""
        model = {**_changed(self.model), **self.model.config}
        model.pop("config", None)
        sections = {"model": model, "data": _changed(self.data), "training": dict(self.training)}
        given = {name: getattr(self, name) for name in OPTIONAL if getattr(self, name) is not None}
        return sections | {name: _changed(arguments) for name, arguments in given.items()}

    def save(self, path: str | Path) -> None:
        """
        Writes a YAML file that `load_config` reads back, without `hub_token` and `feature_cache`: it goes where the
        model goes.
        """
        content = self.to_dict()
        content["training"].pop("hub_token", None)
        content["data"].pop("feature_cache", None)
        with replacing(path) as draft:
            draft.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> RunConfig:
    """
    Reads YAML files, later ones over earlier ones, then `key=value` overrides, and checks every key and type.

    A key is `section.field`, or the field alone where only one section has it (`push_to_hub=true`); keys of a field
    that holds a mapping go on from there (`model.text.hidden_size=96`) and leave its other keys as they are. Values
    are YAML; where names are expected, one stands for a list of it. What comes later leaves behind what belonged to an
    earlier value alone (`DISPLACED`): another `data.source` the license and the subset of the first, and the folds
    that came with it or before it, a `model.checkpoint` the towers, and the shape of the projections, of which it
    brings its own. Fields of `training` that came before the `data.source` are noted as `inherited`. `$VARIABLE` and
    `~` are filled in in `FOLDERS`.

    Raises:
        FileNotFoundError: a file that isn't there.
        ValueError: an unknown section or key (with the nearest right one), a value of the wrong type or out of its
            range, no `key=value`, a variable of the environment that is not set.
    """
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    given: dict[tuple[str, str], int] = {}  # which file gave a field last; the command line comes after all
    sections_given = set()
    for number, file in enumerate(files):
        for section, values in _read_yaml(find_config(file)).items():
            sections_given.add(section)
            for key, value in values.items():
                check_field(section, key, value, str(file))
                _displace(sections, section, key, value, values, given)
                sections[section][key] = as_listed(section, key, value)
            given |= dict.fromkeys(((section, key) for key in values), number)
    for override in overrides:
        section, (key, *inner), value = parse_override(override)
        if inner:
            value = set_inside(sections[section].get(key), f"{section}.{key}", inner, value)
        check_field(section, key, value, "the command line")
        _displace(sections, section, key, value, [parse_override(other)[1][0] for other in overrides], given)
        sections[section][key] = as_listed(section, key, value)
        sections_given.add(section)
        given[section, key] = len(files)
    for section, key in FOLDERS:
        if isinstance(folder := sections[section].get(key), str):
            sections[section][key] = expand_path(folder, f"{section}.{key}")
    source = given.get(("data", "source"), 0)
    data = DataArguments(**sections["data"])
    model = dict(sections["model"])
    config = {name: model.pop(name) for name in list(model) if name in CONFIG_FIELDS}
    if model.get("checkpoint") is None:  # else the checkpoint's own values belong to the check
        names = {name: {"tower": GapClosedClipRecordConfig()} for name in data.all_modalities}
        try:
            GapClosedClipConfig(**config, modalities=names)  # each with any tower: the model's are built later
        except ValueError as error:
            raise ValueError(f"model.{error}") from error
    return RunConfig(
        model=ModelArguments(**model, config=config),
        data=data,
        training=sections["training"],
        inherited=frozenset(key for (name, key), number in given.items() if name == "training" and number < source),
        **{name: arguments(**sections[name]) for name, arguments in OPTIONAL.items() if name in sections_given},
    )


def load_saved_config(file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """
    As `load_config`, of what a run has left in its folder, which the user has not named: errors name it.

    Raises:
        ValueError: as `load_config`.
    """
    try:
        return load_config([file], overrides)
    except ValueError as error:
        if file.name not in str(error) and _is_wrong(file):
            raise ValueError(f"{file}: {error}") from error
        raise


def _is_wrong(file: Path) -> bool:
    """Whether a configuration is wrong by itself, whatever is given beside it."""
    try:
        load_config([file])
    except ValueError:
        return True
    return False


def _displace(
    sections: dict[str, dict[str, Any]],
    section: str,
    key: str,
    value: Any,
    together: Collection[str],
    given: dict[tuple[str, str], int],
) -> None:
    """Removes what belonged to the earlier value of a field, but for the keys that are given `together` with it."""
    if value is None:
        return
    others = list(DISPLACED.get((section, key), ()))
    if (section, key) == ("data", "source") and sections[section].get(key) not in (None, value):
        others += [name for name in HELD_OUT if given.get((section, name), math.inf) <= given[section, key]]
    for other in others:
        if other not in together:
            sections[section].pop(other, None)


def find_config(name: str | Path) -> Path:
    """
    The file of a configuration: the path itself or, where there is no such file, one of the package's own, by name:
    `demo`, `demo.yaml` and `configs/demo.yaml` are the same.

    Raises:
        FileNotFoundError: there is none; with the most similar name.
    """
    path = Path(name)
    if path.is_file():
        return path
    packaged = CONFIGS / path.with_suffix(".yaml").name
    if packaged.is_file() and str(path.parent) in (".", "configs"):
        return packaged
    if any(str(path) in (key, f"{section}.{key}") for section in SECTIONS for key in fields_of(section)):
        raise FileNotFoundError(f"There is no config file {path}. Did you mean {path}=VALUE?")
    known = {other.stem: other for folder in (CONFIGS, path.parent) for other in folder.glob("*.yaml")}
    near = nearest(path.stem, known)
    if near is not None:
        similar = known[near] if known[near].parent == path.parent else known[near].name
        raise FileNotFoundError(f"There is no config file {path}. Did you mean {similar}?")
    packaged_names = ", ".join(sorted(other.name for other in CONFIGS.glob("*.yaml")))
    raise FileNotFoundError(f"There is no config file {path}. Those that come with the package are {packaged_names}.")


def _read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    content = read_yaml(path) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} has to hold the sections {', '.join(SECTIONS)}, each with its fields.")
    for section, values in content.items():
        if section not in SECTIONS:
            raise ValueError(f"{path}: unknown section {section!r}{did_you_mean(section, SECTIONS)}")
        if not isinstance(values, dict):
            raise ValueError(f"{path}: section {section!r} has to hold `field: value` lines.")
    return content


def _changed(arguments) -> dict[str, Any]:
    default = type(arguments)()
    values = dataclasses.asdict(arguments)
    return {name: value for name, value in values.items() if value != getattr(default, name)}


__all__ = ["CONFIGS", "RunConfig", "find_config", "load_config", "load_saved_config"]
