"""Pairs of several sources, measured together and apart: each source's own pairs in a gallery of their own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


Metrics = Mapping[str, float]
# Metrics of which a mean over the sources is told.
MAIN_METRICS = (
    "recall@10",
    "margin",
    "debiased_modality_gap",
    "true_pair_cosine",
    "random_pair_cosine",
    "rouge_l",
    "cider_d",
)


def rows_by_source(sources: Sequence[str]) -> dict[str, np.ndarray]:
    """{source: indices of its rows}, in the order of their first rows; rows without a source ("") are left out."""
    names = np.array(sources, dtype=str)
    return {name: np.flatnonzero(names == name) for name in dict.fromkeys(sources) if name}


def measure_sources(found: Any, metrics: Metrics, measure: Callable[[Any], Metrics]) -> dict[str, dict[str, float]]:
    """
    The metrics of each source's own items.

    Args:
        found: `PairEmbeddings` or `Captions` of one source or several.
        metrics: of all of them.
        measure: gives the metrics of such a `found`.
    """
    parts = found.by_source()
    if len(parts) == 1 and len(next(iter(parts.values()))) == len(found):
        return {name: dict(metrics) for name in parts}
    return {name: dict(measure(part)) for name, part in parts.items()}


def mean_over_sources(
    metrics: Metrics, by_source: Mapping[str, Metrics], names: Sequence[str] = MAIN_METRICS
) -> dict[str, float]:
    """
    The plain mean over the sources, whatever their sizes, of those metrics that all of them have.

    Args:
        metrics: of all pairs; their own means, where there are no named sources.
        by_source: {source: its metrics}.
        names: of the metrics.
    """
    parts = list(by_source.values()) if by_source else [metrics]
    return {name: float(np.mean([part[name] for part in parts])) for name in names if all(name in p for p in parts)}


def flat_metrics(metrics: Metrics, by_source: Mapping[str, Metrics]) -> dict[str, float]:
    """For a Trainer: the metrics of all pairs, `SOURCE_NAME` of each source, and `mean_NAME` over the sources."""
    apart = {f"{source}_{name}": value for source, part in by_source.items() for name, value in part.items()}
    means = {f"mean_{name}": value for name, value in mean_over_sources(metrics, by_source).items()}
    return apart | means | dict(metrics)  # the metrics of all pairs win, should a source's name make one of theirs


__all__ = ["MAIN_METRICS", "flat_metrics", "mean_over_sources", "measure_sources", "rows_by_source"]
