"""Intervals and tests against scipy, hand-written numbers, and simulations whose truth is known."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from scipy import stats

from gap_closed_clip.evaluation import load_metric
from gap_closed_clip.evaluation.statistics import (
    _Differences,
    _variance_of_seeds,
    holm,
    joined_groups,
    paired_bootstrap,
    paired_permutation,
    paired_t,
    retrieval_hits,
    stack_queries,
)


def pairs_with_duplicates(num_rows: int = 60, seed: int = 0):
    """Embeddings of shared images and captions, some of them tied, and their ids."""
    rng = np.random.default_rng(seed)
    image_of, caption_of = rng.integers(0, 40, num_rows), rng.integers(0, 45, num_rows)
    image, text = rng.integers(-2, 3, size=(2, 50, 4)) + [0, 0, 0, 3.0]
    return image[image_of], text[caption_of], [f"i{n}" for n in image_of], [f"c{n}" for n in caption_of]


@pytest.mark.parametrize("k", [1, 5, 10])
def test_the_means_of_the_hits_are_the_metric(k):
    image, text, image_ids, caption_ids = pairs_with_duplicates()
    ids = {"image_ids": image_ids, "caption_ids": caption_ids}
    metric = load_metric("cross_modal_retrieval").compute(image_embeds=image, text_embeds=text, **ids, ks=(k,))
    hits = retrieval_hits(image, text, **ids, k=k)
    assert hits.text_to_image.mean() == metric[f"text_to_image_recall@{k}"]
    assert hits.image_to_text.mean() == metric[f"image_to_text_recall@{k}"]
    assert 0 < metric[f"recall@{k}"] < 1
    scores, groups, parts = hits.queries(np.arange(60))
    assert np.mean([scores[parts == part].mean() for part in (0, 1)]) == metric[f"recall@{k}"]
    none = np.zeros_like(scores)
    assert paired_bootstrap(scores, none, groups, parts, 10).difference == pytest.approx(metric[f"recall@{k}"])


def test_each_hit_belongs_to_its_first_row():
    """Images at 0 and 90 degrees, the second twice; the caption of the first lies nearer to the second."""
    image, text = [[1, 0], [0, 1], [0, 1]], [[1, 2], [0, 1], [1, 9]]
    hits = retrieval_hits(np.array(image, float), np.array(text, float), ["a", "b", "b"], ["p", "q", "r"], k=1)
    assert hits.image_to_text.tolist() == [1, 1] and hits.text_to_image.tolist() == [0, 1, 1]
    assert hits.image_rows.tolist() == [0, 1] and hits.caption_rows.tolist() == [0, 1, 2]
    assert hits.queries(["x", "y", "z"]).groups.tolist() == ["x", "y", "z", "x", "y"]


def test_rows_that_share_anything_are_one_group():
    cases, images, captions = list("aabcd"), ["1", "2", "3", "4", "5"], ["p", "q", "q", "r", "s"]
    groups = joined_groups(cases, images, captions)
    assert [groups[0] == other for other in groups] == [True, True, True, False, False]
    assert len(set(groups)) == 3


@pytest.mark.parametrize("none", [None, math.nan, "", "  "])
def test_rows_without_a_case_are_no_case(none):
    """By hand: the rows of case P2 are one group, the others are alone; and where all have none, all are alone."""
    images, captions = list("abcdef"), list("uvwxyz")
    groups = joined_groups(images, captions, ["P1", none, none, "P2", "P2", "P3"]).tolist()
    assert groups[3] == groups[4] and len(set(groups)) == 5
    assert joined_groups([none] * 4).tolist() == [0, 1, 2, 3]
    assert len(set(joined_groups([none, none, "P1", "P1"], list("aabc")).tolist())) == 2
    for compare in (paired_bootstrap, paired_permutation):
        with pytest.raises(ValueError, match="2 queries have no group, the first in row 1"):
            compare(np.arange(6.0), np.ones(6), np.array(["P1", none, none, "P2", "P2", "P3"], dtype=object))


def test_cases_that_are_numbers_and_texts_are_both_ids():
    """As a data frame reads numbers of patients, some of which have a letter; by hand."""
    mixed = [101, "A7", 101.0, None, "101", 5]
    assert joined_groups(mixed).tolist() == joined_groups(["101", "A7", "101", None, "101", "5"]).tolist()
    assert len(set(joined_groups(mixed).tolist())) == 4
    with pytest.raises(ValueError, match="ids: row 2 is 0.5: ids are strings or whole numbers"):
        joined_groups(["a", None, 0.5])


def test_groups_of_other_rows_are_refused():
    """Those of all sources beside the hits of one: rows of other pairs' cases, without a word."""
    hits = retrieval_hits(np.eye(3), np.eye(3), k=1)
    for wrong in (list("ab"), list("abcd")):
        with pytest.raises(ValueError, match=f"hits are of 3 pairs and there are {len(wrong)} groups"):
            hits.queries(wrong)
        with pytest.raises(ValueError, match=r"joined_groups: the columns have \[., .\] rows"):
            joined_groups(list("abc"), wrong)


