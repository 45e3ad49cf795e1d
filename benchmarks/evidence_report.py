"""The Markdown page of a results file of evidence.py: sentences, tables and figures, all from the file alone."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from evidence_caption_tables import caption_parts
from evidence_results import (
    BUDGET_WORDS,
    DEBIASED_GAP,
    GALLERY_SCOPE,
    GAP,
    GEOMETRY,
    LEVEL,
    MARGIN,
    RANDOM_PAIRS,
    TASKS,
    TRUE_PAIRS,
    Column,
    Evidence,
    p_words,
    points,
)
from evidence_tables import (
    APART_COSINE,
    COLLAPSED_COSINE,
    NOT_SEPARABLE,
    NOT_TESTED,
    association_table,
    comparison_table,
    escaped,
    grid_words,
    joined,
    map_cells,
    methods_table,
    robustness_table,
    trial_words,
    tuning_table,
    weight_table,
)
from measure import markdown_table


SOURCE_COLUMNS = ("R@10 ↑", "V-measure ↑", "kNN ↑", "zero-shot ↑", "other kind in nearest 10")
LEAST_BASE = 0.01  # of a baseline's gap or margin that others are given as ratios to
# What the figures show, by the names that results["figures"] gives them.
FIGURES = {
    "projection": "Images and captions of one run of each method. Horizontal: the direction between the two modality "
    "means; vertical: the first principal component of the rest. Both axes are fitted on other pairs than those "
    "drawn.",
    "cosines": "Cosines of true pairs and of random pairs, one run of each method; dashed lines are the means.",
    "curves": "Modality gap and true-pair cosine of the training batches over the training: mean over the seeds, and "
    "a band of one standard deviation.",
    "gap_and_scores": "Every run's gap against its scores, a panel for each task, with Spearman's correlation over "
    "all runs. Grey are runs of methods that are not separable from the baseline in that score; where nothing was "
    "tested, the panel says so. Of two budgets the shared one is hollow.",
    "weight_map": "R@10, margin and cosine of random pairs over the weights of both terms; collapse and scatter are "
    "hatched.",
    "robustness": "R@10 after trainings of several lengths: mean over the seeds, and a band of one standard "
    "deviation.",
}


def report(results: Mapping[str, Any]) -> str:
    """
    The page of a results file: the same file gives the same page, byte for byte.

    Args:
        results: as evidence.py writes them; parts that are not there are left out.
    """
    evidence = Evidence(results)
    short = [summary(evidence, budget) for budget in evidence.budgets]
    parts = [
        f"# {results['title']}",
        " ".join(results.get("found", [])),
        _what_was_run(results),
        *(["## In short", *short] if any(short) else []),
        "## Methods",
        _methods(evidence),
        *(part for budget in evidence.budgets for part in _budget(evidence, budget)),
        *caption_parts(evidence),
        *_tuning(evidence),
        *_association(evidence),
        *_weights(evidence),
        *_robustness(evidence),
        *_sources(evidence),
        *_figures(evidence),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what_was_run(results: Mapping[str, Any]) -> str:
    lines = [f"- `{results['command']}`"] if results.get("command") else []
    lines += [f"- {results[field]}" for field in ("machine", "versions") if results.get(field)]
    lines += [f"- date: {results['date']}"] if results.get("date") else []
    lines += [f"- minutes: {results['minutes']:g}"] if results.get("minutes") is not None else []
    return "\n".join(lines)


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


# In short.


def summary(evidence: Evidence, budget: str) -> str:
    """Which methods differ from the baseline at a budget, and gaps and margins as ratios to the baseline's."""
    columns = evidence.present(TASKS, evidence.main_scope, budget)
    others = [name for name in evidence.methods(budget) if name != evidence.baseline]
    if not columns or not others:
        return ""
    score = next((column for column in columns if column.name == "recall@10"), columns[0])
    sentences = [*_difference_sentences(evidence, budget, score, others), *_ratio_sentences(evidence, budget, others)]
    return "\n".join([f"At {BUDGET_WORDS[budget]}:\n", *(f"- {sentence}" for sentence in sentences)])


def _difference_sentences(evidence: Evidence, budget: str, score: Column, others: Iterable[str]) -> list[str]:
    """Who differs from the baseline in a score, who is not separable from it, and who was not tested."""
    groups: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for name in others:
        separable = evidence.separable(name, budget, evidence.main_scope, score)
        groups[separable].append(f"{name}{_in_figures(evidence, budget, score, name)}" if separable else name)
    label, baseline = score.words, evidence.baseline
    sentences = []
    if groups[True]:
        verb = "differs" if len(groups[True]) == 1 else "differ"
        sentences.append(f"In {label}, {joined(groups[True])} {verb} from {baseline} (Holm's p below {LEVEL}).")
    if groups[False]:
        verb = "is" if len(groups[False]) == 1 else "are"
        sentences.append(f"In {label}, {joined(groups[False])} {verb} not separable from {baseline}.")
    if groups[None]:
        verb = "was" if len(groups[None]) == 1 else "were"
        sentences.append(f"In {label}, {joined(groups[None])} {verb} not tested against {baseline}.")
    return sentences


def _in_figures(evidence: Evidence, budget: str, score: Column, name: str) -> str:
    """A method's mean with its difference from the baseline and Holm's p."""
    found = evidence.comparison(name, budget, evidence.main_scope, score.name)
    own, other = (evidence.mean(method, budget, evidence.main_scope, score) for method in (name, evidence.baseline))
    means = f"{score.form.format(own)} against {score.form.format(other)}"
    if not found:  # tested in both directions
        return f" ({means})"
    p = p_words(found["p_holm"])
    return f" ({means}, {points(score.form, found['difference'])}, p {p if p.startswith('<') else f'= {p}'})"


