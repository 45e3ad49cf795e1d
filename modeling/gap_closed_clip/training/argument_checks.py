"""Values of the section `training` that would otherwise end in a run of NaN, in none, or in a traceback."""

import math
import multiprocessing
import os
from typing import Any

from transformers.integrations import (
    get_available_reporting_integrations,
    is_azureml_available,
    is_flytekit_available,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..messages import did_you_mean


# Fields that are numbers: the least value that each takes, and whether that itself is taken.
LEAST = {
    "learning_rate": (0.0, True),
    "weight_decay": (0.0, True),
    "adam_beta1": (0.0, True),
    "adam_beta2": (0.0, True),
    "adam_epsilon": (0.0, True),
    "max_grad_norm": (0.0, True),
    "label_smoothing_factor": (0.0, True),
    "warmup_steps": (0.0, True),
    "num_train_epochs": (0.0, False),
    "per_device_train_batch_size": (1, True),
    "per_device_eval_batch_size": (1, True),
    "contrastive_batch_size": (1, True),
    "gradient_accumulation_steps": (1, True),
    "dataloader_num_workers": (0, True),
    "early_stopping_patience": (1, True),
    "skip_broken_steps": (0, True),
    "neftune_noise_alpha": (0.0, True),
    "eval_steps": (0.0, False),
    "save_steps": (0.0, False),
    "logging_steps": (0.0, False),
    "seed": (0, True),
    "data_seed": (0, True),
}
MOST_WORKERS = 256  # of a DataLoader; each is a process
# What installs an integration, where its package has another name.
PACKAGES = {"azure_ml": "azureml-core azureml-mlflow", "flyte": "flytekit"}


def check_numbers(args: Any) -> None:
    """
    Checks the numbers.

    Raises:
        ValueError: one is no number, not finite, or out of range.
    """
    for name, (least, allowed) in LEAST.items():
        value = getattr(args, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"training.{name} is {value!r}: it is a number.")
        if name == "num_train_epochs" and args.max_steps > 0:
            continue
        if not math.isfinite(value) or value < least or (value == least and not allowed):
            range_ = f"{least:g} or more" if allowed else f"above {least:g}"
            raise ValueError(f"training.{name} is {value}: use a finite number, {range_}.")
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(
            f"training.max_steps is {args.max_steps}: use a number of steps, or -1, for num_train_epochs."
        )
    if args.dataloader_num_workers > MOST_WORKERS:
        raise ValueError(
            f"training.dataloader_num_workers is {args.dataloader_num_workers}: each is a process; use as many as "
            f"there are cores ({os.cpu_count()}) at most."
        )
    _check_workers(args)


def _check_workers(args: Any) -> None:
    """
    Raises:
        ValueError: what is said of a DataLoader's processes, of which there are none; or a way to start them that the
            system does not have.
    """
    context = getattr(args, "dataloader_multiprocessing_context", None)
    given = {"persistent_workers": args.dataloader_persistent_workers, "multiprocessing_context": context}
    for name, value in given.items():
        if value and not args.dataloader_num_workers:
            raise ValueError(
                f"training.dataloader_{name} is {value}, and training.dataloader_num_workers is 0: it is of a "
                f"DataLoader's processes. Have 1 or more, or set it to {'false' if value is True else 'null'}."
            )
    known = multiprocessing.get_all_start_methods()
    if context is not None and context not in known:
        raise ValueError(f"training.dataloader_multiprocessing_context is {context!r}: use one of {', '.join(known)}.")


def check_evaluations(args: Any) -> None:
    """
    Checks that what evaluations during training are to decide meets evaluations.

    Raises:
        ValueError: there are none, or they have no metrics.
    """
    for name in ("load_best_model_at_end", "eval_on_start"):
        if getattr(args, name) and args.eval_strategy == "no":
            raise ValueError(
                f"training.{name} is true and training.eval_strategy is no: without evaluations there is nothing to "
                f"choose or to compare. Set eval_strategy=epoch or steps, or {name}=false."
            )
    metric = args.metric_for_best_model
    if args.prediction_loss_only and metric is not None and metric.removeprefix("eval_") != "loss":
        raise ValueError(
            f"training.prediction_loss_only is true, so evaluations have the loss alone, and "
            f"training.metric_for_best_model is {metric}: set prediction_loss_only=false, or "
            "metric_for_best_model=loss."
        )


def check_gathering(args: Any) -> None:
    """
    Checks that the metrics of a run get the embeddings, or captions, of all pairs at once.

    Raises:
        ValueError: they would get them by batches, which is found when the first evaluation has run, or when frozen
            towers have.
    """
    if args.eval_strategy == "no" or args.prediction_loss_only:
        return
    for name, wanted in (("eval_do_concat_batches", True), ("batch_eval_metrics", False)):
        if getattr(args, name) is not wanted:
            raise ValueError(
                f"training.{name} is {str(not wanted).lower()}: the evaluations rank all pairs at once and can't go "
                "batch by batch. Leave it out (with little memory, set eval_accumulation_steps)."
            )


def check_batch_size(args: Any) -> None:
    """
    Checks that batches whose pairs are compared with one another keep their size. (Those of a captioner on frozen
    encoders may get smaller.)

    Raises:
        ValueError: the Trainer may shrink them where memory runs out.
    """
    if args.auto_find_batch_size:
        raise ValueError(
            "training.auto_find_batch_size is true: where memory runs out, batches would get smaller without a word, "
            "with fewer pairs to tell each from, and with repeats. Leave it out and lower "
            "per_device_train_batch_size; contrastive_batch_size, a multiple of it, then says how many pairs are "
            f"compared (e.g. {args.global_batch_size})."
        )


def check_order(args: Any) -> None:
    """
    Checks that one setting alone orders the training pairs.

    Raises:
        ValueError: transformers' own would not be heard.
    """
    own = "training.mix_sources is false" if not args.mix_sources else "training.distinct_batches is true"
    if args.train_sampling_strategy != "random" and (args.distinct_batches or not args.mix_sources):
        raise ValueError(
            f"training.train_sampling_strategy is {args.train_sampling_strategy}, and {own}, which orders the pairs "
            "in its own way. Leave train_sampling_strategy out, or set distinct_batches=false (and mix_sources=true)."
        )


def check_label_smoothing(label_smoothing_factor: float | None) -> None:
    """
    Checks that labels stay with the model, which computes its loss itself.

    Raises:
        ValueError: the Trainer would take a captioner's, and pairs have none to smooth.
    """
    if label_smoothing_factor:
        raise ValueError(
            "training.label_smoothing_factor is transformers' own and would take the labels from the model: set "
            "captioning.label_smoothing (in Python label_smoothing of a captioner's config)."
        )


def check_report_to(report_to: str | list[str] | None) -> None:
    """
    Checks that logs can go where they are to go, which the Trainer finds when the data are loaded.

    Raises:
        ValueError: an integration is unknown, or its package is not installed.
    """
    available = {*get_available_reporting_integrations(), "all", "none"}
    available |= {"azure_ml"} if is_azureml_available() else set()
    available |= {"flyte"} if is_flytekit_available() else set()
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in available:
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            hint = did_you_mean(name, [*INTEGRATION_TO_CALLBACK, "all", "none"])
            raise ValueError(f"training.report_to: there is no {name!r}{hint}")
        raise ValueError(
            f"training.report_to is {name}, whose package is not installed: pip install {PACKAGES.get(name, name)}, "
            "or report_to=none."
        )


__all__ = [
    "check_batch_size",
    "check_evaluations",
    "check_gathering",
    "check_label_smoothing",
    "check_numbers",
    "check_order",
    "check_report_to",
]
