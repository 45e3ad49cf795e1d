"""Captions that decoders write in each trained space, on frozen encoders: learned from images, and from text alone."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import digest_of_start, run_once, slug
from evidence_compare import caption_comparisons
from evidence_measure import rounded
from evidence_plan import IMAGE, NOISELESS, OWN, TEXT, Plan
from evidence_runs import Runs
from evidence_store import Store

from gap_closed_clip import GapClosedClipForConditionalGeneration, GapClosedClipProcessor
from gap_closed_clip.checkpoint import load_captioner, load_checkpoint
from gap_closed_clip.data import load_checked_pairs
from gap_closed_clip.evaluation import (
    Captions,
    embed_pairs,
    evaluate_captions,
    generate_captions,
    modality_means,
    nearest_captions,
    plot_captions,
    score_captions,
)
from gap_closed_clip.evaluation.embed import first_rows
from gap_closed_clip.evaluation.statistics import joined_groups
from gap_closed_clip.metrics.caption_cider import scores_of_images
from gap_closed_clip.training import RunConfig


NEAREST, NEAREST_SHIFTED = "nearest caption", "nearest caption, mean shift"
IMAGE_TRAINED = "image-trained"
TEXT_ONLY, TEXT_SHIFTED, CEILING = "text-only", "text-only, mean shift", "text-only, from the true caption"
NO_NOISE, NO_NOISE_SHIFTED = "text-only, no noise", "text-only, no noise, mean shift"
DRAWN = (NEAREST, IMAGE_TRAINED, TEXT_SHIFTED)  # in the figure


@dataclass
class CaptionPairs:
    """The pairs whose images get captions, those of the training, and how both are embedded."""

    test: Any
    train: Any
    max_length: int | None
    window: tuple[float, float] | None

    def embed(self, model, processor, pairs):
        return embed_pairs(model, processor, pairs, max_length=self.max_length, window=self.window)


class CaptionStudy:
    """
    Trains the decoders of a plan, and measures what they write.

    Args:
        plan: one with `captions`.
        runs: of its encoders.
        results: what was found before, a file for each encoder.
        budgets: of the encoders' methods, by kind: the last one's encoders are taken.
    """

    def __init__(self, plan: Plan, runs: Runs, results: Store, budgets: Mapping[str, Any]):
        if plan.captions is None:
            raise ValueError("The plan asks for no captions.")
        self.plan, self.captions, self.runs, self.results = plan, plan.captions, runs, results
        self.kind, self.budgets = list(budgets.items())[-1]
        self.methods = self.captions.methods or tuple(plan.trained)
        self.seeds = self.captions.seeds or plan.seeds
        self.seconds = 0.0
        self.first: dict[str, dict[str, Any]] = {}  # by method, what was found with the first seed
        results.total = len(self.methods) * len(self.seeds)

    def found(self) -> dict[str, Any]:
        """Settings, the metrics of each run by kind of captions, and comparisons with the baseline's."""
        runs = []
        for seed in self.seeds:
            for method in self.methods:
                found = self.of_encoder(method, seed)
                runs.append({"method": method, "budget": self.kind, "seed": seed, **found})
                self.first.setdefault(method, found)
        runs.sort(key=lambda run: (self.methods.index(run["method"]), self.seeds.index(run["seed"])))
        return {
            "settings": self.settings(len(runs[0]["image_ids"])),
            "runs": [{name: run[name] for name in ("method", "budget", "seed", "metrics")} for run in runs],
            "comparisons": caption_comparisons(runs, self.plan.baseline, self.groups(runs[0]["image_ids"])),
        }

    def settings(self, number: int) -> dict[str, Any]:
        """What the report says of the decoders and of the images, `number` of them."""
        config, captions = self.decoder_config(TEXT, Path("encoder"), self.seeds[0]), self.captions
        names = ("num_train_epochs", "per_device_train_batch_size", "learning_rate")
        return {
            "config": [Path(file).name for file in captions.config],
            "words": list(captions.words),
            "precision": "bfloat16 where that is safe" if config.training_arguments().bf16 else "float32",
            **{name: config.training[name] for name in names if name in config.training},
            "max_caption_tokens": config.data.max_caption_tokens,
            "cache_images": config.data.cache_images,
            "noise": config.captioning.config_fields()["embedding_noise"],
            "without_noise": captions.without_noise,
            "scorer": captions.scorer,
            "scorer_seed": captions.scorer_seed,
            "split": self.runs.config.training["final_split"],
            "images": number,
        }

    def groups(self, image_ids: list[str]) -> np.ndarray:
        """(N,) numbers of the images: those that share a case or a caption have the same."""
        columns = self.runs.columns
        groups = joined_groups(self.runs.groups, columns.image_ids, columns.captions)
        by_image = dict(zip(columns.image_ids, groups, strict=True))
        return np.array([by_image[image_id] for image_id in image_ids])

    def budget_of(self, method: str) -> dict[str, Any]:
        """The budget of a method's encoders; of one that the plan does not train, the baseline's."""
        if self.kind != OWN:
            return dict(self.budgets)
        return dict(self.budgets.get(method, self.budgets[self.plan.baseline]))

    def of_encoder(self, method: str, seed: int) -> dict[str, Any]:
        """Captions with one encoder by kind, their metrics, and each one's CIDEr-D; the images and references."""
        kinds = [IMAGE, TEXT] + ([NOISELESS] if self.captions.without_noise else [])
        encoders = [(method, seed), (self.captions.scorer, self.captions.scorer_seed)]
        about = {
            "encoders": [self._encoder_settings(*each) for each in encoders],
            "decoders": [_but_for_folders(self.decoder_config(kind, Path("encoder"), seed)) for kind in kinds],
            "pairs": self.runs.pairs_digest,
        }

        def compute(_: Path) -> dict[str, Any]:
            pairs, device = self.pairs, self.runs.inputs.args.device
            scorer, encoder = (
                self.runs.model_folder(name, self.budget_of(name), seed) for name, seed in encoders[::-1]
            )
            decoders = {kind: self.decoder(kind, encoder, method, seed) for kind in kinds}
            return _measured(write_captions(encoder, decoders, pairs, device), scorer, pairs, device)

        content = self.results.get(f"captions, {method}, seed {seed}", about, compute)
        self.seconds += content["seconds"]
        return content["result"]

    def _encoder_settings(self, method: str, seed: int) -> dict[str, Any]:
        budget = self.budget_of(method)
        config = self.plan.run_config(method, budget, seed)
        start: Any = digest_of_start(config) or []
        if self.plan.start:
            start = _but_for_folders(self.plan.start_config(method, seed))
        return {**_but_for_folders(config), "start": start}

    def decoder_config(self, kind: str, encoder: Path, seed: int) -> RunConfig:
        """The configuration of a decoder of a kind on the encoder in a folder; its captions are measured later."""
        settings = {
            "model.checkpoint": str(encoder),
            "training.seed": seed,
            "training.final_split": "none",
            "eval_strategy": "no",
            "report_to": "none",
        }
        words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        return self.captions.decoder_config(kind, self.data_words, words)

    @cached_property
    def data_words(self) -> list[str]:
        """
        The encoders' section `data` as overrides for the decoders: the same pairs. How images are kept is the
        decoders' own, and so is what is said of phantoms where there are none.
        """
        data = self.runs.config.data
        with_phantoms = any(own.source == "phantoms" for own in data.sources().values())
        given = [*self.runs.config.to_dict()["data"], *self.captions.decoder_config(TEXT).to_dict()["data"]]
        names = [
            name
            for name in dict.fromkeys(given)
            if name != "cache_images" and (with_phantoms or not name.startswith("phantom_"))
        ]
        return [f"data.{name}={json.dumps(getattr(data, name))}" for name in names]

    def decoder(self, kind: str, encoder: Path, method: str, seed: int) -> Path:
        """The folder of a decoder, which is trained if it has not been before."""
        folder = self.runs.folder / slug(f"captions {kind} {method} seed{seed}")
        run_once(self.decoder_config(kind, encoder, seed), folder, self.runs.pairs_digest)
        return folder

    @cached_property
    def pairs(self) -> CaptionPairs:
        """The pairs as the decoders' configuration reads them."""
        data = self.decoder_config(TEXT, Path("encoder"), self.seeds[0]).data
        split = self.runs.config.training["final_split"]
        test, train = (load_checked_pairs(data, each) for each in (split, "train"))
        if set(test["image_id"]) != set(self.runs.columns.image_ids):
            raise ValueError("captions: the decoders' configuration names other images than the plan's.")
        return CaptionPairs(test, train, data.max_caption_tokens, data.window)

    def draw(self, path: Path) -> None:
        """Draws some images, and their captions with the first and the last encoder."""
        written = {}
        for method in dict.fromkeys((self.methods[0], self.methods[-1])):
            found = self.first[method]
            for kind in DRAWN:
                texts = found["captions"][kind]
                written[f"{method}, {kind}"] = Captions(found["image_ids"], texts, found["references"])
        plot_captions(written, self.runs.test_pairs, path)


