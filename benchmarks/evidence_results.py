"""What a results file of evidence.py holds: runs and comparisons by name, words for metrics, columns of the tables."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure import RESULTS
from scipy.stats import spearmanr

from gap_closed_clip.evaluation.report import ROWS


LEVEL = 0.05  # of Holm's p, below which a difference counts as separable
BUDGET_WORDS = {
    "shared": "the shared budget",
    "own": "each method's own budget",
    "given": "the budgets that the models were trained with",
}
MEAN_SCOPE, ONE_SCOPE, GALLERY_SCOPE = "mean of the sources", "all pairs", "all in one gallery"
PERCENT, THREE, ONE = "{:.1%}", "{:.3f}", "{:.1f}"
# Words and formats of metrics; those of the evaluation's table win.
WORDS = {
    "median_rank": ("median rank, mean of both directions ↓", ONE),
    "knn_accuracy": ("kNN, mean of both directions ↑", PERCENT),
    "knn_balanced_accuracy": ("balanced kNN, mean of both directions ↑", PERCENT),
    "linear_probe_accuracy": ("linear probe, mean of both directions ↑", PERCENT),
    "linear_probe_balanced_accuracy": ("balanced linear probe, mean of both directions ↑", PERCENT),
    "normalized_mutual_information": ("normalized mutual information ↑", PERCENT),
    "zero_shot_accuracy": ("zero-shot accuracy ↑", PERCENT),
    "zero_shot_balanced_accuracy": ("zero-shot balanced accuracy ↑", PERCENT),
    "zero_shot_ece": ("zero-shot calibration error (ECE) ↓", THREE),
    "zero_shot_brier": ("zero-shot Brier score ↓", THREE),
    "zero_shot_nll": ("zero-shot negative log-likelihood ↓", THREE),
    "relative_gap": ("relative gap ↓", THREE),
    "modality_separability": ("linear separability of the modalities (0.5: none) ↓", THREE),
    "uniformity_image": ("uniformity of images ↓", THREE),
    "uniformity_text": ("uniformity of captions ↓", THREE),
    "uniformity_cross": ("uniformity across modalities ↓", THREE),
    "effective_rank": ("effective rank, mean of images and captions", ONE),
    "effective_rank_image": ("effective rank of images", ONE),
    "effective_rank_text": ("effective rank of captions", ONE),
    **ROWS,
}


class Column(NamedTuple):
    """A column of a table.

    Args:
        label: its head.
        metrics: whose mean it shows: one metric, or both directions of one.
        better: 1 where higher is better, -1 where lower is, 0 where neither.
        name: the metric's name or, of several, that under which a file may hold their mean.
        chance: the metrics, if any, that say what chance or the most frequent label would give.
    """

    label: str
    metrics: tuple[str, ...]
    better: int
    name: str
    chance: tuple[str, ...] = ()

    @property
    def form(self) -> str:
        return form_of(self.name)

    @property
    def words(self) -> str:
        """The label without its arrow."""
        return self.label.removesuffix(" ↑").removesuffix(" ↓")


def _column(label: str, name: str, better: int, chance: str = "") -> Column:
    return Column(label, (name,), better, name, (chance,) if chance else ())


def _directions(label: str, name: str, parts: Iterable[str], better: int, chance: Iterable[str] = ()) -> Column:
    return Column(label, tuple(parts), better, name, tuple(chance))


ACROSS = ("image_to_text", "text_to_image")
TASKS = (
    _column("R@10 ↑", "recall@10", 1, "chance_recall@10"),
    _directions("median rank ↓", "median_rank", [f"{way}_median_rank" for way in ACROSS], -1),
    _column("V-measure ↑", "v_measure", 1),
    *(
        _directions(
            f"{label} ↑",
            f"{name}_accuracy",
            [f"{name}_accuracy_{way}" for way in ACROSS],
            1,
            [f"majority_accuracy_{way}" for way in ACROSS],
        )
        for label, name in (("kNN", "knn"), ("linear probe", "linear_probe"))
    ),
    _column("zero-shot ↑", "zero_shot_balanced_accuracy", 1, "zero_shot_chance_accuracy"),
    _column("zero-shot, ensemble ↑", "zero_shot_balanced_accuracy_ensemble", 1, "zero_shot_chance_accuracy"),
    _column("ECE ↓", "zero_shot_ece", -1),
    _column("ECE, ensemble ↓", "zero_shot_ece_ensemble", -1),
    _column("other kind in nearest 10", "other_kind_share@10", 0, "chance_other_kind_share@10"),
    _column("CIDEr-D ↑", "cider_d", 1),
)
GAP = _column("gap ↓", "modality_gap", -1)
DEBIASED_GAP = _column("debiased gap ↓", "debiased_modality_gap", -1)
TRUE_PAIRS = _column("true pairs ↑", "true_pair_cosine", 1)
RANDOM_PAIRS = _column("random pairs", "random_pair_cosine", 0)
MARGIN = _column("margin ↑", "margin", 1)
GEOMETRY = (
    GAP,
    DEBIASED_GAP,
    TRUE_PAIRS,
    RANDOM_PAIRS,
    MARGIN,
    _column("separability ↓", "modality_separability", -1),
    _directions("effective rank", "effective_rank", ("effective_rank_image", "effective_rank_text"), 0),
    _column("relative gap ↓", "relative_gap", -1),
)

# Of captions, in the order of their table.
CAPTION_METRICS = (
    "coco_bleu_1", "coco_bleu_2", "coco_bleu_3", "coco_bleu_4", "sacrebleu_4", "rouge_l", "meteor", "cider_d",
    "clip_score", "ref_clip_score", "image_caption_cosine", "distinct_captions", "caption_words",
)  # fmt: skip


def column_of(metric: str) -> Column:
    """The column of a metric, by its name or by that of the mean of both directions."""
    known = {column.name: column for column in TASKS + GEOMETRY}
    return known.get(metric, _column(label_of(metric), metric, 0))


def label_of(metric: str) -> str:
    """A metric in words, with the direction that is better; a name without words stays as it is."""
    base = metric.removesuffix("_ensemble")
    if metric in WORDS or base not in WORDS:
        return WORDS.get(metric, (metric,))[0]
    words, space, arrow = WORDS[base][0].rpartition(" ")
    return f"{words}, several templates{space}{arrow}"


def form_of(metric: str) -> str:
    """The format of a metric's values."""
    return WORDS.get(metric, WORDS.get(metric.removesuffix("_ensemble"), ("", THREE)))[1]


