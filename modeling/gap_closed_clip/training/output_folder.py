"""The output folder: what it may hold before a run, what the run writes, and where an interrupted one goes on."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import Trainer
from transformers.utils import logging

from ..checkpoint import ADAPTER_CONFIG, CONFIG_FILE, RUN_FILE
from ..model.configuration_gap_closed_clip import GapClosedClipConfig
from .arguments import GapClosedTrainingArguments
from .config import RunConfig


logger = logging.get_logger(__name__)

# What the Trainer writes into a checkpoint, in this order: one that was being written when the run was killed lacks
# the last.
CHECKPOINT_FILES = ("config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json")


@dataclass
class TrainingResult:
    """
    What a finished run tells beside its configuration; all but the metrics is `run.json` in its model folder.

    Args:
        metrics: those of the final evaluation; empty where there is none, and on all processes but the first.
        num_train_pairs: number of pairs trained on; None for a stream.
        device: name of the device.
        num_processes: number of processes that trained together.
        fusion_weights: as of `GapClosedClipConfig`, which an adapter does not have; None with two modalities.
    """

    metrics: dict[str, float]
    num_train_pairs: int | None
    device: str
    num_processes: int
    fusion_weights: dict[str, float] | None = None


def checkpoint_to_resume(args: GapClosedTrainingArguments) -> str | None:
    """
    The checkpoint to go on from, or None for a new run; makes sure that no other run is written over.

    Raises:
        ValueError: the folder holds another run, or there is no complete checkpoint to resume from.
    """
    folder = Path(args.output_dir)
    resume = args.resume_from_checkpoint or None
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
    return resume


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
    """The Trainer's checkpoints, the last one last."""
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


def save_model_folder(trainer: Trainer, config: RunConfig, num_train_pairs: int | None) -> TrainingResult:
    """
    Saves a finished run into `output_dir`: weights, config, processor, code, `train_config.yaml` and `run.json`.
    Adapters are merged first where that was asked for.

    Returns:
        what `run.json` says, without metrics.
    """
    args = trainer.args
    folder = Path(args.output_dir)
    if config.lora is not None and config.lora.merge:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    trainer.save_model()
    result = TrainingResult(
        metrics={},
        num_train_pairs=num_train_pairs,
        device=torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU",
        num_processes=args.world_size,
        fusion_weights=_encoder_config(trainer).fusion_weights,
    )
    if trainer.is_world_process_zero():
        # The Trainer pickles its arguments beside the weights; train_config.yaml says the same in the open.
        (folder / "training_args.bin").unlink(missing_ok=True)
        config.save(folder / CONFIG_FILE)
        facts = {name: value for name, value in asdict(result).items() if name != "metrics"}
        if result.fusion_weights is None:
            facts.pop("fusion_weights")
        (folder / RUN_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return result


def _encoder_config(trainer: Trainer) -> GapClosedClipConfig:
    return trainer.accelerator.unwrap_model(trainer.model).config


__all__ = [
    "TrainingResult",
    "checkpoint_to_resume",
    "delete_other_run",
    "is_complete_checkpoint",
    "last_complete_checkpoint",
    "save_model_folder",
]
