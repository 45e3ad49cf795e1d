"""Two figures that show a gap or its absence, a panel for each model: a 2-D projection and histograms of cosines."""

import itertools
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

from ..disk import replacing
from .every_pair import MEAN, name_for
from .pair_embeddings import PairEmbeddings


# Okabe and Ito's colours, told apart by everyone; one, and a shape, for each modality.
MODALITY_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#F0E442")
MODALITY_MARKERS = ("o", "^", "s", "D", "v", "P")
MODALITY_LABELS = {"image": "images", "text": "captions"}
TRUE_COLOR, RANDOM_COLOR = "#009E73", "#CC79A7"
LINE_COLOR, INK = "#555555", "#222222"
PANELS_PER_ROW = 4
MAX_POINTS, MAX_LINES, MAX_RANDOM_PAIRS = 600, 15, 20_000


class Projection(NamedTuple):
    """Held-out pairs seen along two axes of their space; units are those of the embeddings.

    Args:
        points: by the modality's name (P, 2) positions of the pairs shown; nan where a pair lacks it.
        rows: (P,) their rows in the embeddings.
        across: the two modalities whose means are farthest apart, image and text where there are no others: the
            horizontal axis goes from the mean of the second to that of the first.
    """

    points: dict[str, np.ndarray]
    rows: np.ndarray
    across: tuple[str, str]

    @property
    def image(self) -> np.ndarray:
        """(P, 2) positions of the images."""
        return self.points["image"]

    @property
    def text(self) -> np.ndarray:
        """(P, 2) positions of the captions."""
        return self.points["text"]


def project(embeddings: PairEmbeddings) -> Projection:
    """An orthogonal projection that shows the gap at its own length, neither hidden nor made up.

    Horizontal: the direction from the mean text to the mean image; of more modalities, between those two means that
    are farthest apart. Vertical: the first principal component of all modalities stacked, once the horizontal
    direction is taken out. Both are found on one half of the captions and the *other* half is shown. Plain PCA can
    hide a gap: a few semantic directions often vary more than the modalities lie apart. And the direction between the
    means of the very points shown parts even two samples of one distribution (by about sqrt(2 / N), more than their
    spread along any one of many dimensions).

    The origin is the middle between the two means of the half used for fitting.
    """
    fitted, shown = _halves(_ids_of_halves(embeddings))
    vectors = {name: embeddings.embeds(name).astype(np.float64) for name in embeddings.modalities}
    of_fit = {name: z[fitted][embeddings.present[name][fitted]] for name, z in vectors.items()}
    of_fit = {name: z for name, z in of_fit.items() if len(z)}
    means = {name: z.mean(axis=0) for name, z in of_fit.items()}
    pairs = list(itertools.combinations(means, 2)) or [(name, name) for name in means]
    first, second = max(pairs, key=lambda pair: np.linalg.norm(means[pair[0]] - means[pair[1]]))
    across = _unit(means[first] - means[second])
    origin = (means[first] + means[second]) / 2
    stacked = np.concatenate(list(of_fit.values())) - origin  # (M F, D)
    stacked -= np.outer(stacked @ across, across)
    stacked -= stacked.mean(axis=0)
    up = np.linalg.eigh(stacked.T @ stacked)[1][:, -1]
    axes = np.stack([across, up], axis=1)  # (D, 2)
    points = {name: (z[shown] - origin) @ axes for name, z in vectors.items()}
    for name, positions in points.items():
        positions[~embeddings.present[name][shown]] = np.nan
    return Projection(points, shown, (first, second))


