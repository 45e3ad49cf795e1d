"""The projection tells the truth about the gap; the files come out whole and leave nothing behind."""

import sys

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from gap_closed_clip.evaluation import (
    PairEmbeddings,
    evaluate_embeddings,
    plot_cosine_histograms,
    plot_projection,
)
from gap_closed_clip.evaluation.figures import project

from .conftest import synthetic


def between_means(embeddings) -> np.ndarray:
    projection = project(embeddings)
    return projection.image.mean(axis=0) - projection.text.mean(axis=0)


def hidden_gap(n=400, dim=60, seed=0) -> PairEmbeddings:
    """A gap along an axis that varies less than three others: PCA would draw those."""
    random = np.random.default_rng(seed)
    shared = random.normal(size=(n, dim)) * np.concatenate([[6, 5, 4], np.full(dim - 3, 0.3)])
    image, text = shared + 0.5 * random.normal(size=(2, n, dim))
    image[:, -1] += 2
    text[:, -1] -= 2
    image, text = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (image, text))
    ids = [str(k) for k in range(n)]
    return PairEmbeddings(image.astype(np.float32), text.astype(np.float32), ids, ids, [""] * n)


def test_a_gap_is_drawn_at_its_length_even_if_other_directions_vary_more():
    embeddings = hidden_gap()
    gap = evaluate_embeddings(embeddings)["debiased_modality_gap"]
    assert gap > 0.4
    assert np.linalg.norm(between_means(embeddings)) == pytest.approx(gap, rel=0.1)
    stacked = np.concatenate([embeddings.image_embeds, embeddings.text_embeds])
    components = np.linalg.svd(stacked - stacked.mean(axis=0))[2][:2]
    halves = components @ (embeddings.image_embeds.mean(axis=0) - embeddings.text_embeds.mean(axis=0))
    assert np.linalg.norm(halves) < 0.2 * gap  # what plain PCA would have shown


def test_no_gap_is_made_up():
    """Two samples of one distribution, fewer pairs than dimensions: their own mean direction would part them."""
    shifts, naive = [], []
    for seed in range(10):
        embeddings = synthetic(n=60, dim=200, common=0, seed=seed)
        shifts.append(between_means(embeddings)[0])
        difference = embeddings.image_embeds.mean(axis=0) - embeddings.text_embeds.mean(axis=0)
        naive.append(np.linalg.norm(difference))
    assert np.mean(naive) > 0.15
    assert abs(np.mean(shifts)) < 0.03


def test_projection_is_orthogonal_and_of_held_out_captions():
    embeddings = synthetic(n=60, gap=0.3)
    embeddings.captions[:] = [f"caption {k // 2}" for k in range(60)]  # neighbours share theirs
    projection = project(embeddings)
    shown = {embeddings.captions[row] for row in projection.rows}
    assert len(projection.rows) == 30 and len(shown) == 15
    image = embeddings.image_embeds[projection.rows]
    inside = np.linalg.norm(image[:, None] - image[None], axis=-1)
    drawn = np.linalg.norm(projection.image[:, None] - projection.image[None], axis=-1)
    assert (drawn <= inside + 1e-6).all()  # never longer than it is


def test_vertical_axis_is_the_widest_direction_left():
    random = np.random.default_rng(0)
    image, text = random.normal(size=(2, 200, 5)) * [0.1, 1, 0.1, 0.1, 0.1] + [0, 0, 0, 0, 0]
    image[:, 0] += 3
    text[:, 0] -= 3
    ids = [str(k) for k in range(200)]
    projection = project(PairEmbeddings(image, text, ids, ids, [""] * 200))
    assert np.abs(np.corrcoef(projection.image[:, 1], image[projection.rows, 1])[0, 1]) > 0.99
    assert projection.image[:, 0].mean() == pytest.approx(3, abs=0.1)
    assert projection.text[:, 0].mean() == pytest.approx(-3, abs=0.1)


@pytest.mark.parametrize("plot", [plot_projection, plot_cosine_histograms])
@pytest.mark.parametrize("number", [1, 3, 6])
def test_files(plot, number, tmp_path):
    embeddings = {f"model {k} with quite a long name indeed": synthetic(gap=k / 10) for k in range(number)}
    metrics = {name: evaluate_embeddings(found) for name, found in embeddings.items()}
    plot(embeddings, metrics, tmp_path / "new folder" / "figure.png")
    figure = np.asarray(Image.open(tmp_path / "new folder" / "figure.png").convert("L"))
    assert figure.shape[1] > 500 * min(number, 4) and figure.std() > 10
    edges = (figure[:5], figure[-5:], figure[:, :5], figure[:, -5:])
    assert all((edge == 255).all() for edge in edges)  # nothing is cut off
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


@pytest.mark.parametrize("plot", [plot_projection, plot_cosine_histograms])
@pytest.mark.parametrize("n", [1, 2])
def test_hardly_any_pairs(plot, n, tmp_path):
    embeddings = {"tiny": synthetic(n=n)}
    plot(embeddings, {"tiny": evaluate_embeddings(embeddings["tiny"])}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.filterwarnings("error")
def test_a_collapsed_space_is_drawn_whole(tmp_path, monkeypatch):
    """float32 rounds cosines of equal vectors to 1.0000001 at times: they were outside of all bins."""
    point = np.random.default_rng(10).normal(size=(1, 9))
    point = np.repeat(point / np.linalg.norm(point) * (1 + 2e-7), 20, axis=0).astype(np.float32)
    assert (np.sum(point * point, axis=1) > 1).all()
    ids = [str(row) for row in range(20)]
    embeddings = {"collapsed": PairEmbeddings(point, point, ids, ids, [""] * 20)}
    metrics = {"collapsed": evaluate_embeddings(embeddings["collapsed"], grouping=False)}
    drawn = []
    hist = Axes.hist
    monkeypatch.setattr(Axes, "hist", lambda *args, **kwargs: drawn.append(args[1]) or hist(*args, **kwargs))
    plot_cosine_histograms(embeddings, metrics, tmp_path / "cosines.png")
    plot_projection(embeddings, metrics, tmp_path / "projection.png")
    assert {len(values) for values in drawn} == {20, 20 * 19} and max(values.max() for values in drawn) <= 1
