"""Small pairs in memory, and embeddings whose gap and margin are known."""

import io

import numpy as np
import pytest
from conftest import CAPTIONS, IMAGE_SIZE
from datasets import Dataset, Features, Image, Value
from PIL import Image as Picture

from gap_closed_clip.evaluation import PairEmbeddings


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE + 4, IMAGE_SIZE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Picture.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pairs() -> Dataset:
    """Eight pairs of six images and five captions (one of them twice, in another case), three of them labelled."""
    images = [0, 1, 2, 0, 3, 4, 5, 1]
    captions = [*CAPTIONS[:5], CAPTIONS[1].upper() + "  ", CAPTIONS[2], CAPTIONS[0]]
    rows = {
        "image": [{"bytes": png(number), "path": None} for number in images],
        "caption": captions,
        "image_id": [f"image {number}" for number in images],
        "label": ["CT", "", "MR", "CT", "US", "", "", ""],
    }
    text = Value("string")
    features = Features({"image": Image(decode=False), "caption": text, "image_id": text, "label": text})
    return Dataset.from_dict(rows, features=features)


def synthetic(n: int = 120, dim: int = 24, gap: float = 0.0, common: float = 1.0, seed: int = 0) -> PairEmbeddings:
    """Pairs with `common` content (0: partners have nothing in common), pulled `gap` apart along the last axis."""
    random = np.random.default_rng(seed)
    shared = common * random.normal(size=(n, dim))
    image, text = shared + random.normal(size=(2, n, dim))
    image[:, -1] += gap * np.sqrt(dim)
    text[:, -1] -= gap * np.sqrt(dim)
    image, text = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (image, text))
    return PairEmbeddings(
        image_embeds=image.astype(np.float32),
        text_embeds=text.astype(np.float32),
        image_ids=[f"i{k}" for k in range(n)],
        captions=[f"caption {k}" for k in range(n)],
        labels=["even" if k % 2 == 0 else "odd" for k in range(n)],
    )
