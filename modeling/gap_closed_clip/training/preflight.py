"""Finds whatever can be known to be wrong with a run, before hours of training."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import datasets
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..data import DataArguments, check_sizes_of_sources, load_checked_pairs, sources_of
from ..disk import writing
from ..evaluation import check_references, load_metric, metric_names
from ..messages import did_you_mean
from .argument_checks import check_batch_size, check_gathering, check_order
from .arguments import GapClosedTrainingArguments
from .choices import choose_held_out, fitting_batch_size, lower_batch_size
from .config import RunConfig
from .encoder import check_towers
from .output_folder import checkpoint_to_resume
from .resume import check_settings, settings_of
from .seen_pairs import seen_rows, shared_cases, shared_rows, told_cases, told_seen, told_shared


logger = logging.get_logger(__name__)


@dataclass
class RunInputs:
    """
    What a run starts from.

    Args:
        args: the `TrainingArguments`.
        checkpoint: folder of the checkpoint to go on from, or None.
        train_pairs: the checked training pairs.
        held_out: {split: checked pairs} of the evaluations during and after training.
        seen: {split: how many of them have an image that this training, or that of `model.checkpoint`, has as well}.
    """

    args: GapClosedTrainingArguments
    checkpoint: str | None
    train_pairs: Dataset | IterableDataset
    held_out: dict[str, Dataset | IterableDataset]
    seen: dict[str, int] = field(default_factory=dict)

    @property
    def streaming(self) -> bool:
        """Whether the training pairs are read as they are needed."""
        return isinstance(self.train_pairs, IterableDataset)

    @property
    def num_train_pairs(self) -> int | None:
        """Number of training pairs; None for a stream, which does not know it."""
        return None if self.streaming else len(self.train_pairs)

    @property
    def eval_pairs(self) -> Dataset | IterableDataset | None:
        """Pairs of the evaluations during training; None where there are no evaluations."""
        return self.held_out.get("validation") if self.args.eval_strategy != "no" else None

    @property
    def final_pairs(self) -> Dataset | IterableDataset | None:
        """Pairs of the evaluation after training; None where there is none."""
        return self.held_out.get(self.args.final_split)

    def captions(self) -> Iterable[str]:
        """The captions of the training pairs."""
        return (row["caption"] for row in self.train_pairs) if self.streaming else self.train_pairs["caption"]


def preflight(config: RunConfig) -> RunInputs:
    """
    Checks devices, towers, the output folder, the cache of metrics and data, and loads the pairs. What the
    configuration leaves open and the pairs decide (`choices.py`) is noted in it.

    Raises:
        ValueError, OSError: whatever is wrong with the configuration, the data or the output folder.
    """
    args = config.training_arguments()
    # The Trainer would push every half-trained state, and its pickled arguments. A finished folder is published whole.
    args.push_to_hub = False
    check_devices(args)
    captioning = config.captioning
    contrastive = captioning is None or captioning.encoders == "joint"
    if contrastive:
        check_batch_size(args)
    if captioning is None:
        check_order(args)
    if captioning is None or args.predict_with_generate:
        check_gathering(args)
    check_towers(config.model, config.data.all_modalities)
    checkpoint = checkpoint_to_resume(args, config)
    load_metric("modality_gap")  # what the evaluation after training would fail by
    # `datasets` caches on disk what it downloads and converts.
    cached = writing(datasets.config.HF_DATASETS_CACHE, "What `datasets` caches", None, "Or set HF_DATASETS_CACHE.")
    with args.main_process_first(desc="loading pairs"), cached:
        choose_held_out(config, args)
        train_pairs = load_training_pairs(config, args, least=2 if contrastive else 1)
        splits = {args.final_split} | ({"validation"} if args.eval_strategy != "no" else set())
        held_out = {split: load_held_out_pairs(split, config.data, args) for split in splits - {"none"}}
        inputs = RunInputs(args, checkpoint, train_pairs, held_out, _count_seen(config, train_pairs, held_out, args))
    if checkpoint is not None:
        check_settings(checkpoint, settings_of(config, args, train_pairs))
    if captioning is None:
        check_best_metric(inputs, config.data)
    else:
        check_captions(inputs, embedded_before=captioning.train_on == "text")
    return inputs


def _count_seen(
    config: RunConfig,
    train_pairs: Dataset | IterableDataset,
    held_out: dict[str, Dataset | IterableDataset],
    args: GapClosedTrainingArguments,
) -> dict[str, int]:
    """
    {split: how many of its pairs have an image that is among the training pairs, or that the checkpoint was trained
    on}, each with a warning; without those of none. Pairs of cases that training pairs are of have a warning alone.
    """
    checkpoint, title = config.model.checkpoint, config.data.title
    seen: dict[str, int] = {}
    for split, pairs in held_out.items():
        told, rows = [], set()
        if checkpoint is not None and (rows := seen_rows(pairs, config.data, split, checkpoint)):
            told.append(told_seen(len(rows), title, checkpoint))
        if split != "train" and isinstance(pairs, Dataset) and isinstance(train_pairs, Dataset):
            if shared := shared_rows(pairs, train_pairs):
                told.append(told_shared(len(shared), len(pairs), split, title))
                rows |= shared
            if cases := shared_cases(pairs, train_pairs, config.data):
                told.append(told_cases(len(cases), len(pairs), split, config.data))
        if rows:
            seen[split] = len(rows)
        for sentence in told if args.process_index == 0 else ():
            logger.warning(sentence)
    return seen


def check_best_metric(inputs: RunInputs, data: DataArguments) -> None:
    """
    Checks that the evaluations during training will have the metric that chooses the best model. (Those of a stream
    are not known before.)

    Raises:
        ValueError: they will not; with the nearest name.
    """
    args, pairs = inputs.args, inputs.eval_pairs
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if name == "loss" or not isinstance(pairs, Dataset):
        return
    modalities = {each: columns for each, columns in data.all_modalities.items() if each in pairs.column_names}
    # Which metrics a field has, all of its values decide.
    fields = [(each, field) for each, columns in modalities.items() if isinstance(columns, list) for field in columns]
    if any(f"_{each}[{field}]" in name for each, field in fields):
        return
    known = metric_names(pairs, args.eval_grouping, list(modalities))
    if name not in known:
        hint = did_you_mean(name, known, otherwise=".")
        raise ValueError(f"training.metric_for_best_model: the evaluations have no {name!r}{hint}")


def check_captions(inputs: RunInputs, embedded_before: bool) -> None:
    """
    Checks the pairs of a captioner.

    Args:
        embedded_before: whether all training captions are embedded before training.

    Raises:
        ValueError: a stream, which can't be embedded before; a held-out image whose captions have no word.
    """
    if inputs.streaming and embedded_before:
        raise ValueError(
            "data.streaming and captioning.train_on=text: every caption is embedded before training, so the set has "
            "to be there as a whole. Leave streaming off."
        )
    for split, pairs in inputs.held_out.items():
        if isinstance(pairs, Dataset):
            check_references(pairs, split)


def check_devices(args: GapClosedTrainingArguments) -> None:
    """
    Checks that the pairs of a step can be compared with one another on the devices that there are.

    Raises:
        ValueError: several GPUs in one process, or a contrastive batch that they can't share.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs and would split each batch among them (torch.nn.DataParallel), so "
            "that no pair is compared with those of another GPU. Start one process for each, `accelerate launch -m "
            "gap_closed_clip_cli train ...`, or set CUDA_VISIBLE_DEVICES=0."
        )
    _ = args.num_micro_batches  # checks the sizes


