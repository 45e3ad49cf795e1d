"""What benchmarks of training steps share: untrained towers, and batches of random pixels and token ids."""

from dataclasses import dataclass
from functools import cache

import timm
import torch
from torch import Tensor
from transformers import BertConfig

from gap_closed_clip import GapClosedClipConfig, GapClosedClipModel


DIM = 512

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Preset:
    """
    The architecture of both towers.

    Args:
        architecture: of the image tower, by timm's name.
        image_size: height and width of its images in pixels.
        model_args: further arguments of the image tower.
        text: fields of the text tower's `BertConfig`.
        length: tokens of a text.
        batch: batch size, unless another is asked for.
    """

    architecture: str
    image_size: int
    model_args: dict
    text: dict
    length: int
    batch: int


def small_bert(width: int, layers: int) -> dict:
    """Fields of a `BertConfig` with heads of 64 dimensions and a small vocabulary."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        "vocab_size": 8192,
    }


PRESETS = {
    # The tiny EVA-02 of timm with half of its blocks and images of half the size.
    "eva02_tiny": Preset(
        "eva02_tiny_patch14_224",
        image_size=112,
        model_args={"img_size": 112, "depth": 6, "global_pool": "token"},
        text=small_bert(192, layers=6),
        length=32,
        batch=32,
    ),
    # As small as makes sense, to measure the memory of large batches on CPUs.
    "eva02_nano": Preset(
        "eva02_tiny_patch14_224",
        image_size=56,
        model_args={"img_size": 56, "depth": 2, "embed_dim": 64, "num_heads": 1, "global_pool": "token"},
        text=small_bert(64, layers=2),
        length=16,
        batch=64,
    ),
    # EVA-CLIP-g and BERT-base, the towers of the paper.
    "eva_giant": Preset("eva_giant_patch14_clip_224", image_size=224, model_args={}, text={}, length=77, batch=64),
}


# For each text tower the fields of its `BertConfig`, and the tokens of a text.
TEXTS = {
    "bert-base": ({}, 77),
    "minilm": (
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
        64,
    ),
    "nano": (small_bert(64, layers=2), 16),
}


@cache
def preset_of(name: str) -> Preset:
    """One of `PRESETS`, or `ARCHITECTURE+TEXT`: any image tower of timm with one of `TEXTS`."""
    if name in PRESETS:
        return PRESETS[name]
    architecture, _, text = name.partition("+")
    fields, length = TEXTS[text]
    image_size = timm.get_pretrained_cfg(architecture).input_size[-1]
    return Preset(architecture, image_size, model_args={}, text=fields, length=length, batch=32)


@dataclass(frozen=True)
class Settings:
    """
    The settings of a training step.

    Args:
        preset: the towers, see `preset_of`.
        device: "cpu" or "cuda".
        batch: pairs that go through the towers at a time.
        contrastive_batch: pairs that are compared with one another in the loss.
        precision: "float32", or "bfloat16" for autocast.
        gradient_checkpointing: compute the towers' activations again in the backward pass.
    """

    preset: str
    device: str
    batch: int
    contrastive_batch: int
    precision: str
    gradient_checkpointing: bool

    @property
    def towers(self) -> Preset:
        return preset_of(self.preset)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16")


def random_batch(settings: Settings, num_rows: int, seed: int = 0) -> Batch:
    """A batch on the CPU, in pinned memory if it is for a GPU; its texts have no padding."""
    generator = torch.Generator().manual_seed(seed)
    size, length = settings.towers.image_size, settings.towers.length
    vocabulary = BertConfig(**settings.towers.text).vocab_size
    batch = {
        "pixel_values": torch.randn(num_rows, 3, size, size, generator=generator),
        "input_ids": torch.randint(1, vocabulary, (num_rows, length), generator=generator),
        "attention_mask": torch.ones(num_rows, length, dtype=torch.int64),
    }
    return {name: x.pin_memory() if settings.device == "cuda" else x for name, x in batch.items()}


def to_device(batch: Batch, settings: Settings) -> Batch:
    return {name: x.to(settings.device, non_blocking=True) for name, x in batch.items()}


def random_parts(settings: Settings, distinct: int | None = None) -> list[Batch]:
    """The contrastive batch in micro-batches; only the first `distinct` are different, and they repeat."""
    count = settings.contrastive_batch // settings.batch
    parts = [random_batch(settings, settings.batch, seed) for seed in range(min(count, distinct or count))]
    return [parts[i % len(parts)] for i in range(count)]


def build_ours(settings: Settings, **objective) -> GapClosedClipModel:
    """Build an untrained model; `objective` are fields of its configuration."""
    towers = settings.towers
    config = GapClosedClipConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": towers.architecture,
            "model_args": towers.model_args or None,
        },
        text_config={"model_type": "bert", **towers.text},
        projection_dim=DIM,
        **objective,
    )
    model = GapClosedClipModel(config)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model
