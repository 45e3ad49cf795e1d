"""Measures how far apart the two modalities are, and draws a figure that shows the gap at its own length."""

import math
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D


# Okabe and Ito's colours, told apart by everyone; `style.css` has them, too.
IMAGE_COLOR, TEXT_COLOR, QUERY_COLOR = "#0072B2", "#E69F00", "#D55E00"
LINE_COLOR, INK = "#555555", "#222222"
MAX_LINES = 15


class View(NamedTuple):
    """
    Two orthonormal axes of an embedding space, on which it is drawn.

    Args:
        origin: (D,), the point that is drawn at (0, 0).
        axes: (D, 2), one axis in each column.
        rows: the pairs to draw: those that the axes were not fitted on.
    """

    origin: np.ndarray
    axes: np.ndarray
    rows: np.ndarray

    def __call__(self, embeds: np.ndarray) -> np.ndarray:
        """Project embeddings (P, D) to points (P, 2), in the units of the embeddings."""
        return (embeds - self.origin) @ self.axes


def fit_view(image: np.ndarray, text: np.ndarray, captions: list | np.ndarray) -> View:
    """
    Choose the axes. Horizontal is the direction from the mean text to the mean image; vertical is the first principal
    component of both modalities after the horizontal direction is taken out.

    Both are fitted on one half of the captions, and the other half is to be drawn: the direction between the means of
    the very points drawn would part even two samples of one distribution, and plain PCA can hide a gap. This is the
    definition of `gap_closed_clip.evaluation.figures.project`, which a Space does not have.

    Args:
        image, text: (N, D) unit vectors; row i of each is a pair.
        captions: N captions, or numbers that stand for them; pairs with the same one go into the same half.
    """
    distinct, index = np.unique(np.asarray(captions), return_inverse=True)
    fitted = shown = np.arange(len(index))
    if len(distinct) > 1:
        first = np.random.default_rng(0).permutation(len(distinct))[index] < len(distinct) // 2
        fitted, shown = np.flatnonzero(first), np.flatnonzero(~first)
    image_mean, text_mean = image[fitted].mean(axis=0), text[fitted].mean(axis=0)
    origin, across = (image_mean + text_mean) / 2, image_mean - text_mean
    across = across / (np.linalg.norm(across) or 1.0)
    rest = np.concatenate([image[fitted], text[fitted]]) - origin
    rest -= np.outer(rest @ across, across)
    rest -= rest.mean(axis=0)
    up = np.linalg.eigh(rest.T @ rest)[1][:, -1]
    return View(origin, np.stack([across, up], axis=1), shown)


def measure(image: np.ndarray, text: np.ndarray) -> dict[str, float]:
    """
    Measure the gap, the gap without its sampling floor, the cosines of true and of random pairs, and the margin. They
    are those of the package's metric `modality_gap`.

    Args:
        image, text: (N, D) unit vectors, N > 1; row i of each is a pair.
    """
    n, difference = len(image), image - text
    gap_squared = float(np.sum(difference.mean(axis=0) ** 2))
    spread = float(np.mean(np.sum(difference**2, axis=1))) - gap_squared
    true_sum = float(np.sum(image * text))
    random_pair = (float(image.sum(axis=0) @ text.sum(axis=0)) - true_sum) / (n * (n - 1))
    return {
        "modality_gap": math.sqrt(gap_squared),
        "debiased_modality_gap": math.sqrt(max(0.0, gap_squared - spread / (n - 1))),
        "true_pair_cosine": true_sum / n,
        "random_pair_cosine": random_pair,
        "margin": true_sum / n - random_pair,
    }


def draw(
    image: np.ndarray, text: np.ndarray, view: View, window: np.ndarray, query: np.ndarray | None = None
) -> Figure:
    """
    Draw both modalities of the pairs that `view` names, lines between some true pairs, and the two means.

    Args:
        image, text: (N, D) unit vectors; row i of each is a pair.
        view: axes from `fit_view`.
        window: from `window_of`; the same for every model.
        query: (D,), a visitor's text or image, drawn as a star.
    """
    image, text = view(image[view.rows]), view(text[view.rows])  # (P, 2)
    figure = Figure(figsize=(5, 5.3), layout="constrained", dpi=130)  # without pyplot, nothing global is left behind
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*np.stack([image, text], axis=1)[:MAX_LINES].T, color=LINE_COLOR, linewidth=0.8, alpha=0.8, zorder=2)
    means = np.stack([image.mean(axis=0), text.mean(axis=0)])
    axes.plot(*means.T, color=INK, linewidth=2.2, zorder=4)
    for points, mean, marker, color in ((image, means[0], "o", IMAGE_COLOR), (text, means[1], "^", TEXT_COLOR)):
        axes.scatter(*points.T, s=26, marker=marker, color=color, alpha=0.6, linewidths=0, zorder=3)
        axes.scatter(*mean, s=150, marker=marker, color=color, edgecolors="white", linewidths=2, zorder=5)
    handles = [
        Line2D([], [], color=IMAGE_COLOR, marker="o", linestyle="", markersize=8, label="images"),
        Line2D([], [], color=TEXT_COLOR, marker="^", linestyle="", markersize=8, label="captions"),
        Line2D([], [], color=LINE_COLOR, linewidth=1, label="a true pair"),
        Line2D([], [], color=INK, linewidth=2.5, label="between the means"),
    ]
    if query is not None:
        (point,) = view(query[None])
        axes.scatter(*point, s=330, marker="*", color=QUERY_COLOR, edgecolors="white", linewidths=1.5, zorder=6)
        handles.append(Line2D([], [], color=QUERY_COLOR, marker="*", linestyle="", markersize=14, label="your query"))
    axes.set(xlim=window[0], ylim=window[1], aspect="equal")
    axes.set_xlabel("from the mean caption to the mean image", fontsize=11)
    axes.set_ylabel("first principal component of the rest", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=10)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2 if query is None else 3, frameon=False, fontsize=10.5
    )
    return figure


def window_of(points: list[np.ndarray]) -> np.ndarray:
    """The square that shows all these (P, 2) points, as ((left, right), (bottom, top))."""
    every = np.concatenate(points)
    low, high = every.min(axis=0), every.max(axis=0)
    half = 0.54 * float((high - low).max())
    return np.stack([(low + high) / 2 - half, (low + high) / 2 + half], axis=1)
