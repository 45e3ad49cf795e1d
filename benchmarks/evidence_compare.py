"""Every method against the baseline, run by run and query by query, with Holm's correction over the methods."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from evidence_measure import DIGITS
from evidence_plan import Plan
from evidence_results import CAPTION_METRICS, GEOMETRY, TASKS, Column, column_of, value_of

from gap_closed_clip.evaluation.statistics import Interval, Queries, holm, paired_bootstrap, paired_t


RECALL, CIDER = "recall@10", "cider_d"  # means over queries and images, of which each has a score
Run = dict[str, Any]  # method, budget, seed, metrics and hits


def comparisons(runs: Sequence[Run], plan: Plan, queries: Queries) -> list[dict]:
    """
    Comparisons of each method with the plan's baseline, at each budget, in the main scope.

    Args:
        queries: groups and parts of the queries, in the order of the runs' hits.
    """
    found = []
    for budget in dict.fromkeys(run["budget"] for run in runs):
        by_method: dict[str, list[Run]] = {}
        for run in runs:
            if run["budget"] == budget:
                by_method.setdefault(run["method"], []).append(run)
        baseline = by_method.pop(plan.baseline)
        for column in TASKS + GEOMETRY:
            tested = {name: _test(column, each, baseline, queries) for name, each in by_method.items()}
            tested = {name: result for name, result in tested.items() if result is not None}
            for (name, result), p in zip(tested.items(), holm([each["p"] for each in tested.values()]), strict=True):
                about = {"budget": budget, "scope": next(iter(baseline[0]["metrics"])), "metric": column.name}
                found.append({**about, "method": name, "baseline": plan.baseline, **result, "p_holm": _round(p)})
    return found


def caption_comparisons(runs: Sequence[Run], baseline: str, groups: np.ndarray) -> list[dict]:
    """
    Captions with each method's encoder against those with the baseline's, of the same kind; Holm's correction is over
    methods and kinds.

    Args:
        runs: method, budget and seed, metrics by kind of captions, and `cider_d`, {kind: N scores of images}.
        groups: (N,) of the images.
    """
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run["method"], []).append(run)
    of_baseline = by_method.pop(baseline, [])
    if not by_method or not of_baseline:
        return []
    metrics = of_baseline[0]["metrics"]
    found = []
    for name in CAPTION_METRICS:
        if not all(name in each for each in metrics.values()):
            continue
        tested = {}
        for kind in metrics:
            for method, each in by_method.items():
                tested[kind, method] = _test_captions(column_of(name), kind, each, of_baseline, groups)
        known = {key: result for key, result in tested.items() if result is not None}
        adjusted = holm([result["p"] for result in known.values()])
        for ((kind, method), result), p in zip(known.items(), adjusted, strict=True):
            about = {"budget": of_baseline[0]["budget"], "scope": kind, "metric": name}
            found.append({**about, "method": method, "baseline": baseline, **result, "p_holm": _round(p)})
    return found


def _test_captions(
    column: Column, kind: str, runs: list[Run], baseline: list[Run], groups: np.ndarray
) -> dict[str, Any] | None:
    pairs = _matched(runs, baseline)
    if column.name == CIDER:
        return _over_cases([[run["cider_d"][kind] for run in each] for each in pairs], groups, None)
    return _over_seeds([[value_of(run["metrics"][kind], column) for run in each] for each in pairs])


def _test(column: Column, runs: list[Run], baseline: list[Run], queries: Queries) -> dict[str, Any] | None:
    scope = next(iter(baseline[0]["metrics"]))
    pairs = _matched(runs, baseline)
    if column.name == RECALL:
        return _over_cases([[_hits(run) for run in each] for each in pairs], queries.groups, queries.parts)
    return _over_seeds([[value_of(run["metrics"][scope], column) for run in each] for each in pairs])


def _matched(runs: list[Run], baseline: list[Run]) -> list[list[Run]]:
    """The runs of both with the seeds that both have, in one order."""
    seeds = sorted({run["seed"] for run in runs} & {run["seed"] for run in baseline})
    return [[next(run for run in each if run["seed"] == seed) for seed in seeds] for each in (runs, baseline)]


def _over_cases(scores: list[list], groups: np.ndarray, parts: np.ndarray | None) -> dict[str, Any]:
    """Of a metric that is a mean over queries: both methods' scores of each query, by seed."""
    first, second = (np.array(each, float) for each in scores)
    several = len(first) > 1
    interval = paired_bootstrap(first, second, groups, parts, new_seeds=several)
    return _result(interval, "bootstrap over cases" + (" and seeds" if several else ""), interval.groups, len(first))


def _over_seeds(values: list[list[float]]) -> dict[str, Any] | None:
    """Of any metric: both methods' values by seed; None where a test can't be made."""
    if len(values[0]) < 2 or np.isnan(values).any():
        return None
    return _result(paired_t(*values), "paired t over seeds", None, len(values[0]))


def _result(interval: Interval, test: str, groups: int | None, seeds: int) -> dict[str, Any]:
    numbers = {name: _round(getattr(interval, name)) for name in ("difference", "low", "high", "p")}
    if np.isnan(interval.low):  # too few cases for one
        numbers |= {"low": None, "high": None}
    return {**numbers, "test": test, "groups": groups, "seeds": seeds}


def _hits(run: Run) -> list[int]:
    return [hit for directions in run["hits"].values() for hits in directions.values() for hit in hits]


def _round(value: float) -> float:
    return round(float(value), DIGITS)