def test_hits_of_tensors_are_those_of_their_values():
    image, text, image_ids, caption_ids = pairs_with_duplicates()
    expected = retrieval_hits(image, text, image_ids, caption_ids, k=5)
    tensors = (torch.tensor(z).to(torch.bfloat16) for z in (image, text))  # whole numbers below 8 are exact
    found = retrieval_hits(*tensors, image_ids, caption_ids, k=5)
    assert found.text_to_image.tolist() == expected.text_to_image.tolist()
    assert found.image_to_text.tolist() == expected.image_to_text.tolist()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"image_ids": ["a", None, "b"]}, "image_ids: row 1 has none"),
        ({"caption_ids": np.array([1.0, 2.0, math.nan])}, "caption_ids: row 2 has none"),
        ({"caption_ids": ["a", "b"]}, "there are 3 pairs and 2 caption_ids"),
        ({"k": 0}, "k is 0, it has to be 1 or more"),
    ],
)
def test_ids_of_hits_are_checked_as_those_of_the_metric(ids, message):
    with pytest.raises(ValueError, match=message):
        retrieval_hits(np.eye(3), np.eye(3), **ids)


def test_sources_are_parts_of_the_mean_over_them():
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 30, 5))
    apart = [retrieval_hits(image[rows], text[rows], k=2) for rows in (slice(0, 12), slice(12, 30))]
    groups = np.array([f"case {n // 2}" for n in range(30)])
    queries = stack_queries([hits.queries(part) for hits, part in zip(apart, (groups[:12], groups[12:]), strict=True)])
    expected = np.mean([[h.text_to_image.mean(), h.image_to_text.mean()] for h in apart])
    found = paired_bootstrap(queries.scores, 0 * queries.scores, queries.groups, queries.parts, 50)
    assert found.difference == pytest.approx(expected) and found.groups == 15


def test_bootstrap_equals_scipy_percentiles_of_single_queries():
    """With a query a group and many of them the widening vanishes, and scipy's percentiles are what is left."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 400)) + [[0.1], [0.0]]
    found = paired_bootstrap(first, second, np.arange(400), num_resamples=20000)
    by_scipy = stats.bootstrap(
        (first - second,), np.mean, n_resamples=20000, method="percentile", vectorized=True, rng=rng
    ).confidence_interval
    assert found.difference == pytest.approx(np.mean(first - second))
    width = by_scipy.high - by_scipy.low
    assert [found.low, found.high] == pytest.approx([by_scipy.low, by_scipy.high], abs=0.03 * width)


def too_small(weights: list[float]) -> float:
    """The variance of a weighted mean of independent values, over what the squares of their influences expect."""
    w = np.array(weights)
    influences = np.diag(w) @ (np.eye(len(w)) - np.ones((len(w), 1)) * w)  # of the values: w (value - weighted mean)
    return np.trace(np.diag(w**2)) / np.trace(influences @ influences.T)


def test_widening_is_that_of_a_mean_of_unequal_groups():
    """By hand: equal weights need G / (G - 1); two groups of 3 and 1 queries (10/16) / (2 * 2 * 9/256) = 40/9."""
    rng = np.random.default_rng(0)
    of_sizes = {(1, 1, 1, 1, 1): 5 / 4, (3, 1): 40 / 9, (9, 2, 1, 1, 1): too_small([9 / 14, 2 / 14, *[1 / 14] * 3])}
    for sizes, expected in of_sizes.items():
        groups = np.repeat(np.arange(len(sizes)), sizes)
        factor, degrees = _Differences(rng.normal(size=len(groups)), np.zeros(len(groups)), groups, None).widening()
        assert (factor, degrees) == (pytest.approx(expected), len(sizes) - 1)
    assert of_sizes[9, 2, 1, 1, 1] > 2 * 5 / 4


def test_a_source_of_few_cases_widens_as_it_does_alone():
    """Half the mean is of 1000 cases that do not differ: the interval is half of that of the other source's seven."""
    differences = np.random.default_rng(0).normal(size=7)
    alone = paired_bootstrap(differences, 0 * differences, np.arange(7), num_resamples=20000)
    both = np.concatenate([differences, np.zeros(1000)])
    sources = np.repeat([0, 1], [7, 1000])
    found = paired_bootstrap(both, 0 * both, np.arange(1007), sources, num_resamples=20000)
    assert [2 * found.low, 2 * found.high] == pytest.approx([alone.low, alone.high], abs=0.05)
    assert found.difference == pytest.approx(alone.difference / 2)


