"""Accuracy and calibration against scikit-learn, naive loops and hand-written numbers."""

import math

import numpy as np
import pandas
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, mean_squared_error

from gap_closed_clip.metrics.zero_shot_classification import _calibration_error

from .conftest import random_pairs, unit_lists


NAMES = ("accuracy", "balanced_accuracy", "ece", "brier", "nll", "chance_accuracy", "majority_accuracy")


def compute(load, images, labels, classes, logit_scale=10.0, **settings) -> dict[str, float]:
    inputs = {"image_embeds": images, "labels": labels, "class_embeds": classes, "logit_scale": logit_scale}
    return load("zero_shot_classification").compute(**inputs, **settings)


def made_up(n: int = 200, num_classes: int = 6, num_templates: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images near their classes, labels of which one class is frequent and one is missing, and templates."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(num_classes, 8))
    labels = rng.choice(num_classes - 1, size=n, p=[0.5, 0.2, 0.1, 0.1, 0.1])
    images = (centers[labels] + 1.5 * rng.normal(size=(n, 8))) * rng.uniform(0.1, 9, size=(n, 1))
    templates = (centers + 0.5 * rng.normal(size=(num_templates, *centers.shape))) * rng.uniform(1, 5)
    return images.astype(np.float32), labels, templates.astype(np.float32)


def naive_calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int) -> float:
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(probabilities, labels, strict=True):
        bins.setdefault(math.ceil(row.max() * num_bins), []).append((row.max(), row.argmax() == label))
    error = 0.0
    for found in bins.values():
        confidence, accuracy = (sum(column) / len(found) for column in zip(*found, strict=True))
        error += len(found) / len(labels) * abs(accuracy - confidence)
    return error


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize(("logit_scale", "num_bins", "block_size"), [(1.0, 15, 4096), (10.0, 10, 37), (15.0, 15, 64)])
@pytest.mark.parametrize("ensemble", [False, True])
def test_equals_scikit_learn(load, logit_scale, num_bins, block_size, ensemble):
    images, labels, templates = made_up()
    if ensemble:
        units = np.array([unit_lists(template) for template in templates])
        classes, given = np.array(unit_lists(units.mean(axis=0))), templates
    else:
        classes, given = np.array(unit_lists(templates[0])), templates[0]
    result = compute(load, images, labels, given, logit_scale, num_bins=num_bins, block_size=block_size)
    probabilities = softmax(logit_scale * np.array(unit_lists(images)) @ classes.T, axis=1)
    predicted = probabilities.argmax(axis=1)
    assert result == pytest.approx(
        {
            "zero_shot_accuracy": accuracy_score(labels, predicted),
            "zero_shot_balanced_accuracy": balanced_accuracy_score(labels, predicted),
            "zero_shot_ece": naive_calibration_error(probabilities, labels, num_bins),
            "zero_shot_brier": 6 * mean_squared_error(np.eye(6)[labels], probabilities),
            "zero_shot_nll": log_loss(labels, probabilities, labels=range(6)),
            "zero_shot_chance_accuracy": 1 / 6,
            "zero_shot_majority_accuracy": np.mean(labels == 0),
        },
        abs=1e-9,
    )
    assert 0.3 < result["zero_shot_accuracy"] < 0.95  # the test tells something


