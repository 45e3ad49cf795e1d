"""Arguments, the Trainer, and the way from a configuration to a trained model folder."""

from .arguments import GapClosedTrainingArguments, ModelArguments
from .build import build_model_and_processor
from .caption_trainer import GapClosedCaptionTrainer
from .captioning import CaptioningArguments
from .config import RunConfig, load_config, read_words
from .lora import LoraArguments, add_adapters, build_peft_config
from .output_folder import last_complete_checkpoint
from .run import train
from .trainer import GapClosedClipTrainer, TrainingProgressCallback


__all__ = [
    "CaptioningArguments",
    "GapClosedCaptionTrainer",
    "GapClosedClipTrainer",
    "GapClosedTrainingArguments",
    "LoraArguments",
    "ModelArguments",
    "RunConfig",
    "TrainingProgressCallback",
    "add_adapters",
    "build_model_and_processor",
    "build_peft_config",
    "last_complete_checkpoint",
    "load_config",
    "read_words",
    "train",
]