def test_small_bootstrap_is_the_enumeration_of_all_resamples():
    """Four groups of unequal sizes, two parts: quantiles of all 4^4 equally likely draws."""
    groups, parts = np.array([0, 0, 1, 2, 2, 2, 3, 3]), np.array([0, 1, 0, 0, 1, 1, 0, 1])
    scores = np.array([[1.0, 4, 2, 8, 5, 7, 1, 3], [2.0, 4, 1, 9, 5, 6, 1, 1]])
    values = []
    for drawn in itertools.product(range(4), repeat=4):
        rows = np.concatenate([np.flatnonzero(groups == group) for group in drawn])
        means = [scores.mean(axis=0)[rows][parts[rows] == part] for part in (0, 1)]
        if all(len(mean) for mean in means):
            values.append(np.mean([mean.mean() for mean in means]))
    center = scores.mean(axis=0)
    center = np.mean([center[parts == part].mean() for part in (0, 1)])
    wider = math.sqrt(too_small([7 / 24, 1 / 8, 1 / 3, 1 / 4])) * stats.t.ppf(0.1, 3) / stats.norm.ppf(0.1)
    expected = center + wider * (np.quantile(values, [0.1, 0.9]) - center)
    found = paired_bootstrap(scores, 0 * scores, groups, parts, num_resamples=40000, level=0.8)
    assert [found.low, found.high] == pytest.approx(expected, abs=0.12)
    assert found.groups == 4 and found.seeds == 2


def test_p_is_where_the_interval_touches_zero():
    rng = np.random.default_rng(3)
    first, second, groups = rng.normal(size=(3, 80)) + 0.3, rng.normal(size=(3, 80)), np.arange(80) // 2
    for new_seeds in (False, True):
        p = paired_bootstrap(first, second, groups, new_seeds=new_seeds).p
        assert 0.001 < p < 0.5
        for level, holds in ((1 - 0.9 * p, True), (1 - 1.1 * p, False)):
            found = paired_bootstrap(first, second, groups, level=level, new_seeds=new_seeds)
            assert (found.low <= 0 <= found.high) == holds
    worse = paired_bootstrap(second, first, groups)
    assert worse.p == pytest.approx(paired_bootstrap(first, second, groups).p, rel=0.4) and worse.difference < 0
    nothing = paired_bootstrap(first, first, groups)
    assert (nothing.difference, nothing.low, nothing.high, nothing.p) == (0, 0, 0, 1)


def test_seeds_that_differ_widen_the_interval_to_that_of_students_t():
    """Every query alike but for the seed: nothing but the seeds varies, and five of them have t of 4 degrees."""
    effects = np.array([0.5, 0.2, 0.1, 0.4, 0.3])
    first = np.repeat(effects[:, None], 300, axis=1)
    found = paired_bootstrap(first, 0 * first, np.arange(300), num_resamples=20000, new_seeds=True)
    by_t = stats.ttest_1samp(effects, 0).confidence_interval(0.95)
    assert [found.low, found.high] == pytest.approx([by_t.low, by_t.high], abs=0.002)


