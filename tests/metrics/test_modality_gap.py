"""The closed forms against double loops in plain Python."""

import math

import numpy as np
import pytest

from .conftest import dot, random_pairs, unit_lists


def reference(image: np.ndarray, text: np.ndarray) -> dict[str, float]:
    """Every metric from its definition, pair by pair."""
    x, y = unit_lists(image), unit_lists(text)
    n, dim = len(x), len(x[0])
    gap = math.sqrt(sum((sum(r[d] for r in x) / n - sum(r[d] for r in y) / n) ** 2 for d in range(dim)))
    true_pair = sum(dot(a, b) for a, b in zip(x, y, strict=True)) / n

    def off_diagonal(a, b):
        values = [dot(a[i], b[j]) for i in range(n) for j in range(n) if i != j]
        return sum(values) / len(values) if values else math.nan

    squares = [sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) for a, b in zip(x, y, strict=True)]
    debiased = math.nan
    if n > 1:
        debiased = math.sqrt(max(0.0, gap**2 - (sum(squares) / n - gap**2) / (n - 1)))
    random_pair = off_diagonal(x, y)
    return {
        "modality_gap": gap,
        "debiased_modality_gap": debiased,
        "true_pair_cosine": true_pair,
        "random_pair_cosine": random_pair,
        "margin": true_pair - random_pair,
        "mean_cosine_image": off_diagonal(x, x),
        "mean_cosine_text": off_diagonal(y, y),
    }


@pytest.mark.parametrize(("n", "dim"), [(1, 3), (2, 3), (7, 2), (40, 16)])
def test_equals_the_double_loops(load, n, dim):
    image, text = random_pairs(n, dim)
    result = load("modality_gap").compute(image_embeds=image, text_embeds=text)
    assert result == pytest.approx(reference(image, text), abs=1e-9, nan_ok=True)


def test_more_rows_than_are_read_at_once(load):
    """Against whole matrices of cosines."""
    x, y = (z.astype(np.float64) for z in random_pairs(2500, 3))
    result = load("modality_gap").compute(image_embeds=x.astype(np.float32), text_embeds=y.astype(np.float32))
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    others = ~np.eye(2500, dtype=bool)
    gap, d = np.linalg.norm((x - y).mean(axis=0)), x - y
    expected = {
        "modality_gap": gap,
        "debiased_modality_gap": np.sqrt(gap**2 - d.var(axis=0).sum() / 2499),
        "true_pair_cosine": np.diag(x @ y.T).mean(),
        "random_pair_cosine": (x @ y.T)[others].mean(),
        "margin": np.diag(x @ y.T).mean() - (x @ y.T)[others].mean(),
        "mean_cosine_image": (x @ x.T)[others].mean(),
        "mean_cosine_text": (y @ y.T)[others].mean(),
    }
    assert result == pytest.approx(expected, abs=1e-12)


def test_one_pair_defines_only_what_needs_no_second(load):
    result = load("modality_gap").compute(image_embeds=[[3.0, 0.0]], text_embeds=[[0.0, 2.0]])
    assert result["modality_gap"] == pytest.approx(math.sqrt(2))
    assert result["true_pair_cosine"] == 0
    assert all(math.isnan(result[name]) for name in ("debiased_modality_gap", "random_pair_cosine", "margin"))
    assert all(math.isnan(result[name]) for name in ("mean_cosine_image", "mean_cosine_text"))


def test_collapse_closes_the_gap_without_a_margin(load):
    cone = np.ones((5, 4), np.float32)
    result = load("modality_gap").compute(image_embeds=cone, text_embeds=3 * cone)
    expected = {"modality_gap": 0, "true_pair_cosine": 1, "margin": 0, "mean_cosine_image": 1, "mean_cosine_text": 1}
    assert {name: result[name] for name in expected} == pytest.approx(expected)


def test_debiased_gap_takes_the_sampling_floor_away(load):
    """Two samples of one distribution: the plain gap is about sqrt(2 / N), the debiased one is far smaller."""
    metric, plain, debiased = load("modality_gap"), [], []
    for seed in range(20):
        random = np.random.default_rng(seed)
        image, text = random.normal(size=(2, 100, 64)).astype(np.float32)
        result = metric.compute(image_embeds=image, text_embeds=text)
        plain.append(result["modality_gap"])
        debiased.append(result["debiased_modality_gap"] ** 2)
    assert np.mean(plain) == pytest.approx(math.sqrt(2 / 100), rel=0.05)
    assert np.mean(debiased) < 0.1 * 2 / 100


def test_batches_add_up(load):
    image, text = random_pairs(12, 5)
    metric = load("modality_gap")
    for start in (0, 5, 10):
        metric.add_batch(image_embeds=image[start : start + 5], text_embeds=text[start : start + 5])
    assert metric.compute() == pytest.approx(reference(image, text))


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.0, "text_embeds: row 2 is a zero vector"), (math.nan, "text_embeds: row 2 holds NaN or infinity")],
)
def test_a_row_without_direction_is_named(load, value, message):
    image, text = random_pairs(4, 3)
    text[2] = value
    with pytest.raises(ValueError, match=message):
        load("modality_gap").compute(image_embeds=image, text_embeds=text)


def test_shapes_that_do_not_fit_are_named(load):
    with pytest.raises(ValueError, match="image_embeds: rows differ in length, \\[2, 3\\] values"):
        load("modality_gap").compute(image_embeds=[[1.0, 0.0], [1.0, 0.0, 0.0]], text_embeds=[[1.0, 0.0]] * 2)
    with pytest.raises(ValueError, match="image_embeds have 2 dimensions, text_embeds 3"):
        load("modality_gap").compute(image_embeds=[[1.0, 0.0]], text_embeds=[[1.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match="no pairs"):
        load("modality_gap").compute(image_embeds=[], text_embeds=[])
