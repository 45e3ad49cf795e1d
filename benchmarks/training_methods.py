"""What `training.py` compares: models with the same towers, and ways to make a training step of a batch."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm
import torch
from measure import is_installed
from random_towers import DIM, Batch, Settings, build_ours, random_batch, random_parts, to_device
from torch import Tensor, nn
from transformers import BertConfig

from gap_closed_clip import MicroBatches


def build_open_clip(settings: Settings) -> nn.Module:
    """open_clip's model with the same image tower and the same BERT."""
    from open_clip.model import CustomTextCLIP

    towers = settings.towers
    with tempfile.TemporaryDirectory() as folder:  # open_clip reads the text tower's config from the Hub or a folder
        BertConfig(**towers.text).save_pretrained(folder)
        model = CustomTextCLIP(
            embed_dim=DIM,
            vision_cfg={
                "timm_model_name": towers.architecture,
                "timm_model_pretrained": False,
                "timm_pool": "token",
                "timm_proj": None,
                "image_size": towers.image_size,
            },
            text_cfg={
                "hf_model_name": folder,
                "hf_model_pretrained": False,
                "hf_pooler_type": "cls_last_hidden_state_pooler",
                "hf_proj_type": "linear",
            },
            output_dict=True,
        )
    if towers.model_args:  # open_clip's config has no field for them
        trunk_args = {"global_pool": "token", **towers.model_args}
        model.visual.trunk = timm.create_model(towers.architecture, num_classes=DIM, **trunk_args)
    if settings.gradient_checkpointing:
        model.set_grad_checkpointing()
    return model


def our_step(model: nn.Module, settings: Settings, micro_batches: list[Batch]) -> None:
    (batch,) = micro_batches
    with settings.autocast():
        loss = model(**to_device(batch, settings)).loss
    loss.backward()


def our_micro_batched_step(model: nn.Module, settings: Settings, micro_batches: list[Batch]) -> None:
    with settings.autocast():
        loss = model(micro_batches=MicroBatches(micro_batches)).loss
    loss.backward()


def open_clip_step(model: nn.Module, settings: Settings, micro_batches: list[Batch]) -> None:
    from open_clip.loss import ClipLoss

    (batch,) = micro_batches
    batch = to_device(batch, settings)
    with settings.autocast():
        loss = ClipLoss()(**model(batch["pixel_values"], batch["input_ids"]))
    loss.backward()


def open_clip_accumulated_step(model: nn.Module, settings: Settings, micro_batches: list[Batch]) -> None:
    """What `open_clip_train/train.py` (3.3.0) does with --accum-freq: the whole loss again for every micro-batch."""
    from open_clip.loss import ClipLoss

    kept: dict[str, list[Tensor]] = {"image_features": [], "text_features": []}
    batches = []
    for batch in micro_batches:
        batch = to_device(batch, settings)
        with torch.no_grad(), settings.autocast():
            outputs = model(batch["pixel_values"], batch["input_ids"])
        for name, features in kept.items():
            features.append(outputs[name])
        batches.append(batch)
    for j, batch in enumerate(batches):
        with settings.autocast():
            outputs = model(batch["pixel_values"], batch["input_ids"])
            inputs = {name: torch.cat([*x[:j], outputs[name], *x[j + 1 :]]) for name, x in kept.items()}
            loss = ClipLoss()(**inputs, logit_scale=outputs["logit_scale"])
            del inputs
        loss.backward()


@dataclass(frozen=True)
class Method:
    """
    A way to make a training step.

    Args:
        build: builds the model.
        step: forward and backward pass of a batch, given as a list of micro-batches.
        micro_batched: whether that list has micro-batches of `Settings.batch` rows, or the whole batch as its only
            entry.
        large: whether the batch has `Settings.contrastive_batch` rows, or only `Settings.batch`.
    """

    build: Callable[[Settings], nn.Module]
    step: Callable[[nn.Module, Settings, list[Batch]], None]
    micro_batched: bool = False
    large: bool = False

    def rows(self, settings: Settings) -> int:
        """How many rows the batch has."""
        return settings.contrastive_batch if self.large else settings.batch

    def micro_batches(self, settings: Settings, distinct: int | None = None) -> list[Batch]:
        """A random batch as `step` takes it; of its micro-batches only the first `distinct` are different."""
        if self.micro_batched:
            return random_parts(settings, distinct)
        return [random_batch(settings, self.rows(settings))]


OURS, AS_CLIP, OPEN_CLIP = "ours", "ours as CLIP", "open_clip"
OURS_LARGE, OURS_MICRO_BATCHES = "ours, one piece", "ours, micro-batches"
OPEN_CLIP_ACCUMULATED = "open_clip, accumulation"
build_as_clip = partial(build_ours, align_weight=0.0, uniformity_weight=0.0, center_projections=False)
METHODS = {
    OURS: Method(build_ours, our_step),
    AS_CLIP: Method(build_as_clip, our_step),
    OPEN_CLIP: Method(build_open_clip, open_clip_step),
    OURS_LARGE: Method(build_ours, our_step, large=True),
    OURS_MICRO_BATCHES: Method(build_ours, our_micro_batched_step, micro_batched=True, large=True),
    OPEN_CLIP_ACCUMULATED: Method(build_open_clip, open_clip_accumulated_step, micro_batched=True, large=True),
}
# The method with whose time per image that of a large batch is compared.
PLAIN_STEP = {OURS_LARGE: OURS, OURS_MICRO_BATCHES: OURS, OPEN_CLIP_ACCUMULATED: OPEN_CLIP}


def available_methods(chosen: list[str]) -> list[str]:
    """The chosen methods without those of open_clip where it is not installed."""
    return [name for name in chosen if is_installed("open_clip") or METHODS[name].build is not build_open_clip]