def test_written_out(load):
    """Cosines 1 and 0 for either class at a scale of log 3: probabilities 3/4 and 1/4, one image of three wrong."""
    found = compute(load, [[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [0, 1, 1], [[1.0, 0.0], [0.0, 3.0]], math.log(3))
    assert found == pytest.approx(
        {
            "zero_shot_accuracy": 2 / 3,
            "zero_shot_balanced_accuracy": (1 + 1 / 2) / 2,
            "zero_shot_ece": 3 / 4 - 2 / 3,
            "zero_shot_brier": (2 * 2 / 16 + 2 * 9 / 16) / 3,
            "zero_shot_nll": -(2 * math.log(3 / 4) + math.log(1 / 4)) / 3,
            "zero_shot_chance_accuracy": 1 / 2,
            "zero_shot_majority_accuracy": 2 / 3,
        },
        abs=1e-7,
    )
    assert list(found) == [f"zero_shot_{name}" for name in NAMES]


def test_ties_count_against_the_model(load):
    found = compute(load, [[1.0, 0.0], [1.0, 1.0]], [0, 1], [[1.0, 0.0], [0.0, 1.0]])
    assert found["zero_shot_accuracy"] == 0.5
    same = compute(load, np.ones((4, 3), np.float32), [0, 1, 0, 1], np.ones((2, 3), np.float32))
    assert same["zero_shot_accuracy"] == same["zero_shot_balanced_accuracy"] == 0
    assert same["zero_shot_nll"] == pytest.approx(math.log(2)) and same["zero_shot_ece"] == pytest.approx(0.5)


def test_rounding_breaks_no_tie(load):
    """One direction at several lengths: the unit vectors differ in their last bits."""
    rng = np.random.default_rng(0)
    direction = rng.integers(1, 50, 100)
    images, classes = (
        np.outer(lengths, direction).astype(np.float32) for lengths in (np.arange(1, 40), [3, 5, 7, 11])
    )
    for label in range(4):
        assert compute(load, images, np.full(39, label), classes)["zero_shot_accuracy"] == 0


def test_a_bin_holds_its_upper_edge():
    """(0, 1/2] holds a probability of 1/2 that is right, (1/2, 1] one of 0.6 that is wrong."""
    found = _calibration_error(np.array([True, False]), np.array([0.5, 0.6]), num_bins=2)
    assert found == pytest.approx((0.5 + 0.6) / 2)


def test_tensors_and_batches_give_the_same(load):
    images, labels, templates = made_up(20)
    expected = compute(load, images, labels, templates)
    assert compute(load, torch.tensor(images), torch.tensor(labels), torch.tensor(templates)) == expected
    metric = load("zero_shot_classification")
    for rows in (slice(0, 8), slice(8, None)):
        metric.add_batch(image_embeds=images[rows], labels=labels[rows])
    assert metric.compute(class_embeds=templates, logit_scale=10.0) == pytest.approx(expected, abs=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scale_that_is_trained_is_a_number(load, shape):
    """`model.logit_scale.exp()`, as the page of the metric says; some models have one of one element."""
    images, classes, labels = np.eye(3)[[0, 1, 2, 0]], np.eye(3), [0, 1, 2, 2]
    scale = torch.nn.Parameter(torch.full(shape, 2.0)).exp()
    assert compute(load, images, labels, classes, scale) == compute(load, images, labels, classes, scale.item())


def test_labels_and_classes_in_other_containers(load):
    images, labels, templates = made_up(20)
    expected = compute(load, images, labels, templates)
    chosen = pandas.DataFrame({"label": labels}, index=range(100, 120))["label"]  # of some rows of a larger table
    for given in (chosen, labels.astype(float), [torch.tensor(label) for label in labels], tuple(labels.tolist())):
        assert compute(load, images, given, templates) == expected
    metric = load("zero_shot_classification")
    for rows in (slice(0, 7), slice(7, 20)):
        metric.add_batch(image_embeds=images[rows], labels=chosen.iloc[rows])
    assert metric.compute(class_embeds=templates, logit_scale=10.0) == expected

    rounded = torch.tensor(templates).bfloat16()
    expected = compute(load, images, labels, rounded.float())
    assert compute(load, images, labels, [part.requires_grad_() for part in rounded]) == expected


def test_batches_of_labels_that_are_no_classes_are_refused(load):
    images, _, templates = made_up(3)
    for labels, row in (([0, 0.5, 1], 1), (["0", "1", "2"], 0), ([0, 1, None], 2), ([[0], [1], [2]], 0)):
        with pytest.raises(ValueError, match=rf"labels: row {row} is .*: give the number of its class"):
            load("zero_shot_classification").add_batch(image_embeds=images, labels=labels)
    with pytest.raises(ValueError, match=r"class_embeds: the parts differ in shape, \[\(5, 8\), \(6, 8\)\]"):
        compute(load, images, [0, 1, 2], [templates[0], templates[1, :5]])


def test_what_does_not_fit_is_named(load):
    images, classes = random_pairs(3, 4)
    with pytest.raises(ValueError, match="labels: row 1 is 3, but the 3 classes are 0 to 2"):
        compute(load, images, [0, 3, -1], classes)
    for labels, row in (
        (["CT", "MR", "CT"], "0 is 'CT'"),
        ([0, 1.5, 1], "1 is 1.5"),
        (np.array(["CT"] * 3), "0 is 'CT'"),
        ([0, math.nan, 1], "1 is nan"),
        ([0, 1, pandas.NA], "2 is <NA>"),
    ):
        with pytest.raises(ValueError, match=rf"labels: row {row}: give the number of its class, .*names.index"):
            compute(load, images, labels, classes)
    with pytest.raises(ValueError, match="image_embeds have 4 dimensions, class_embeds 3"):
        compute(load, images, [0, 1, 2], classes[:, :3])
    with pytest.raises(ValueError, match="class_embeds of template 1: row 0 is a zero vector"):
        compute(load, images, [0, 1, 2], np.stack([classes, 0 * classes]))
    with pytest.raises(ValueError, match="the templates of class 0 cancel out"):
        compute(load, images, [0, 1, 2], np.stack([classes, -classes]))
    with pytest.raises(ValueError, match="num_bins is 0, it has to be 1 or more"):
        compute(load, np.eye(2), [0, 1], np.eye(2), num_bins=0)
    with pytest.raises(ValueError, match="logit_scale is 0"):
        compute(load, images, [0, 1, 2], classes, 0)
    with pytest.raises(ValueError, match="class_embeds: the shape is .4,."):
        compute(load, images, [0, 1, 2], classes[0])