def plot_projection(
    embeddings: Mapping[str, PairEmbeddings], metrics: Mapping[str, Mapping[str, float]], path: str | Path
) -> None:
    """Draws one panel for each model, all with the same scale: all modalities under `project`, and lines between the
    parts of some samples.

    Args:
        embeddings: {model name: its embeddings}.
        metrics: {model name: its metrics}, of which the titles tell gap, true-pair cosine and margin.
        path: PNG file to write.
    """
    figure, panels = _panels(list(embeddings), panel_height=4.35)
    projections = {name: project(embedded) for name, embedded in embeddings.items()}
    reach = 0.0
    for axes, (name, projection) in zip(panels, projections.items(), strict=True):
        chosen = np.random.default_rng(0).permutation(len(projection.rows))[:MAX_POINTS]  # the same in every panel
        points = {modality: positions[chosen] for modality, positions in projection.points.items()}
        reach = max(reach, *(float(np.nanmax(np.abs(z))) for z in points.values() if np.isfinite(z).any()))
        _draw_points(axes, points)
        _title(axes, name, _title_of_gap(metrics[name]))
        first, second = projection.across
        axes.set_xlabel(f"from the mean {second} to the mean {first}")
    reach = reach or 1.0  # all modalities in one point
    for axes in panels:
        axes.set(xlim=(-1.06 * reach, 1.06 * reach), ylim=(-1.06 * reach, 1.06 * reach), aspect="equal")
        axes.locator_params(nbins=7)
    panels[0].set_ylabel("first principal component of the rest")
    names = dict.fromkeys(modality for projection in projections.values() for modality in projection.points)
    handles: list[Artist] = [
        Line2D([], [], color=color, marker=marker, linestyle="", markersize=7, label=label)
        for color, marker, label in (_look(number, modality) for number, modality in enumerate(names))
    ]
    handles += [
        Line2D([], [], color=LINE_COLOR, linewidth=1, label="a true pair" if len(names) == 2 else "one sample"),
        Line2D([], [], color=INK, linewidth=2.5, label=f"between the {'two ' * (len(names) == 2)}means"),
    ]
    _save(figure, handles, len(panels), path)


def _draw_points(axes: Axes, points: dict[str, np.ndarray]) -> None:
    """The points (P, 2) of each modality, lines between those of some samples, and the means."""
    stacked = np.stack(list(points.values()), axis=1)  # (P, M, 2)
    enough = stacked[np.isfinite(stacked[:, :, 0]).sum(axis=1) > 1][:MAX_LINES]
    for sample in enough:
        ends = sample[np.isfinite(sample[:, 0])]
        ends = ends if len(ends) == 2 else np.concatenate([ends, ends[:1]])  # around
        axes.plot(*ends.T, color=LINE_COLOR, linewidth=0.7, alpha=0.8, zorder=3)
    looks = [_look(number, name) for number, name in enumerate(points)]
    number = len(stacked)
    for part in np.array_split(np.arange(number), min(10, number)):  # in turn: none hides another
        for modality, (color, marker, _) in enumerate(looks):
            size = 13 if marker == "o" else 15
            spots = stacked[part, modality].T
            axes.scatter(*spots, s=size, marker=marker, color=color, alpha=0.55, linewidths=0, zorder=2)
    means = [np.nanmean(z, axis=0) if np.isfinite(z).any() else None for z in points.values()]
    known = np.array([mean for mean in means if mean is not None])
    axes.plot(*np.concatenate([known, known[:1]] if len(known) > 2 else [known]).T, color=INK, linewidth=2, zorder=4)
    for mean, (color, marker, _) in zip(means, looks, strict=True):
        if mean is not None:
            axes.scatter(*mean, s=110, marker=marker, color=color, edgecolors="white", linewidths=1.8, zorder=5)


def _look(number: int, modality: str) -> tuple[str, str, str]:
    """Colour, shape and label of a modality."""
    color = MODALITY_COLORS[number % len(MODALITY_COLORS)]
    marker = MODALITY_MARKERS[number % len(MODALITY_MARKERS)]
    return color, marker, MODALITY_LABELS.get(modality, modality)


def _title_of_gap(values: Mapping[str, float]) -> str:
    prefix, what = (MEAN, "mean ") if f"{MEAN}margin" in values else ("", "")
    gap, debiased, cosine, margin = (
        values[f"{prefix}{name}"] for name in ("modality_gap", "debiased_modality_gap", "true_pair_cosine", "margin")
    )
    return f"{what}gap {gap:.2f} (debiased {debiased:.2f})\ntrue-pair cosine {cosine:.2f}, margin {margin:.2f}"


