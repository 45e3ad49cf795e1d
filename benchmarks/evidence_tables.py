"""Tables of a report of evidence.py: methods beside one another, comparisons, tuning, weights, too long a training."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evidence_results import (
    DEBIASED_GAP,
    GAP,
    MARGIN,
    PERCENT,
    RANDOM_PAIRS,
    TASKS,
    Column,
    Correlation,
    Evidence,
    chance_of,
    column_of,
    form_of,
    label_of,
    p_words,
    points,
    spearman,
    value_of,
)
from measure import markdown_table

from gap_closed_clip.evaluation.tables import cell, table


NOT_SEPARABLE, NOT_TESTED = "≈", "°"
COMPARISON_HEAD = ["metric", "method", "difference", "95% interval", "p", "Holm's p", "groups", "seeds", "test"]
RECALL = column_of("recall@10")
# The map of the weights: what counts as collapse, and as scatter.
COLLAPSED_COSINE, TIMES_CHANCE, SHARE_OF_BEST = 0.5, 2.0, 0.25
APART_COSINE, SHARE_OF_MARGIN = 0.1, 0.5


def joined(items: Sequence[str], word: str = "and") -> str:
    """A list in a sentence; names may hold commas, so that semicolons part them."""
    return "; ".join(items) if len(items) > 2 else f" {word} ".join(items)


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def grid_words(settings: Mapping[str, Any]) -> str:
    """Settings in a line: `num_train_epochs` 24, `learning_rate` 0.001."""
    return ", ".join(
        f"`{name}` {value:g}" if isinstance(value, float) else f"`{name}` {value}" for name, value in settings.items()
    )


def marked(text: str, separable: bool | None) -> str:
    """A cell with the mark of what is not separable from the baseline, or was not tested."""
    return text if separable or text == "-" else f"{text} {NOT_TESTED if separable is None else NOT_SEPARABLE}"


# Methods beside one another.


def methods_table(evidence: Evidence, budget: str, scope: str, columns: Iterable[Column], chance: bool = False) -> str:
    """
    Methods as rows, means ± standard deviations over seeds. What no run has is left out; no column, no table.

    Args:
        evidence: of a results file.
        budget, scope: whose runs and metrics.
        columns: in this order.
        chance: whether the last row says what chance gives.
    """
    shown = evidence.present(columns, scope, budget)
    methods = evidence.methods(budget)
    if not shown or not methods:
        return ""
    any_test = evidence.was_tested(budget, scope)
    head, body = ["method"], [[escaped(method)] for method in methods]
    for column in shown:
        tested = any(evidence.separable(name, budget, scope, column) is not None for name in methods)
        head.append(f"{column.label} {NOT_TESTED}" if any_test and not tested else column.label)
        best = _best(evidence, budget, scope, column)
        for row, method in zip(body, methods, strict=True):
            text = cell(evidence.values(method, budget, scope, column), column.form)
            separable = evidence.separable(method, budget, scope, column)
            if method == best:
                text = f"**{text}**"
            elif method != evidence.baseline and tested:
                text = marked(text, separable)
            row.append(text)
    return table([head, *body] + ([_chance_row(evidence, budget, scope, shown)] if chance else []))


def _best(evidence: Evidence, budget: str, scope: str, column: Column) -> str | None:
    """The best method of a column, if it is separable from the baseline."""
    means = {name: evidence.mean(name, budget, scope, column) for name in evidence.methods(budget)}
    known = {name: column.better * mean for name, mean in means.items() if not math.isnan(mean)}
    if not column.better or not known:
        return None
    best = max(known, key=lambda name: known[name])
    return best if evidence.separable(best, budget, scope, column) else None


def _chance_row(evidence: Evidence, budget: str, scope: str, columns: Sequence[Column]) -> list[str]:
    """Chance is the same for all methods: that of the first run that has it."""
    runs = [metrics for name in evidence.methods(budget) for metrics in evidence.metrics(name, budget, scope)]
    row = ["*chance, or the most frequent label*"]
    for column in columns:
        values = [value for value in (chance_of(metrics, column) for metrics in runs) if not math.isnan(value)]
        row.append(f"*{column.form.format(values[0])}*" if values else "")
    return row


def comparison_table(evidence: Evidence, budget: str, scope: str) -> str:
    """All comparisons at a budget in a scope, by metric, with intervals, p, Holm's p, groups, seeds and the test."""
    found = [
        entry
        for entry in evidence.results.get("comparisons", [])
        if (entry["budget"], entry["scope"]) == (budget, scope)
    ]
    rows = comparison_rows(found, evidence.baseline)
    return markdown_table(COMPARISON_HEAD, rows, left=2) if rows else ""


