"""The Space computes its figure and its numbers as the package does."""

import numpy as np
import pytest

from gap_closed_clip.evaluation import PairEmbeddings, evaluate_embeddings
from gap_closed_clip.evaluation.figures import project

from .conftest import SPACE


projection = pytest.importorskip("projection", reason=f"{SPACE} is missing")


def embeddings(n: int = 60, gap: float = 0.4, captions: int = 40) -> PairEmbeddings:
    random = np.random.default_rng(0)
    shared = random.normal(size=(n, 24))
    image, text = shared + random.normal(size=(2, n, 24))
    image[:, -1] += 2 * gap
    text[:, -1] -= 2 * gap
    image, text = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (image, text))
    return PairEmbeddings(
        image, text, [f"i{k}" for k in range(n)], [f"caption {k % captions:03d}" for k in range(n)], n * [""]
    )


@pytest.mark.parametrize("captions", [40, 1])
def test_the_view_is_the_packages_projection(captions):
    pairs = embeddings(captions=captions)
    view = projection.fit_view(pairs.image_embeds, pairs.text_embeds, [int(c.split()[1]) for c in pairs.captions])
    reference = project(pairs)
    np.testing.assert_array_equal(view.rows, reference.rows)
    np.testing.assert_allclose(view(pairs.image_embeds[view.rows]), reference.image, atol=1e-9)
    np.testing.assert_allclose(view(pairs.text_embeds[view.rows]), reference.text, atol=1e-9)


def test_the_numbers_are_the_packages_metrics():
    pairs = embeddings()
    measured = projection.measure(pairs.image_embeds, pairs.text_embeds)
    reference = evaluate_embeddings(pairs)
    assert measured == {name: pytest.approx(reference[name], abs=1e-6) for name in measured}
    assert measured["debiased_modality_gap"] > 0.1


@pytest.mark.parametrize("query", [None, np.eye(24)[0]])
def test_everything_drawn_is_inside_the_window(query):
    pairs = embeddings()
    view = projection.fit_view(pairs.image_embeds, pairs.text_embeds, pairs.captions)
    points = [view(part[view.rows]) for part in (pairs.image_embeds, pairs.text_embeds)]
    window = projection.window_of(points)
    assert np.ptp(window, axis=1)[0] == pytest.approx(np.ptp(window, axis=1)[1])
    for part in points:
        assert (part > window[:, 0]).all() and (part < window[:, 1]).all()
    figure = projection.draw(pairs.image_embeds, pairs.text_embeds, view, window, query)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert ("your query" in labels) == (query is not None)
