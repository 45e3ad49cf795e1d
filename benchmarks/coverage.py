"""How often the intervals of `paired_bootstrap` hold the truth, and how often p < 0.05 where there is no difference.

    python benchmarks/coverage.py               # benchmarks/results/coverage.md, six minutes of one core
    python benchmarks/coverage.py --runs 200

Simulated test sets whose true difference is 0: cases of unequal sizes (1 to 30 queries, log-normal), and a score of
each query, of both methods and of each seed. "hits" are 0 or 1 with the same odds for both methods, by effects of the
query, the case, the seed and the single cell; "few differ" are hits of which both methods share 19 in 20; "normal" and
"skew" are differences with normal or exponential effects of the cases. "8 + 200" cases are of two sources, whose means
count alike. The last column is of `paired_permutation`.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from measure import RESULTS, header, markdown_table, write_report

from gap_closed_clip.evaluation.statistics import paired_bootstrap, paired_permutation


Simulated = tuple[np.ndarray, np.ndarray, np.ndarray]
Queries = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Setting:
    """
    Args:
        scores: what is simulated.
        cases, seeds: how many.
        seed_effect: standard deviation of the effect of a seed.
        new_seeds: whether the interval is to hold for other seeds.
        further: cases of a second source, simulated alike.
    """

    scores: str
    cases: int
    seeds: int = 1
    seed_effect: float = 0.0
    new_seeds: bool = False
    further: int = 0


SETTINGS = (
    *(Setting(scores, cases) for scores in ("hits", "normal", "skew", "few differ") for cases in (8, 25, 100, 400)),
    *(Setting(scores, 8, further=200) for scores in ("hits", "normal")),
    *(Setting(scores, 8, 2, 0.1, True) for scores in ("hits", "normal")),
    *(Setting("hits", 100, seeds, effect, True) for seeds in (3, 5) for effect in (0.0, 0.1, 0.3)),
    *(Setting("normal", 100, seeds, effect, True) for seeds in (3, 5) for effect in (0.0, 0.1, 0.3)),
    Setting("hits", 400, 5, 0.1, True),
)


def cases_of(rng: np.random.Generator, number: int) -> np.ndarray:
    """(N,) the case of each query."""
    return np.repeat(np.arange(number), np.clip(rng.lognormal(0.7, 0.8, number).round().astype(int), 1, 30))


def hits(rng: np.random.Generator, setting: Setting) -> Simulated:
    """Hits of both methods, which find the same cases and queries hard, and those of the case each its own way."""
    cases = cases_of(rng, setting.cases)
    shared = 1.2 * rng.normal(size=setting.cases)[cases] + 0.7 * rng.normal(size=len(cases))

    def method() -> np.ndarray:
        own = 0.5 * rng.normal(size=setting.cases)[cases]
        of_seeds = setting.seed_effect * rng.normal(size=(setting.seeds, 1))
        return (shared + own + of_seeds + 0.5 * rng.normal(size=(setting.seeds, len(cases))) > 0.2).astype(float)

    return method(), method(), cases


def few_differ(rng: np.random.Generator, setting: Setting) -> Simulated:
    """Hits that agree but for one query in 20."""
    cases = cases_of(rng, setting.cases)
    first = (rng.random((setting.seeds, len(cases))) < 0.5).astype(float)
    return first, np.where(rng.random(first.shape) < 0.05, 1 - first, first), cases


def differences(rng: np.random.Generator, setting: Setting) -> Simulated:
    """Differences with an effect of the case, of the seed, of both together, and of the single query."""
    cases = cases_of(rng, setting.cases)
    of_case = rng.normal(size=setting.cases) if setting.scores == "normal" else rng.exponential(size=setting.cases) - 1
    of_both = rng.normal(size=(setting.seeds, setting.cases))
    of_seeds = setting.seed_effect * rng.normal(size=(setting.seeds, 1))
    found = 0.5 * of_case[cases] + 0.3 * of_both[:, cases] + of_seeds + 0.5 * rng.normal(size=of_both[:, cases].shape)
    return found, np.zeros_like(found), cases


SIMULATIONS: dict[str, Callable[[np.random.Generator, Setting], Simulated]] = {
    "hits": hits,
    "few differ": few_differ,
    "normal": differences,
    "skew": differences,
}


def simulated(rng: np.random.Generator, setting: Setting) -> Queries:
    """(S, N) scores of both methods, the case of each query and its source."""
    simulate = SIMULATIONS[setting.scores]
    of_sources = [simulate(rng, replace(setting, cases=cases)) for cases in (setting.cases, setting.further) if cases]
    first, second = (np.concatenate(scores, axis=1) for scores in list(zip(*of_sources, strict=True))[:2])
    cases = np.concatenate([own + source * setting.cases for source, (*_, own) in enumerate(of_sources)])
    return first, second, cases, (cases >= setting.cases).astype(int)


def measured(setting: Setting, runs: int, resamples: int) -> list[str]:
    """A row of the table."""
    rng = np.random.default_rng(0)
    covered, widths, rejected = [], [], []
    for run in range(runs):
        first, second, cases, sources = simulated(rng, setting)
        found = paired_bootstrap(first, second, cases, sources, resamples, run, new_seeds=setting.new_seeds)
        covered.append(found.low <= 0 <= found.high)
        widths.append(found.high - found.low)
        if not setting.new_seeds:
            rejected.append(paired_permutation(first, second, cases, sources, resamples, run) < 0.05)
    counted = f"{np.mean(rejected):.1%}" if rejected else "-"
    number = f"{setting.cases} + {setting.further}" if setting.further else str(setting.cases)
    told = [setting.scores, number, str(setting.seeds), f"{setting.seed_effect:g}"]
    scope = "cases and seeds" if setting.new_seeds else "cases"
    return [*told, scope, f"{np.mean(covered):.1%}", f"{np.median(widths):.3f}", counted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="simulated test sets of each row")
    parser.add_argument("--resamples", type=int, default=1000, help="of each interval")
    arguments = parser.parse_args()
    start = time.perf_counter()
    rows = [measured(setting, arguments.runs, arguments.resamples) for setting in SETTINGS]
    error = 1.96 * np.sqrt(0.95 * 0.05 / arguments.runs)
    columns = (
        "scores",
        "cases",
        "seeds",
        "seed effect",
        "interval over",
        "coverage",
        "width",
        "permutation: p < 0.05",
    )
    write_report(
        RESULTS / "coverage.md",
        header("Coverage of 95% intervals, simulated", "cpu"),
        f"- {time.perf_counter() - start:.0f} seconds; {arguments.runs} simulated test sets a row, "
        f"{arguments.resamples} resamples each; a coverage of 95% is known to ±{error:.1%}",
        (__doc__ or "").split("\n\n")[2],
        markdown_table(columns, rows),
    )


if __name__ == "__main__":
    main()