def _but_for_folders(config: RunConfig) -> dict[str, Any]:
    """The settings without folders, which numbers don't depend on."""
    found = config.to_dict()
    for section, name in (("training", "output_dir"), ("data", "feature_cache"), ("model", "checkpoint")):
        found[section].pop(name, None)
    return found


def write_captions(
    encoder: Path, decoders: Mapping[str, Path], pairs: CaptionPairs, device: torch.device | str
) -> dict[str, Captions]:
    """Captions of the images by every method with one encoder, by kind."""
    clip_model, processor = load_checkpoint(encoder)
    clip_model.to(device)
    test, train = (pairs.embed(clip_model, processor, rows) for rows in (pairs.test, pairs.train))
    image_mean, text_mean = modality_means(train)
    shift = text_mean - image_mean
    captions = {NEAREST: nearest_captions(test, train), NEAREST_SHIFTED: nearest_captions(test, train, shift)}
    model, processor = load_captioner(decoders[IMAGE])
    captions[IMAGE_TRAINED] = generate_captions(model.to(device), processor, pairs.test, window=pairs.window)
    rows = list(first_rows(test.image_ids))
    images, true_captions = test.image_embeds[rows], test.text_embeds[rows]
    from_embeddings = {TEXT: {TEXT_ONLY: images, TEXT_SHIFTED: images + shift, CEILING: true_captions}}
    if NOISELESS in decoders:
        from_embeddings[NOISELESS] = {NO_NOISE: images, NO_NOISE_SHIFTED: images + shift}
    for kind, embeds_by_name in from_embeddings.items():
        model, processor = load_captioner(decoders[kind])
        model.to(device)
        for name, embeds in embeds_by_name.items():
            captions[name] = replace(captions[NEAREST], captions=write_from(model, processor, embeds))
    return captions