@pytest.mark.parametrize("groups", [2, 5, 6, 9])
def test_few_groups_that_agree_prove_no_more_than_their_signs_can(groups):
    """All resamples are the difference itself: the p of flipped signs remains, and below 6 groups no interval."""
    found = paired_bootstrap(np.ones(groups), np.zeros(groups), np.arange(groups))
    assert found.difference == 1 and found.p == pytest.approx(2.0 ** (1 - groups))
    assert found.p == pytest.approx(paired_permutation(np.ones(groups), np.zeros(groups), np.arange(groups)))
    assert math.isnan(found.low) == math.isnan(found.high) == (groups < 6)
    assert not math.isnan(paired_bootstrap(np.ones(groups), np.zeros(groups), np.arange(groups), level=0.5).low)


def test_few_groups_and_two_seeds_widen_the_interval_apart():
    """t of one degree for the seeds and of five for the groups: not the extreme of the one's rank in the other."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=6) + np.array([[0.1], [-0.1]])
    found = paired_bootstrap(scores, 0 * scores, np.arange(6), num_resamples=20000, new_seeds=True)
    of_seeds = stats.t.ppf(0.975, 1) * 0.1
    assert of_seeds < (found.high - found.low) / 2 < of_seeds + stats.t.ppf(0.975, 5) * scores.mean(0).std(ddof=1)


def test_few_groups_find_what_is_not_there_as_rarely_as_many():
    """2000 times 8 groups. Holm's correction looks at the smallest p, which the rank of a percentile can't tell."""
    rng = np.random.default_rng(0)
    p = [
        paired_bootstrap(rng.normal(size=8), np.zeros(8), np.arange(8), num_resamples=400, seed=i).p
        for i in range(2000)
    ]
    assert 0.03 < np.mean(np.array(p) <= 0.05) < 0.08
    assert 0.004 < np.mean(np.array(p) <= 0.01) < 0.025


@pytest.mark.parametrize("effect", [0.0, 2.0])
def test_variance_of_seeds_is_that_of_a_two_way_analysis_of_variance(effect):
    """A query a group: (mean square of the seeds - that of the residuals) / (S G), and 0 where that is negative."""
    rng = np.random.default_rng(5)
    y = rng.normal(size=(4, 30)) + rng.normal(size=30) + effect * rng.normal(size=(4, 1))
    of_seeds, of_groups = y.mean(axis=1, keepdims=True), y.mean(axis=0, keepdims=True)
    residuals = np.sum((y - of_seeds - of_groups + y.mean()) ** 2) / (3 * 29)
    expected = (30 * np.sum((of_seeds - y.mean()) ** 2) / 3 - residuals) / (4 * 30)
    found = _variance_of_seeds(_Differences(y, 0 * y, np.arange(30), None))
    assert found == pytest.approx(max(0, expected), abs=1e-12)
    assert (expected > 0) == (effect > 0)


def simulated(rng, num_groups: int, num_seeds: int, seed_effect: float) -> tuple[np.ndarray, np.ndarray]:
    """(S, N) differences without any true one, and their groups of unequal sizes."""
    sizes = np.clip(rng.lognormal(0.7, 0.8, num_groups).round().astype(int), 1, 30)
    groups = np.repeat(np.arange(num_groups), sizes)
    of_cells = rng.normal(size=(num_seeds, num_groups))[:, groups]
    of_seeds = seed_effect * rng.normal(size=(num_seeds, 1))
    single = rng.normal(size=(num_seeds, len(groups)))
    return 0.5 * rng.normal(size=num_groups)[groups] + 0.5 * of_cells + of_seeds + 0.5 * single, groups


@pytest.mark.parametrize(("num_seeds", "seed_effect"), [(1, 0.0), (3, 0.15), (5, 0.15)])
def test_intervals_cover_the_truth(num_seeds, seed_effect):
    """200 times; benchmarks/coverage.py has thousands. Two and a half standard deviations of 200 are 4%."""
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(200):
        differences, groups = simulated(rng, 80, num_seeds, seed_effect)
        found = paired_bootstrap(differences, 0 * differences, groups, num_resamples=400, new_seeds=num_seeds > 1)
        covered.append(found.low <= 0 <= found.high)
    assert 0.91 <= np.mean(covered) <= 0.99


def test_permutation_equals_scipy_and_counts_all_ways():
    first, second, groups = [1.0, 3, 2, 5, 4, 2.5], [0.5, 1, 2.5, 3, 3, 3], np.arange(6)
    by_scipy = stats.permutation_test(
        (first, second), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert paired_permutation(first, second, groups) == pytest.approx(by_scipy.pvalue, abs=1e-12)
    drawn = paired_permutation(first, second, groups, num_resamples=63)  # fewer than 2^6 ways
    assert drawn == pytest.approx(by_scipy.pvalue, abs=0.2) and drawn != by_scipy.pvalue
    assert paired_permutation(first, first, groups) == 1


def test_permutation_moves_whole_groups_in_all_parts():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 2, 30))
    groups, parts = np.arange(30) // 3, np.arange(30) % 2
    values = []
    for signs in itertools.product((1, -1), repeat=10):
        moved = (first - second).mean(axis=0) * np.array(signs)[groups]
        values.append(abs(np.mean([moved[parts == part].mean() for part in (0, 1)])))
    expected = np.mean(np.array(values) >= values[0] - 1e-12)
    assert paired_permutation(first, second, groups, parts) == pytest.approx(expected, abs=1e-12)
    assert paired_permutation(first, second, groups, parts, 1000) == pytest.approx(expected, abs=0.05)


def test_t_over_seeds_equals_scipy_and_the_table():
    first, second = [0.51, 0.48, 0.55, 0.50, 0.49], [0.45, 0.47, 0.50, 0.44, 0.47]
    by_scipy = stats.ttest_rel(first, second)
    found = paired_t(first, second)
    assert found.p == pytest.approx(by_scipy.pvalue, abs=1e-12)
    assert [found.low, found.high] == pytest.approx(list(by_scipy.confidence_interval(0.95)), abs=1e-12)
    differences = [x - y for x, y in zip(first, second, strict=True)]
    half = 2.776 * statistics.stdev(differences) / math.sqrt(5)  # from the table of Student's t
    assert found.high - found.difference == pytest.approx(half, rel=3e-4)
    same = paired_t([1, 2], [1, 2])
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_seeds_that_all_differ_by_the_same_are_no_certainty(seeds):
    """All differences are 0.1 but for rounding: of the 2 ** S ways to give them signs two are as extreme."""
    second = np.arange(seeds) / 3
    found = paired_t(second + 0.1, second)
    assert found.p == 2 / 2**seeds and found.low == found.high == found.difference == pytest.approx(0.1)
    assert paired_t(second - 0.1, second).p == found.p


def test_holm_written_out():
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04, and the last not below the third."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6, 0.01]) == pytest.approx([1, 1, 0.03])
    assert holm([]).shape == (0,)
    with pytest.raises(ValueError, match="holm: p-values are from 0 to 1, got nan"):
        holm([0.1, math.nan])


def test_what_cannot_be_compared_is_said():
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match=f"level is {level}: give the share"):
            paired_bootstrap(np.arange(8.0), np.ones(8), np.arange(8), level=level)
        with pytest.raises(ValueError, match=f"level is {level}: give the share"):
            paired_t([1.0, 2.0], [2.0, 4.0], level=level)
    x = np.ones(4)
    with pytest.raises(ValueError, match="differ in shape, .1, 4. and .1, 3."):
        paired_bootstrap(x, x[:3], [0, 1, 2, 3])
    with pytest.raises(ValueError, match="have the shapes .3,. and .4,.: give each of the 4 queries one"):
        paired_bootstrap(x, x, [0, 1, 2])
    with pytest.raises(ValueError, match="single group"):
        paired_bootstrap(x, x, [0, 0, 0, 0])
    with pytest.raises(ValueError, match="NaN or infinity"):
        paired_bootstrap(x * math.nan, x, [0, 1, 2, 3])
    with pytest.raises(ValueError, match="new_seeds needs scores of two seeds"):
        paired_bootstrap(x, x, [0, 1, 2, 3], new_seeds=True)
    with pytest.raises(ValueError, match="paired_t needs the same two seeds or more"):
        paired_t([1.0], [2.0])
