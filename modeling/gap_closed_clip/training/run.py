"""One run: pairs, model, Trainer, model folder. What can be known to be wrong is said before training starts."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import set_seed
from transformers.utils import logging

from ..data import DataArguments, PairCollator, count_truncated, load_checked_pairs
from ..evaluation import build_compute_metrics, check_writable, evaluate_model, write_report
from ..modeling_gap_closed_clip import GapClosedClipModel
from ..processing_gap_closed_clip import GapClosedClipProcessor
from .arguments import GapClosedTrainingArguments
from .base import Base
from .build import build_model_and_processor, check_start
from .config import RunConfig
from .frozen import pool_captions_once, recenter
from .trainer import GapClosedClipTrainer


logger = logging.get_logger(__name__)

# What a finished run leaves beside the weights: its configuration, and what else its card tells.
CONFIG_FILE, RUN_FILE = "train_config.yaml", "run.json"
# What the Trainer writes into a checkpoint, in this order: one that was being written when the run was killed lacks
# the last.
CHECKPOINT_FILES = ("config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json")
# What config.json is to an adapter.
ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class TrainingResult:
    """
    What a finished run tells beside its configuration; all but the metrics is `run.json` in its model folder.

    Args:
        metrics: of the final evaluation; empty where there is none, and on all processes but the first.
        num_train_pairs: pairs trained on; None for a stream.
        device: name of the device.
        num_processes: that trained together.
    """

    metrics: dict[str, float]
    num_train_pairs: int | None
    device: str
    num_processes: int


def train(config: RunConfig) -> TrainingResult:
    """
    Trains the model that a configuration describes, and leaves a model folder in `training.output_dir`: weights,
    config, processor, code, `train_config.yaml`, `run.json`, and the evaluation on `training.final_split`
    (metrics.json, table, figures). With `lora`, weights and config are those of an adapter, and a folder `base` holds
    the model it belongs to if no other does.

    Raises:
        ValueError, OSError: whatever is wrong with the configuration, the data or the output folder, before training.
    """
    args = config.training_arguments()
    # The Trainer would push every half-trained state, and its pickled arguments. A finished folder is published whole.
    args.push_to_hub = False
    check_devices(args)
    check_start(config.model)
    if args.process_index == 0:
        check_writable(args.output_dir, "training.output_dir")
    checkpoint = checkpoint_to_resume(args)
    with args.main_process_first(desc="loading pairs"):  # `datasets` caches on disk what it downloads and converts
        train_pairs = load_training_pairs(config.data, args)
        splits = {args.final_split} | ({"validation"} if args.eval_strategy != "no" else set())
        held_out = {split: load_held_out_pairs(split, config.data, args) for split in splits - {"none"}}
    set_seed(args.seed)
    streaming = isinstance(train_pairs, IterableDataset)
    captions = (row["caption"] for row in train_pairs) if streaming else train_pairs["caption"]
    model, processor = build_model_and_processor(config.model, captions)
    set_caption_length(train_pairs, model, processor, config.data)
    base = None if config.lora is None else Base(model, config.model, args.output_dir)
    trained = model if base is None else base.adapt(config.lora)
    collator = PairCollator(processor, config.data.augmentation(), config.data.max_caption_tokens, config.data.window)
    if not streaming and not any(parameter.requires_grad for parameter in model.text_model.parameters()):
        train_pairs = pool_captions_once(train_pairs, model, collator, args.eval_batch_size, args.device)
    delete_other_run(args, checkpoint)
    if base is not None and not config.lora.merge and args.process_index == 0:
        base.save(processor)
    eval_pairs = held_out.get("validation") if args.eval_strategy != "no" else None
    trainer = GapClosedClipTrainer(
        model=trained,
        args=args,
        train_dataset=train_pairs,
        eval_dataset=eval_pairs,
        data_collator=collator,
        processing_class=processor,
        compute_metrics=None if eval_pairs is None else build_compute_metrics(eval_pairs),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if model.config.center_projections and not streaming:
        recenter(model, train_pairs, collator, args.eval_batch_size, args.dataloader_num_workers)
    save_model_folder(trainer, config)
    metrics = {}
    if args.final_split != "none" and trainer.is_world_process_zero():
        metrics = evaluate_model_folder(trainer, config, held_out[args.final_split])
    result = TrainingResult(
        metrics=metrics,
        num_train_pairs=None if streaming else len(train_pairs),
        device=torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU",
        num_processes=args.world_size,
    )
    if trainer.is_world_process_zero():
        facts = {name: value for name, value in asdict(result).items() if name != "metrics"}
        (Path(args.output_dir) / RUN_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return result


def check_devices(args: GapClosedTrainingArguments) -> None:
    """
    Raises:
        ValueError: several GPUs in one process, or a contrastive batch that they can't share.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs and would split each batch among them (torch.nn.DataParallel), so "
            "that no pair is compared with those of another GPU. Start one process for each, `accelerate launch "
            "train.py ...`, or set CUDA_VISIBLE_DEVICES=0."
        )
    _ = args.num_micro_batches  # checks the sizes


