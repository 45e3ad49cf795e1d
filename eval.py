"""Evaluate one or more trained models on the same pairs: a table side by side, metrics.json and figures.

    python eval.py outputs/clip outputs/demo
    python eval.py outputs/captioner outputs/captioner_text nearest_caption=true    # captioners: their captions
    python eval.py outputs/clip outputs/demo split=validation data.source='$RADIOLOGY_DATA/medpix2' output=outputs/eval

A model is a folder that train.py wrote, or a Hub id. The pairs are those of the first model's train_config.yaml;
`data.FIELD=VALUE` changes them. Other settings, as KEY=VALUE:

    split        train, validation or test (default: the first model's training.final_split)
    output       folder for metrics.json, metrics.md and the figures: projection.png and cosines.png of the embeddings,
                 captions.png (and captions.jsonl) of captions (default: outputs/eval)
    batch_size   images or captions at once (default: 64)
    num_workers  processes that decode the images (default: 2)
    bf16         compute in bfloat16 where that is safe (default: false)
    centering     add each model with its modalities centered by their training means (default: false)

Of captioners, the captions are evaluated; of other models, the embeddings. For captions:

    nearest_caption  add, for each model, the training caption nearest to the image: what a decoder must beat (default:
                     false)
    num_beams        beams of a caption (default: as the captioner was trained; 1 is greedy)
    scorer           folder or Hub id of a model whose embeddings give the CLIPScore of all columns (default: each
                     captioner's own encoder: then compare captioners of one encoder only)
"""

import argparse
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import yaml
from datasets import Dataset

from gap_closed_clip import GapClosedClipForConditionalGeneration, GapClosedClipModel, GapClosedClipProcessor
from gap_closed_clip.checkpoint import (
    check_model_name,
    check_writable,
    is_captioner,
    is_local,
    load_captioner,
    load_checkpoint,
)
from gap_closed_clip.data import load_checked_pairs
from gap_closed_clip.evaluation import (
    Captions,
    PairEmbeddings,
    check_references,
    embed_pairs,
    evaluate_captioner,
    evaluate_captions,
    evaluate_embeddings,
    evaluate_model,
    modality_means,
    nearest_captions,
    post_hoc_centering,
    score_captions,
    write_report,
)
from gap_closed_clip.messages import suggest
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
    centering: bool = False
    nearest_caption: bool = False
    num_beams: int = 0
    scorer: str = ""

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("num_workers", 0), ("num_beams", 0)):
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


class Evaluation:
    """Models on the same pairs, one after the other."""

    def __init__(self, models: list[str], settings: EvalArguments, config: RunConfig):
        self.models = dict(zip(column_names(models), models, strict=True))
        self.settings, self.config = settings, config
        final_split = config.training.get("final_split", "validation")
        self.split = settings.split or ("validation" if final_split == "none" else final_split)
        self.pairs = load_checked_pairs(config.data, self.split, settings.num_workers)
        needs_training_pairs = settings.centering or settings.nearest_caption
        self.train_pairs = (
            load_checked_pairs(config.data, "train", settings.num_workers) if needs_training_pairs else None
        )
        self.device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.how = {
            "batch_size": settings.batch_size,
            "num_workers": settings.num_workers,
            "autocast_dtype": torch.bfloat16 if settings.bf16 else None,
            "max_length": config.data.max_caption_tokens,
            "window": config.data.window,
        }
        self.results: dict[str, dict[str, float]] = {}
        self.embeddings: dict[str, PairEmbeddings] = {}
        self.captions: dict[str, Captions] = {}

    def run(self) -> str:
        """Evaluates all models and writes the report; returns the table."""
        for name, path in self.models.items():
            if is_captioner(path):
                if isinstance(self.pairs, Dataset):
                    check_references(self.pairs, self.split)
                model, processor = load_captioner(path)
                self.add_captioner(name, model.to(self.device), processor)
            else:
                model, processor = load_checkpoint(path)
                self.add_encoder(name, model.to(self.device), processor)
        if self.settings.scorer and self.captions:
            self.score_all()
        data = {"source": self.config.data.source, **self.config.to_dict()["data"]}  # to_dict leaves defaults out
        folders = {name: path for name, path in self.models.items() if is_local(path)}
        where = (self.settings.output, self.results, self.embeddings, data, self.split, folders)
        how = {name: value for name in ("num_beams", "scorer") if (value := getattr(self.settings, name))}
        return write_report(*where, captions=self.captions, pairs=self.pairs, how=how if self.captions else None)

    def add_encoder(self, name: str, model: GapClosedClipModel, processor: GapClosedClipProcessor) -> None:
        self.results[name], self.embeddings[name] = evaluate_model(model, processor, self.pairs, **self.how)
        if self.train_pairs is None:
            return
        train = embed_pairs(model, processor, self.train_pairs, **self.how)
        if self.settings.centering:
            centered = f"{name}, centered"
            self.embeddings[centered] = post_hoc_centering(self.embeddings[name], modality_means(train))
            self.results[centered] = evaluate_embeddings(self.embeddings[centered])
        if self.settings.nearest_caption:
            self.add_nearest(name, model, processor, self.embeddings[name], train)

    def add_captioner(
        self, name: str, model: GapClosedClipForConditionalGeneration, processor: GapClosedClipProcessor
    ) -> None:
        beams = {"num_beams": self.settings.num_beams} if self.settings.num_beams else {}
        self.results[name], self.captions[name] = evaluate_captioner(
            model, processor, self.pairs, score=not self.settings.scorer, **self.how, **beams
        )
        if self.settings.nearest_caption:
            encoder = model.gap_closed_clip
            embeddings, train = (
                embed_pairs(encoder, processor, p, **self.how) for p in (self.pairs, self.train_pairs)
            )
            self.add_nearest(name, encoder, processor, embeddings, train)

    def add_nearest(
        self,
        name: str,
        model: GapClosedClipModel,
        processor: GapClosedClipProcessor,
        embeddings: PairEmbeddings,
        train: PairEmbeddings,
    ) -> None:
        nearest = f"{name}, nearest caption"
        captions = self.captions[nearest] = nearest_captions(embeddings, train)
        self.results[nearest] = evaluate_captions(captions)
        if not self.settings.scorer:
            limit = self.config.data.max_caption_tokens
            images = embeddings.by_image()
            self.results[nearest] |= score_captions(model, processor, captions, images, max_length=limit)

    def score_all(self) -> None:
        """CLIPScore of all captions by one model."""
        scorer, processor = load_checkpoint(self.settings.scorer)
        images = embed_pairs(scorer.to(self.device), processor, self.pairs, **self.how).by_image()
        for name, captions in self.captions.items():
            limit = self.config.data.max_caption_tokens
            self.results[name] |= score_captions(scorer, processor, captions, images, max_length=limit)


def run(words: list[str]) -> None:
    models, settings, overrides = parse(words)
    for model in [*models, *filter(None, [settings.scorer])]:
        check_model_name(model)  # all of them, before the first is evaluated
    check_writable(settings.output, "output")
    evaluation = Evaluation(models, settings, data_config(models, overrides))
    table = evaluation.run()
    number = f"{len(evaluation.pairs)} pairs, " if isinstance(evaluation.pairs, Dataset) else ""
    print(f"\n{number}split '{evaluation.split}' of '{evaluation.config.data.source}'\n\n{table}\n")
    print(f"metrics.json, metrics.md and the figures are in {settings.output}")


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
