"""Two figures that show a gap or its absence, a panel for each model: a 2-D projection and histograms of cosines."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from .pair_embeddings import PairEmbeddings


# Okabe and Ito's colours, told apart by everyone.
IMAGE_COLOR, TEXT_COLOR = "#0072B2", "#E69F00"
TRUE_COLOR, RANDOM_COLOR = "#009E73", "#CC79A7"
LINE_COLOR, INK = "#555555", "#222222"
PANELS_PER_ROW = 4
MAX_POINTS, MAX_LINES, MAX_RANDOM_PAIRS = 600, 15, 20_000


class Projection(NamedTuple):
    """Held-out pairs seen along two axes of their space; units are those of the embeddings.

    Args:
        image, text: (P, 2) positions of the pairs shown.
        rows: (P,) their rows in the embeddings.
    """

    image: np.ndarray
    text: np.ndarray
    rows: np.ndarray


def project(embeddings: PairEmbeddings) -> Projection:
    """An orthogonal projection that shows the gap at its own length, neither hidden nor made up.

    Horizontal: the direction from the mean text to the mean image. Vertical: the first principal component of both
    modalities stacked, once the horizontal direction is taken out. Both are found on one half of the captions and the
    *other* half is shown. Plain PCA can hide a gap: a few semantic directions often vary more than the two modalities
    lie apart. And the direction between the means of the very points shown parts even two samples of one distribution
    (by about sqrt(2 / N), more than their spread along any one of many dimensions).

    The origin is the middle between the two means of the half used for fitting.
    """
    image, text = embeddings.image_embeds.astype(np.float64), embeddings.text_embeds.astype(np.float64)
    fitted, shown = _halves(embeddings.caption_ids)
    image_mean, text_mean = image[fitted].mean(axis=0), text[fitted].mean(axis=0)
    across = _unit(image_mean - text_mean)
    origin = (image_mean + text_mean) / 2
    stacked = np.concatenate([image[fitted], text[fitted]]) - origin  # (2 F, D)
    stacked -= np.outer(stacked @ across, across)
    stacked -= stacked.mean(axis=0)
    up = np.linalg.eigh(stacked.T @ stacked)[1][:, -1]
    axes = np.stack([across, up], axis=1)  # (D, 2)
    return Projection((image[shown] - origin) @ axes, (text[shown] - origin) @ axes, shown)


def plot_projection(
    embeddings: Mapping[str, PairEmbeddings], metrics: Mapping[str, Mapping[str, float]], path: str | Path
) -> None:
    """Draws one panel for each model, all with the same scale: both modalities under `project`, and lines between some
    true pairs.

    Args:
        embeddings: {model name: its embeddings}.
        metrics: {model name: its metrics}, of which the titles tell gap, true-pair cosine and margin.
        path: PNG file to write.
    """
    figure, panels = _panels(list(embeddings), panel_height=4.35)
    reach = 0.0
    for axes, (name, embedded) in zip(panels, embeddings.items(), strict=True):
        image, text, _ = project(embedded)
        chosen = np.random.default_rng(0).permutation(len(image))[:MAX_POINTS]  # the same pairs in every panel
        image, text = image[chosen], text[chosen]  # (P, 2)
        reach = max(reach, float(np.abs(np.concatenate([image, text])).max()))
        lines = np.stack([image, text], axis=1)[:MAX_LINES]  # (lines, 2 ends, 2)
        axes.plot(lines[:, :, 0].T, lines[:, :, 1].T, color=LINE_COLOR, linewidth=0.7, alpha=0.8, zorder=3)
        for part in np.array_split(np.arange(len(image)), min(10, len(image))):  # in turn: neither hides the other
            axes.scatter(*image[part].T, s=13, marker="o", color=IMAGE_COLOR, alpha=0.55, linewidths=0, zorder=2)
            axes.scatter(*text[part].T, s=15, marker="^", color=TEXT_COLOR, alpha=0.55, linewidths=0, zorder=2)
        means = np.stack([image.mean(axis=0), text.mean(axis=0)])
        axes.plot(*means.T, color=INK, linewidth=2, zorder=4)
        for mean, marker, color in zip(means, "o^", (IMAGE_COLOR, TEXT_COLOR), strict=True):
            axes.scatter(*mean, s=110, marker=marker, color=color, edgecolors="white", linewidths=1.8, zorder=5)
        values = metrics[name]
        _title(
            axes,
            name,
            f"gap {values['modality_gap']:.2f} (debiased {values['debiased_modality_gap']:.2f})\n"
            f"true-pair cosine {values['true_pair_cosine']:.2f}, margin {values['margin']:.2f}",
        )
    for axes in panels:
        axes.set(xlim=(-1.06 * reach, 1.06 * reach), ylim=(-1.06 * reach, 1.06 * reach), aspect="equal")
        axes.locator_params(nbins=7)
        axes.set_xlabel("from the mean text to the mean image")
    panels[0].set_ylabel("first principal component of the rest")
    handles = [
        Line2D([], [], color=IMAGE_COLOR, marker="o", linestyle="", markersize=7, label="images"),
        Line2D([], [], color=TEXT_COLOR, marker="^", linestyle="", markersize=7, label="captions"),
        Line2D([], [], color=LINE_COLOR, linewidth=1, label="a true pair"),
        Line2D([], [], color=INK, linewidth=2.5, label="between the two means"),
    ]
    _save(figure, handles, len(panels), path)


def plot_cosine_histograms(
    embeddings: Mapping[str, PairEmbeddings], metrics: Mapping[str, Mapping[str, float]], path: str | Path
) -> None:
    """Draws one panel for each model, all with the same bins: cosines of the true pairs and of random pairs (i != j).

    Args:
        embeddings, metrics, path: as in `plot_projection`; the dashed means are the metrics.
    """
    figure, panels = _panels(list(embeddings), panel_height=3.4)
    cosines = {name: _cosines(embedded) for name, embedded in embeddings.items()}
    every = np.concatenate([values for pair in cosines.values() for values in pair])
    bins = np.linspace(max(-1.0, every.min() - 0.02), min(1.0, every.max() + 0.02), 61)
    for axes, (name, (true_pairs, random_pairs)) in zip(panels, cosines.items(), strict=True):
        for values, color in ((random_pairs, RANDOM_COLOR), (true_pairs, TRUE_COLOR)):
            if not len(values):  # one pair has no random partner
                continue
            axes.hist(values, bins=bins, density=True, color=color, alpha=0.45, histtype="stepfilled")
            axes.hist(values, bins=bins, density=True, color=color, histtype="step", linewidth=1.4)
        for metric, color in (("true_pair_cosine", TRUE_COLOR), ("random_pair_cosine", RANDOM_COLOR)):
            axes.axvline(metrics[name][metric], color=color, linestyle="--", linewidth=1.8)
        true_cosine, random_cosine = (metrics[name][key] for key in ("true_pair_cosine", "random_pair_cosine"))
        means = f"true pairs {true_cosine:.2f}, random pairs {random_cosine:.2f}"
        _title(axes, name, f"{means}\nmargin {true_cosine - random_cosine:.2f}")
        axes.set(xlim=(bins[0], bins[-1]), xlabel="cosine of image and caption", yticks=[])
    panels[0].set_ylabel("density")
    handles = [
        Patch(facecolor=TRUE_COLOR, alpha=0.6, label="true pairs"),
        Patch(facecolor=RANDOM_COLOR, alpha=0.6, label="random pairs"),
        Line2D([], [], color=INK, linestyle="--", linewidth=1.8, label="their means"),
    ]
    _save(figure, handles, len(panels), path)


def _halves(ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two halves that share no id; all rows twice where there is one id only."""
    distinct, index = np.unique(np.array(ids, dtype=object), return_inverse=True)
    if len(distinct) < 2:
        return np.arange(len(ids)), np.arange(len(ids))
    first = np.random.default_rng(0).permutation(len(distinct))[index] < len(distinct) // 2
    return np.flatnonzero(first), np.flatnonzero(~first)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / (np.linalg.norm(vector) or 1.0)


