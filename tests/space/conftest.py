"""The Space's folder on the path, as on the Hub; a gallery of six images and five captions, and a saved tiny model."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, tiny_config
from PIL import Image

from gap_closed_clip import GapClosedClipModel


SPACE = Path(__file__).parents[2] / "space"
sys.path.insert(0, str(SPACE))
if SPACE.is_dir():
    # benchmarks/ has a module of this name, too: in whatever order the folders are collected, here it is the Space's.
    import search  # noqa: F401

PAIRS = [(0, 0), (1, 1), (2, 2), (0, 3), (3, 4), (4, 1), (5, 2)]  # image, caption


def write_gallery(folder: Path) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(6):
        pixels = random.integers(0, 256, (36, 30), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    captions = [CAPTIONS[caption] for _, caption in PAIRS]
    captions[-1] = f"  {captions[-1].upper()} "  # the same caption in another case
    rows = [{"image": f"{image}.png", "caption": caption} for (image, _), caption in zip(PAIRS, captions, strict=True)]
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    (folder / "about.json").write_text('{"source": "phantoms", "split": "test"}')
    return folder


@pytest.fixture
def gallery_folder(tmp_path) -> Path:
    return write_gallery(tmp_path / "gallery")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tiny_processor) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    GapClosedClipModel(tiny_config()).eval().save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def engines(tmp_path_factory, model_folder) -> list:
    from search import Gallery, load_engines

    gallery = Gallery.load(write_gallery(tmp_path_factory.mktemp("space") / "gallery"))
    return load_engines({"MODEL_ID": str(model_folder), "CLIP_MODEL_ID": str(model_folder)}, gallery)