def load_training_pairs(
    config: RunConfig, args: GapClosedTrainingArguments, least: int = 2
) -> Dataset | IterableDataset:
    """
    Loads and checks the training pairs. A batch size that was given for another source is lowered where it has to be.

    Args:
        least: the smallest batch that can be trained on: 1 where pairs are not compared with one another.

    Raises:
        ValueError: fewer pairs than one batch (of a source, where batches don't mix them), a batch of fewer than
            `least`, streaming without `max_steps`, with unmixed batches, or with evaluations by several processes.
    """
    data = config.data
    if args.global_batch_size < least:
        raise ValueError(
            "training.per_device_train_batch_size is 1: a pair needs other pairs to be told apart from. Use 2 or "
            "more; contrastive learning wants as many as fit."
        )
    if data.streaming and not args.mix_sources and len(data.sources()) > 1:
        raise ValueError(
            "training.mix_sources is false and data.streaming is true: a stream takes a row of each source in turn, "
            "so that batches mix them. Leave one of the two out."
        )
    if data.streaming and args.world_size > 1 and args.eval_strategy != "no":
        raise ValueError(
            f"data.streaming is true and training.eval_strategy is {args.eval_strategy.value}: several processes "
            "can't share the evaluation of a stream, whose length they do not know. Set eval_strategy=no; the "
            "evaluation after training is by the first process alone."
        )
    pairs = load_checked_pairs(data, "train", args.dataloader_num_workers)
    if isinstance(pairs, IterableDataset):
        if args.max_steps <= 0:
            raise ValueError("data.streaming has no known length: set training.max_steps.")
        return pairs
    lower_batch_size(config, args, len(pairs))
    if len(pairs) < args.global_batch_size:
        fitting = fitting_batch_size(len(pairs), args.world_size)
        setting = "per_device_train_batch_size" if args.contrastive_batch_size is None else "contrastive_batch_size"
        devices = "one device" if args.world_size == 1 else f"{args.world_size} devices together"
        raise ValueError(
            f"{data.title} has {len(pairs)} training pairs, fewer than one batch of {args.global_batch_size} "
            f"({devices}): lower training.{setting}{f', e.g. to {fitting}' if fitting > 1 else ''}."
        )
    if not args.mix_sources:
        check_sizes_of_sources(sources_of(pairs), args.global_batch_size)
    return pairs


def load_held_out_pairs(
    split: str, data: DataArguments, args: GapClosedTrainingArguments
) -> Dataset | IterableDataset:
    """
    Loads and checks the pairs of a split to evaluate on.

    Raises:
        FileNotFoundError, ValueError: there is no such split, or it is wrong; with the setting that asked for it.
    """
    try:
        return load_checked_pairs(data, split, args.dataloader_num_workers)
    except (FileNotFoundError, ValueError) as error:
        asker, remedy = "training.eval_strategy", "no"
        if split == args.final_split:
            asker, remedy = f"training.final_split={split}", "none, or another split"
        raise type(error)(f"{error} (These pairs are needed because of {asker}. It may be {remedy}.)") from error


__all__ = ["RunInputs", "preflight"]