def comparison_rows(found: Sequence[Mapping[str, Any]], baseline: str) -> list[list[str]]:
    """Comparisons as rows under `COMPARISON_HEAD`, by metric."""
    metrics = list(dict.fromkeys(entry["metric"] for entry in found))
    return [
        [
            label_of(entry["metric"]),
            escaped(_who(entry, baseline)),
            points(form_of(entry["metric"]), entry["difference"]),
            _interval(entry),
            p_words(entry.get("p")),
            p_words(entry.get("p_holm")),
            *(str(entry.get(field) or "-") for field in ("groups", "seeds", "test")),
        ]
        for entry in sorted(found, key=lambda entry: metrics.index(entry["metric"]))
    ]


def _who(entry: Mapping[str, Any], baseline: str) -> str:
    """The method that was compared, and with what where that is not the baseline."""
    return entry["method"] if entry["baseline"] == baseline else f"{entry['method']} - {entry['baseline']}"


def _interval(found: Mapping[str, Any]) -> str:
    """The ends of a comparison's interval, as its difference; of percentages in points."""
    if found.get("low") is None or found.get("high") is None:
        return "-"
    percent = form_of(found["metric"]) == PERCENT
    form = "{:+.1f}" if percent else form_of(found["metric"]).replace("{:", "{:+")
    scale = 100 if percent else 1
    return f"{form.format(scale * found['low'])} to {form.format(scale * found['high'])}"


# How much a method needs tuning.


def tuning_table(evidence: Evidence) -> str:
    """Each method's own budget, and the best, mean and spread of the grid that it was chosen from."""
    grid = evidence.results.get("grid") or {}
    own = evidence.results.get("budgets", {}).get("own", {})
    trials = grid.get("trials", {})
    form = form_of(grid.get("score", ""))
    rows = []
    for method in evidence.results["methods"]:
        scores = [trial["score"] for trial in trials.get(method, []) if trial["score"] is not None]
        if not scores and method not in own:
            continue
        values = ["-"] * 4
        if scores:
            best, mean = max(scores), statistics.fmean(scores)
            spread = form.format(statistics.stdev(scores)) if len(scores) > 1 else "-"
            values = [form.format(best), form.format(mean), spread, points(form, best - mean)]
        rows.append([escaped(method), grid_words(own.get(method, {})) or "-", *values, str(len(scores))])
    head = ["method", "own budget", "best", "mean", "deviation", "best - mean", "budgets tried"]
    return markdown_table(head, rows, left=2) if rows else ""


# Does the gap predict anything?

PREDICTORS = (GAP, DEBIASED_GAP, MARGIN)


def association(evidence: Evidence, predictor: Column, task: Column, of_means: bool = False) -> Correlation | None:
    """Spearman's correlation of two columns in the main scope, over all runs of all methods and budgets, or over the
    means of each method at each budget."""
    scope = evidence.main_scope
    found: list[tuple[float, float]] = []
    for budget in evidence.budgets:
        for name in evidence.methods(budget):
            if of_means:
                found.append((evidence.mean(name, budget, scope, predictor), evidence.mean(name, budget, scope, task)))
            else:
                values = (evidence.values(name, budget, scope, column) for column in (predictor, task))
                found += zip(*values, strict=True)
    return spearman([x for x, _ in found], [y for _, y in found])


def association_table(evidence: Evidence) -> str:
    """Gap, debiased gap and margin against each task's score: rho and p over all runs, rho over the methods' means."""
    scope = evidence.main_scope
    predictors = evidence.present(PREDICTORS, scope)
    words = [column.words for column in predictors]
    head = ["score", *(f"{word}, {what}" for word in words for what in ("runs", "means")), "runs"]
    rows = []
    for task in evidence.present(TASKS, scope):
        row, number = [task.label], 0
        for predictor in predictors:
            runs, means = (association(evidence, predictor, task, of_means) for of_means in (False, True))
            number = max(number, runs.n if runs else 0)
            row.append(f"{runs.rho:+.2f} (p {_with_sign(runs.p)})" if runs else "-")
            row.append(f"{means.rho:+.2f}" if means else "-")
        if number:
            rows.append([*row, str(number)])
    return table([head, *rows]) if rows and predictors else ""


def _with_sign(p: float) -> str:
    return p_words(p) if p < 0.001 else f"= {p_words(p)}"


# The map over the weights of both terms.


