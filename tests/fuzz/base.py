"""What is whole, before something of it is spoilt: a tiny run, its model folder, images and a table of pairs."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

import gap_closed_clip_cli


CONFIG = {
    "model": {
        "vision": {
            "architecture": "eva02_tiny_patch14_224",
            "model_args": {"img_size": 28, "embed_dim": 48, "depth": 1, "num_heads": 3},
        },
        "text": {
            "hidden_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "intermediate_size": 64,
            "vocab_size": 300,
            "max_position_embeddings": 96,
        },
        "projection_dim": 16,
    },
    "data": {
        "phantom_train_pairs": 8,
        "phantom_validation_pairs": 4,
        "phantom_test_pairs": 4,
        "phantom_size": 32,
    },
    "training": {
        "output_dir": "run",
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "eval_strategy": "no",
        "save_strategy": "no",
        "final_split": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    },
}
CAPTIONS = ["Axial CT of the chest.", "Normal radiograph.", "Stone, in the gallbladder.", "MR of the brain."]


@dataclass
class Base:
    """A folder with `config.yaml` and `model`, which is trained already."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @classmethod
    def make(cls, folder: Path) -> "Base":
        base = cls(folder)
        base.config.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
        if gap_closed_clip_cli.main("train", [str(base.config), f"output_dir={base.model}"]):
            raise RuntimeError("The tiny run failed.")
        return base


def image_file(seed: int = 0, kind: str = "PNG") -> bytes:
    """Gray noise of 32 x 30 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 32), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def rows() -> list[dict]:
    """A good table's rows; their images are `0.png` to `3.png`."""
    return [
        {"image": f"{number}.png", "caption": caption, "age": 30 + number, "sex": "FM"[number % 2]}
        for number, caption in enumerate(CAPTIONS)
    ]


def write_images(folder: Path) -> None:
    for number in range(len(CAPTIONS)):
        (folder / f"{number}.png").write_bytes(image_file(number))
