"""
Several modalities of one sample as one query: how much each of them counts, and their weighted sum.

**Model.** Let t be the target's embedding and z_m that of modality m of the same sample, both without the mean of
their modality and scaled to a root mean square length of 1. Write z_m = c_m t + sqrt(1 - c_m^2) e_m: c_m is the cosine
of the two (over the samples, E<z_m, t>), and e_m, orthogonal to t, is what modality m says beside it. Of a query u =
sum_m w_m z_m the part along t is sum_m w_m c_m, and E|u|^2 = w^T G w with G_mn = E<z_m, z_n>. The cosine of query and
target, to first order

    (w^T c) / sqrt(w^T G w),

is largest for w proportional to G^(-1) c (Cauchy-Schwarz in the inner product of G), where it is sqrt(c^T G^(-1) c):
at least the cosine of each modality alone, and at least that of the plain mean. Where the e_m are independent, G_mn =
c_m c_n for m != n, and that is

    w_m proportional to c_m / (1 - c_m^2),

as G^(-1) c = S^(-1) c / (1 + c^T S^(-1) c) with S = diag(1 - c^2) (Sherman and Morrison). It is maximal-ratio
combining (Brennan, "Linear diversity combining techniques", Proceedings of the IRE 1959, reprinted 2003): each channel
by its amplitude over its noise's power. Modalities that share what the target doesn't have (a record and an image that
both know the patient's sex) have a larger G_mn, and the weaker one counts less, down to nothing; weights below 0 would
be fitted noise and are none.

**Estimates.** Over the samples that have both, c_mn = margin_mn / sqrt(s_m s_n), where the margin is the mean cosine
of true pairs less that of random pairs, which is E<z_m - mean, z_n - mean> without bias, and s_m = 1 - (mean cosine
inside m) is the same of the squared length. Where the means are zero, c is the true-pair cosine itself; in a cone,
which has high cosines everywhere, only what stands out of it counts. Since z_m comes unscaled, its weight is divided
by sqrt(s_m). Take pairs that the model was not trained on where there are enough: of training pairs a modality that
can be learned by heart has cosines that it does not have elsewhere.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from .pair_embeddings import PairEmbeddings
from .post_hoc import unit


LARGEST_COSINE = 0.999  # above it a weight would be arbitrarily large
RIDGE = 1e-6


def fusion_weights(
    embeddings: PairEmbeddings, target: str | None = None, modalities: Sequence[str] | None = None
) -> dict[str, float]:
    """
    Weights of the modalities in a query of several, {name: weight} with a mean of 1, so that of the plain mean all are
    1. The module says where they come from.

    Args:
        embeddings: unit vectors of at least two samples that have each two modalities which are compared.
        target: what is searched for; the weights are the best ones to find it with all of the others together, G and
            all. Default: one weight for each modality whatever it is put together with, c / (1 - c^2), the mean over
            the other ones as targets: what `config.fusion_weights` holds.
        modalities: those to put together; default: all but the target.

    Raises:
        ValueError: an unknown modality, fewer than two to put together, fewer than two samples with both of two, or
            embeddings that are not finite.
    """
    names = [name for name in modalities or embeddings.modalities if name != target]
    unknown = [name for name in (*names, *filter(None, [target])) if name not in embeddings.modalities]
    if unknown or len(names) < 2:
        raise ValueError(
            f"fusion_weights: the embeddings have {', '.join(embeddings.modalities)}; "
            + (f"there is no {unknown[0]}." if unknown else f"a query needs two modalities beside {target} at least.")
        )
    everything = [*names, *filter(None, [target])]
    _check_finite(embeddings, everything)
    cosines, lengths = _cosines(embeddings, everything)
    if target is not None:
        weights = _best(cosines[:-1, :-1], cosines[:-1, -1])
    else:
        likely = cosines.clip(0, LARGEST_COSINE)
        np.fill_diagonal(likely, 0)
        weights = (likely / (1 - likely**2)).sum(axis=1) / (len(names) - 1)
    weights = weights / lengths[: len(names)]
    if not weights.any():  # none of them knows anything of the target
        weights = np.ones(len(names))
    return dict(zip(names, (weights / weights.mean()).tolist(), strict=True))


def fuse(parts: Mapping[str, np.ndarray], weights: Mapping[str, float] | None = None) -> np.ndarray:
    """
    The query of several modalities: unit(sum_m w_m z_m), (N, D) float32.

    Args:
        parts: by the names of modalities (N, D) unit vectors, zeros where a sample lacks it.
        weights: by name; default: all 1. A sample that has one modality alone is found by that.

    Raises:
        ValueError: a modality without a weight.
    """
    if missing := [name for name in parts if weights is not None and name not in weights]:
        raise ValueError(f"fuse: there is no weight of {', '.join(missing)}, only of {', '.join(weights or ())}.")
    summed = sum((1.0 if weights is None else weights[name]) * unit(z) for name, z in parts.items())
    return unit(np.asarray(summed)).astype(np.float32)


def _check_finite(embeddings: PairEmbeddings, names: Sequence[str]) -> None:
    for name in names:
        broken = np.flatnonzero(~np.isfinite(embeddings.having(name).embeds(name)).all(axis=1))
        if len(broken):
            raise ValueError(
                f"fusion_weights: {len(broken)} rows of {name} are NaN or infinite: leave those samples out, or embed "
                "them again."
            )


def _cosines(embeddings: PairEmbeddings, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(M, M) c_mn, 1 on the diagonal, and (M,) sqrt(s_m)."""
    cosines, squares = np.eye(len(names)), []
    for name in names:
        z = embeddings.having(name).embeds(name)
        squares.append(max(1 - _different(z, z, f"the modality {name}"), 1e-12))
    lengths = np.sqrt(squares)
    for (i, first), (j, second) in itertools.combinations(enumerate(names), 2):
        both = embeddings.having(first, second)
        x, y = unit(both.embeds(first)), unit(both.embeds(second))
        margin = np.sum(x * y) / max(len(x), 1) - _different(x, y, f"both of {first} and {second}")
        cosines[i, j] = cosines[j, i] = np.clip(margin / (lengths[i] * lengths[j]), -1, 1)
    return cosines, lengths


def _different(x: np.ndarray, y: np.ndarray, what: str) -> float:
    """Mean cosine of rows of different samples."""
    x, y, n = unit(x), unit(y), len(x)
    if n < 2:
        raise ValueError(f"fusion_weights: {n} samples have {what}; two at least are needed.")
    return float((x.sum(axis=0) @ y.sum(axis=0) - np.sum(x * y)) / (n * (n - 1)))


def _best(inner: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """(M,) G^(-1) c without weights below 0: of what is left out of the query, the others are solved again."""
    weights = np.zeros(len(cosines))
    used = np.flatnonzero(cosines > 0)
    while len(used):
        solved = np.linalg.solve(inner[np.ix_(used, used)] + RIDGE * np.eye(len(used)), cosines[used])
        if (solved >= 0).all():
            weights[used] = solved
            break
        used = np.delete(used, solved.argmin())
    return weights


__all__ = ["fuse", "fusion_weights"]