def map_cells(evidence: Evidence) -> dict[tuple[float, float], tuple[dict[str, float], str]]:
    """
    {(ATP, CU) weights: (R@10, margin and random-pair cosine, a mark)}; the mark is "collapse", "scatter" or "".

    Collapse: random pairs have a cosine of 0.5 or more and R@10 is at most twice what chance gives or, where that is
    not known, a quarter of the map's best. Scatter: random pairs are apart (below 0.1), but the margin is less than
    half of that without both terms or, where that was not run, of the map's median.
    """
    runs: dict[tuple[float, float], list[Mapping[str, float | None]]] = {}
    for entry in evidence.results.get("weight_map", []):
        runs.setdefault((entry["align_weight"], entry["uniformity_weight"]), []).append(entry["metrics"])
    cells = {
        weights: {
            column.name: statistics.fmean(value_of(metrics, column) for metrics in found)
            for column in (RECALL, MARGIN, RANDOM_PAIRS)
        }
        for weights, found in sorted(runs.items())
    }
    if not cells:
        return {}
    margins = [values["margin"] for values in cells.values()]
    usual = cells.get((0, 0), {"margin": statistics.median(margins)})["margin"]
    best = max(values["recall@10"] for values in cells.values())
    chances = {
        weights: statistics.fmean(chance_of(metrics, RECALL) for metrics in found) for weights, found in runs.items()
    }
    return {weights: (values, _mark(values, chances[weights], best, usual)) for weights, values in cells.items()}


def _mark(values: Mapping[str, float], chance: float, best: float, usual: float) -> str:
    near_chance = SHARE_OF_BEST * best if math.isnan(chance) else TIMES_CHANCE * chance
    if values["random_pair_cosine"] >= COLLAPSED_COSINE and values["recall@10"] <= near_chance:
        return "collapse"
    scattered = values["random_pair_cosine"] < APART_COSINE and values["margin"] < SHARE_OF_MARGIN * usual
    return "scatter" if scattered else ""


def weight_table(evidence: Evidence) -> str:
    """ATP weights as rows, CU weights as columns: R@10 / margin / cosine of random pairs, and the mark."""
    cells = map_cells(evidence)
    if not cells:
        return ""
    align, uniformity = (sorted({weights[axis] for weights in cells}) for axis in (0, 1))
    rows = [["ATP", *(f"CU {weight:g}" for weight in uniformity)]]
    for first in align:
        found = [cells.get((first, second)) for second in uniformity]
        rows.append([f"{first:g}", *(_map_cell(*entry) if entry else "-" for entry in found)])
    return table(rows)


def _map_cell(values: Mapping[str, float], mark: str) -> str:
    recall, margin, random = (values[name] for name in ("recall@10", "margin", "random_pair_cosine"))
    text = f"{recall:.1%} / {margin:.2f} / {random:.2f}"
    return f"{text} *{mark}*" if mark else text


# Too long a training.


def robustness_runs(evidence: Evidence, column: Column = RECALL) -> dict[str, dict[float, list[float]]]:
    """{method: {epochs: the column's values}}, epochs in order."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in sorted(evidence.results.get("robustness", []), key=lambda run: run["num_train_epochs"]):
        epochs = found.setdefault(run["method"], {})
        epochs.setdefault(run["num_train_epochs"], []).append(value_of(run["metrics"], column))
    return {name: found[name] for name in evidence.results["methods"] if name in found}


def robustness_table(evidence: Evidence) -> str:
    """R@10 of each method after each number of epochs, and what the longest training loses on the best."""
    found = robustness_runs(evidence)
    lengths = sorted({epochs for runs in found.values() for epochs in runs})
    rows = [["R@10 after epochs", *(f"{epochs:g}" for epochs in lengths), "longest - best"]]
    for method, runs in found.items():
        means = [statistics.fmean(values) for values in runs.values()]
        cells = [cell(runs.get(epochs, []), RECALL.form) for epochs in lengths]
        rows.append([escaped(method), *cells, points(RECALL.form, means[-1] - max(means))])
    return table(rows) if found else ""


def trial_words(results: Mapping[str, Any]) -> str:
    """How the own budgets were chosen, in a sentence."""
    grid = results.get("grid") or {}
    if not grid.get("trials"):
        return "The own budgets were given, not searched for."
    number = grid.get("folds") or 0
    held_out = f"{number} fold{'s' if number > 1 else ''} held out in turn"
    folds = f"by cross-validation over training cases ({held_out})" if number else "by validation"
    label = column_of(grid["score"]).words
    distinct = {json.dumps(trial["budget"], sort_keys=True) for found in grid["trials"].values() for trial in found}
    return f"Each method's own budget is the one with the highest {label} {folds}, out of a grid of {len(distinct)}."
