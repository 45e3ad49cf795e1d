"""What the tests of Trainers share: pairs, and a Trainer of each kind with a tiny model."""

import io
from pathlib import Path

import numpy as np
from conftest import CAPTIONS, IMAGE_SIZE, tiny_config
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture
from transformers import CLIPImageProcessor, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from gap_closed_clip import GapClosedClipModel, GapClosedClipProcessor
from gap_closed_clip.data import Augmentation, PairCollator
from gap_closed_clip.evaluation import build_compute_metrics
from gap_closed_clip.training import GapClosedClipTrainer, GapClosedTrainingArguments
from gap_closed_clip.training.encoder import train_tokenizer


BATCH, STEPS = 8, 12  # 26 pairs: three steps an epoch (four in the plain Trainer)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE + 8, IMAGE_SIZE + 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Picture.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_pairs(n: int = 26, augment: bool = True) -> Dataset:
    """n pairs; three captions and one image occur three times."""
    numbers = list(range(n))
    image_of = [0 if i in (7, 13) else i for i in numbers]
    caption_of = [i % 3 if i in (9, 10, 11, 18, 19, 20) else i for i in numbers]
    rows = {
        "image": [{"bytes": png(i), "path": None} for i in image_of],
        "image_id": [f"image {i}" for i in image_of],
        "caption": [f"{CAPTIONS[i % 6]} Case {i}." for i in caption_of],
        "label": [f"kind {i % 6}" for i in caption_of],
        "augment": [augment] * n,
    }
    text = Value("string")
    features = {
        "image": Image(decode=False),
        "image_id": text,
        "caption": text,
        "label": text,
        "augment": Value("bool"),
    }
    return Dataset.from_dict(rows, features=Features(features))


def make_processor() -> GapClosedClipProcessor:
    tokenizer: PreTrainedTokenizerBase = train_tokenizer(make_pairs()["caption"], 200)
    tokenizer.model_max_length = 64
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return GapClosedClipProcessor(CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size), tokenizer)


def make_trainer(kind: str, folder: Path, callbacks=(), config=None, eval_dataset=None, **arguments) -> Trainer:
    """A `vanilla` Trainer, or `ours` with all that can stand in the way of an exact resume; dropout is BERT's 0.1.

    `micro-batches` is `ours` with batches in two parts.
    """
    set_seed(5)
    objective = {"align_weight": [[0.1, 1.0], [0.9, 3.0]], "uniformity_weight": 0.5, "center_projections": True}
    model = GapClosedClipModel(tiny_config(**({} if kind == "vanilla" else objective) | (config or {})))
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "learning_rate": 2e-3,
        "logging_steps": 1,
        "save_steps": 5,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **arguments,
    }
    if kind == "micro-batches":
        arguments |= {"per_device_train_batch_size": BATCH // 2, "contrastive_batch_size": BATCH}
    if kind != "vanilla":
        # A worker of its own has random numbers of its own, which no checkpoint keeps.
        arguments = {"dataloader_num_workers": 1, **arguments}
        trainer_class, args = GapClosedClipTrainer, GapClosedTrainingArguments(**arguments)
    else:
        trainer_class, args = Trainer, TrainingArguments(**arguments, remove_unused_columns=False)
    return trainer_class(
        model=model,
        args=args,
        train_dataset=make_pairs(),
        eval_dataset=eval_dataset,
        data_collator=PairCollator(make_processor(), Augmentation()),
        compute_metrics=None if eval_dataset is None else build_compute_metrics(eval_dataset),
        callbacks=list(callbacks),
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
