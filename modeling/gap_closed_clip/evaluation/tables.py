"""Markdown tables that are aligned for terminals too."""

import math
from collections.abc import Mapping, Sequence

import numpy as np


Metrics = Mapping[str, float]


def runs_of(found: Metrics | Sequence[Metrics]) -> list[Metrics]:
    """The metrics of one run, or those of several (seeds), as a list."""
    return [found] if isinstance(found, Mapping) else list(found)


def cell(values: Sequence[float], form: str) -> str:
    """The mean ± the standard deviation with N - 1; of one value itself; "-" where one is nan."""
    if not values or any(math.isnan(value) for value in values):
        return "-"
    mean = form.format(np.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(np.std(values, ddof=1))}"


def cell_of(runs: Sequence[Metrics], metric: str, form: str) -> str:
    """The cell of a metric of several runs; "-" where one does not have it."""
    return cell([run.get(metric, math.nan) for run in runs], form)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the head, the first column is aligned left and the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        padded = [row[0].ljust(widths[0])]
        padded += [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)


__all__ = ["Metrics", "cell", "cell_of", "runs_of", "table"]
