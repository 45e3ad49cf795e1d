"""Evaluate one or more trained models on the same pairs: a table side by side, metrics.json and two figures.

    python eval.py outputs/clip outputs/demo
    python eval.py outputs/clip outputs/demo split=validation data.source='$RADIOLOGY_DATA/medpix2' output=outputs/eval

A model is a folder that train.py wrote, or a Hub id. The pairs are those of the first model's train_config.yaml;
`data.FIELD=VALUE` changes them. Other settings, as KEY=VALUE:

    split        train, validation or test (default: the first model's training.final_split)
    output       folder for metrics.json, metrics.md, projection.png, cosines.png (default: outputs/eval)
    batch_size   images or captions at once (default: 64)
    num_workers  processes that decode the images (default: 2)
    bf16         compute in bfloat16 where that is safe (default: false)
    centring     add each model with its modalities centred by their training means (default: false)
"""

import argparse
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import yaml

from gap_closed_clip.data import load_checked_pairs
from gap_closed_clip.data.messages import suggest
from gap_closed_clip.evaluation import (
    check_model_name,
    check_writable,
    evaluate_embeddings,
    evaluate_model,
    is_local,
    load_checkpoint,
    modality_means,
    post_hoc_centring,
    write_report,
)
from gap_closed_clip.evaluation.embed import embed_pairs
from gap_closed_clip.training import RunConfig, load_config, read_words
from gap_closed_clip.training.config import fields_of


@dataclass
class EvalArguments:
    """The settings of the module's docstring."""

    split: str = ""
    output: str = "outputs/eval"
    batch_size: int = 64
    num_workers: int = 2
    bf16: bool = False
    centring: bool = False

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


def parse(words: list[str]) -> tuple[list[str], EvalArguments, list[str]]:
    """Models, settings, and overrides of the data section."""
    models, settings, overrides = [], {}, []
    types = {field.name: field.type for field in fields(EvalArguments)}
    for word in words:
        key, equals, raw = word.partition("=")
        if not equals or Path(word).is_dir():
            models.append(word)
        elif key in types:
            value = raw if types[key] is str else yaml.safe_load(raw)
            if type(value) is not types[key]:
                raise ValueError(f"{key} is '{raw}'; it must be of type {types[key].__name__}.")
            settings[key] = value
        elif key.removeprefix("data.") in fields_of("data"):
            overrides.append(f"data.{key.removeprefix('data.')}={raw}")
        else:
            known = [*types, *(f"data.{name}" for name in fields_of("data"))]
            raise ValueError(f"There is no setting '{key}'. {suggest(key, known, 'settings')}")
    if not models:
        raise ValueError("Which model? Give the folder that train.py wrote, or a Hub id: python eval.py outputs/demo")
    return models, EvalArguments(**settings), overrides


def data_config(models: list[str], overrides: list[str]) -> RunConfig:
    """The first model's configuration with the overrides: its data section says what to evaluate on."""
    found = [path for model in models if (path := Path(model) / "train_config.yaml").is_file()]
    if not found and not any(override.startswith("data.source=") for override in overrides):
        raise ValueError(
            f"{models[0]} has no train_config.yaml, so say what to evaluate on: data.source=... (a data set or "
            "'phantoms')."
        )
    return load_config(found[:1], overrides)


def column_names(models: list[str]) -> list[str]:
    """The folders' names, or their whole paths where two have the same."""
    names = [Path(model).resolve().name if is_local(model) else model for model in models]
    return names if len(set(names)) == len(names) else models


def run(words: list[str]) -> None:
    models, settings, overrides = parse(words)
    for model in models:
        check_model_name(model)  # all of them, before the first is evaluated
    check_writable(settings.output, "output")
    config = data_config(models, overrides)
    final_split = config.training.get("final_split", "validation")
    split = settings.split or ("validation" if final_split == "none" else final_split)
    pairs = load_checked_pairs(config.data, split, settings.num_workers)
    train_pairs = load_checked_pairs(config.data, "train", settings.num_workers) if settings.centring else None
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    how = {
        "batch_size": settings.batch_size,
        "num_workers": settings.num_workers,
        "autocast_dtype": torch.bfloat16 if settings.bf16 else None,
        "max_length": config.data.max_caption_tokens,
        "window": config.data.window,
    }
    results, embeddings = {}, {}
    for name, path in zip(column_names(models), models, strict=True):
        model, processor = load_checkpoint(path)
        model.to(device)
        results[name], embeddings[name] = evaluate_model(model, processor, pairs, **how)
        if settings.centring:
            means = modality_means(embed_pairs(model, processor, train_pairs, **how))
            centred = f"{name}, centred"
            embeddings[centred] = post_hoc_centring(embeddings[name], means)
            results[centred] = evaluate_embeddings(embeddings[centred])
    data = {"source": config.data.source, **config.to_dict()["data"]}  # to_dict leaves defaults out
    folders = {name: path for name, path in zip(column_names(models), models, strict=True) if is_local(path)}
    table = write_report(settings.output, results, embeddings, data, split, folders)
    print(f"\n{len(embeddings[name])} pairs, split '{split}' of '{config.data.source}'\n\n{table}\n")
    print(f"metrics.json, metrics.md, projection.png and cosines.png are in {settings.output}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="MODEL or KEY=VALUE")
    try:
        run(read_words(parser))
    except KeyboardInterrupt:
        print("\neval.py: interrupted; no complete report was written.", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