@torch.no_grad()
def write_from(
    model: GapClosedClipForConditionalGeneration,
    processor: GapClosedClipProcessor,
    embeds: np.ndarray,
    batch: int = 64,
) -> list[str]:
    """A caption from each of the embeddings (N, D), which are made unit vectors first."""
    model.eval()
    unit = torch.nn.functional.normalize(torch.from_numpy(embeds).float(), dim=-1).to(model.device)
    tokens = [model.generate(shared_embeds=part) for part in unit.split(batch)]
    return [text for part in tokens for text in processor.batch_decode(part, skip_special_tokens=True)]


def _measured(
    captions: Mapping[str, Captions], scorer: Path, pairs: CaptionPairs, device: torch.device | str
) -> dict[str, Any]:
    """The metrics of each kind of captions, CLIPScore by the encoder in the folder `scorer`, and all texts."""
    model, processor = load_checkpoint(scorer)
    images = pairs.embed(model.to(device), processor, pairs.test).by_image()
    metrics, cider = {}, {}
    for name, written in captions.items():
        found = score_captions(model, processor, written, images, max_length=pairs.max_length)
        metrics[name] = evaluate_captions(written) | found
        cider[name] = scores_of_images(written.captions, written.references)
    first = next(iter(captions.values()))
    texts = {name: written.captions for name, written in captions.items()}
    same = {"image_ids": first.image_ids, "references": first.references}
    return {"metrics": rounded(metrics), "cider_d": cider, "captions": texts, **same}
