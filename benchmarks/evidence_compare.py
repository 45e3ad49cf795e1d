"""Every method against the baseline, run by run and query by query, with Holm's correction over the methods."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from evidence_measure import DIGITS
from evidence_plan import Plan
from evidence_results import GEOMETRY, TASKS, Column, value_of

from gap_closed_clip.evaluation.statistics import Queries, holm, paired_bootstrap, paired_t


RECALL = "recall@10"
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


def _test(column: Column, runs: list[Run], baseline: list[Run], queries: Queries) -> dict[str, Any] | None:
    scope = next(iter(baseline[0]["metrics"]))
    seeds = sorted({run["seed"] for run in runs} & {run["seed"] for run in baseline})
    pairs = [[next(run for run in each if run["seed"] == seed) for seed in seeds] for each in (runs, baseline)]
    if column.name == RECALL:  # a mean over queries
        first, second = (np.array([_hits(run) for run in each], float) for each in pairs)
        several = len(seeds) > 1
        interval = paired_bootstrap(first, second, queries.groups, queries.parts, new_seeds=several)
        test, groups = "bootstrap over cases" + (" and seeds" if several else ""), interval.groups
    else:
        values = [[value_of(run["metrics"][scope], column) for run in each] for each in pairs]
        if len(seeds) < 2 or np.isnan(values).any():
            return None
        interval = paired_t(*values)
        test, groups = "paired t over seeds", None
    numbers = {name: _round(getattr(interval, name)) for name in ("difference", "low", "high", "p")}
    return {**numbers, "test": test, "groups": groups, "seeds": len(seeds)}


def _hits(run: Run) -> list[int]:
    return [hit for directions in run["hits"].values() for hits in directions.values() for hit in hits]


def _round(value: float) -> float:
    return round(float(value), DIGITS)
