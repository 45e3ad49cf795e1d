"""
What a configuration leaves open and the pairs decide: which pairs are held out, and how large a batch can be.

Open is what was not given, or was given for another source: `demo.yaml` trains in batches of 64 and evaluates on the
test split of its phantoms, and the pairs of `data.source=my_pairs`, which comes later, may have neither.
"""

from dataclasses import replace

from transformers.utils import logging

from ..data import DataArguments, load_pairs
from ..data.pairs import MissingSplitError
from .arguments import GapClosedTrainingArguments
from .config import RunConfig


logger = logging.get_logger(__name__)

FOLDS = 5  # of which one is held out, where a source has no validation split


def choose_held_out(config: RunConfig, args: GapClosedTrainingArguments) -> None:
    """
    Where a plain source has no test split, and the final split is open, it is the validation split; where there is no
    validation split, and one is needed, a fifth of the training pairs is. Both are logged, and noted in `config` and
    `args`, so that the model folder says what was done and evaluates on the same pairs.
    """
    data = config.data
    if not isinstance(data.source, str) or data.source == "phantoms" or data.streaming or data.folds is not None:
        return
    is_open = "final_split" not in config.training or "final_split" in config.inherited
    if args.final_split == "test" and is_open and not _has_split(data, "test"):
        logger.warning(f"{data.title} has no test split: the final evaluation is on its validation split.")
        _set(config, args, "final_split", "validation")
    needed = args.final_split == "validation" or args.eval_strategy != "no"
    if needed and data.validation_split is not None and not _has_split(data, "validation"):
        config.data = replace(data, folds=FOLDS)
        logger.warning(
            f"{data.title} has no validation split: a fifth of its training pairs is held out instead "
            f"(data.folds={FOLDS}). No image is in both parts; nor is a patient, if data.fold_column names the column "
            "that says whose an image is."
        )


def lower_batch_size(config: RunConfig, args: GapClosedTrainingArguments, num_pairs: int) -> None:
    """Lowers a batch size that was given for another source and is more than the pairs of this one; it is logged."""
    name = "per_device_train_batch_size"
    if num_pairs >= args.global_batch_size or args.contrastive_batch_size is not None or name not in config.inherited:
        return
    before, size = getattr(args, name), fitting_batch_size(num_pairs, args.world_size)
    if size < 2:
        return
    _set(config, args, name, size)
    logger.warning(
        f"{config.data.title} has {num_pairs} training pairs, fewer than a batch of {before}: training.{name} is "
        f"{size}."
    )


def fitting_batch_size(num_pairs: int, num_devices: int = 1) -> int:
    """A batch size for one device, a power of two, with which an epoch has four batches or more; 0 where none fits."""
    per_device = num_pairs // num_devices
    quarter = max(per_device // 4, min(per_device, 2))
    return 2 ** (quarter.bit_length() - 1) if quarter else 0


def _set(config: RunConfig, args: GapClosedTrainingArguments, name: str, value) -> None:
    config.training[name] = value
    setattr(args, name, value)


def _has_split(data: DataArguments, split: str) -> bool:
    """Whether a source has a split. What else is wrong with it, loading it in earnest will tell."""
    if not data.has_split(split):
        return False
    try:
        load_pairs(data, split)
    except MissingSplitError:
        return False
    except (OSError, ValueError):
        return True
    return True


__all__ = ["choose_held_out", "fitting_batch_size", "lower_batch_size"]
