"""Evaluate one or more trained models on the same pairs: a table side by side, metrics.json and figures.

    gap-closed-clip eval outputs/clip outputs/demo
    gap-closed-clip eval outputs/captioner outputs/captioner_text nearest_caption=true  # captioners: their captions
    gap-closed-clip eval outputs/clip outputs/demo split=validation data.source='$RADIOLOGY_DATA/medpix2'

In a checkout, `python eval.py` is the same. A model is a folder that `gap-closed-clip train` wrote, or a Hub id. The
pairs are those of the first model's train_config.yaml; `data.FIELD=VALUE` changes them. Other settings, as KEY=VALUE:

    split        train, validation or test (default: the first model's training.final_split)
    output       folder for metrics.json, metrics.md and the figures: projection.png and cosines.png of the embeddings,
                 captions.png (and captions.jsonl) of captions (default: outputs/eval)
    batch_size   images or captions at once (default: 64)
    num_workers  processes that decode the images (default: 2)
    bf16         compute in bfloat16 where that is safe (default: false)
    centering    add each model with its modalities centered by their training means (default: false)

Of captioners, the captions are evaluated; of other models, the embeddings. For captions:

    nearest_caption  add, for each model, the training caption nearest to the image: what a decoder must beat (default:
                     false)
    num_beams        beams of a caption (default: as the captioner was trained; 1 is greedy)
    scorer           folder or Hub id of a model whose embeddings give the CLIPScore of all columns (default: each
                     captioner's own encoder: then compare captioners of one encoder only)
"""

import typing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from ..checkpoint import CONFIG_FILE, check_model_name, check_writable, is_local
from ..evaluation import Comparison, ComparisonSettings
from ..messages import suggest
from ..training import RunConfig, fields_of, load_config
from . import CommandParser, keep_freed_memory


@dataclass
class EvalCommand:
    """
    A checked command line.

    Args:
        models: {name in the table: folder or Hub id}.
        settings: with the split that is evaluated.
        config: the first model's configuration, whose data section says which pairs.
    """

    models: dict[str, str]
    settings: ComparisonSettings
    config: RunConfig


def parse(words: list[str]) -> EvalCommand:
    """
    The models, the settings and the pairs that a command line names.

    Raises:
        FileNotFoundError, ValueError: a model that isn't there, an unknown setting or a value of the wrong type; no
            model, or nothing that says which pairs.
    """
    words = CommandParser("eval", __doc__).parse_words(words, "MODEL or KEY=VALUE", at_least_one=True)
    models, settings, overrides = split_words(words)
    for model in [*models, *filter(None, [settings.scorer])]:
        check_model_name(model)  # all of them, before the first is evaluated
    config = _config_of_the_pairs(models, overrides)
    if not settings.split:
        final_split = config.training.get("final_split", "validation")
        settings = replace(settings, split="validation" if final_split == "none" else final_split)
    return EvalCommand(dict(zip(_names_in_the_table(models), models, strict=True)), settings, config)


def run(command: EvalCommand) -> None:
    """
    Evaluates all models, writes the report and prints the table.

    Raises:
        ValueError, OSError: as `Comparison`; a folder that can't be written.
    """
    settings, config = command.settings, command.config
    check_writable(settings.output, "output")
    keep_freed_memory()
    comparison = Comparison(command.models, settings, config.data)
    table = comparison.run(config.described_data())
    number = f"{len(comparison.pairs)} pairs, " if isinstance(comparison.pairs, Dataset) else ""
    print(f"\n{number}split '{settings.split}' of {config.data.title}\n\n{table}\n")
    print(f"metrics.json, metrics.md and the figures are in {settings.output}")


def after_interrupt(command: EvalCommand) -> str:
    """What Ctrl-C leaves of an evaluation."""
    return f"No complete report was written to {command.settings.output}."


def split_words(words: list[str]) -> tuple[list[str], ComparisonSettings, list[str]]:
    """
    Models, settings, and overrides of the data section.

    Raises:
        ValueError: an unknown setting, a value of the wrong type, or no model.
    """
    models: list[str] = []
    settings: dict[str, Any] = {}
    overrides: list[str] = []
    types = typing.get_type_hints(ComparisonSettings)
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or Path(word).is_dir():
            models.append(word)
        elif key in types:
            settings[key] = _value(key, text, types[key])
        elif key.removeprefix("data.") in fields_of("data"):
            overrides.append(f"data.{key.removeprefix('data.')}={text}")
        else:
            known = [*types, *(f"data.{name}" for name in fields_of("data"))]
            raise ValueError(f"There is no setting '{key}'. {suggest(key, known, 'settings')}")
    if not models:
        raise ValueError(
            "No model is named: give a folder that `gap-closed-clip train` wrote, or a Hub id, e.g. outputs/demo."
        )
    return models, ComparisonSettings(**settings), overrides


def _value(key: str, text: str, expected: type) -> Any:
    value = text if expected is str else yaml.safe_load(text)
    if type(value) is not expected:
        raise ValueError(f"{key} is '{text}'; it must be of type {expected.__name__}.")
    return value


def _config_of_the_pairs(models: list[str], overrides: list[str]) -> RunConfig:
    """The first model's configuration with the overrides: its data section says what to evaluate on."""
    found = [path for model in models if (path := Path(model) / CONFIG_FILE).is_file()]
    if not found and not any(override.startswith("data.source=") for override in overrides):
        raise ValueError(
            f"{models[0]} has no {CONFIG_FILE}, so say what to evaluate on: data.source=... (a data set or "
            "'phantoms')."
        )
    return load_config(found[:1], overrides)


def _names_in_the_table(models: list[str]) -> list[str]:
    """The folders' names, or their whole paths where two have the same."""
    names = [Path(model).resolve().name if is_local(model) else model for model in models]
    return names if len(set(names)) == len(names) else models


__all__ = ["EvalCommand", "after_interrupt", "parse", "run", "split_words"]
