"""Evaluate one or more trained models on the same pairs: a table side by side, metrics.json and figures.

    gap-closed-clip eval outputs/clip outputs/demo
    gap-closed-clip eval outputs/captioner outputs/captioner_text nearest_caption=true  # captioners: their captions
    gap-closed-clip eval outputs/clip outputs/demo split=validation data.source='$RADIOLOGY_DATA/medpix2'
    gap-closed-clip eval images.npy,texts.npy other=both.safetensors labels=labels.txt  # embeddings, without a model

In a checkout, `python eval.py` is the same. A model is a folder that `gap-closed-clip train` wrote, a Hub id, or a
CLIP of transformers or open_clip (openai/clip-vit-base-patch32, a folder, ...). The pairs are those of the first
model's train_config.yaml; `data.FIELD=VALUE` changes them. Other settings, as KEY=VALUE:

    split        train, validation or test (default: the first model's training.final_split)
    output       folder for metrics.json, metrics.md and the figures: projection.png and cosines.png of the embeddings,
                 captions.png (and captions.jsonl) of captions (default: outputs/eval)
    batch_size   images or captions at once (default: 64)
    num_workers  processes that decode the images (default: 2)
    bf16         compute in bfloat16 where that is safe (default: false)
    allow_pickle read pickled weights of a CLIP of another library, by torch.load's weights_only (default: false)
    centering    add each model with its modalities centered by their training means (default: false)

Embeddings that were computed elsewhere are two .npy files with an array (N, D) each, images first, or a .safetensors
file with one tensor 'image...' and one 'text...'; row i of both is one pair. NAME=FILES names them in the table. They
are made unit vectors. Beside models, they are of the same pairs in the same order; without a model, no data set is
needed, and what else is known of the rows is told by

    image_ids, caption_ids  text file with an id a line, or table.csv:column; rows of one id are one image, or caption
                            (default: every row is one of its own)
    labels                  the same with labels, for grouping and for precision in a mixed gallery

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

from datasets import Dataset

from ..checkpoint import CONFIG_FILE, check_model_name, check_writable, is_local
from ..data import DataArguments
from ..evaluation import Comparison, ComparisonSettings, load_metric
from ..evaluation.arrays import ArrayFiles, is_arrays
from ..evaluation.modality_report import what_captions_tell
from ..messages import suggest
from ..training import RunConfig, fields_of, load_config
from ..training.config import load_saved_config
from ..training.seen_pairs import count_seen, told_seen
from ..training.yaml_files import parse_yaml
from . import CommandParser, keep_freed_memory


@dataclass
class EvalCommand:
    """
    A checked command line.

    Args:
        models: {name in the table: folder or Hub id}.
        arrays: {name in the table: `images.npy,texts.npy` or `both.safetensors`}.
        settings: with the split that is evaluated.
        config: the first model's configuration, whose data section says which pairs; None without a model.
    """

    models: dict[str, str]
    arrays: dict[str, str]
    settings: ComparisonSettings
    config: RunConfig | None


def parse(words: list[str]) -> EvalCommand:
    """
    The models, the settings and the pairs that a command line names.

    Raises:
        FileNotFoundError, ValueError: a model that isn't there, an unknown setting or a value of the wrong type; no
            model, or nothing that says which pairs.
    """
    words = CommandParser("eval", __doc__).parse_words(words, "MODEL or KEY=VALUE", at_least_one=True)
    words, arrays = _split_arrays(words)
    models, settings, overrides = split_words(words)
    if not models and not arrays:
        raise ValueError(
            "No model is named: give a folder that `gap-closed-clip train` wrote, or a Hub id, e.g. outputs/demo."
        )
    if files := [word for word in models if any(Path(part).is_file() for part in word.split(","))]:
        raise ValueError(
            f"{files[0]} is a file: a model is a folder or a Hub id, and embeddings are `images.npy,texts.npy` or "
            "`both.safetensors`."
        )
    _check_arrays(arrays, models, settings, overrides)
    if not models:
        return EvalCommand({}, arrays, settings, None)
    for model in [*models, *filter(None, [settings.scorer])]:
        check_model_name(model)  # all of them, before the first is evaluated
    config = config_of_the_pairs(models, overrides)
    if not settings.split:
        final_split = config.training.get("final_split", "validation")
        settings = replace(settings, split="validation" if final_split == "none" else final_split)
    names = _names_in_the_table(models)
    if twice := set(names) & set(arrays):
        raise ValueError(f"{twice.pop()} is the name of a model and of embeddings: write OTHER=FILES.")
    return EvalCommand(dict(zip(names, models, strict=True)), arrays, settings, config)


def run(command: EvalCommand) -> None:
    """
    Evaluates all models, writes the report and prints the table.

    Raises:
        ValueError, OSError: as `Comparison`; a folder that can't be written.
    """
    settings, config = command.settings, command.config
    check_writable(settings.output, "output")
    load_metric("modality_gap")  # the cache of metrics may not be writable, which is not to be found after all towers
    keep_freed_memory()
    arrays = {name: ArrayFiles.parse(word) for name, word in command.arrays.items()}
    comparison = Comparison(command.models, settings, config.data if config else DataArguments(), arrays)
    seen = _seen_pairs(command, comparison)
    settings_found = {"seen_pairs": seen} if seen else {}
    table = comparison.run(config.described_data() if config else {"embeddings": command.arrays}, settings_found)
    if config is None:
        what = f"{len(next(iter(comparison.arrays.values())))} pairs of {', '.join(command.arrays)}"
    else:
        number = f"{len(comparison.pairs)} pairs, " if isinstance(comparison.pairs, Dataset) else ""
        what = f"{number}split '{settings.split}' of {config.data.title}"
    print(f"\n{what}\n\n{table}\n")
    for model, count in seen.items():
        assert config is not None  # pairs of a data section were seen
        print(told_seen(count, config.data.title, model), end="\n\n")
    for told in dict.fromkeys(what_captions_tell(e.metrics) for e in comparison.evaluations.values()):
        if told:
            print(told)
    print(f"metrics.json, metrics.md and the figures are in {settings.output}")


def _seen_pairs(command: EvalCommand, comparison: Comparison) -> dict[str, int]:
    """{name in the table: how many of the pairs the model was trained on}, of those that were on any."""
    if command.config is None:
        return {}
    data, split = command.config.data, command.settings.split
    numbers = {name: count_seen(comparison.pairs, data, split, path) for name, path in command.models.items()}
    return {name: number for name, number in numbers.items() if number}


def after_interrupt(command: EvalCommand) -> str:
    """What Ctrl-C leaves of an evaluation."""
    return f"No complete report was written to {command.settings.output}."


def split_words(words: list[str], settings_class: type = ComparisonSettings) -> tuple[list[str], Any, list[str]]:
    """
    Models, settings, and overrides of the data section.

    Args:
        settings_class: the dataclass whose fields the settings are.

    Raises:
        ValueError: an unknown setting, or a value of the wrong type.
    """
    models: list[str] = []
    settings: dict[str, Any] = {}
    overrides: list[str] = []
    types = typing.get_type_hints(settings_class)
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
    return models, settings_class(**settings), overrides


def _split_arrays(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """The other words, and {name in the table: files} of those that name embeddings."""
    settings, data = typing.get_type_hints(ComparisonSettings), fields_of("data")
    others: list[str] = []
    arrays: dict[str, str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        name, files = (key, text) if equals else (word, word)
        if key in settings or key.removeprefix("data.") in data or not is_arrays(files):
            others.append(word)
            continue
        ArrayFiles.parse(files)
        if name in arrays:
            raise ValueError(f"{name} is there twice: write NAME=FILES with two names.")
        arrays[name] = files
    return others, arrays


def _check_arrays(
    arrays: dict[str, str], models: list[str], settings: ComparisonSettings, overrides: list[str]
) -> None:
    """
    Checks that the settings belong to what is evaluated.

    Raises:
        ValueError: ids and labels of rows beside a data set that has them; settings of models where there is none.
    """
    given = {name: getattr(settings, name) for name in ("image_ids", "caption_ids", "labels")}
    if models and any(given.values()):
        name = next(name for name, value in given.items() if value)
        raise ValueError(f"{name} is of embeddings alone: beside a model, ids and labels are those of its data set.")
    if not models:
        needless = [name for name in ("centering", "nearest_caption", "scorer", "split") if getattr(settings, name)]
        needless += [override.partition("=")[0] for override in overrides]
        if needless:
            raise ValueError(f"{needless[0]} is for models, and embeddings alone are named: leave it out.")


def _value(key: str, text: str, expected: type) -> Any:
    value = text if expected is str else _parsed(key, text)
    if type(value) is not expected:
        raise ValueError(f"{key} is '{text}'; it must be of type {expected.__name__}.")
    return value


def _parsed(key: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{key} is '{text:.100}', which is no value: {error}.") from error


def config_of_the_pairs(models: list[str], overrides: list[str]) -> RunConfig:
    """The first model's configuration with the overrides: its data section says what to evaluate on."""
    found = [path for model in models if (path := Path(model) / CONFIG_FILE).is_file()]
    if not found and not any(override.startswith("data.source=") for override in overrides):
        raise ValueError(
            f"{models[0]} has no {CONFIG_FILE}, so say what to evaluate on: data.source=... (a data set or "
            "'phantoms')."
        )
    return load_saved_config(found[0], overrides) if found else load_config([], overrides)


def _names_in_the_table(models: list[str]) -> list[str]:
    """The folders' names, or their whole paths where two have the same."""
    names = [Path(model).resolve().name if is_local(model) else model for model in models]
    return names if len(set(names)) == len(names) else models


__all__ = ["EvalCommand", "after_interrupt", "config_of_the_pairs", "parse", "run", "split_words"]
