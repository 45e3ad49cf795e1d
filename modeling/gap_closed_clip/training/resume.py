"""Which checkpoint a run goes on from: complete, undamaged, and of the run that is asked for."""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from safetensors import SafetensorError, safe_open
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..checkpoint import ADAPTER_CONFIG
from ..data.hashing import digest_of
from ..disk import replacing, writing
from .arguments import GapClosedTrainingArguments
from .config import RunConfig


logger = logging.get_logger(__name__)

AUTO = "auto"
# What the Trainer writes into a checkpoint, in this order: one that was being written when the run was killed lacks
# the last.
CHECKPOINT_FILES = ("config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json")
# Beside it, so that it is not resumed with other settings.
SETTINGS_FILE = "run_settings.json"
# Fields of the configuration that decide which batches a step sees, beside the sections `model` and `data`; and those
# of the optimiser, which resuming takes from the checkpoint, wholly or half.
TRAINING_FIELDS = (
    *("seed", "data_seed", "distinct_batches", "mix_sources", "contrastive_batch_size"),
    *("learning_rate", "tower_learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim"),
    *("optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("label_smoothing_factor", "gradient_accumulation_steps"),
)
# How long the training is: it may change, and is only told.
LENGTH_FIELDS = ("max_steps", "num_train_epochs")
NUMBER, DIGEST = "training pairs", "digest of the training pairs"
RECORDS = "digest of the records"  # from which a tower's fields and words are learned when the run goes on, too
# Of the sections those that do not: where things are, not what they are.
ELSEWHERE = ("feature_cache", "allow_pickle", "license")


def checkpoints(folder: Path) -> list[Path]:
    """The Trainer's checkpoints, the last one last."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = [path for path in folder.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint=true` goes on from; None where there is none."""
    return next((path for path in reversed(checkpoints(Path(folder))) if not what_is_wrong(path)), None)


def checkpoint_to_go_on_from(folder: Path) -> Path | None:
    """As `last_complete_checkpoint`; says which later ones are passed over, and why."""
    for path in reversed(checkpoints(folder)):
        problem = what_is_wrong(path)
        if not problem:
            return path
        logger.warning(f"{path} is passed over: {problem}.")
    return None


def what_is_wrong(folder: Path) -> str:
    """Why a checkpoint can't be gone on from, in words; empty where it can."""
    config, *rest = CHECKPOINT_FILES
    if not any((folder / name).is_file() for name in (config, ADAPTER_CONFIG)):
        return f"{config} is missing"
    missing = [name for name in rest if not (folder / name).is_file()]
    if missing:
        return f"{missing[0]} is missing, as where a run was killed while it wrote"
    return next(_damages(folder), "")


def _damages(folder: Path) -> Iterator[str]:
    state = _read_json(folder / "trainer_state.json")
    if state is None or not isinstance(state.get("global_step"), int):
        yield "trainer_state.json is damaged"
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        yield "its weights are missing"
    for path in weights:
        try:
            with safe_open(path, framework="pt"):  # reads the header, which tells how long the file has to be
                pass
        except (SafetensorError, OSError):
            yield f"{path.name} is damaged"
    index = _read_json(folder / "model.safetensors.index.json") or {}
    for name in set(index.get("weight_map", {}).values()) - {path.name for path in weights}:
        yield f"{name} is missing"
    for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
        if not _is_whole_archive(path):
            yield f"{path.name} is damaged"


def _is_whole_archive(path: Path) -> bool:
    """Whether what torch.save wrote is there to the last byte, by the archive's own checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError):
        return False


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def settings_of(
    config: RunConfig, args: GapClosedTrainingArguments, pairs: Dataset | IterableDataset
) -> dict[str, Any]:
    """
    What has to be the same for a run to go on: names as in the configuration, and values as in JSON.

    Args:
        pairs: for training; of a stream neither their number nor their content is known.
    """
    names = (*TRAINING_FIELDS, *LENGTH_FIELDS)
    settings: dict[str, Any] = {f"training.{name}": getattr(args, name) for name in names}
    settings["pairs in a step (per_device_train_batch_size)"] = args.global_batch_size
    known = not isinstance(pairs, IterableDataset)
    settings[NUMBER] = len(pairs) if known else None
    settings[DIGEST] = digest_of([list(pairs["image_id"]), list(pairs["caption"])]) if known else None
    records = [name for name, columns in config.data.all_modalities.items() if isinstance(columns, list)]
    if records:
        settings[RECORDS] = digest_of([list(pairs[name]) for name in records]) if known else None
    for section in ("model", "data", "lora", "captioning"):
        described = getattr(config, section)
        described = {} if described is None else asdict(described)
        described |= described.pop("config", {})  # fields of GapClosedClipConfig stand in `model` as well
        settings |= {f"{section}.{name}": value for name, value in described.items() if name not in ELSEWHERE}
    return json.loads(json.dumps(settings, default=str))


def check_settings(checkpoint: str | Path, settings: dict[str, Any]) -> None:
    """
    Checks that a checkpoint is of a run with the same settings, and warns where the run gets another length. (One
    without a note of them is taken as it is, and so are those of the section `training`, and the pairs, where an older
    note lacks them.)

    Raises:
        ValueError: it is of another; the message says what differs.
    """
    before = _read_json(Path(checkpoint) / SETTINGS_FILE)
    if before is None:
        return
    lengths = [f"training.{name}" for name in LENGTH_FIELDS]
    newer = ("training.", DIGEST, RECORDS)
    unknown = {name for name in settings if name not in before and name.startswith(newer)}
    differ = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    names = [name for name in differ if name not in unknown and name not in lengths]
    if NUMBER in names:
        names = [name for name in names if name not in (DIGEST, RECORDS)]  # of course
    if names:
        listed = "; ".join(_difference(name, before, settings) for name in names[:5])
        raise ValueError(
            f"training.resume_from_checkpoint: {checkpoint} is of a run with other settings: {listed}. Going on would "
            "train neither as the run began nor as is asked for now: a step would see other batches, or the Trainer "
            "would take the optimiser's settings from the checkpoint. Set them as they were; or start a new run from "
            f"its weights, model.checkpoint={checkpoint}, with another output_dir."
        )
    if settings.get("training.max_steps", 0) > 0 and before.get("training.max_steps", 0) > 0:
        lengths.remove("training.num_train_epochs")  # which then say nothing
    longer = [_difference(name, before, settings) for name in lengths if name in differ and name not in unknown]
    if longer:
        logger.warning(
            f"{'; '.join(longer)}: from here on the learning rate, and weights of the objective that change during "
            "training, follow the schedule of the new length."
        )


def _difference(name: str, before: dict[str, Any], settings: dict[str, Any]) -> str:
    if name == DIGEST:
        return "the training pairs have changed (their images, their captions, or their order)"
    if name == RECORDS:
        return "the records of the training pairs have changed"
    return f"{name} was {before.get(name)!r:.100} and is {settings.get(name)!r:.100}"


class SettingsCallback(TrainerCallback):
    """Notes in each checkpoint with which settings it was trained."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            with writing(folder, SETTINGS_FILE), replacing(folder / SETTINGS_FILE) as draft:
                draft.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")


class EarlyStopping(EarlyStoppingCallback):
    """As transformers', which would count from 0 again where a run goes on from a checkpoint."""

    _began_at = 0

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if not state.global_step:
            self.early_stopping_patience_counter = 0  # not that of an earlier training of the same Trainer
            state.stateful_callbacks[type(self).__name__] = self.state()
        # A checkpoint of a run that was not to stop early has none, which the Trainer would miss when it saves.
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = kept["attributes"]["early_stopping_patience_counter"]
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True
        self._began_at = state.global_step

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        # Before the first step the weights are those of the checkpoint, whose evaluation has been counted.
        if state.global_step != self._began_at:
            super().on_evaluate(args, state, control, metrics, **kwargs)


__all__ = [
    "AUTO",
    "EarlyStopping",
    "SettingsCallback",
    "check_settings",
    "checkpoint_to_go_on_from",
    "checkpoints",
    "last_complete_checkpoint",
    "settings_of",
    "what_is_wrong",
]
