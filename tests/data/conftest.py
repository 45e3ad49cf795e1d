"""Small sources in temporary folders: ROCO's layout, tables beside images; and images to decode."""

import csv
import io
import json
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from gap_closed_clip.data import DataArguments, decode_image


ROWS = [("a/0.png", "zero", "007", "x"), ("a/1.png", "None", "008", ""), ("a/0.png", "again", "007", "y")]


@pytest.fixture(autouse=True)
def offline_with_a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def draw(path: Path, gray: int) -> str:
    """Save an image of one gray value; gives its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), gray).save(path)
    return str(path)


@pytest.fixture
def roco(tmp_path) -> Path:
    """Two splits of three images; captions with the real sets' space after the tab."""
    for split in ("train", "validation"):
        folder = tmp_path / "roco" / split / "radiology"
        for index in range(3):
            draw(folder / "images" / f"{split}_{index}.png", index)
        lines = [f"{split}_{index}\t caption {index} ü\n" for index in range(3)]
        (folder / "captions.txt").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "roco"


def train_folder(roco: Path) -> Path:
    return roco / "train" / "radiology"


def add_caption(roco: Path, line: str) -> None:
    with open(train_folder(roco) / "captions.txt", "a", encoding="utf-8") as file:
        file.write(line)


def gray_of(row: dict) -> int:
    """The gray value that the row's image was drawn with."""
    return decode_image(row["image"]).getpixel((0, 0))[0]


@pytest.fixture
def table(tmp_path) -> Path:
    """A folder with two images, and no table yet."""
    for gray in range(2):
        draw(tmp_path / "table" / "a" / f"{gray}.png", gray)
    return tmp_path / "table"


def write_table(file: Path, rows=ROWS, names=("file", "text", "patient", "label")) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix in (".csv", ".tsv"):
        with open(file, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, delimiter="\t" if file.suffix == ".tsv" else ",").writerows([names, *rows])
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    else:
        Dataset.from_dict({name: [row[i] for row in rows] for i, name in enumerate(names)}).to_parquet(str(file))
    return file


def table_arguments(source: Path, **options) -> DataArguments:
    return DataArguments(source=str(source), image_column="file", caption_column="text", **options)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    """A file of the kind, which is a name of a format in Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data, **options) -> np.ndarray:
    """What `decode_image` makes of the data, (H, W, 3), as signed integers."""
    image = decode_image(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def three(gray: np.ndarray) -> np.ndarray:
    """Gray values (H, W) as three equal channels, (H, W, 3)."""
    return np.stack([gray] * 3, axis=-1)


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (13, 17), dtype=np.uint8)


@pytest.fixture
def ramp12() -> np.ndarray:
    """12-bit values 0..4095 as they lie in 16-bit files."""
    return np.linspace(0, 4095, 64 * 80).round().astype(np.uint16).reshape(64, 80)
