"""
Closes the gap of a trained model without training it: published methods, each fitted on the embeddings of training
pairs and applied to any others.

Notation: x_i and y_i in R^D are the unit vectors of image and text i of the N training pairs, m_x and m_y their means,
unit(v) = v / |v|. Each method gives a map of each modality of the form

    z -> unit(unit(W unit(z) + b) + s),    W (D, D), b (D,), s (D,)

with s = 0 but for ReAlign. All is computed in float64. Fit on training pairs alone: means of the evaluated pairs
themselves make the gap vanish by construction.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from sklearn.covariance import ledoit_wolf_shrinkage

from ..messages import did_you_mean
from .pair_embeddings import PairEmbeddings


@dataclass
class AffineMap:
    """
    The map of one modality, (N, D) -> unit vectors (N, D) in float64.

    Args:
        weight, bias, shift: W (D, D), b (D,) and s (D,) of the module's formula.
        normalize: whether the map begins with unit(z); without it, it is z -> unit(unit(W z + b) + s).
    """

    weight: np.ndarray
    bias: np.ndarray
    shift: np.ndarray
    normalize: bool = True

    def __call__(self, embeds: np.ndarray) -> np.ndarray:
        z = unit(embeds) if self.normalize else np.asarray(embeds, dtype=np.float64)
        return unit(unit(z @ self.weight.T + self.bias) + self.shift)


@dataclass
class PostHocMaps:
    """The maps of both modalities, and of further ones by name."""

    image: AffineMap
    text: AffineMap
    further: dict[str, AffineMap] = field(default_factory=dict)

    def by_modality(self) -> dict[str, AffineMap]:
        """All maps by the names of the modalities."""
        return {"image": self.image, "text": self.text, **self.further}

    def apply(self, embeddings: PairEmbeddings) -> PairEmbeddings:
        """Other pairs, mapped; in float32, as all embeddings of pairs are. What a pair lacks stays a row of zeros."""
        maps = self.by_modality()
        return embeddings.with_embeds(
            {name: maps[name](embeddings.embeds(name)).astype(np.float32) for name in embeddings.modalities}
        )


def mean_shift(image_embeds: np.ndarray, text_embeds: np.ndarray) -> PostHocMaps:
    """
    Both modalities move half of the gap towards each other (Liang et al., "Mind the Gap", NeurIPS 2022, arXiv
    2203.02053, section 4.2: the embedding shift, with the lambda of 1/2 that makes the means meet):

        x -> unit(x - delta / 2),    y -> unit(y + delta / 2),    delta = m_x - m_y

    Args:
        image_embeds, text_embeds: (N, D) and (M, D) of training pairs; they need not be paired.

    Raises:
        ValueError: as `fit`.
    """
    image, text = _unit_rows(image_embeds, text_embeds)
    delta = image.mean(axis=0) - text.mean(axis=0)
    return PostHocMaps(_translation(-delta / 2), _translation(delta / 2))


def centering(image_embeds: np.ndarray, text_embeds: np.ndarray, normalize: bool = True) -> PostHocMaps:
    """
    Each modality loses its own mean:

        x -> unit(x - m_x),    y -> unit(y - m_y)

    Of unit vectors this is the calibration of GR-CLIP (Li et al., "Closing the Modality Gap for Mixed Modality
    Search", arXiv 2507.19054) and the standardization I0T_post (An et al., "I0T", ACL 2025, arXiv 2412.14384). With
    `normalize=False`, of projections that are not normalised, it is what this package's models do in their
    `ProjectionCentering`, and what `gap-closed-clip center method=centering` sets there.

    Args:
        image_embeds, text_embeds: (N, D) and (M, D) of training pairs; they need not be paired.
        normalize: whether they, and what the maps are applied to, are made unit vectors first.

    Raises:
        ValueError: as `fit`.
    """
    image, text = _unit_rows(image_embeds, text_embeds, normalize)
    return PostHocMaps(_translation(-image.mean(axis=0), normalize), _translation(-text.mean(axis=0), normalize))


def realign(image_embeds: np.ndarray, text_embeds: np.ndarray, epsilon: float = 1e-8) -> PostHocMaps:
    """
    ReAlign: texts take the place and the spread of the images, which stay as they are (Yu et al., "Modality Gap-Driven
    Subspace Alignment Training Paradigm for Multimodal Large Language Models", arXiv 2602.07026, section 4):

        anchor and trace    y'  = unit(m_x + r (y - m_y)),    r = sqrt(T_x / (T_y + epsilon)),
                            T_x = mean |x - m_x|^2,  T_y = mean |y - m_y|^2
        centroid            y'' = unit(y' - m' + m_x),        m' = mean of y' over the training texts

    The paper made it for text-only training of a language model on image embeddings. The images' own cone stays, and
    the texts move into it: all cosines rise.

    Args:
        image_embeds, text_embeds: (N, D) and (M, D) of training pairs; they need not be paired.
        epsilon: keeps the quotient finite where all texts are the same.

    Raises:
        ValueError: as `fit`.
    """
    image, text = _unit_rows(image_embeds, text_embeds)
    image_mean, text_mean = image.mean(axis=0), text.mean(axis=0)
    image_trace, text_trace = (np.square(z - z.mean(axis=0)).sum(axis=1).mean() for z in (image, text))
    ratio = np.sqrt(image_trace / (text_trace + epsilon))
    dim = len(image_mean)
    anchored = AffineMap(ratio * np.eye(dim), image_mean - ratio * text_mean, np.zeros(dim))
    return PostHocMaps(_translation(np.zeros(dim)), replace(anchored, shift=image_mean - anchored(text).mean(axis=0)))


def whitening(image_embeds: np.ndarray, text_embeds: np.ndarray, shrinkage: float | None = None) -> PostHocMaps:
    """
    Each modality gets mean 0 and the same covariance in all directions, with as little rotation as that takes (ZCA:
    Bell and Sejnowski, Vision Research 1997; Kessy et al., The American Statistician 2018):

        z -> unit(C^(-1/2) (z - m)),    C = (1 - a) S + a (tr S / D) I,    S = mean (z - m) (z - m)^T

    The covariance is shrunk towards a multiple of the identity, by the intensity a of Ledoit and Wolf (Journal of
    Multivariate Analysis 2004). With fewer pairs than dimensions S alone has no inverse: the more they lack, the
    higher a becomes, and the nearer whitening comes to centering alone (which is a = 1).

    Args:
        image_embeds, text_embeds: (N, D) and (M, D) of training pairs; they need not be paired.
        shrinkage: a, from 0 to 1, instead of Ledoit and Wolf's.

    Raises:
        ValueError: as `fit`; embeddings that are all the same; a shrinkage out of its range, or too low for so few
            pairs.
    """
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ValueError(f"whitening: shrinkage is {shrinkage}; use a number from 0 to 1, or None for Ledoit-Wolf's.")
    image, text = _unit_rows(image_embeds, text_embeds)
    return PostHocMaps(_whitening_of(image, shrinkage), _whitening_of(text, shrinkage))


def procrustes(image_embeds: np.ndarray, text_embeds: np.ndarray) -> PostHocMaps:
    """
    Both modalities are centered, and the texts are turned onto their images by the best orthogonal matrix (Schönemann,
    "A generalized solution of the orthogonal Procrustes problem", Psychometrika 1966):

        x -> unit(x - m_x),    y -> unit(R (y - m_y)),
        R = argmin over orthogonal R of sum_i |R (y_i - m_y) - (x_i - m_x)|^2 = U V^T,  U diag(s) V^T the SVD of
        sum_i (x_i - m_x) (y_i - m_y)^T

    (Liang et al., arXiv 2203.02053, section 4.4, turn texts like this, without centering, before they train a CLIP.)
    It is the only method here that learns from the pairs themselves, D (D - 1) / 2 numbers of them: with few pairs (or
    fewer than dimensions, where directions outside of them are turned arbitrarily) it fits them and not others.

    Args:
        image_embeds, text_embeds: (N, D), row i of each of one training pair.

    Raises:
        ValueError: as `fit`; numbers of images and texts that differ.
    """
    image, text = _unit_rows(image_embeds, text_embeds)
    if len(image) != len(text):
        raise ValueError(f"procrustes: {len(image)} images and {len(text)} texts; it needs pairs, row by row.")
    image_mean, text_mean = image.mean(axis=0), text.mean(axis=0)
    left, _, right = np.linalg.svd((image - image_mean).T @ (text - text_mean))
    rotation = left @ right
    zeros = np.zeros(len(image_mean))
    return PostHocMaps(_translation(-image_mean), AffineMap(rotation, -rotation @ text_mean, zeros))


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], PostHocMaps]] = {
    "centering": centering,
    "mean_shift": mean_shift,
    "realign": realign,
    "whitening": whitening,
    "procrustes": procrustes,
}


def fit(method: str, image_embeds: np.ndarray, text_embeds: np.ndarray) -> PostHocMaps:
    """
    The maps of a method by its name, one of METHODS.

    Args:
        image_embeds, text_embeds: (N, D), of training pairs.

    Raises:
        ValueError: an unknown name; embeddings that are no matrices of one width, are not finite, or are none.
    """
    if method not in METHODS:
        raise ValueError(f"There is no post-hoc method {method!r}{did_you_mean(method, METHODS)}")
    return METHODS[method](image_embeds, text_embeds)


def fit_pairs(method: str, embeddings: PairEmbeddings, normalize: bool = True) -> PostHocMaps:
    """
    The maps of a method for every modality of embedded pairs, each fitted on those pairs that have what it looks at.

    Further modalities are treated as texts are: `centering` and `whitening` look at each modality alone; `realign` and
    `procrustes` move each one onto the images, procrustes by the pairs that have both. Of `mean_shift`, where every
    modality moves by the way from its mean to the mean of all M means, two modalities are the published case.

    Args:
        method: one of METHODS.
        normalize: of `centering`.

    Raises:
        ValueError: as `fit`; no pair has a modality, or both of two.
    """
    if not embeddings.further:
        if method == "centering":
            return centering(embeddings.image_embeds, embeddings.text_embeds, normalize)
        return fit(method, embeddings.image_embeds, embeddings.text_embeds)
    names = embeddings.modalities
    given = {name: embeddings.having(name).embeds(name) for name in names}
    for name in names:
        if not len(given[name]):
            raise ValueError(f"{method}: none of the pairs has the modality {name}: there is nothing to fit.")
    if method == "mean_shift":
        means = {name: unit(z).mean(axis=0) for name, z in given.items()}
        common = np.mean(list(means.values()), axis=0)
        maps = {name: _translation(common - mean) for name, mean in means.items()}
    else:
        maps = {}
        for name in names[1:]:
            image, other = given["image"], given[name]
            if method == "procrustes":
                both = embeddings.having("image", name)
                image, other = both.image_embeds, both.embeds(name)
            found = centering(image, other, normalize) if method == "centering" else fit(method, image, other)
            maps[name] = found.text
            if "image" not in maps:
                maps["image"] = centering(given["image"], other).image if method == "procrustes" else found.image
    return PostHocMaps(maps.pop("image"), maps.pop("text"), maps)


def unit(z: np.ndarray) -> np.ndarray:
    """The rows of z (N, D) at unit length, in float64. A row of zeros stays zero."""
    z = np.asarray(z, dtype=np.float64)
    length = np.linalg.norm(z, axis=1, keepdims=True)
    return z / np.where(length == 0, 1.0, length)


def _unit_rows(image: np.ndarray, text: np.ndarray, normalize: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Both modalities in float64, checked."""
    for name, z in (("image", image), ("text", text)):
        if np.ndim(z) != 2 or not len(z):
            raise ValueError(f"{name}_embeds has the shape {np.shape(z)}: give one row for each training pair.")
        if not np.isfinite(z).all():
            raise ValueError(f"{name}_embeds holds NaN or infinite values.")
    if image.shape[1] != text.shape[1]:
        raise ValueError(f"image_embeds have {image.shape[1]} dimensions and text_embeds {text.shape[1]}.")
    if normalize:
        return unit(image), unit(text)
    return np.asarray(image, dtype=np.float64), np.asarray(text, dtype=np.float64)


def _translation(bias: np.ndarray, normalize: bool = True) -> AffineMap:
    return AffineMap(np.eye(len(bias)), bias, np.zeros(len(bias)), normalize)


def _whitening_of(z: np.ndarray, shrinkage: float | None) -> AffineMap:
    mean = z.mean(axis=0)
    centered = z - mean
    if not np.abs(centered).max() > 1e-12:
        raise ValueError("whitening: all embeddings of a modality are the same, so there is no spread to even out.")
    if shrinkage is None:
        shrinkage = float(ledoit_wolf_shrinkage(centered, assume_centered=True))
    variances, axes = np.linalg.eigh(centered.T @ centered / len(z))
    variances = (1 - shrinkage) * variances.clip(min=0) + shrinkage * variances.clip(min=0).mean()
    if variances.min() <= 1e-12 * variances.max():
        raise ValueError(
            f"whitening: {len(z)} pairs do not spread in all of {z.shape[1]} dimensions: raise shrinkage (now "
            f"{shrinkage:g}), or give more pairs."
        )
    weight = axes / np.sqrt(variances) @ axes.T
    return AffineMap(weight, -weight @ mean, np.zeros(len(mean)))


__all__ = [
    "METHODS",
    "AffineMap",
    "PostHocMaps",
    "centering",
    "fit",
    "fit_pairs",
    "mean_shift",
    "procrustes",
    "realign",
    "unit",
    "whitening",
]
