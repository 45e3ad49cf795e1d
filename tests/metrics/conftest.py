"""Metric modules loaded as anybody would load them, and embeddings to measure."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest

import gap_closed_clip

from .tiny_wordnet import TinyWordNet


METRICS_FOLDER = Path(gap_closed_clip.__file__).parent / "metrics"


@pytest.fixture
def load(tmp_path):
    """load("modality_gap") -> the metric, with its cache in a folder of the test's own."""

    def load(name: str, **kwargs) -> evaluate.Metric:
        return evaluate.load(str(METRICS_FOLDER / f"{name}.py"), cache_dir=str(tmp_path / "cache"), **kwargs)

    return load


@pytest.fixture
def tiny_wordnet(tmp_path, monkeypatch) -> TinyWordNet:
    """NLTK with a WordNet of a few words, whatever is installed."""
    return TinyWordNet(tmp_path / "nltk_data", monkeypatch)


def random_pairs(n: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(n, dim) float32 images and texts of all lengths, with a gap and with something in common."""
    random = np.random.default_rng(seed)
    common, offset = random.normal(size=(n, dim)), random.normal(size=dim)
    image = common + random.normal(size=(n, dim)) + offset
    text = common + random.normal(size=(n, dim)) - offset
    lengths = random.uniform(0.1, 10, size=(2, n, 1))
    return (lengths[0] * image).astype(np.float32), (lengths[1] * text).astype(np.float32)


def unit_lists(matrix: np.ndarray) -> list[list[float]]:
    """Rows of length 1, in plain Python."""
    rows = [[float(value) for value in row] for row in matrix]
    return [[value / sum(v * v for v in row) ** 0.5 for value in row] for row in rows]


def dot(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


@contextmanager
def traced_peak() -> Iterator[SimpleNamespace]:
    """`bytes`, after the block: the most that numpy and Python had allocated in it at one time."""
    peak = SimpleNamespace(bytes=None)
    tracemalloc.start()
    try:
        yield peak
        peak.bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
