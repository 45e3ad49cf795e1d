"""The trainings behind `evidence.py`: heads on features that frozen towers gave once, or towers that train."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from itertools import product
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import cases, digest_of_pairs, run_once, slug
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from evidence_cases import check_cases
from evidence_checks import check_fixed
from evidence_plan import Plan
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from gap_closed_clip import GapClosedClipConfig, GapClosedClipModel
from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.data.features import FeaturePairs
from gap_closed_clip.data.folds import assign_folds, join_groups
from gap_closed_clip.evaluation import PairEmbeddings, embed_pairs
from gap_closed_clip.evaluation.pair_embeddings import columns_of
from gap_closed_clip.training import GapClosedClipTrainer, RecenterCallback, RunConfig, load_config
from gap_closed_clip.training.build import build, feature_settings
from gap_closed_clip.training.precompute import embed_pairs_once
from gap_closed_clip.training.preflight import preflight


CUTOFF = 10  # of the recall that methods are compared by
FEW_CASES = 20
POINTS = 40  # of a training's curve
FITTED_ON = 2000  # training pairs at most that a post-hoc method is fitted on, where towers have to run for each
# What asks for evaluations during training, of which these trainings have none.
DECIDES = ("eval_on_start", "load_best_model_at_end", "early_stopping_patience")
Curve = list[list[float]]  # points [progress from 0 to 1, modality gap, true-pair cosine] of training batches


@dataclass
class Trained:
    """
    What a training gave.

    Args:
        test: embeddings of the held-out pairs.
        train: of the training pairs, without augmentation; None where nothing is fitted on them.
        prompts: (T, C, D) unit vectors: the prompts of each template for each label, in the order of `classes`.
        logit_scale: 1 / temperature.
        curve: how gap and true-pair cosine went.
    """

    test: PairEmbeddings
    train: PairEmbeddings | None
    prompts: np.ndarray
    logit_scale: float
    curve: Curve


class NoTower(torch.nn.Module):
    """In place of a tower whose features are there. It has no weights and can't be called."""

    def __init__(self, tower: PreTrainedModel):
        super().__init__()
        self.config = tower.config


