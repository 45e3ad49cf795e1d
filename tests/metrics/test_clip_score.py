"""CLIPScore and RefCLIPScore against the paper's formulas in plain Python."""

import math

import numpy as np
import pytest

from .conftest import dot, unit_lists


def draw(rows: int = 12, dim: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Images, captions, and one to four references an image, float32 and of all lengths."""
    random = np.random.default_rng(seed)
    image, caption = random.normal(size=(2, rows, dim)).astype(np.float32)
    references = [random.normal(size=(random.integers(1, 5), dim)).astype(np.float32) for _ in range(rows)]
    return image, caption, references


def naive(image, caption, references) -> dict[str, float]:
    cosines = [dot(x, y) for x, y in zip(unit_lists(image), unit_lists(caption), strict=True)]
    scores = [2.5 * cosine if cosine > 0 else 0.0 for cosine in cosines]
    best = [
        max(dot(vector, other) for other in unit_lists(others))
        for vector, others in zip(unit_lists(caption), references, strict=True)
    ]
    harmonic = [2 / (1 / s + 1 / r) if s > 0 and r > 0 else 0.0 for s, r in zip(scores, best, strict=True)]
    values = (scores, cosines, harmonic, best)
    names = ("clip_score", "image_caption_cosine", "ref_clip_score", "caption_reference_cosine")
    return {name: sum(row) / len(row) for name, row in zip(names, values, strict=True)}


def compute(load, image, caption, references=None):
    inputs = {} if references is None else {"reference_embeds": references}
    return load("clip_score").compute(image_embeds=image, caption_embeds=caption, **inputs)


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition(load, seed):
    inputs = draw(seed=seed)
    assert compute(load, *inputs) == pytest.approx(naive(*inputs), abs=1e-6)


def test_more_rows_than_are_read_at_once(load):
    inputs = draw(rows=2100, dim=3)
    assert compute(load, *inputs) == pytest.approx(naive(*inputs), abs=1e-6)


def test_without_references(load):
    image, caption, references = draw()
    expected = naive(image, caption, references)
    names = ("clip_score", "image_caption_cosine")
    assert compute(load, image, caption) == pytest.approx({name: expected[name] for name in names}, abs=1e-6)


def at(degrees: float) -> list[float]:
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


@pytest.mark.parametrize(
    ("caption", "references", "clip_score", "ref_clip_score"),
    [
        (0, [0], 2.5, 2 * 2.5 * 1 / 3.5),  # at the image and at the reference
        (60, [60, 150], 1.25, 2 * 1.25 * 1 / 2.25),  # cos 60 = 0.5; the best reference is itself
        (60, [0, 180], 1.25, 2 * 1.25 * 0.5 / 1.75),  # the best reference at 60 degrees as well
        (120, [120], 0, 0),  # cosine -0.5 with the image: cut to 0, and the harmonic mean with 0 is 0
        (0, [120, 180], 2.5, 0),  # best cosine with a reference -0.5: cut to 0
        (120, [0], 0, 0),  # both cut to 0
    ],
)
def test_by_hand(load, caption, references, clip_score, ref_clip_score):
    """The image at 0 degrees, all of different lengths."""
    references = [[[3 * x for x in at(degrees)] for degrees in references]]
    result = compute(load, [[2.0, 0.0]], [at(caption)], references)
    assert result["clip_score"] == pytest.approx(clip_score, abs=1e-6)
    assert result["ref_clip_score"] == pytest.approx(ref_clip_score, abs=1e-6)
    assert result["image_caption_cosine"] == pytest.approx(math.cos(math.radians(caption)), abs=1e-6)


def test_batches_add_up(load):
    image, caption, references = draw()
    metric = load("clip_score")
    for start in (0, 5, 10):
        rows = slice(start, start + 5)
        metric.add_batch(image_embeds=image[rows], caption_embeds=caption[rows], reference_embeds=references[rows])
    assert metric.compute() == pytest.approx(naive(image, caption, references), abs=1e-6)
    for x, y in zip(image, caption, strict=True):
        metric.add(image_embeds=x, caption_embeds=y)
    assert metric.compute() == pytest.approx(compute(load, image, caption), abs=1e-6)


def test_errors_name_the_row(load):
    image, caption, references = draw(rows=3, dim=2)
    with pytest.raises(ValueError, match="caption_embeds: row 1 is a zero vector"):
        compute(load, image, caption * [[1], [0], [1]])
    with pytest.raises(ValueError, match="reference_embeds: row 2 has no reference"):
        compute(load, image, caption, [*references[:2], []])
    with pytest.raises(ValueError, match="reference_embeds of row 1: row 0 is a zero vector"):
        compute(load, image, caption, [references[0], [[0.0, 0.0]], references[2]])
    with pytest.raises(ValueError, match="image_embeds have 2 dimensions, caption_embeds 3"):
        compute(load, image, [[1.0, 0.0, 0.0]] * 3)
    with pytest.raises(ValueError, match="image_embeds have 2 dimensions, reference_embeds of row 0 3"):
        compute(load, image, caption, [[[1.0, 0.0, 0.0]]] * 3)
    with pytest.raises(ValueError, match="there are no captions"):
        compute(load, [], [])
