"""Whether two methods differ: intervals and tests over cases and over seeds, and Holm's correction for many of them.

All tests are paired: both methods answer the same queries. Queries of one case (several images of it, an image and its
caption) are not independent, so whole groups are resampled, or change their sign, never single queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..metrics._embeddings import blocks
from .retrieval_hits import Queries, RetrievalHits, joined_groups, lacks_id, retrieval_hits, stack_queries


Ids = Sequence | np.ndarray
SAME = 1e-9  # differences of seeds that vary by less of their mean are the same but for rounding


@dataclass(frozen=True)
class Interval:
    """
    How much better the first of two methods is.

    Args:
        difference: first - second.
        low, high: of the interval, in the same unit; NaN where there are too few groups for one.
        p: two-sided, of no difference.
        groups, seeds: how many there were.
    """

    difference: float
    low: float
    high: float
    p: float
    groups: int
    seeds: int


def _paired(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(S, N) first - second, checked."""
    x, y = (np.atleast_2d(np.asarray(scores, dtype=np.float64)) for scores in (first, second))
    if x.shape != y.shape:
        raise ValueError(f"The methods' scores differ in shape, {x.shape} and {y.shape}: give both the same queries.")
    difference = x - y
    if not np.isfinite(difference).all():
        raise ValueError("The scores hold NaN or infinity: leave these queries out of both methods.")
    return difference


