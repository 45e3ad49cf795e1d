"""Figures of a results file of evidence.py: curves, gap against scores, the map of weights, too long a training."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from evidence_results import DEBIASED_GAP, GAP, MARGIN, RANDOM_PAIRS, TASKS, Column, Evidence, p_words
from evidence_tables import RECALL, association, map_cells, robustness_runs
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle


# Okabe and Ito's colours, told apart by everyone; the baseline is black. Shapes and dashes tell more methods apart.
INK, MIDDLE, GREY = "#222222", "#777777", "#BBBBBB"
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d", "H")
DASHES = ("-", "--", ":", "-.")
PANELS_PER_ROW = 4
HATCHES = {"collapse": "////", "scatter": "...."}
BUDGET_TITLES = {"shared": "shared budget", "own": "own budgets"}
GRID = np.linspace(0, 1, 101)  # of the training's progress


class Look(NamedTuple):
    """How a method is drawn, the same in every figure."""

    color: str
    marker: str
    dash: str


def looks(evidence: Evidence) -> dict[str, Look]:
    """{method: its look}."""
    found = {evidence.baseline: Look(INK, MARKERS[0], "-")}
    others = [name for name in evidence.results["methods"] if name != evidence.baseline]
    for number, name in enumerate(others):
        dash = DASHES[number // len(COLORS) % len(DASHES)]
        found[name] = Look(COLORS[number % len(COLORS)], MARKERS[(number + 1) % len(MARKERS)], dash)
    return {name: found[name] for name in evidence.results["methods"] if name in found}


def draw(results: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """
    Draw what the results have into `evidence_NAME_FIGURE.png`.

    Args:
        results: as evidence.py writes them.
        folder: of the figures.

    Returns:
        {figure: its file's name}, as results["figures"] has them.
    """
    evidence = Evidence(results)
    files = {}
    for name, plot in PLOTS.items():
        figure = plot(evidence)
        if figure is not None:
            files[name] = f"evidence_{results['name']}_{name}.png"
            folder.mkdir(parents=True, exist_ok=True)
            # Without matplotlib's version, so that the same results give the same bytes.
            metadata = {"Software": None}
            figure.savefig(folder / files[name], bbox_inches="tight", pad_inches=0.15, metadata=metadata)
    return files


# Over the training.


def plot_curves(evidence: Evidence) -> Figure | None:
    """Gap and true-pair cosine over the training: a row for each budget, a line for each method."""
    budgets = [name for name in evidence.budgets if _curves(evidence, name)]
    if not budgets:
        return None
    figure, panels = _panels(2 * len(budgets), per_row=2, width=4.8, height=3.1)
    drawn: list[str] = []
    for row, budget in enumerate(budgets):
        for axes, column, label in zip(panels[2 * row :], (1, 2), ("modality gap", "true-pair cosine"), strict=False):
            for method, curves in _curves(evidence, budget).items():
                look = looks(evidence)[method]
                rows = [np.interp(GRID, curve[:, 0], curve[:, column]) for curve in curves]
                _band(axes, dict(zip(GRID.tolist(), np.transpose(rows).tolist(), strict=True)), look, marker="")
                drawn.append(method)
            axes.set(xlim=(0, 1), xlabel="progress of the training")
            axes.xaxis.set_major_formatter(_percent)
            _title(axes, f"{label}, {BUDGET_TITLES[budget]}" if len(budgets) > 1 else label)
    _legend(figure, _lines(evidence, drawn, marker=False))
    return figure


def _curves(evidence: Evidence, budget: str) -> dict[str, list[np.ndarray]]:
    """{method: the curve (P, 3) of each of its runs}; those without one are left out."""
    found: dict[str, list[np.ndarray]] = {}
    for name in evidence.methods(budget):
        runs = [run for run in evidence.runs if (run["method"], run["budget"]) == (name, budget)]
        curves = [np.array(run["curve"], dtype=float) for run in runs if run.get("curve")]
        if curves:
            found[name] = curves
    return found


def _band(axes: Axes, values: Mapping[float, Sequence[float]], look: Look, marker: str) -> None:
    """A line of the means at each place, and a band of one standard deviation where there are several values."""
    places = list(values)
    mean = np.array([np.mean(found) for found in values.values()])
    axes.plot(
        places, mean, color=look.color, linestyle=look.dash, marker=marker, markersize=5, linewidth=1.8, zorder=3
    )
    if any(len(found) > 1 for found in values.values()):
        spread = np.array([np.std(found, ddof=1) if len(found) > 1 else 0.0 for found in values.values()])
        axes.fill_between(places, mean - spread, mean + spread, color=look.color, alpha=0.15, linewidth=0, zorder=2)


# The gap against scores.


def plot_gap_and_scores(evidence: Evidence) -> Figure | None:
    """A panel for each task: every run's gap and score. Grey is what is not separable from the baseline."""
    scope = evidence.main_scope
    tasks = [task for task in evidence.present(TASKS, scope)]
    gaps = evidence.present((DEBIASED_GAP, GAP), scope)
    if not tasks or not gaps:
        return None
    figure, panels = _panels(len(tasks), PANELS_PER_ROW, width=3.3, height=2.9)
    drawn: dict[str, list[str]] = {}
    grey = False
    for axes, task in zip(panels, tasks, strict=True):
        for budget in evidence.budgets:
            for name in evidence.methods(budget):
                plain = evidence.separable(name, budget, scope, task) is False and name != evidence.baseline
                _points(axes, evidence, (name, budget), (gaps[0], task), plain)
                grey |= plain
                drawn.setdefault(budget, []).append(name)
        if task.form == "{:.1%}":
            axes.yaxis.set_major_formatter(_percent)
        axes.set_xlabel(gaps[0].words)
        axes.locator_params(nbins=5, steps=[1, 2, 5, 10])
        _title(axes, task.label, _words_of_panel(evidence, gaps[0], task))
    handles = _lines(evidence, [name for names in drawn.values() for name in names], line=False)
    if len(drawn) > 1:
        handles += [_dot(MIDDLE, MIDDLE, "filled: own budget"), _dot("none", MIDDLE, "hollow: shared budget")]
    _legend(figure, handles + ([_dot(GREY, GREY, "not separable from the baseline")] if grey else []))
    return figure


def _points(axes: Axes, evidence: Evidence, of: tuple[str, str], columns: tuple[Column, Column], plain: bool) -> None:
    """A method's runs at a budget: filled at its own, hollow at the shared one where there are both."""
    (name, budget), look = of, looks(evidence)[of[0]]
    x, y = (evidence.values(name, budget, evidence.main_scope, column) for column in columns)
    color = GREY if plain else look.color
    hollow = budget == "shared" and len(evidence.budgets) > 1
    face = "none" if hollow else color
    axes.scatter(
        x, y, s=30, marker=look.marker, facecolors=face, edgecolors=color, linewidths=1.1, zorder=2 + (not plain)
    )


def _words_of_panel(evidence: Evidence, gap: Column, task: Column) -> str:
    """The correlation over all runs, and whether the task is one whose differences were not tested."""
    found = association(evidence, gap, task)
    words = p_words(found.p) if found else ""
    sign = "" if words.startswith("<") else "= "
    tested = any(
        evidence.separable(name, budget, evidence.main_scope, task) is not None
        for budget in evidence.budgets
        for name in evidence.methods(budget)
    )
    parts = [f"ρ = {found.rho:+.2f}", f"p {sign}{words}"] if found else []
    return ", ".join([*parts, *([] if tested else ["not tested"])])


# The map over the weights.


def plot_weight_map(evidence: Evidence) -> Figure | None:
    """Heat maps of R@10, margin and random pairs: ATP weights upwards, CU weights to the right."""
    cells = map_cells(evidence)
    if not cells:
        return None
    align, uniformity = (sorted({weights[axis] for weights in cells}) for axis in (0, 1))
    figure, panels = _panels(3, 3, width=1.2 + 0.62 * len(uniformity), height=1.2 + 0.5 * len(align))
    for axes, column in zip(panels, (RECALL, MARGIN, RANDOM_PAIRS), strict=True):
        values = np.full((len(align), len(uniformity)), np.nan)
        for (first, second), (found, mark) in cells.items():
            row, place = align.index(first), uniformity.index(second)
            values[row, place] = found[column.name]
            if mark:
                axes.add_patch(_hatched(place, row, mark))
        _heat(axes, values, "{:.0%}" if column is RECALL else "{:.2f}")
        axes.set_xticks(range(len(uniformity)), [f"{weight:g}" for weight in uniformity])
        axes.set_yticks(range(len(align)), [f"{weight:g}" for weight in align])
        axes.set_xlabel("weight of Centroid Uniformity")
        _title(axes, column.label)
    panels[0].set_ylabel("weight of Align True Pairs")
    marks = dict.fromkeys(mark for _, mark in cells.values() if mark)
    _legend(figure, [Patch(facecolor="white", edgecolor=INK, hatch=HATCHES[mark], label=mark) for mark in marks])
    return figure


def _heat(axes: Axes, values: np.ndarray, form: str) -> None:
    """Colours and numbers (A, U); the numbers in whichever of black and white is easier to read."""
    scale = colormaps["cividis"]
    image = axes.imshow(values, origin="lower", cmap=scale, aspect="auto")
    for (row, place), value in np.ndenumerate(values):
        if math.isnan(value):
            continue
        red, green, blue, _ = scale(image.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        box = {"facecolor": scale(image.norm(value)), "edgecolor": "none", "pad": 1.2}  # no hatch behind a number
        color = "white" if dark else "black"
        axes.text(
            place, row, form.format(value), ha="center", va="center", fontsize=9, color=color, bbox=box, zorder=4
        )


def _hatched(place: int, row: int, mark: str) -> Rectangle:
    return Rectangle((place - 0.5, row - 0.5), 1, 1, fill=False, hatch=HATCHES[mark], edgecolor="white", linewidth=0)


# Too long a training.


def plot_robustness(evidence: Evidence) -> Figure | None:
    """R@10 over the number of epochs, a line for each method."""
    found = robustness_runs(evidence)
    if not found:
        return None
    figure, (axes,) = _panels(1, 1, width=5.4, height=3.4)
    for name, runs in found.items():
        look = looks(evidence)[name]
        _band(axes, runs, look, look.marker)
    lengths = sorted({epochs for runs in found.values() for epochs in runs})
    if len(lengths) > 1 and lengths[0] > 0 and lengths[-1] >= 4 * lengths[0]:
        axes.set_xscale("log")
    axes.set_xticks(lengths, [f"{epochs:g}" for epochs in lengths])
    axes.minorticks_off()
    axes.set_xlabel("epochs")
    axes.yaxis.set_major_formatter(_percent)
    _title(axes, RECALL.label)
    _legend(figure, _lines(evidence, list(found)))
    return figure


# Panels and legends.


def _percent(value: float, _: int) -> str:
    """A tick's label."""
    return f"{round(100 * value, 6):g}%"


def _panels(number: int, per_row: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure without pyplot, so that nothing global is left behind; sizes of a panel in inches."""
    columns = min(number, per_row)
    rows = -(-number // columns)
    figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    for axes in panels[number:]:
        axes.remove()
    return figure, panels[:number]


def _title(axes: Axes, name: str, figures: str = "") -> None:
    axes.set_title(
        "\n".join(textwrap.wrap(name, 36)), fontsize=12, fontweight="bold", loc="left", pad=22 if figures else 8
    )
    axes.text(0, 1.02, figures, transform=axes.transAxes, fontsize=9.5, color=INK, verticalalignment="bottom")


def _lines(evidence: Evidence, names: Sequence[str], marker: bool = True, line: bool = True) -> list[Artist]:
    """A handle for each of the methods, in the order of the file."""
    return [
        Line2D(
            [],
            [],
            color=look.color,
            marker=look.marker if marker else "",
            linestyle=look.dash if line else "",
            linewidth=1.8,
            markersize=6,
            label=name,
        )
        for name, look in looks(evidence).items()
        if name in names
    ]


def _dot(face: str, edge: str, label: str) -> Line2D:
    return Line2D(
        [], [], marker="o", linestyle="", markersize=6, markerfacecolor=face, markeredgecolor=edge, label=label
    )


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Below the panels, in as many columns as fit the figure's width."""
    if not handles:
        return
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / (0.6 + 0.085 * longest))))
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, frameon=False, fontsize=10)


PLOTS: dict[str, Callable[[Evidence], Figure | None]] = {
    "curves": plot_curves,
    "gap_and_scores": plot_gap_and_scores,
    "weight_map": plot_weight_map,
    "robustness": plot_robustness,
}