def load_training_pairs(data: DataArguments, args: GapClosedTrainingArguments) -> Dataset | IterableDataset:
    """
    The training pairs, checked.

    Raises:
        ValueError: fewer pairs than one batch, a batch of a single pair, streaming without `max_steps`.
    """
    if args.global_batch_size < 2:
        raise ValueError(
            "training.per_device_train_batch_size is 1: a pair needs other pairs to be told apart from. Use 2 or "
            "more; contrastive learning wants as many as fit."
        )
    pairs = load_checked_pairs(data, "train", args.dataloader_num_workers)
    if isinstance(pairs, IterableDataset):
        if args.max_steps <= 0:
            raise ValueError("data.streaming has no known length: set training.max_steps.")
        return pairs
    if len(pairs) < args.global_batch_size:
        setting = "per_device_train_batch_size" if args.contrastive_batch_size is None else "contrastive_batch_size"
        devices = "one device" if args.world_size == 1 else f"{args.world_size} devices together"
        raise ValueError(
            f"{data.source} has {len(pairs)} training pairs, fewer than one batch of {args.global_batch_size} "
            f"({devices}): lower training.{setting}."
        )
    return pairs


def load_held_out_pairs(
    split: str, data: DataArguments, args: GapClosedTrainingArguments
) -> Dataset | IterableDataset:
    """
    The checked pairs of a split to evaluate on.

    Raises:
        FileNotFoundError, ValueError: there is no such split, or it is wrong; with the setting that asked for it.
    """
    try:
        return load_checked_pairs(data, split, args.dataloader_num_workers)
    except (FileNotFoundError, ValueError) as error:
        asker = f"training.final_split={split}" if split == args.final_split else "training.eval_strategy"
        raise type(error)(f"{error} (These pairs are needed because of {asker}.)") from error


def set_caption_length(
    pairs: Dataset | IterableDataset, model: GapClosedClipModel, processor: GapClosedClipProcessor, data: DataArguments
) -> None:
    """
    Makes the tokenizer cut texts where training cuts captions: a tower from scratch has never seen what comes behind.
    Logs how many captions lose their end; of a stream that is not known.

    Raises:
        ValueError: `data.max_caption_tokens` is more than the text tower takes.
    """
    if data.max_caption_tokens is not None:
        if data.max_caption_tokens > model.max_text_length:
            raise ValueError(
                f"data.max_caption_tokens is {data.max_caption_tokens}, but the text tower takes "
                f"{model.max_text_length} tokens at most."
            )
        processor.tokenizer.model_max_length = data.max_caption_tokens
    if isinstance(pairs, IterableDataset):
        return
    limit = processor.tokenizer.model_max_length
    truncated = count_truncated(pairs, processor.tokenizer, limit)
    if truncated:
        logger.warning(
            f"{truncated} of {len(pairs)} training captions are longer than {limit} tokens and lose their end."
        )