def plot_cosine_histograms(
    embeddings: Mapping[str, PairEmbeddings], metrics: Mapping[str, Mapping[str, float]], path: str | Path
) -> None:
    """Draws one panel for each model, and of more modalities for every two of them, all with the same bins: cosines of
    the true pairs and of random pairs (i != j).

    Args:
        embeddings, metrics, path: as in `plot_projection`; the dashed means are the metrics.
    """
    shown = [
        (name, pair, embedded.having(*pair))
        for name, embedded in embeddings.items()
        for pair in itertools.combinations(embedded.modalities, 2)
        if len(embedded.having(*pair))
    ]
    titles = {pair: " and ".join(pair).replace("text", "caption") for _, pair, _ in shown}
    several = any(embedded.further for embedded in embeddings.values())
    names = [f"{name}: {titles[pair]}" if several else name for name, pair, _ in shown]
    per_model = max(1, *(sum(other == name for other, _, _ in shown) for name in embeddings))
    columns = per_model if 1 < per_model <= PANELS_PER_ROW else PANELS_PER_ROW
    figure, panels = _panels(names, panel_height=3.4, per_row=columns)
    cosines = [_cosines(both.embeds(pair[0]), both.embeds(pair[1])) for _, pair, both in shown]
    every = np.concatenate([values for found in cosines for values in found])
    bins = np.linspace(max(-1.0, every.min() - 0.02), min(1.0, every.max() + 0.02), 61)
    for axes, title, (name, pair, _), (true_pairs, random_pairs) in zip(panels, names, shown, cosines, strict=True):
        for values, color in ((random_pairs, RANDOM_COLOR), (true_pairs, TRUE_COLOR)):
            if not len(values):  # one pair has no random partner
                continue
            axes.hist(values, bins=bins, density=True, color=color, alpha=0.45, histtype="stepfilled")
            axes.hist(values, bins=bins, density=True, color=color, histtype="step", linewidth=1.4)
        true_cosine, random_cosine = (
            metrics[name][name_for(metric, *pair)] for metric in ("true_pair_cosine", "random_pair_cosine")
        )
        for cosine, color in ((true_cosine, TRUE_COLOR), (random_cosine, RANDOM_COLOR)):
            axes.axvline(cosine, color=color, linestyle="--", linewidth=1.8)
        means = f"true pairs {true_cosine:.2f}, random pairs {random_cosine:.2f}"
        _title(axes, title, f"{means}\nmargin {true_cosine - random_cosine:.2f}")
        axes.set(xlim=(bins[0], bins[-1]), xlabel=f"cosine of {titles[pair]}", yticks=[])
    panels[0].set_ylabel("density")
    handles = [
        Patch(facecolor=TRUE_COLOR, alpha=0.6, label="true pairs"),
        Patch(facecolor=RANDOM_COLOR, alpha=0.6, label="random pairs"),
        Line2D([], [], color=INK, linestyle="--", linewidth=1.8, label="their means"),
    ]
    _save(figure, handles, len(panels), path)


def _ids_of_halves(embeddings: PairEmbeddings) -> list[str]:
    """Captions, by which halves are drawn; a pair without one is of its own."""
    if not embeddings.further:
        return embeddings.caption_ids
    return [caption or f"row {row}, no caption" for row, caption in enumerate(embeddings.caption_ids)]


def _halves(ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two halves that share no id; all rows twice where there is one id only."""
    distinct, index = np.unique(np.array(ids, dtype=object), return_inverse=True)
    if len(distinct) < 2:
        return np.arange(len(ids)), np.arange(len(ids))
    first = np.random.default_rng(0).permutation(len(distinct))[index] < len(distinct) // 2
    return np.flatnonzero(first), np.flatnonzero(~first)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / (np.linalg.norm(vector) or 1.0)


def _cosines(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of all true pairs, and of all random pairs or a sample of them, from -1 to 1 as the bins are.

    Args:
        first, second: (N, D) unit vectors of two modalities.
    """
    true_pairs = np.sum(first * second, axis=1).clip(-1, 1)  # float32 rounds those of equal vectors to 1.0000001, too
    n = len(first)
    if n * (n - 1) <= MAX_RANDOM_PAIRS:
        return true_pairs, (first @ second.T)[~np.eye(n, dtype=bool)].clip(-1, 1)
    random = np.random.default_rng(0)
    rows = random.integers(0, n, MAX_RANDOM_PAIRS)
    others = (rows + random.integers(1, n, MAX_RANDOM_PAIRS)) % n  # never the row itself
    return true_pairs, np.sum(first[rows] * second[others], axis=1).clip(-1, 1)


def _wrapped(name: str) -> list[str]:
    return textwrap.wrap(name, 32)


def _panels(names: list[str], panel_height: float, per_row: int = PANELS_PER_ROW) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot, so that nothing global is left behind; `panel_height` in inches, names not included."""
    number, columns = len(names), min(len(names), per_row)
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
    with replacing(path) as draft:
        figure.savefig(draft, bbox_inches="tight", pad_inches=0.15)
