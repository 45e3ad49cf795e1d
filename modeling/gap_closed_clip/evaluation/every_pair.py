"""Metrics of samples of more than two modalities: of every two of them, of their means, of all of them stacked."""

import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np

from ..metrics._clusters import CLUSTERING, cluster_scores
from .load_metric import load_metric
from .pair_embeddings import PairEmbeddings
from .post_hoc import unit


# What is told as a mean over the pairs of modalities, where all of them have it.
AVERAGED = (
    "modality_gap",
    "debiased_modality_gap",
    "true_pair_cosine",
    "random_pair_cosine",
    "margin",
    *(f"{what}@{k}" for k in (1, 5, 10) for what in ("recall", "chance_recall")),
    "v_measure",
    "ari",
)
MEAN = "mean_over_pairs_"


def pairs_of_modalities(names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Every two of them, those that come first in the model first."""
    return itertools.combinations(names, 2)


def name_for(metric: str, first: str, second: str) -> str:
    """
    What a metric of images and captions is called for two other modalities: `image_to_text_recall@10` becomes
    `image_to_record_recall@10`, and `margin` becomes `image_record_margin`. Images and captions keep their names.
    """
    if (first, second) == ("image", "text"):
        return metric
    for direction, renamed in (
        ("image_to_text", f"{first}_to_{second}"),
        ("text_to_image", f"{second}_to_{first}"),
    ):
        if direction in metric:
            return metric.replace(direction, renamed)
    return f"{first}_{second}_{metric}"


def measure_every_pair(
    embeddings: PairEmbeddings, image_and_text: Mapping[str, float], ks: tuple[int, ...], grouping: bool
) -> dict[str, float]:
    """
    Metrics of samples of more than two modalities, flat, beside those of images and captions.

    For every two other modalities, over the samples that have both, what `modality_gap` and `cross_modal_retrieval`
    give, under the names of `name_for`; k-means on both stacked, where there are labels; and the number of samples.
    `mean_over_pairs_NAME`: the plain mean over every two modalities that any sample has both of. `mean_cosine_NAME`
    inside each modality, over all samples that have it; `centroid_spread` and `debiased_centroid_spread` as of
    `centroid_spread`; `all_v_measure`, `all_nmi` and `all_ari` of all embeddings that there are stacked.
    `num_samples`.

    Args:
        image_and_text: the metrics of images and captions; empty if no sample has both.
        ks: cut-offs of the recalls.
        grouping: whether to cluster, which takes seconds.
    """
    of_pair: dict[tuple[str, str], Mapping[str, float]] = {}
    for first, second in pairs_of_modalities(embeddings.modalities):
        if (first, second) == ("image", "text"):
            if image_and_text:
                of_pair[first, second] = image_and_text
            continue
        both = embeddings.having(first, second)
        if len(both):
            of_pair[first, second] = _measure(both, first, second, ks, grouping)
    result: dict[str, float] = {}
    for (first, second), metrics in of_pair.items():
        if (first, second) != ("image", "text"):
            result |= {name_for(name, first, second): value for name, value in metrics.items()}
    for name in AVERAGED:
        if of_pair and all(name in metrics for metrics in of_pair.values()):
            result[f"{MEAN}{name}"] = float(np.mean([metrics[name] for metrics in of_pair.values()]))
    result |= centroid_spread({name: _present(embeddings, name) for name in embeddings.modalities})
    if grouping and any(embeddings.labels):
        result |= _cluster(embeddings, embeddings.modalities, prefix="all_")
    return result | {"num_samples": float(len(embeddings))}


def _measure(both: PairEmbeddings, first: str, second: str, ks: tuple[int, ...], grouping: bool) -> dict[str, float]:
    vectors = {"image_embeds": both.embeds(first), "text_embeds": both.embeds(second)}
    found = load_metric("modality_gap").compute(**vectors)
    for inside in ("mean_cosine_image", "mean_cosine_text"):  # told once for each modality
        del found[inside]
    ids = {"image_ids": both.ids(first), "caption_ids": both.ids(second)}
    found |= load_metric("cross_modal_retrieval").compute(**vectors, **ids, ks=ks)
    if grouping and any(both.labels):
        found |= _cluster(both, (first, second))
    return found | {"num_pairs": float(len(both))}


def _cluster(embeddings: PairEmbeddings, modalities: tuple[str, ...], prefix: str = "") -> dict[str, float]:
    """V-measure, NMI and adjusted Rand index over those samples that have a label; nan with fewer than two labels."""
    labels = np.array([label.strip() for label in embeddings.labels])
    found, groups = np.unique(labels[labels != ""], return_inverse=True)
    if len(found) < 2:
        return {f"{prefix}{name}": math.nan for name in CLUSTERING}
    number = np.full(len(labels), -1)
    number[labels != ""] = groups
    rows = [np.flatnonzero((number >= 0) & embeddings.present[name]) for name in modalities]
    vectors = [unit(embeddings.embeds(name)[mine]) for name, mine in zip(modalities, rows, strict=True)]
    scores = cluster_scores(vectors, [number[mine] for mine in rows])
    return {f"{prefix}{name}": value for name, value in scores.items()}


def _present(embeddings: PairEmbeddings, name: str) -> np.ndarray:
    """(N, D) float64 unit vectors; zeros where a sample lacks the modality."""
    return unit(embeddings.embeds(name)) * embeddings.present[name][:, None]


def centroid_spread(modalities: Mapping[str, np.ndarray]) -> dict[str, float]:
    """
    How far the means of M modalities lie from their common mean (root mean square), and the cosine inside each:

        spread = sqrt(1/M sum_m |mu_m - mu|^2) = sqrt(1/M^2 sum_{m<n} |mu_m - mu_n|^2),    mu = 1/M sum_m mu_m

    So it is half of the gap where M = 2. The debiased one takes for |mu_m - mu_n|^2 what is without the floor of few
    samples, U_mm + U_nn - 2 U_mn, where U_mn is the mean of <z_mi, z_nj> over all i != j (different samples) that have
    m and n; below 0 it is 0. Where no sample lacks anything, U_mm + U_nn - 2 U_mn is the square of the debiased gap. A
    root of the mean square, and not a mean of lengths, since only squares can be freed of their bias.

    Args:
        modalities: {name: (N, D)} unit vectors, row i of each of one sample; zeros where it lacks the modality.

    Returns:
        centroid_spread, debiased_centroid_spread and mean_cosine_NAME (U_mm) of each; nan where there are too few.
    """
    names = [name for name, z in modalities.items() if z.any()]
    given = np.stack([modalities[name].any(axis=1) for name in names]).astype(np.float64)  # (M, N)
    sums = np.stack([modalities[name].sum(axis=0) for name in names])  # (M, D)
    numbers = given.sum(axis=1)
    same = np.array([[np.sum(modalities[a] * modalities[b]) for b in names] for a in names])
    different = np.outer(numbers, numbers) - given @ given.T  # (M, M) how many pairs of different samples there are
    # Of a single sample what is left above is a rounding error, and not a zero: divided by no pairs it is infinite.
    u = np.divide(sums @ sums.T - same, different, out=np.full_like(same, math.nan), where=different > 0)  # (M, M)
    means = sums / numbers[:, None]
    spread = float(np.sqrt(np.mean(np.sum((means - means.mean(axis=0)) ** 2, axis=1))))
    inside = np.diag(u)
    squares = inside[:, None] + inside[None, :] - 2 * u
    np.fill_diagonal(squares, 0.0)
    debiased = squares.sum() / 2 / len(names) ** 2
    result = {f"mean_cosine_{name}": float(value) for name, value in zip(names, inside, strict=True)}
    debiased_spread = math.nan if math.isnan(debiased) else math.sqrt(max(0.0, debiased))
    return result | {"centroid_spread": spread, "debiased_centroid_spread": debiased_spread}


__all__ = ["AVERAGED", "MEAN", "centroid_spread", "measure_every_pair", "name_for", "pairs_of_modalities"]