class Runs:
    """
    Trains the plan's methods on the plan's pairs.

    Args:
        plan: what is asked for.
        folder: of what has to be kept between runs of the script.

    Raises:
        ValueError, OSError: whatever is wrong with the configuration or the pairs.
    """

    folder_settings: dict[str, Any] = {}  # of the trainings that leave a model folder
    folds_digest = ""  # of how the training cases are cut into folds

    def __init__(self, plan: Plan, folder: Path):
        self.plan, self.folder = plan, folder
        self.config = config_of_pairs(plan)
        if self.config.training.get("final_split") == "none":
            raise ValueError("training.final_split is none: name the split that the methods are compared on.")
        self._temporary = tempfile.TemporaryDirectory()
        quiet = {"eval_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        without_evaluations(self.config).training.update(quiet, output_dir=self._temporary.name)
        self.inputs = preflight(self.config)
        self.config.training["final_split"] = self.inputs.args.final_split  # where it says nothing, the default
        self.test_pairs, self.train_pairs = self.inputs.final_pairs, self.inputs.train_pairs
        self.pairs_digest = digest_of_pairs(self.train_pairs, self.test_pairs)
        self.columns = columns_of(self.test_pairs)
        self.classes = sorted({label for label in self.columns.labels if label})
        self.groups = cases(self.test_pairs, self.config.data)
        if len(plan.known_methods) > 1:
            check_cases(self.columns, self.groups)

    def describe(self) -> list[str]:
        """What was found, in sentences."""
        title, counts = self.config.data.title.replace("'", ""), {}
        for split, pairs in (("training", self.train_pairs), (self.config.training["final_split"], self.test_pairs)):
            columns = columns_of(pairs)
            counts[split] = (
                f"{len(pairs):,} {split} pairs ({len({*columns.image_ids}):,} images, "
                f"{len({*columns.captions}):,} captions)"
            )
        labelled = sum(bool(label) for label in self.columns.labels)
        labels = (
            f"{labelled:,} of the held-out pairs have a label, {len(self.classes)} different ones."
            if labelled
            else "No pair has a label, so tasks of labels are left out."
        )
        return [
            f"{title}: {' and '.join(counts.values())}.",
            labels,
            f"The rows of a case stay together: {len(set(self.groups)):,} cases are held out.",
            *self._warnings(),
        ]

    def _warnings(self) -> list[str]:
        """What makes the held-out pairs tell little, in sentences."""
        found = []
        gallery = max(len({*self.columns.image_ids}), len({*self.columns.captions}))
        if gallery <= CUTOFF:
            found.append(
                f"R@{CUTOFF} is 100% for every method, as no more than {gallery} images or captions are held out: it "
                "tells nothing here, nor do budgets that were chosen by it."
            )
        if len(set(self.groups)) < FEW_CASES:
            found.append(
                f"That is few: below {FEW_CASES} cases, intervals are wide and tests find large differences alone."
            )
        known = {*columns_of(self.train_pairs).captions}
        seen = sum(caption in known for caption in self.columns.captions)
        if seen:
            found.append(f"{seen:,} of the held-out captions are captions of training pairs, too.")
        return found

    def model_folder(self, method: str, budget: dict[str, Any], seed: int) -> Path:
        """The model folder of one training of the whole model, which is made if it is not there."""
        words = " ".join(f"{key} {value}" for key, value in budget.items())
        if self.plan.start:
            start = self.folder / slug(f"{method} start seed{seed}")
            run_once(self.plan.start_config(method, seed), start, self.pairs_digest)
            budget = {**budget, "checkpoint": start}
        config = self.plan.run_config(method, budget, seed)
        if self.folder_settings.get("eval_strategy") == "no":
            without_evaluations(config)
        config.training.update(self.folder_settings)
        folder = self.folder / slug(f"{method} {words} seed{seed}")
        run_once(config, folder, self.pairs_digest)
        return folder

    def prompts(self) -> list[str]:
        """All prompts, template by template."""
        return [template.format(label) for template in self.plan.templates for label in self.classes]

    def _by_template(self, vectors: np.ndarray) -> np.ndarray:
        return vectors.reshape(len(self.plan.templates), len(self.classes), -1)


class FeatureRuns(Runs):
    """Trainings of heads, in this process: the frozen towers have run before, once for each image and caption."""

    folder_settings = {"eval_strategy": "no", "report_to": "none"}

    def __init__(self, plan: Plan, folder: Path):
        check_fixed(plan)
        super().__init__(plan, folder)
        self.folds = self._cut() if plan.grid and not plan.own else np.zeros(0, int)
        self.folds_digest = hashlib.blake2b(self.folds.tobytes(), digest_size=8).hexdigest()
        set_seed(self.config.training["seed"])  # of towers that start at random
        self.parts = build(self.config, self.inputs)
        if not self.parts.towers_have_run:
            raise ValueError("Not all towers are frozen: set model.freeze_vision=true and model.freeze_text=true.")
        collator, args = self.parts.pair_collator, self.inputs.args
        settings = feature_settings(self.config, args)
        self.test = embed_pairs_once(self.test_pairs, self.parts.encoder, collator, settings, vary=False)
        encoder = self.parts.encoder.eval()
        self.pooled_prompts = None
        if self.classes:
            with torch.inference_mode():
                tokens = {name: value.to(encoder.device) for name, value in collator.tokenize(self.prompts()).items()}
                self.pooled_prompts = encoder.encode_text(**tokens).pooler_output.clone()

    def _cut(self) -> np.ndarray:
        """(N,) the fold of each training pair; cases that share an image are one."""
        groups = join_groups(cases(self.train_pairs, self.config.data), self.train_pairs["image_id"])
        if (number := len({*groups})) < self.plan.num_folds:
            raise ValueError(
                f"{self.plan.name}: num_folds is {self.plan.num_folds}, but the training pairs are of {number} cases "
                "(those that share an image are one): lower it, or give `own` budgets or `grid: {}`."
            )
        return np.array(assign_folds(groups, self.plan.num_folds))

    def train(
        self, method: str, budget: dict[str, Any], seed: int, fold: int | None = None, embed_train: bool = False
    ) -> Trained:
        """
        One training of new heads.

        Args:
            budget: values of the configuration's fields.
            fold: of the training cases, to hold out instead of the held-out pairs.
            embed_train: whether the training pairs are embedded as well.
        """
        config = self.plan.run_config(method, budget, seed)
        pairs, held_out = self.parts.train_pairs, self.test
        if fold is not None:
            pairs = self.parts.train_pairs.select(np.flatnonzero(self.folds != fold))
            held_out = self.parts.train_pairs.select(np.flatnonzero(self.folds == fold)).plain()
        set_seed(seed)
        model = self._new_model(config)
        curve = self._fit(model, config, pairs)
        model.eval()  # whatever goes through in training moves the centers
        train = self._embed(model, self.parts.train_pairs.plain()) if embed_train else None
        with torch.inference_mode():
            prompts = np.zeros((len(self.plan.templates), 0, model.config.projection_dim))
            if self.classes:
                pooled = self.pooled_prompts.to(model.device)
                vectors = model.get_text_features(pooled_text=pooled).pooler_output
                prompts = self._by_template(torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy())
            scale = float(model.temperature())
        return Trained(self._embed(model, held_out), train, prompts, scale, curve)

    def _new_model(self, config: RunConfig) -> GapClosedClipModel:
        encoder = self.parts.encoder
        model_config = GapClosedClipConfig.from_dict({**encoder.config.to_dict(), **config.model.config})
        model = GapClosedClipModel(model_config, vision_model=encoder.vision_model, text_model=encoder.text_model)
        # What the towers gave is there: a Trainer would walk through their hundreds of modules in every step.
        model.vision_model, model.text_model = NoTower(encoder.vision_model), NoTower(encoder.text_model)
        return model

    def _fit(self, model: GapClosedClipModel, config: RunConfig, pairs: FeaturePairs) -> Curve:
        # One that was given for another source was lowered before, for few pairs; that of a budget is its own.
        lowered = "per_device_train_batch_size" in config.inherited
        batch = (self.config if lowered else config).training.get("per_device_train_batch_size", 8)
        batch = min(batch, 2 ** (len(pairs).bit_length() - 1))  # a fold has fewer still
        steps = max(len(pairs) // batch, 1) * config.training.get("num_train_epochs", 3)
        without_evaluations(config).training.update(
            output_dir=self._temporary.name, per_device_train_batch_size=batch, eval_strategy="no",
            save_strategy="no", logging_strategy="steps", logging_steps=max(round(steps / POINTS), 1),
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        args = config.training_arguments()
        collator = self.parts.pair_collator
        loader = DataLoader(pairs.plain(), args.eval_batch_size, collate_fn=collator)
        trainer = GapClosedClipTrainer(
            model=model, args=args, train_dataset=pairs, data_collator=collator,
            callbacks=[RecenterCallback(loader, at_evaluations=False)],
        )  # fmt: skip
        with quiet_log():
            trainer.train()
        return curve_of(trainer.state.log_history, trainer.state.max_steps)

    @torch.inference_mode()
    def _embed(self, model: GapClosedClipModel, pairs: FeaturePairs) -> PairEmbeddings:
        model.eval()
        loader = DataLoader(pairs, self.inputs.args.eval_batch_size, collate_fn=self.parts.pair_collator)
        outputs = [model(**{name: value.to(model.device) for name, value in batch.items()}) for batch in loader]
        images, texts = (
            torch.cat([output[name] for output in outputs]).float().cpu().numpy()
            for name in ("image_embeds", "text_embeds")
        )
        return PairEmbeddings(images, texts, *columns_of(pairs.pairs)[:4])


class FolderRuns(Runs):
    """
    Trainings of whole towers: each leaves a model folder, which the next run of the script finds. With `plan.start`
    each starts from a model of that first stage.
    """

    def train(
        self, method: str, budget: dict[str, Any], seed: int, fold: int | None = None, embed_train: bool = False
    ) -> Trained:
        """As `FeatureRuns.train`; folds are not trained."""
        folder = self.model_folder(method, budget, seed)
        model, processor = load_checkpoint(folder)
        model.to(self.inputs.args.device)
        settings = {"max_length": self.config.data.max_caption_tokens, "batch_size": 64}
        test = embed_pairs(model, processor, self.test_pairs, **settings)
        train = None
        if embed_train:
            rows = np.linspace(0, len(self.train_pairs) - 1, min(len(self.train_pairs), FITTED_ON)).astype(int)
            train = embed_pairs(model, processor, self.train_pairs.select(np.unique(rows)), **settings)
        prompts = np.zeros((len(self.plan.templates), 0, model.config.projection_dim))
        if self.classes:
            tokens = processor(text=self.prompts(), return_tensors="pt", padding=True, truncation=True)
            with torch.inference_mode():
                vectors = model.eval().get_text_features(**tokens.to(model.device)).pooler_output
            prompts = self._by_template(torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy())
        return Trained(test, train, prompts, float(model.temperature().detach()), curve_of_folder(folder))


class GivenRuns(FolderRuns):
    """
    Models that are there (`plan.folders`): nothing is trained.

    Raises:
        FileNotFoundError: one of them is missing; nothing is measured then.
    """

    def __init__(self, plan: Plan, folder: Path):
        for method, seed in product(plan.trained, plan.seeds):
            path = plan.model_folder(method, seed)
            if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
                raise FileNotFoundError(f"{plan.name}, folders, {method}: there is no model in {path}.")
        super().__init__(plan, folder)

    def model_folder(self, method: str, budget: dict[str, Any], seed: int) -> Path:
        """As `Runs.model_folder`; a budget changes nothing."""
        return self.plan.model_folder(method, seed)


def config_of_pairs(plan: Plan) -> RunConfig:
    """
    The configuration that the plan's pairs are read by. With `plan.start` it trains what the first stage trains, as
    each training starts from a folder of its own, which is not there yet.
    """
    config = plan.run_config(plan.baseline, {}, seed=0)
    if not plan.start:
        return config
    first = plan.start_config(plan.baseline, seed=0)
    training = {**config.training, "tower_learning_rate": first.training.get("tower_learning_rate")}
    return replace(config, model=first.model, lora=first.lora, training=training)


def without_evaluations(config: RunConfig) -> RunConfig:
    """The configuration itself, without what would ask for evaluations during training."""
    for name in DECIDES:
        config.training.pop(name, None)
    return config


def curve_of(log: list[dict[str, Any]], steps: int) -> Curve:
    """The curve that a Trainer's log holds."""
    return [
        [entry["step"] / max(steps, 1), entry["modality_gap"], entry["true_pair_cosine"]]
        for entry in log
        if "modality_gap" in entry and "true_pair_cosine" in entry
    ]


def curve_of_folder(folder: Path) -> Curve:
    """The curve of a finished run, from its logs for TensorBoard; empty where it has left none."""
    paths = sorted((folder / "runs").glob("**/events.*"))
    if not paths:
        return []
    events = EventAccumulator(str(paths[-1]), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in ("train/modality_gap", "train/true_pair_cosine") if tag in events.Tags()["scalars"]]
    if len(tags) < 2:
        return []
    gaps, cosines = ({event.step: event.value for event in events.Scalars(tag)} for tag in tags)
    steps = sorted(set(gaps) & set(cosines))
    return [[step / steps[-1], gaps[step], cosines[step]] for step in steps]


@contextmanager
def quiet_log() -> Iterator[None]:
    """Keeps a Trainer from telling of itself: of hundreds of trainings nobody reads it."""
    own, were_hidden = getLogger("gap_closed_clip"), are_progress_bars_disabled()
    verbosity, level = logging.get_verbosity(), own.level
    logging.set_verbosity_error()
    own.setLevel(ERROR)
    disable_progress_bars()
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        logging.set_verbosity(verbosity)
        own.setLevel(level)
        if not were_hidden:
            enable_progress_bars()


def open_runs(plan: Plan, folder: Path) -> Runs:
    """The way of training that the plan's towers need."""
    if plan.folders:
        return GivenRuns(plan, folder)
    config = load_config(plan.config, plan.words)
    frozen = config.model.freeze_vision and config.model.freeze_text and config.lora is None
    return FeatureRuns(plan, folder) if frozen else FolderRuns(plan, folder)
