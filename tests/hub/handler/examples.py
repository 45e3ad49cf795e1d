"""Images, texts and requests that the tests of the handler share, and a folder to serve."""

import base64
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.hub.reload import HANDLER, HUB


LABELS = ["pleural effusion", "pneumothorax", "a normal chest"]
TEXTS = ["Chest radiograph with left pleural effusion.", "Sagittal T2 weighted MR image of the brain."]
ZERO_SHOT, RETRIEVAL = "zero-shot-image-classification", "image-text-retrieval"
URL_NOT_FETCHED = "is a URL, and URLs are not fetched: send the bytes of the image file as base64."


def noise(seed: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (40, 36, len(mode)), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode)


def file_bytes(image: Image.Image, kind: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def b64(data: bytes | Image.Image) -> str:
    return base64.b64encode(data if isinstance(data, bytes) else file_bytes(data)).decode()


IMAGES = [noise(seed) for seed in range(3)]
IMAGE = b64(IMAGES[0])


def save(folder: Path, model: GapClosedClipModel, processor) -> Path:
    """A folder as it is published."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in HANDLER:
        shutil.copy(HUB / name, folder)
    return folder


def near(expected) -> list | dict:
    """The same with every number approximate."""
    if isinstance(expected, list):
        return [near(entry) for entry in expected]
    if isinstance(expected, dict):
        return {key: near(entry) for key, entry in expected.items()}
    return pytest.approx(expected, abs=1e-5) if isinstance(expected, float) else expected


def classified(image, labels=LABELS, template="Medical image of {}.") -> dict:
    return {"inputs": image, "parameters": {"candidate_labels": labels, "hypothesis_template": template}}


def search(query, gallery, **parameters) -> dict:
    return {"inputs": {"query": query, "gallery": gallery}, "parameters": parameters}
