"""What a run of train.py is told of the model and the training, beside the data."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments


@dataclass
class ModelArguments:
    """Where the model starts from. Fields of [`GapClosedClipConfig`] stand beside these in the `model:` section."""

    checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of a trained GapClosedClipModel to go on from; vision and text stay empty."
        },
    )
    vision: str | dict | None = field(
        default=None,
        metadata={
            "help": "Image tower: Hub id or folder of a timm model, or a mapping (architecture, model_args) to start "
            "a "
            "timm architecture from scratch."
        },
    )
    text: str | dict | None = field(
        default=None,
        metadata={
            "help": "Text tower: Hub id, folder or name of a BERT-family encoder, or a mapping of BertConfig fields "
            "to "
            "start one from scratch, with a WordPiece vocabulary of the training captions."
        },
    )
    keep_vision_projection: bool = field(
        default=False, metadata={"help": "Start the image projection from the EVA-CLIP checkpoint's own head."}
    )
    freeze_vision: bool = field(default=False, metadata={"help": "Keep the image tower as it is (text-side tuning)."})
    freeze_text: bool = field(default=False, metadata={"help": "Keep the text tower as it is."})
    config: dict[str, Any] = field(default_factory=dict, metadata={"help": "Fields of GapClosedClipConfig."})

    def __post_init__(self):
        if self.checkpoint is not None:
            given = [name for name in ("vision", "text") if getattr(self, name) is not None]
            if given or self.keep_vision_projection:
                raise ValueError(
                    f"model.checkpoint is {self.checkpoint!r} and model.{(given or ['keep_vision_projection'])[0]} is "
                    f"set "
                    "too: a checkpoint brings its own towers, so give one or the other."
                )


@dataclass
class GapClosedTrainingArguments(TrainingArguments):
    """transformers' [`TrainingArguments`] with defaults that suit pairs, and what only pairs need."""

    output_dir: str | None = field(
        default="outputs/demo", metadata={"help": "The model folder; checkpoints go to its subfolder checkpoints."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete another run's results in output_dir instead of refusing to start."}
    )
    distinct_batches: bool = field(
        default=True, metadata={"help": "Keep pairs that share an image or a caption out of one batch where possible."}
    )
    final_split: Literal["train", "validation", "test", "none"] = field(
        default="validation", metadata={"help": "Pairs of the evaluation after training; its metrics go on the card."}
    )
    resume_from_checkpoint: str | bool | None = field(
        default=None, metadata={"help": "true: the last complete checkpoint of output_dir; or the folder of one."}
    )
    # The last, smaller batch of an epoch has fewer negatives and another loss.
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Leave out an epoch's last, incomplete batch."})
    # The collator needs captions and image bytes, which forward's signature does not name.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave this off."})
    report_to: str | list[str] | None = field(default="tensorboard", metadata={"help": "Where logs go."})


__all__ = ["GapClosedTrainingArguments", "ModelArguments"]