def points(form: str, value: float) -> str:
    """A signed difference; of percentages in points."""
    return f"{100 * value:+.1f} points" if form == PERCENT else form.replace("{:", "{:+").format(value)


def p_words(p: float | None) -> str:
    """A p-value for a table."""
    if p is None or math.isnan(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def value_of(metrics: Mapping[str, float | None], column: Column) -> float:
    """The column's value of one run; nan where the run does not have it."""
    return _mean_of(metrics, [column.name] if column.name in metrics else column.metrics)


def chance_of(metrics: Mapping[str, float | None], column: Column) -> float:
    """What chance or the most frequent label gives in a column; nan where that is not known."""
    return _mean_of(metrics, column.chance)


def _mean_of(metrics: Mapping[str, float | None], names: Sequence[str]) -> float:
    found = [metrics.get(name) for name in names]
    return float(np.mean([math.nan if value is None else value for value in found])) if found else math.nan


class Evidence:
    """A results file's content, asked by method, budget, scope and column.

    Args:
        results: of evidence.py, as `read` gives them.
    """

    def __init__(self, results: Mapping[str, Any]):
        self.results = results
        self.baseline: str = results["baseline"]
        self.runs: list[dict[str, Any]] = results.get("runs", [])

    @cached_property
    def budgets(self) -> list[str]:
        """Those that runs have: "shared", then "own"; or "given" alone."""
        return [name for name in BUDGET_WORDS if any(run["budget"] == name for run in self.runs)]

    @cached_property
    def scopes(self) -> list[str]:
        """The main one first, then each source, then all of them in one gallery."""
        names = list(dict.fromkeys(scope for run in self.runs for scope in run["metrics"]))
        rank = {MEAN_SCOPE: 0, ONE_SCOPE: 1, GALLERY_SCOPE: 3}
        return sorted(names, key=lambda name: rank.get(name, 2))

    @property
    def main_scope(self) -> str:
        """That of the main tables: the mean of the sources, or all pairs where there is one source."""
        return self.scopes[0] if self.scopes else ONE_SCOPE

    @cached_property
    def captions(self) -> "Evidence | None":
        """The captions' results, whose scopes are the kinds of captions; None where the plan asks for none."""
        found = self.results.get("captions")
        return Evidence({"baseline": self.baseline, "methods": self.results["methods"], **found}) if found else None

    def methods(self, budget: str) -> list[str]:
        """Those that have runs at a budget, in the order of the file."""
        ran = {run["method"] for run in self.runs if run["budget"] == budget}
        return [name for name in self.results["methods"] if name in ran]

    def metrics(self, method: str, budget: str, scope: str) -> list[dict[str, float | None]]:
        """The metrics of each run of a method, by seed."""
        runs = [run for run in self.runs if (run["method"], run["budget"]) == (method, budget)]
        return [run["metrics"].get(scope, {}) for run in sorted(runs, key=lambda run: run["seed"])]

    def values(self, method: str, budget: str, scope: str, column: Column) -> list[float]:
        """A column's value of each run of a method, by seed; nan where a run does not have it."""
        return [value_of(metrics, column) for metrics in self.metrics(method, budget, scope)]

    def mean(self, method: str, budget: str, scope: str, column: Column) -> float:
        """The mean over the runs of a method; nan without one."""
        values = self.values(method, budget, scope, column)
        return float(np.mean(values)) if values else math.nan

    def present(self, columns: Iterable[Column], scope: str, budget: str | None = None) -> list[Column]:
        """Those of the columns that some run (of a budget) has in a scope."""
        found = [run["metrics"].get(scope, {}) for run in self.runs if budget in (None, run["budget"])]
        return [column for column in columns if any(not math.isnan(value_of(m, column)) for m in found)]

    @cached_property
    def _tests(self) -> dict[tuple[str, str, str, str], dict[str, Any]]:
        return {
            (found["budget"], found["scope"], found["metric"], found["method"]): found
            for found in self.results.get("comparisons", [])
            if found["baseline"] == self.baseline
        }

    def comparison(self, method: str, budget: str, scope: str, metric: str) -> dict[str, Any] | None:
        """That of a method with the baseline in one metric."""
        return self._tests.get((budget, scope, metric, method))

    def was_tested(self, budget: str, scope: str) -> bool:
        """Whether any method was compared with the baseline at a budget in a scope."""
        return any(key[:2] == (budget, scope) for key in self._tests)

    def separable(self, method: str, budget: str, scope: str, column: Column) -> bool | None:
        """Whether a method differs from the baseline by Holm's p; of a mean of both directions, in each of them in the
        same sense. None where that was not tested."""
        names = [column.name] if self.comparison(method, budget, scope, column.name) else list(column.metrics)
        tests = [self.comparison(method, budget, scope, name) for name in names]
        known = [test for test in tests if test and test.get("p_holm") is not None and not math.isnan(test["p_holm"])]
        if len(known) < len(names):
            return None
        one_sense = len({test["difference"] > 0 for test in known}) == 1
        return one_sense and all(test["p_holm"] < LEVEL for test in known)


class Correlation(NamedTuple):
    """Spearman's rank correlation with its two-sided p (Student's t with n - 2 degrees of freedom) and n."""

    rho: float
    p: float
    n: int


def spearman(first: Sequence[float], second: Sequence[float]) -> Correlation | None:
    """Over the places where both are known; None of fewer than four, or where one of them is constant."""
    both = np.array([first, second], dtype=float)
    both = both[:, np.isfinite(both).all(axis=0)]
    if both.shape[1] < 4 or (both == both[:, :1]).all(axis=1).any():
        return None
    found = spearmanr(*both)
    return Correlation(float(found.statistic), float(found.pvalue), both.shape[1])


def path_of(name: str, folder: Path = RESULTS) -> Path:
    return folder / f"evidence_{name}.json"


def read(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one of evidence.py.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no {path}; `python benchmarks/evidence.py` writes one.") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not a results file ({error}); run `python benchmarks/evidence.py` again."
        ) from error
    missing = [field for field in ("title", "baseline", "methods", "runs") if field not in results]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; run `python benchmarks/evidence.py` again.")
    return results


def known_name(name: str, names: Sequence[str], what: str) -> str:
    """The name, if it is one of the names."""
    if name not in names:
        raise ValueError(f"there is no {what} {name!r}; there are {'; '.join(names) or 'none'}.")
    return name


def names_in(
    text: str, names: Sequence[str], what: str, check: Callable[[str, Sequence[str], str], str] = known_name
) -> list[str]:
    """
    A list parted by commas, of names that may hold commas themselves: at each place the longest that fits.

    Args:
        check: fails for a name that is not among the names.

    Raises:
        ValueError: one is not among the names.
    """
    rest, found = text.strip(), []
    while rest:
        fitting = [name for name in names if rest == name or rest.startswith(f"{name},")]
        if not fitting:
            check(rest.partition(",")[0], names, what)
            raise ValueError(f"{rest!r} is no list of names of {what}s.")
        found.append(max(fitting, key=len))
        rest = rest[len(found[-1]) :].lstrip(", ")
    return found


# Tables.
