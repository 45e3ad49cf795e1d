"""The way from a configuration to a trained model folder; `run.py` shows it from top to bottom."""

from .arguments import GapClosedTrainingArguments, ModelArguments
from .caption_trainer import GapClosedCaptionTrainer
from .captioning import CaptioningArguments
from .close_gap import close_gap, fit_post_hoc
from .config import RunConfig, load_config
from .config_fields import fields_of
from .encoder import build_model_and_processor
from .lora import LoraArguments, add_adapters, build_peft_config
from .recenter import RecenterCallback, recenter
from .resume import last_complete_checkpoint
from .run import train
from .trainer import GapClosedClipTrainer, TrainingProgressCallback


__all__ = [
    "CaptioningArguments",
    "GapClosedCaptionTrainer",
    "GapClosedClipTrainer",
    "GapClosedTrainingArguments",
    "LoraArguments",
    "ModelArguments",
    "RecenterCallback",
    "RunConfig",
    "TrainingProgressCallback",
    "add_adapters",
    "build_model_and_processor",
    "build_peft_config",
    "close_gap",
    "fields_of",
    "fit_post_hoc",
    "last_complete_checkpoint",
    "load_config",
    "recenter",
    "train",
]