def checkpoint_to_resume(args: GapClosedTrainingArguments) -> str | None:
    """
    The checkpoint to go on from, or None for a new run; makes sure that no other run is written over.

    Raises:
        ValueError: the folder holds another run, or there is no complete checkpoint to resume from.
    """
    folder = Path(args.output_dir)
    resume = args.resume_from_checkpoint
    if resume is True:
        return str(_checkpoint_to_go_on_from(folder))
    if resume and not is_complete_checkpoint(Path(resume)):
        raise ValueError(
            f"training.resume_from_checkpoint: {resume} is no complete checkpoint: it needs "
            f"{', '.join(CHECKPOINT_FILES)}, the last of them whole."
        )
    if _holds_other_run(folder, resume) and not args.overwrite_output_dir:
        raise ValueError(
            f"training.output_dir {folder} holds another run. Name another folder, or add resume_from_checkpoint=true "
            "to go on from its last checkpoint, or overwrite_output_dir=true to delete it."
        )
    return resume or None


def delete_other_run(args: GapClosedTrainingArguments, checkpoint: str | None) -> None:
    """Does what `overwrite_output_dir` allows, as the last thing before training: nothing else can go wrong then."""
    if args.overwrite_output_dir and args.process_index == 0 and _holds_other_run(Path(args.output_dir), checkpoint):
        shutil.rmtree(args.output_dir)


def _holds_other_run(folder: Path, checkpoint: str | None) -> bool:
    """Whether there is a run in the folder that `checkpoint` is no part of."""
    if checkpoint and Path(checkpoint).resolve().parent == folder.resolve():
        return False
    return bool(_checkpoints(folder)) or any((folder / name).exists() for name in ("config.json", ADAPTER_CONFIG))


def _checkpoints(folder: Path) -> list[Path]:
    """Of the Trainer, the last one last."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint=true` goes on from; None where there is none."""
    return next(filter(is_complete_checkpoint, reversed(_checkpoints(Path(folder)))), None)


def _checkpoint_to_go_on_from(folder: Path) -> Path:
    for path in _checkpoints(folder):
        if not is_complete_checkpoint(path):
            logger.warning(f"{path} was left half-written by a run that was killed; it is passed over.")
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(
            f"training.resume_from_checkpoint: {folder} holds no complete checkpoint. Leave it out to start anew."
        )
    return checkpoint


def is_complete_checkpoint(folder: Path) -> bool:
    """Whether the Trainer finished writing this checkpoint."""
    config, *rest = CHECKPOINT_FILES
    if not any((folder / name).is_file() for name in (config, ADAPTER_CONFIG)):
        return False
    if not all((folder / name).is_file() for name in rest):
        return False
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def save_model_folder(trainer: GapClosedClipTrainer, config: RunConfig) -> None:
    """Weights, config, processor, code and `train_config.yaml` into `output_dir`; adapters are merged if asked for."""
    folder = Path(trainer.args.output_dir)
    if config.lora is not None and config.lora.merge:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    trainer.save_model()
    if trainer.is_world_process_zero():
        # The Trainer pickles its arguments beside the weights; train_config.yaml says the same in the open.
        (folder / "training_args.bin").unlink(missing_ok=True)
        config.save(folder / CONFIG_FILE)


def evaluate_model_folder(
    trainer: GapClosedClipTrainer, config: RunConfig, pairs: Dataset | IterableDataset
) -> dict[str, float]:
    """The final evaluation: metrics.json, metrics.md and figures beside the weights, the table on the screen."""
    args = trainer.args
    metrics, embeddings = evaluate_model(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        pairs,
        batch_size=args.eval_batch_size,
        num_workers=args.dataloader_num_workers,
        max_length=config.data.max_caption_tokens,
        window=config.data.window,
    )
    name = Path(args.output_dir).name
    data = {"source": config.data.source, **config.to_dict()["data"]}
    folder = {name: args.output_dir}
    table = write_report(args.output_dir, {name: metrics}, {name: embeddings}, data, args.final_split, folder)
    print(f"\n{len(embeddings)} pairs, split '{args.final_split}' of '{config.data.source}'\n\n{table}\n")
    return metrics


__all__ = ["CONFIG_FILE", "RUN_FILE", "TrainingResult", "last_complete_checkpoint", "train"]
