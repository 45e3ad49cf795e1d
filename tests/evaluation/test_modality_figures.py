"""Figures and post-hoc maps of three modalities."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from gap_closed_clip.evaluation import evaluate_embeddings, plot_cosine_histograms, plot_projection
from gap_closed_clip.evaluation.figures import project
from gap_closed_clip.evaluation.post_hoc import METHODS, fit, fit_pairs

from .conftest import synthetic
from .records import of_three


def test_the_widest_gap_is_drawn_at_its_length():
    embeddings = of_three(n=400, lacking=0.1, gap=0.1)
    embeddings.further["record"][:, 7] += 2 * embeddings.present["record"]
    z = embeddings.further["record"]
    z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-9)
    projection = project(embeddings)
    assert "record" in projection.across
    first, second = (np.nanmean(projection.points[name], axis=0) for name in projection.across)
    expected = evaluate_embeddings(embeddings, grouping=False)
    gap = max(expected[f"{pair}_debiased_modality_gap"] for pair in ("image_record", "text_record"))
    assert first[0] - second[0] == pytest.approx(gap, rel=0.1)
    lacking = ~embeddings.present["record"][projection.rows]
    assert np.isnan(projection.points["record"][lacking]).all() and lacking.any()


@pytest.mark.parametrize("plot", [plot_projection, plot_cosine_histograms])
def test_files_of_models_with_and_without_a_record(plot, tmp_path):
    embeddings = {"ours": of_three(lacking=0.2), "CLIP": of_three(gap=0.3), "two": synthetic()}
    metrics = {name: evaluate_embeddings(found) for name, found in embeddings.items()}
    plot(embeddings, metrics, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        figure = np.asarray(image.convert("RGB"))
    colors = {tuple(color) for color in figure.reshape(-1, 3)[::3]}
    assert figure.std() > 10 and all((edge == 255).all() for edge in (figure[:5], figure[-5:], figure[:, :5]))
    if plot is plot_projection:  # the legend has each modality's own
        assert {(0, 114, 178), (230, 159, 0), (0, 158, 115)} <= colors


@pytest.mark.parametrize("plot", [plot_projection, plot_cosine_histograms])
def test_nobody_has_an_image(plot, tmp_path):
    embeddings = of_three(n=12)
    embeddings.present["image"][:] = False
    found = {"ours": embeddings.with_embeds({})}
    assert not found["ours"].image_embeds.any()
    plot(found, {"ours": evaluate_embeddings(found["ours"])}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize("method", METHODS)
def test_every_modality_is_mapped_by_those_that_have_it(method):
    """Each by itself or onto the images, as texts are: by the two-modality method on the samples concerned."""
    embeddings = of_three(n=200, lacking=0.2, gap=0.3)
    found = fit_pairs(method, embeddings).apply(embeddings)
    if method != "mean_shift":
        for name in ("text", "record"):
            both = embeddings.having("image", name)
            image, other = embeddings.having("image").image_embeds, embeddings.having(name).embeds(name)
            if method == "procrustes":
                image, other = both.image_embeds, both.embeds(name)
            maps = fit(method, image, other)
            present = embeddings.present[name]
            np.testing.assert_allclose(
                found.embeds(name)[present], maps.text(embeddings.embeds(name)[present]), atol=1e-6
            )
            if method != "procrustes":
                expected = maps.image(embeddings.image_embeds[embeddings.present["image"]])
                np.testing.assert_allclose(found.image_embeds[embeddings.present["image"]], expected, atol=1e-6)
    for name, present in embeddings.present.items():
        assert not found.embeds(name)[~present].any()
        np.testing.assert_allclose(np.linalg.norm(found.embeds(name)[present], axis=1), 1, atol=1e-6)
    before, after = (evaluate_embeddings(z, grouping=False) for z in (embeddings, found))
    assert after["debiased_centroid_spread"] < 0.3 * before["debiased_centroid_spread"]


def test_two_modalities_are_mapped_as_ever():
    embeddings = synthetic(gap=0.3)
    for method in METHODS:
        expected = fit(method, embeddings.image_embeds, embeddings.text_embeds).apply(embeddings)
        found = fit_pairs(method, embeddings).apply(embeddings)
        np.testing.assert_array_equal(found.image_embeds, expected.image_embeds)
        np.testing.assert_array_equal(found.text_embeds, expected.text_embeds)


def test_three_means_meet_where_two_do():
    """mean_shift of three modalities of which the third is the mean of the others: as of the two."""
    embeddings = of_three(n=50, gap=0.3)
    two = fit("mean_shift", embeddings.image_embeds, embeddings.text_embeds)
    middle = (embeddings.image_embeds.mean(0) + embeddings.text_embeds.mean(0)) / 2
    record = embeddings.further["record"].astype(np.float64)
    shifted = fit_pairs("mean_shift", embeddings)
    common = (2 * middle + record.mean(0)) / 3
    np.testing.assert_allclose(two.image.bias, middle - embeddings.image_embeds.mean(0), atol=1e-6)
    np.testing.assert_allclose(shifted.further["record"].bias, common - record.mean(0), atol=1e-6)


def test_a_modality_that_nobody_has():
    embeddings = of_three(n=10)
    embeddings.present["record"][:] = False
    with pytest.raises(ValueError, match="none of the pairs has the modality record"):
        fit_pairs("centering", dataclasses.replace(embeddings))