def _cosines(embeddings: PairEmbeddings) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of all true pairs, and of all random pairs or a sample of them."""
    image, text = embeddings.image_embeds, embeddings.text_embeds
    true_pairs = np.sum(image * text, axis=1)
    n = len(image)
    if n * (n - 1) <= MAX_RANDOM_PAIRS:
        return true_pairs, (image @ text.T)[~np.eye(n, dtype=bool)]
    random = np.random.default_rng(0)
    rows = random.integers(0, n, MAX_RANDOM_PAIRS)
    others = (rows + random.integers(1, n, MAX_RANDOM_PAIRS)) % n  # never the row itself
    return true_pairs, np.sum(image[rows] * text[others], axis=1)


def _wrapped(name: str) -> list[str]:
    return textwrap.wrap(name, 32)


def _panels(names: list[str], panel_height: float) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot, so that nothing global is left behind; `panel_height` in inches, names not included."""
    number, columns = len(names), min(len(names), PANELS_PER_ROW)
    rows = -(-number // columns)
    height = (panel_height + 0.2 * max(len(_wrapped(name)) for name in names)) * rows + 0.3
    figure = Figure(figsize=(0.4 + 3.6 * columns, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    for axes in panels[number:]:
        axes.remove()
    return figure, panels[:number]


def _title(axes: Axes, name: str, figures: str) -> None:
    axes.set_title("\n".join(_wrapped(name)), fontsize=12, fontweight="bold", loc="left", pad=36)
    axes.text(0, 1.02, figures, transform=axes.transAxes, fontsize=9.5, color=INK, verticalalignment="bottom")


def _save(figure: Figure, handles: list[Artist], num_panels: int, path: str | Path) -> None:
    columns = 2 if num_panels == 1 else len(handles)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.15)
