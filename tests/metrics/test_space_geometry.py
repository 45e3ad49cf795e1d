"""Uniformity, effective rank and relative gap against double loops and scipy, separability against scikit-learn."""

import math

import numpy as np
import pytest
from scipy.stats import entropy
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupKFold, StratifiedKFold, cross_val_predict
from sklearn.preprocessing import StandardScaler

from .conftest import dot, random_pairs, traced_peak, unit_lists


UNIFORMITY = ("uniformity_image", "uniformity_text", "uniformity_cross")


def reference(image: np.ndarray, text: np.ndarray) -> dict[str, float]:
    """From the definitions, pair by pair; the rank from the singular values of the centered vectors."""
    x, y = unit_lists(image), unit_lists(text)
    n = len(x)

    def others(a, b, value):
        return sum(value(a[i], b[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    def potential(a, b):
        return math.exp(-2 * sum((p - q) ** 2 for p, q in zip(a, b, strict=True)))

    def distance(a, b):
        return (1 - dot(a, b)) / 2

    pair = sum(distance(a, b) for a, b in zip(x, y, strict=True)) / n
    found = dict(
        zip(UNIFORMITY, (math.log(others(*both, potential)) for both in ((x, x), (y, y), (x, y))), strict=True)
    )
    for name, z in (("image", np.array(x)), ("text", np.array(y))):
        found[f"effective_rank_{name}"] = math.exp(entropy(np.linalg.svd(z - z.mean(axis=0))[1] ** 2))
    return found | {"relative_gap": pair / (pair + (others(x, x, distance) + others(y, y, distance)) / 2)}


@pytest.mark.parametrize(("n", "dim", "block_size"), [(2, 3, 1024), (7, 2, 3), (40, 16, 16), (20, 30, 7)])
def test_equals_the_double_loops(load, n, dim, block_size):
    image, text = random_pairs(n, dim)
    result = load("space_geometry").compute(image_embeds=image, text_embeds=text, block_size=block_size)
    expected = reference(image, text)
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def reference_separability(items: np.ndarray, kinds: np.ndarray, groups: np.ndarray) -> float:
    predicted = np.empty(len(items))
    for fitted, tested in GroupKFold(5).split(items, groups=groups):
        scaler = StandardScaler(with_std=False).fit(items[fitted])
        length = np.linalg.norm(scaler.transform(items[fitted])) / math.sqrt(len(fitted))
        model = LogisticRegression(C=32, max_iter=1000, class_weight="balanced")
        model.fit(scaler.transform(items[fitted]) / length, kinds[fitted])
        predicted[tested] = model.predict(scaler.transform(items[tested]) / length)
    return balanced_accuracy_score(kinds, predicted)


@pytest.mark.parametrize("shift", [0.0, 0.1, 1.0])
def test_separability_equals_scikit_learn(load, shift):
    """Every pair a family of its own; the vectors' scale is one number, as a classifier of one space needs it."""
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 100, 12)).astype(np.float32)
    image[:, 0] += shift
    text[:, 0] -= shift
    found = load("space_geometry").compute(image_embeds=image, text_embeds=text)["modality_separability"]
    items = np.array(unit_lists(image) + unit_lists(text))
    kinds, pairs = np.repeat([0, 1], 100), np.tile(np.arange(100), 2)
    assert found == pytest.approx(reference_separability(items, kinds, pairs), abs=1e-12)
    lowest, highest = {0.0: (0.35, 0.6), 0.1: (0.4, 0.65), 1.0: (0.75, 1)}[shift]
    assert lowest < found < highest


def test_no_relative_of_a_tested_item_is_fitted_on(load):
    """60 images, and 3 captions of each, which are alike: a caption whose siblings are known is known for a text."""
    rng = np.random.default_rng(0)
    image, text = (np.repeat(z, 3, axis=0) for z in rng.normal(size=(2, 60, 60)))
    text = text + 0.01 * rng.normal(size=text.shape)
    ids = {"image_ids": [f"i{n // 3}" for n in range(180)], "caption_ids": [f"c{n}" for n in range(180)]}
    found = load("space_geometry").compute(image_embeds=image, text_embeds=text, **ids)["modality_separability"]
    items, kinds = np.concatenate([image[::3], text]), np.repeat([0, 1], [60, 180])
    model = LogisticRegression(max_iter=1000, class_weight="balanced")
    mixed = cross_val_predict(model, items, kinds, cv=StratifiedKFold(5, shuffle=True, random_state=0))
    assert 0.35 < found < 0.6 and balanced_accuracy_score(kinds, mixed) > found + 0.15


def test_rare_images_count_as_much_as_frequent_captions(load):
    """30 images with five captions each, and a gap that is too small to tell all of them apart."""
    rng = np.random.default_rng(0)
    image, text = np.repeat(rng.normal(size=(30, 6)), 5, axis=0).astype(np.float32), rng.normal(size=(150, 6))
    text = (text + [2, 0, 0, 0, 0, 0]).astype(np.float32)
    ids = {"image_ids": [f"i{n // 5:02}" for n in range(150)], "caption_ids": [f"c{n:03}" for n in range(150)]}
    found = load("space_geometry").compute(image_embeds=image, text_embeds=text, **ids)["modality_separability"]
    items = np.array(unit_lists(image[::5]) + unit_lists(text))
    groups = np.concatenate([np.arange(30), np.arange(150) // 5])
    assert found == pytest.approx(reference_separability(items, np.repeat([0, 1], [30, 150]), groups), abs=1e-12)
    assert 0.55 < found < 0.9


def test_known_spaces(load):
    """Images on all axes of eight dimensions, captions opposite to them, then all in one point."""
    axes = np.eye(8, dtype=np.float32)
    result = load("space_geometry").compute(image_embeds=axes, text_embeds=-axes)
    assert result["uniformity_image"] == result["uniformity_text"] == pytest.approx(-4)  # |x_i - x_j|^2 = 2
    assert result["uniformity_cross"] == pytest.approx(-4)
    assert result["effective_rank_image"] == pytest.approx(7)  # around their mean the axes span 7 dimensions alike
    assert result["relative_gap"] == pytest.approx(2 / (2 + 1))
    point = np.ones((6, 4), np.float32)
    result = load("space_geometry").compute(image_embeds=point, text_embeds=3 * point)
    assert [result[name] for name in UNIFORMITY] == pytest.approx([0, 0, 0], abs=1e-7)
    assert all(math.isnan(result[name]) for name in ("effective_rank_image", "effective_rank_text", "relative_gap"))
    assert result["modality_separability"] == 0.5
    opposite = load("space_geometry").compute(image_embeds=point, text_embeds=-point)
    assert opposite["relative_gap"] == pytest.approx(1) and opposite["uniformity_cross"] == pytest.approx(-8)
    assert opposite["modality_separability"] == 1


def test_one_pair_and_one_family_leave_nothing_to_say(load):
    assert all(
        map(math.isnan, load("space_geometry").compute(image_embeds=[[1.0, 2]], text_embeds=[[2.0, 1]]).values())
    )
    image, text = random_pairs(6, 3)
    found = load("space_geometry").compute(image_embeds=image, text_embeds=text, image_ids=["a"] * 6)
    assert [name for name, value in found.items() if math.isnan(value)] == ["modality_separability"]


def test_memory_stays_below_a_square_of_distances(load):
    """4,000 x 4,000 distances would take 128 MB."""
    image, text = random_pairs(4000, 16)
    with traced_peak() as peak:
        load("space_geometry").compute(image_embeds=image, text_embeds=text, block_size=512)
    assert peak.bytes < 24e6