class _Differences:
    """The differences of two methods, summed over each group in each part.

    Args:
        sums: (S, G, P) of the scores' differences.
        sizes: (G, P) numbers of queries.
        strata: (G,) numbers: groups that have parts in common, directly or through others, are of one stratum.
    """

    def __init__(self, first: np.ndarray, second: np.ndarray, groups: Ids, parts: Ids | None):
        difference = _paired(first, second)
        num_seeds, num_queries = difference.shape
        columns = np.asarray(groups), np.zeros(num_queries) if parts is None else np.asarray(parts)
        if any(ids.shape != (num_queries,) for ids in columns):
            found = " and ".join(str(ids.shape) for ids in columns)
            raise ValueError(f"Groups and parts have the shapes {found}: give each of the {num_queries} queries one.")
        if lacking := [row for row, group in enumerate(columns[0].tolist()) if lacks_id(group)]:
            raise ValueError(
                f"{len(lacking)} queries have no group, the first in row {lacking[0]}: give each one, as "
                "joined_groups makes them, where rows without an id are groups of their own."
            )
        group, part = (np.unique(ids, return_inverse=True)[1] for ids in columns)
        shape = int(group.max(initial=-1)) + 1, int(part.max(initial=-1)) + 1
        self.sizes, self.sums = np.zeros(shape), np.zeros((num_seeds, *shape))
        np.add.at(self.sizes, (group, part), 1)
        for seed in range(num_seeds):
            np.add.at(self.sums[seed], (group, part), difference[seed])
        edges = coo_array((np.ones(len(group)), (group, shape[0] + part)), shape=(sum(shape), sum(shape)))
        self.strata = np.unique(connected_components(edges, directed=False)[1][: shape[0]], return_inverse=True)[1]
        if not len(group) or np.bincount(self.strata).min() < 2:
            raise ValueError("A part of the queries has a single group, or none: nothing tells how groups vary.")
        self.corrections = self._corrections()

    def _corrections(self) -> np.ndarray:
        """(T,) by how much the squares of each stratum's influences are too small a variance: 1 or more.

        A group of weight w has the influence w (d - sum of w d). Where the groups' means d vary alike, the squares
        expect sum of w^2 ((1 - w)^2 + W - w^2) of the variance W = sum of w^2: (G - 1) / G of it with equal weights,
        and less where a few groups hold most queries.
        """
        weights = (self.sizes / self.sizes.sum(axis=0)).mean(axis=1)
        found = []
        for stratum in range(int(self.strata.max()) + 1):
            share = weights[self.strata == stratum]
            share = share / share.sum()
            total = np.sum(share**2)
            found.append(total / np.sum(share**2 * ((1 - share) ** 2 + total - share**2)))
        return np.array(found)

    def widening(self) -> tuple[float, float]:
        """By how much the variance of the resamples is too small, and its degrees of freedom: those of a sum of the
        strata's, each of G - 1 (Satterthwaite, "An Approximate Distribution of Estimates of Variance Components",
        Biometrics Bulletin 1946)."""
        drawn = np.bincount(self.strata, weights=self.influences().mean(axis=0) ** 2)
        degrees = np.bincount(self.strata) - 1
        if not drawn.any():  # no group differs from another
            return 1.0, float(degrees.sum())
        variances = self.corrections * drawn
        return float(variances.sum() / drawn.sum()), float(variances.sum() ** 2 / np.sum(variances**2 / degrees))

    def means(self) -> np.ndarray:
        """(S,) the difference of each seed."""
        return (self.sums.sum(axis=1) / self.sizes.sum(axis=0)).mean(axis=1)

    def influences(self) -> np.ndarray:
        """(S, G) how much each group moves the difference of each seed, to first order; they sum to 0 in a stratum."""
        totals = self.sizes.sum(axis=0)
        ratios = self.sums.sum(axis=1, keepdims=True) / totals  # (S, 1, P)
        return ((self.sums - ratios * self.sizes) / totals).mean(axis=2)

    def resampled(self, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
        """(num_resamples,) the mean over the seeds, each time of as many groups of each stratum, with replacement."""
        both = np.concatenate([self.sums.mean(axis=0), self.sizes], axis=1)  # (G, 2 P)
        members = [np.flatnonzero(self.strata == stratum) for stratum in range(int(self.strata.max()) + 1)]
        found = []
        for block in blocks(num_resamples, max(1, 2**22 // len(both))):
            count = block.stop - block.start
            weights = np.empty((count, len(both)))
            for rows in members:
                drawn = rng.integers(len(rows), size=(count, len(rows))) + len(rows) * np.arange(count)[:, None]
                counts = np.bincount(drawn.ravel(), minlength=count * len(rows))
                weights[:, rows] = counts.reshape(count, len(rows))
            sums, sizes = np.split(weights @ both, 2, axis=1)
            with np.errstate(invalid="ignore"):
                found.append((sums / sizes).mean(axis=1))
        values = np.concatenate(found)
        return values[np.isfinite(values)]  # without those few that drew no group of some part


def _variance_of_seeds(data: _Differences) -> float:
    """What the seeds add to the variance over groups of the mean difference, 0 or more.

    Groups and seeds are crossed random factors: V = V_groups + V_seeds - V_cells, each of which holds the variance of
    single cells once (Cameron, Gelbach and Miller, JBES 2011).
    """
    influences, means = data.influences(), data.means()
    seeds = len(means)
    cells = np.sum((influences - influences.mean(axis=0)) ** 2 * data.corrections[data.strata])
    return max(0.0, float(np.var(means, ddof=1) / seeds - cells / (seeds * (seeds - 1))))


def paired_bootstrap(
    first: np.ndarray,
    second: np.ndarray,
    groups: Ids,
    parts: Ids | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    new_seeds: bool = False,
) -> Interval:
    """
    How much better the first method is than the second, by a bootstrap over whole groups (cases).

    The difference is the mean over the parts of sum of differences / number of queries, and the mean over the seeds.
    As many groups are drawn with replacement as there are, apart where groups have no part in common (sources). The
    bounds are percentiles of their deviations, widened for few groups as normal ones would have to be: with groups of
    equal sizes by sqrt(G / (G - 1)) t_{G - 1} / z (Hesterberg, "What Teachers Should Know About the Bootstrap", The
    American Statistician 2015, section 5.3, widens the rank of the percentile by as much, which ends at the most
    extreme resample), by more where few groups hold much of the mean (`_Differences.widening`). p is the level at
    which the interval just touches 0, at least 2 / (num_resamples + 1), and at least 2^(1 - G), the least that a test
    of G groups can give. Where that is above 1 - level (fewer than 6 groups at 95%), the bounds are NaN.

    By default it covers other cases of the same kind, judged by these very models: their seeds count as given. With
    `new_seeds` it covers other cases and trainings with other seeds. Three or five seeds resampled would vary too
    little: the variance that they add is estimated (`_variance_of_seeds`), drawn from Student's t with S - 1 degrees
    of freedom, and added to the resamples (the sum of Behrens and Fisher). How often intervals of 95% hold the
    truth is simulated in benchmarks/coverage.py: in 93 to 98% of test sets from 8 groups on, and in nearly all where
    few groups differ at all.

    Args:
        first, second: (S, N) a score of each query of each seed, or (N,); seeds are matched by row.
        groups: (N,) ids of the groups.
        parts: (N,) ids of what means are taken over before their mean (directions, sources); default: one part.
        num_resamples: drawn.
        seed: of the drawing.
        level: of the interval.
        new_seeds: whether it is to hold for other seeds, too.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, a query without a group, a stratum of one
            group, new_seeds of one seed, a level that is none.
    """
    _check_level(level)
    data = _Differences(first, second, groups, parts)
    means = data.means()
    if new_seeds and len(means) < 2:
        raise ValueError("new_seeds needs scores of two seeds or more; with one seed leave it out.")
    difference = float(means.mean())
    rng = np.random.default_rng(seed)
    bounds = _bounds(data, difference, data.resampled(num_resamples, rng) - difference, rng if new_seeds else None)
    least = 2.0 ** (1 - len(data.strata))  # of a test that flips the signs of groups
    p = max(_touching(bounds), 2 / (num_resamples + 1), least) if difference else 1.0
    low, high = bounds(1 - level) if least <= 1 - level else (np.nan, np.nan)
    return Interval(difference, low, high, p, len(data.strata), len(means))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: give the share of intervals that are to hold the truth, such as 0.95.")


Bounds = Callable[[float], tuple[float, float]]


def _bounds(
    data: _Differences, difference: float, deviations: np.ndarray, of_seeds: np.random.Generator | None
) -> Bounds:
    """The lower and the upper bound as a function of alpha = 1 - level.

    Args:
        deviations: (B,) of the resamples from the difference.
        of_seeds: draws the part of the seeds, from Student's t; None leaves it out.
    """
    too_small, degrees = data.widening()
    seeds = np.zeros_like(deviations)
    if of_seeds is not None:
        ranks = (of_seeds.permutation(len(deviations)) + 0.5) / len(deviations)
        student = special.stdtrit(len(data.sums) - 1, ranks)
        seeds = np.sqrt(_variance_of_seeds(data)) * student

    def bounds(alpha: float) -> tuple[float, float]:
        wider = np.sqrt(too_small) * special.stdtrit(degrees, alpha / 2) / special.ndtri(alpha / 2)
        low, high = difference + np.quantile(wider * deviations + seeds, [alpha / 2, 1 - alpha / 2])
        return float(low), float(high)

    return bounds


def _touching(bounds: Bounds) -> float:
    """The alpha at which the interval begins to leave 0 out; 1 where it always holds it."""
    low, high = 0.0, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        bottom, top = bounds(middle)
        low, high = (low, middle) if bottom > 0 or top < 0 else (middle, high)
    return high


def paired_permutation(
    first: np.ndarray,
    second: np.ndarray,
    groups: Ids,
    parts: Ids | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> float:
    """
    The two-sided p of a permutation test: both methods change their places in whole groups, at random.

    The differences of a group, over all its queries and seeds, keep or change their sign. With 2^G <= num_resamples
    all ways are counted, and p is exact; else p is (1 + those that differ as much) / (1 + num_resamples) (Phipson and
    Smyth, 2010). It says that the methods differ on cases like these, by these models. It holds for any number of
    groups, which intervals do not.

    Args:
        first, second, groups, parts, num_resamples, seed: as of `paired_bootstrap`.

    Raises:
        ValueError: as `paired_bootstrap`.
    """
    data = _Differences(first, second, groups, parts)
    moved = (data.sums.mean(axis=0) / data.sizes.sum(axis=0)).mean(axis=1)  # (G,)
    exact = len(moved) <= 60 and 2 ** len(moved) <= num_resamples
    total, least, rng = 2 ** len(moved) if exact else num_resamples, abs(moved.sum()), np.random.default_rng(seed)
    least -= 1e-12 * np.abs(moved).sum()  # sums that are equal but for rounding are equal
    count = 0
    for block in blocks(total, max(1, 2**22 // len(moved))):
        if exact:
            flips = np.arange(block.start, block.stop)[:, None] >> np.arange(len(moved)) & 1
        else:
            flips = rng.integers(2, size=(block.stop - block.start, len(moved)), dtype=np.int8)
        count += int(np.sum(np.abs((1 - 2.0 * flips) @ moved) >= least))
    return count / total if exact else (1 + count) / (1 + total)


def paired_t(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Interval:
    """
    Student's paired t-test over seeds (Student, 1908), with its interval: it covers trainings with other seeds, judged
    on the very same test pairs. `groups` is 0.

    Where all differences are the same but for rounding, and not 0, t has no value: p is then that of the exact test
    that flips the signs of the seeds, 2 ** (1 - S), and the interval is the difference alone.

    Args:
        first, second: (S,) a metric of both methods by matched seeds.
        level: of the interval.

    Raises:
        ValueError: fewer than two seeds, numbers that differ or are not finite, or a level that is none.
    """
    _check_level(level)
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise ValueError(f"paired_t needs the same two seeds or more of both methods, got {x.shape} and {y.shape}.")
    differences = x - y
    if not np.isfinite(differences).all():
        raise ValueError("paired_t: a metric of a seed is NaN or infinite: leave the seed out of both methods.")
    mean, error = float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(x)))
    if error <= SAME * abs(mean):
        return Interval(mean, mean, mean, 2.0 ** (1 - len(x)) if mean else 1.0, 0, len(x))
    half = error * float(stats.t.ppf((1 + level) / 2, len(x) - 1))
    p = 2 * float(stats.t.sf(abs(mean) / error, len(x) - 1))
    return Interval(mean, mean - half, mean + half, p, 0, len(x))


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """
    (M,) p-values adjusted for their number, in the order given (Holm, "A simple sequentially rejective multiple test
    procedure", 1979): the i-th smallest times M - i + 1, not below those before it, not above 1. To reject those below
    alpha keeps the chance of any wrong rejection below alpha, whatever depends on what.

    Raises:
        ValueError: a value that is not from 0 to 1.
    """
    p = np.asarray(p_values, dtype=np.float64).reshape(-1)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"holm: p-values are from 0 to 1, got {p[~((p >= 0) & (p <= 1))][0]}.")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


__all__ = [
    "Interval",
    "Queries",
    "RetrievalHits",
    "holm",
    "joined_groups",
    "paired_bootstrap",
    "paired_permutation",
    "paired_t",
    "retrieval_hits",
    "stack_queries",
]
