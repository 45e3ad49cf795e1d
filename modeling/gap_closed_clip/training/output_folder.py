"""The output folder: what it may hold before a run, and what the run writes."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import Trainer
from transformers.utils import logging

from ..base_weights import BASE_WEIGHTS_FILE
from ..checkpoint import (
    ADAPTER_CONFIG,
    BASE,
    CAPTION_FILES,
    CONFIG_FILE,
    FIGURES,
    FITTED_FILE,
    METRICS_FILE,
    RUN_FILE,
)
from ..disk import replacing
from ..model.configuration_gap_closed_clip import GapClosedClipConfig
from .arguments import GapClosedTrainingArguments
from .config import RunConfig, load_config
from .resume import AUTO, checkpoint_to_go_on_from, checkpoints, what_is_wrong


logger = logging.get_logger(__name__)

# What a run writes beside its checkpoints: all that `overwrite_output_dir` may delete. (Images in examples/ may be the
# user's own.)
RUN_FOLDERS = ("runs", BASE)
RUN_FILES = (
    *("config.json", "generation_config.json", "modules.json", "model*.safetensors", "model.safetensors.index.json"),
    *(ADAPTER_CONFIG, "adapter_model.safetensors", BASE_WEIGHTS_FILE),
    *("processor_config.json", "preprocessor_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "vocab.*", "*_gap_closed_clip.py", "training_args.bin"),
    *(CONFIG_FILE, RUN_FILE, FITTED_FILE, METRICS_FILE, "metrics.md", *FIGURES, *CAPTION_FILES, "README.md"),
)


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
        num_steps, kept_step: how many steps were trained, and after which the weights were kept, where the best of
            the evaluations decided that (`load_best_model_at_end`); else None.
    """

    metrics: dict[str, float]
    num_train_pairs: int | None
    device: str
    num_processes: int
    fusion_weights: dict[str, float] | None = None
    num_steps: int | None = None
    kept_step: int | None = None


def checkpoint_to_resume(args: GapClosedTrainingArguments, config: RunConfig) -> str | None:
    """
    The checkpoint to go on from, or None for a new run; makes sure that no other run is written over.

    Raises:
        ValueError: the folder holds another run, or there is no complete checkpoint to resume from.
    """
    folder = Path(args.output_dir)
    resume = args.resume_from_checkpoint or None
    if resume == AUTO and args.save_only_model:
        raise ValueError(
            "training.save_only_model is true, so that no run can go on from its checkpoints, and "
            "training.resume_from_checkpoint is auto: after each interruption it would start anew. Leave out one of "
            "the two."
        )
    if resume is True or resume == AUTO:
        checkpoint = checkpoint_to_go_on_from(folder)
        if checkpoint is not None:
            return str(checkpoint)
        if resume is True:
            raise ValueError(
                f"training.resume_from_checkpoint: {folder} holds no complete checkpoint. Leave it out to start anew, "
                f"or set it to {AUTO}, which does so by itself."
            )
        if _is_finished(folder) and not _is_of(folder, config) and not args.overwrite_output_dir:
            raise _holds_another(folder)
        return None
    if resume and (problem := what_is_wrong(Path(resume))):
        raise ValueError(f"training.resume_from_checkpoint: {resume} is no complete checkpoint: {problem}.")
    if _holds_other_run(folder, resume) and not args.overwrite_output_dir:
        raise _holds_another(folder)
    return resume


def _holds_another(folder: Path) -> ValueError:
    return ValueError(
        f"training.output_dir {folder} holds another run. Name another folder, or add resume_from_checkpoint=true to "
        "go on from its last checkpoint, or overwrite_output_dir=true to delete it."
    )


def delete_other_run(args: GapClosedTrainingArguments, checkpoint: str | None) -> None:
    """
    Does what `overwrite_output_dir` allows, as the last thing before training: nothing else can go wrong then. Deletes
    what runs write (`RUN_FILES`, checkpoints, logs) and nothing else.
    """
    folder = Path(args.output_dir)
    if not args.overwrite_output_dir or args.process_index != 0 or not _holds_other_run(folder, checkpoint):
        return
    for path in checkpoints(folder):
        shutil.rmtree(path)
    for name in RUN_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            if path.is_file():
                path.unlink()


def _holds_other_run(folder: Path, checkpoint: str | None) -> bool:
    """Whether there is a run in the folder that `checkpoint` is no part of."""
    if checkpoint and Path(checkpoint).resolve().parent == folder.resolve():
        return False
    return bool(checkpoints(folder)) or _is_finished(folder)


def _is_finished(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", ADAPTER_CONFIG))


def _is_of(folder: Path, config: RunConfig) -> bool:
    """Whether a finished run in the folder had this configuration, however it is resumed."""
    try:
        before = load_config([folder / CONFIG_FILE]).to_dict()
    except (OSError, ValueError):
        return False
    wanted = config.to_dict()
    for described in (before, wanted):
        for name in ("resume_from_checkpoint", "overwrite_output_dir", "output_dir"):
            described["training"].pop(name, None)
    return before == wanted


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
    kept = trainer.state.best_global_step if args.load_best_model_at_end else None
    if kept is not None and trainer.state.best_model_checkpoint is None:
        logger.warning(
            f"The best evaluation was after step {kept}, of which there is no checkpoint: the weights are those after "
            f"the last step, {trainer.state.global_step}."
        )
        kept = None
    result = TrainingResult(
        metrics={},
        num_train_pairs=num_train_pairs,
        device=torch.cuda.get_device_name() if args.device.type == "cuda" else "CPU",
        num_processes=args.world_size,
        fusion_weights=_encoder_config(trainer).fusion_weights,
        num_steps=None if kept is None else trainer.state.global_step,
        kept_step=kept,
    )
    if trainer.is_world_process_zero():
        config.save(folder / CONFIG_FILE)
        facts = {name: value for name, value in asdict(result).items() if name != "metrics"}
        for name in ("fusion_weights", "num_steps", "kept_step"):
            if facts[name] is None:
                facts.pop(name)
        with replacing(folder / RUN_FILE) as draft:
            draft.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return result


def _encoder_config(trainer: Trainer) -> GapClosedClipConfig:
    return trainer.accelerator.unwrap_model(trainer.model).config


__all__ = [
    "TrainingResult",
    "checkpoint_to_resume",
    "delete_other_run",
    "save_model_folder",
]