def _ratio_sentences(evidence: Evidence, budget: str, others: Iterable[str]) -> list[str]:
    """Gap, debiased gap and margin of each method as a ratio to the baseline's, which says nothing of one near 0."""
    scope = evidence.main_scope
    sentences = []
    for column in evidence.present((GAP, DEBIASED_GAP, MARGIN), scope, budget):
        usual = evidence.mean(evidence.baseline, budget, scope, column)
        if not usual >= LEAST_BASE:
            continue
        means = {name: evidence.mean(name, budget, scope, column) for name in others}
        ratios = [f"{name} {mean / usual:.2f}" for name, mean in means.items() if not math.isnan(mean)]
        if ratios:
            sentences.append(f"The {column.words} as a ratio to that of {evidence.baseline}: {'; '.join(ratios)}.")
    return sentences


def _methods(evidence: Evidence) -> str:
    methods = evidence.results["methods"]
    rows = [["method", "kind", "what it is", "source"]]
    for name, about in methods.items():
        source = re.sub(
            r"arXiv:? ?(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", about.get("source") or "-"
        )
        kind = f"{about.get('kind', '-')}{', the baseline' if name == evidence.baseline else ''}"
        rows.append([escaped(text) for text in (name, kind, about.get("about") or "-", source)])
    return markdown_table(rows[0], rows[1:], left=4)


# The budgets.


def _budget(evidence: Evidence, budget: str) -> list[str]:
    """Settings, scores, the space, and the comparisons of a budget."""
    scope = evidence.main_scope
    seeds = sorted({run["seed"] for run in evidence.runs if run["budget"] == budget})
    spread = f"means over {len(seeds)} seeds ± standard deviations" if len(seeds) > 1 else "one seed"
    settings = grid_words(evidence.results.get("budgets", {}).get("shared", {})) if budget == "shared" else ""
    parts = [
        f"## At {BUDGET_WORDS[budget]}",
        f"{_capital(scope)}; {spread}.{f' The budget: {settings}.' if settings else ''}",
        methods_table(evidence, budget, scope, TASKS, chance=True),
        "The space:",
        methods_table(evidence, budget, scope, GEOMETRY),
    ]
    comparisons = comparison_table(evidence, budget, scope)
    if not comparisons:
        return [*parts, "No method was tested against the baseline here: no difference is shown to be one."]
    parts.append(legend(evidence))
    return [*parts, f"### Against {evidence.baseline}, at {BUDGET_WORDS[budget]}", comparisons]


def legend(evidence: Evidence) -> str:
    """What the marks of a table of methods mean."""
    return (
        f"{NOT_SEPARABLE}: not separable from {evidence.baseline} (Holm's p of {LEVEL} or more); {NOT_TESTED}: not "
        "tested, of a column in its head; bold: the best of a column, where it is separable. A mean of both "
        "directions counts as separable where both directions are."
    )


def _tuning(evidence: Evidence) -> list[str]:
    tuning = tuning_table(evidence)
    words = "Best - mean says how much a method needs tuning: what a budget picked at random from the grid costs."
    return ["## Own budgets", f"{trial_words(evidence.results)} {words}", tuning] if tuning else []


def _association(evidence: Evidence) -> list[str]:
    found = association_table(evidence)
    words = (
        "Spearman's rank correlation with each score: over all runs of all methods and budgets, and over the means of "
        "each method at each budget. Seeds of one method are not independent of one another, so that p, which is not "
        "corrected for the number of scores, is too small; and a correlation over methods is not an effect of the gap."
    )
    return ["## Does the gap predict anything?", words, found] if found else []


def _weights(evidence: Evidence) -> list[str]:
    cells = map_cells(evidence)
    if not cells:
        return []
    usual = "of the objective without both terms" if (0, 0) in cells else "of the median cell"
    words = (
        "R@10 / margin / cosine of random pairs, by the weights of Align True Pairs (rows) and Centroid Uniformity "
        f"(columns); {evidence.main_scope}. *Collapse*: random pairs have a cosine of {COLLAPSED_COSINE} or more, and "
        "R@10 is at most twice what chance gives (or a quarter of the best, where chance is not known). *Scatter*: "
        f"random pairs have one below {APART_COSINE}, and the margin is less than half of that {usual}."
    )
    return ["## The weights of both terms", words, weight_table(evidence)]


def _robustness(evidence: Evidence) -> list[str]:
    found = robustness_table(evidence)
    words = f"Trainings of several lengths, all else as before; {evidence.main_scope}."
    return ["## Too long a training", words, found] if found else []


def _sources(evidence: Evidence) -> list[str]:
    """A short table of each scope but the main one, and its comparisons."""
    columns = [column for column in TASKS if column.label in SOURCE_COLUMNS]
    columns += [GAP, DEBIASED_GAP, TRUE_PAIRS, RANDOM_PAIRS, MARGIN]
    parts = []
    for scope in evidence.scopes[1:]:
        parts.append(f"## {_capital(scope) if scope == GALLERY_SCOPE else scope}")
        for budget in evidence.budgets:
            shown = methods_table(evidence, budget, scope, columns, chance=True)
            if shown:
                parts += [f"At {BUDGET_WORDS[budget]}:", shown, comparison_table(evidence, budget, scope)]
    return parts


def _figures(evidence: Evidence) -> list[str]:
    figures = evidence.results.get("figures") or {}
    parts = ["## Figures"] if figures else []
    for name, file in figures.items():
        words = FIGURES.get(name, "")
        parts += [f"![{_capital(name.replace('_', ' '))}]({file})", f"*{words}*" if words else ""]
    return parts
