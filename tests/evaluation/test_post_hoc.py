"""Post-hoc methods against naive versions, row by row in float64, and against scipy and scikit-learn."""

import math

import numpy as np
import pytest
import scipy.linalg
from sklearn.covariance import LedoitWolf

from gap_closed_clip.evaluation import evaluate_embeddings, modality_means, post_hoc
from gap_closed_clip.evaluation.post_hoc import METHODS, fit

from .conftest import synthetic


def normalized(row: np.ndarray) -> np.ndarray:
    return row / math.sqrt(sum(value * value for value in row))


def rows_of(seed: int = 1, n: int = 60, dim: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Training pairs with a gap: rows that are no unit vectors."""
    pairs = synthetic(n=n, dim=dim, gap=0.5, seed=seed)
    length = np.random.default_rng(seed).uniform(0.5, 3, size=(n, 1))
    return length * pairs.image_embeds.astype(np.float64), length[::-1] * pairs.text_embeds.astype(np.float64)


def naive(method: str, images: np.ndarray, texts: np.ndarray) -> tuple:
    """Two functions of a row each, from the formulas in the papers."""
    x, y = [normalized(row) for row in images], [normalized(row) for row in texts]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    if method == "mean_shift":
        delta = mean_x - mean_y
        return lambda z: normalized(z - 0.5 * delta), lambda z: normalized(z + 0.5 * delta)
    if method == "centering":
        return lambda z: normalized(z - mean_x), lambda z: normalized(z - mean_y)
    if method == "realign":
        energy_x = sum(float((row - mean_x) @ (row - mean_x)) for row in x) / len(x)
        energy_y = sum(float((row - mean_y) @ (row - mean_y)) for row in y) / len(y)
        scale = math.sqrt(energy_x / (energy_y + 1e-8))
        anchored = [normalized(mean_x + scale * (row - mean_y)) for row in y]
        drifted = sum(anchored) / len(y)
        return normalized, lambda z: normalized(normalized(mean_x + scale * (z - mean_y)) - drifted + mean_x)
    if method == "whitening":
        covariances = [LedoitWolf().fit(np.stack(z)).covariance_ for z in (x, y)]
        roots = [np.linalg.inv(scipy.linalg.sqrtm(covariance)) for covariance in covariances]
        return lambda z: normalized(roots[0] @ (z - mean_x)), lambda z: normalized(roots[1] @ (z - mean_y))
    rotation, _ = scipy.linalg.orthogonal_procrustes(np.stack(y) - mean_y, np.stack(x) - mean_x)
    return lambda z: normalized(z - mean_x), lambda z: normalized((z - mean_y) @ rotation)


@pytest.mark.parametrize("method", METHODS)
def test_others_are_mapped_as_the_formulas_say(method):
    train, others = rows_of(), rows_of(seed=2, n=7)
    maps = fit(method, *train)
    for found, expected, rows in zip((maps.image, maps.text), naive(method, *train), others, strict=True):
        np.testing.assert_allclose(found(rows), [expected(normalized(row)) for row in rows], atol=1e-9)


def test_whitening_by_a_given_shrinkage():
    images, texts = rows_of()
    found = post_hoc.whitening(images, texts, shrinkage=0.3)
    x = np.stack([normalized(row) for row in images])
    covariance = np.cov(x.T, bias=True)
    shrunk = 0.7 * covariance + 0.3 * np.trace(covariance) / 8 * np.eye(8)
    expected = (x - x.mean(0)) @ scipy.linalg.inv(scipy.linalg.sqrtm(shrunk))
    np.testing.assert_allclose(found.image(images), [normalized(row) for row in expected], atol=1e-9)
    whole, none = (post_hoc.whitening(images, texts, shrinkage=value).image for value in (1.0, 0.0))
    np.testing.assert_allclose(whole(images), post_hoc.centering(images, texts).image(images), atol=1e-9)
    white = x @ none.weight.T + none.bias  # before it is normalised
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(8), atol=1e-9)


def test_whitening_with_fewer_pairs_than_dimensions():
    images, texts = rows_of(n=5)
    found = post_hoc.whitening(images, texts).image(rows_of(seed=2)[0])
    assert np.isfinite(found).all()
    with pytest.raises(ValueError, match="5 pairs do not spread in all of 8 dimensions: raise shrinkage"):
        post_hoc.whitening(images, texts, shrinkage=0.0)
    with pytest.raises(ValueError, match="shrinkage is 1.5; use a number from 0 to 1"):
        post_hoc.whitening(images, texts, shrinkage=1.5)
    with pytest.raises(ValueError, match="all embeddings of a modality are the same"):
        post_hoc.whitening(np.ones((5, 8)), texts)


def test_centering_of_projections_is_that_of_the_rows_as_they_are():
    images, texts = rows_of()
    found = post_hoc.centering(images, texts, normalize=False).text(texts)
    np.testing.assert_allclose(found, [normalized(row - texts.mean(0)) for row in texts], atol=1e-12)
    assert np.abs(found - post_hoc.centering(images, texts).text(texts)).max() > 0.01  # which is something else


def test_realign_leaves_the_images_and_moves_the_texts_to_them():
    train = synthetic(n=4000, gap=0.5, seed=1)
    maps = fit("realign", train.image_embeds, train.text_embeds)
    np.testing.assert_allclose(maps.image(train.image_embeds), train.image_embeds, atol=1e-6)
    gap = maps.text(train.text_embeds).mean(0) - train.image_embeds.mean(0)
    before = train.text_embeds.mean(0) - train.image_embeds.mean(0)
    assert np.linalg.norm(gap) < 0.02 * np.linalg.norm(before)


def test_procrustes_finds_a_rotation_that_is_there():
    images, _ = rows_of()
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(8, 8)))[0]
    x = np.stack([normalized(row) for row in images])
    maps = fit("procrustes", x, x @ turn)
    np.testing.assert_allclose(maps.text(x @ turn), maps.image(x), atol=1e-9)
    with pytest.raises(ValueError, match="60 images and 59 texts; it needs pairs"):
        fit("procrustes", x, x[1:])


@pytest.mark.parametrize("method", METHODS)
def test_the_gap_of_held_out_pairs_closes(method):
    train, test = synthetic(n=400, gap=0.5, seed=1), synthetic(gap=0.5, seed=2)
    mapped = fit(method, train.image_embeds, train.text_embeds).apply(test)
    before, after = evaluate_embeddings(test), evaluate_embeddings(mapped)
    assert before["debiased_modality_gap"] > 0.6 and after["debiased_modality_gap"] < 0.1
    assert mapped.captions == test.captions and test.image_embeds[0, -1] > 0.3  # the original is untouched
    assert mapped.image_embeds.dtype == mapped.text_embeds.dtype == np.float32


def test_modality_means():
    train = synthetic(n=400, gap=0.5, seed=1)
    np.testing.assert_allclose(modality_means(train)[0], train.image_embeds.astype(np.float64).mean(axis=0))


def test_a_row_of_zeros_stays_finite():
    maps = fit("centering", *rows_of())
    assert np.isfinite(maps.image(np.zeros((1, 8)))).all()


@pytest.mark.parametrize(
    ("method", "images", "texts", "message"),
    [
        ("meanshift", np.ones((3, 4)), np.ones((3, 4)), "no post-hoc method 'meanshift': did you mean 'mean_shift'?"),
        ("centering", np.ones(4), np.ones((3, 4)), r"image_embeds has the shape \(4,\)"),
        ("centering", np.ones((3, 4)), np.ones((0, 4)), r"text_embeds has the shape \(0, 4\)"),
        ("realign", np.ones((3, 4)), np.full((3, 4), np.nan), "text_embeds holds NaN"),
        ("mean_shift", np.ones((3, 4)), np.ones((3, 5)), "image_embeds have 4 dimensions and text_embeds 5"),
    ],
)
def test_what_can_not_be_fitted_on(method, images, texts, message):
    with pytest.raises(ValueError, match=message):
        fit(method, images, texts)
