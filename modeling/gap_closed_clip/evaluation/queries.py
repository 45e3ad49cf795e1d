"""Search with two modalities of a sample together as the query, beside each of them alone."""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from .fusion import fuse, fusion_weights
from .load_metric import load_metric
from .pair_embeddings import PairEmbeddings


PLAIN, WEIGHTED = "plain", "weighted"


def queries_of_two(names: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """First and second modality of the query, and the target: every two of the modalities against every other one."""
    for first, second in itertools.combinations(names, 2):
        yield from ((first, second, target) for target in names if target not in (first, second))


def query_name(first: str, second: str, target: str) -> str:
    """What metrics of a query of two modalities begin with: `image+record_to_text_`."""
    return f"{first}+{second}_to_{target}_"


def measure_queries(
    embeddings: PairEmbeddings, ks: tuple[int, ...], weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """
    Retrieval of the third modality by two others together, over the samples that have all three.

    Of each query, which two modalities and which target, four ways: `plain` (the mean of both), `weighted`
    (`fusion_weights`), and each modality alone, under its own name. The same questions are asked in all of them: a
    query is a distinct pair of values (image and record), and right is what occurs with both, so that whoever knows
    the record alone has to find all of the many reports of women of 45 years.

    Args:
        ks: cut-offs of the recalls.
        weights: the model's own (`config.fusion_weights`). Without them, each half of the samples is searched with the
            weights, made for this target, that are best on the other half; pairs that share an image or a caption are
            in one half.

    Returns:
        `image+record_to_text_WAY_recall@k` and `..._median_rank`; `image+record_to_text_chance_recall@k`,
        `..._num_pairs` and, of the weights that were used, `..._weight_image`: the share of the first modality.
    """
    result: dict[str, float] = {}
    for first, second, target in queries_of_two(embeddings.modalities):
        samples = embeddings.having(first, second, target)
        if len(samples) >= 2:
            result |= _measure(samples, (first, second), target, ks, weights)
    return result


def _measure(
    samples: PairEmbeddings,
    names: tuple[str, str],
    target: str,
    ks: tuple[int, ...],
    weights: Mapping[str, float] | None,
) -> dict[str, float]:
    begin = query_name(*names, target)
    parts = {name: samples.embeds(name) for name in names}
    weighted, share = _weighted(samples, names, target, weights)
    ways = {PLAIN: fuse(parts), WEIGHTED: weighted, **parts}
    ids = [f"{first}\n{second}" for first, second in zip(samples.ids(names[0]), samples.ids(names[1]), strict=True)]
    result: dict[str, float] = {}
    for way, queries in ways.items():
        found = load_metric("cross_modal_retrieval").compute(
            image_embeds=queries,
            text_embeds=samples.embeds(target),
            image_ids=ids,
            caption_ids=samples.ids(target),
            ks=ks,
        )
        result |= {f"{begin}{way}_recall@{k}": found[f"image_to_text_recall@{k}"] for k in ks}
        result[f"{begin}{way}_median_rank"] = found["image_to_text_median_rank"]
    result |= {f"{begin}chance_recall@{k}": found[f"image_to_text_chance_recall@{k}"] for k in ks}
    return result | {f"{begin}num_pairs": float(len(samples)), f"{begin}weight_{names[0]}": share}


def _weighted(
    samples: PairEmbeddings, names: tuple[str, str], target: str, weights: Mapping[str, float] | None
) -> tuple[np.ndarray, float]:
    """The weighted queries (N, D), and the first modality's share of the weights."""
    parts = {name: samples.embeds(name) for name in names}
    if weights is not None and all(name in weights for name in names):
        total = sum(weights[name] for name in names)
        # Where neither counts for anything, they weigh alike, as in pipelines and the handler.
        return fuse(parts, weights if total else None), weights[names[0]] / total if total else 0.5
    in_first = _half(samples.families())
    queries = np.empty_like(samples.embeds(target), dtype=np.float32)
    shares = []
    for rows, others in ((in_first, ~in_first), (~in_first, in_first)):
        fitted = np.flatnonzero(others)
        found = dict.fromkeys(names, 1.0)
        if len(fitted) >= 2:
            found = fusion_weights(samples.select(fitted), target, names)
        queries[rows] = fuse({name: part[rows] for name, part in parts.items()}, found)
        shares.append(found[names[0]] / sum(found.values()))
    return queries, float(np.mean(shares))


def _half(families: np.ndarray) -> np.ndarray:
    """(N,) booleans: a half of the families, drawn with a fixed seed."""
    number = int(families.max()) + 1
    return (np.random.default_rng(0).permutation(number) < number // 2)[families]


__all__ = ["PLAIN", "WEIGHTED", "measure_queries", "queries_of_two", "query_name"]
