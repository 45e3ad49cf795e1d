"""How a space is filled: uniformity, effective rank, and whether its two modalities can be told apart."""

import math

import evaluate
import numpy as np
from datasets.utils import tqdm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits

from ._embeddings import (
    ID_ARGUMENTS,
    PAIR_ARGUMENTS,
    RAISES,
    STRING,
    EmbeddingMetric,
    UnitRows,
    blocks,
    families_of,
    first_rows,
    numbered,
    pair_info,
    unit_pairs,
)


_DESCRIPTION = """\
How two modalities fill the unit sphere that they share, beside what `modality_gap` says of it. x_i and y_i are the
unit vectors of image and text of pair i; every pair counts, so an image with several captions counts several times.

- `uniformity_image`, `uniformity_text`: log of the mean over i != j of exp(-2 |x_i - x_j|^2), and the same of y (Wang
  and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere",
  ICML 2020, arXiv 2005.10242, section 4.1.2, t = 2). 0 is a single point; the lower, the more evenly spread, down to
  nearly -4 in many dimensions.
- `uniformity_cross`: log of the mean over i != j of exp(-2 |x_i - y_j|^2), the cross-modal uniformity of Fahim et al.,
  "It's Not a Modality Gap: Characterizing and Addressing the Contrastive Gap", arXiv 2405.18570. A wide gap lowers it
  as well: read it beside those inside the modalities.
- `effective_rank_image`, `effective_rank_text`: exp of the entropy of p_k = l_k / sum l, l the eigenvalues of the
  modality's covariance matrix (D x D, of the unit vectors around their mean): in how many directions it varies, from 1
  to min(N - 1, D). It is the effective rank of that matrix (Roy and Vetterli, "The effective rank", EUSIPCO 2007,
  definition 1). Others take the singular values of the vectors themselves, around 0, where the direction of the mean
  counts, too, and all else more evenly: their figures are different ones.
- `modality_separability`: balanced accuracy (the mean of both modalities' recalls) of a logistic regression that tells
  images from texts, 5-fold cross-validated over the distinct images and texts. Pairs that share an image or a caption,
  directly or through others, are in one fold, so no partner of a tested item is fitted on. 1 is two modalities that a
  plane keeps apart, 0.5 is none that can be told apart; a little less than 0.5 is the same.
- `relative_gap`: d / (d + (d_x + d_y) / 2), d the mean cosine distance (1 - cos) / 2 of true pairs, d_x and d_y those
  over i != j inside images and inside texts: the relative modality gap (RMG) of Schrodi et al., "Two Effects, One
  Trigger: On the Modality Gap, Object Bias, and Information Imbalance in Contrastive Vision-Language Models", ICLR
  2025, arXiv 2404.07983, with their distance. 0 are pairs that are one point each, 1/2 partners that are as far from
  each other as any two of one modality, 1 two modalities that are one point each. It grows with bad alignment as well
  as with a gap: two modalities without any offset, whose partners have nothing in common, have 1/2.

All is computed in float64. Uniformity takes O(N^2 D) time and O(block_size * (block_size + D)) memory, the ranks
O(N D^2 + D^3) time; the classifier needs the vectors in float64. Uniformity and `relative_gap` do not depend on N;
`effective_rank` grows with it until N is several times D: compare models on the same pairs only.
"""

_URLS = [f"https://arxiv.org/abs/{number}" for number in ("2005.10242", "2405.18570", "2404.07983")]
_CITATION = """\
@inproceedings{wang2020understanding,
  title     = {Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere},
  author    = {Wang, Tongzhou and Isola, Phillip},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2020},
  note      = {arXiv:2005.10242}
}
@article{fahim2024gap,
  title   = {It's Not a Modality Gap: Characterizing and Addressing the Contrastive Gap},
  author  = {Fahim, Abrar and Murphy, Alex and Fyshe, Alona},
  journal = {arXiv:2405.18570},
  year    = {2024}
}
@inproceedings{roy2007effective,
  title     = {The Effective Rank: A Measure of Effective Dimensionality},
  author    = {Roy, Olivier and Vetterli, Martin},
  booktitle = {European Signal Processing Conference (EUSIPCO)},
  year      = {2007}
}
@inproceedings{schrodi2025effects,
  title     = {Two Effects, One Trigger: On the Modality Gap, Object Bias, and Information Imbalance in Contrastive
               Vision-Language Models},
  author    = {Schrodi, Simon and Hoffmann, David T. and Argus, Max and Fischer, Volker and Brox, Thomas},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2025},
  note      = {arXiv:2404.07983}
}
"""

_INPUTS_DESCRIPTION = f"""
Args:
{PAIR_ARGUMENTS}
{ID_ARGUMENTS}
    num_folds (`int`, defaults to 5): folds of the classifier, at most one a family of pairs that share anything.
    block_size (`int`, defaults to 1024): rows, and columns, of a tile of distances.

Returns:
    dict of floats: uniformity_image, uniformity_text, uniformity_cross, effective_rank_image, effective_rank_text,
    modality_separability, relative_gap. nan are: all of a single pair; the effective rank of a modality that does not
    vary; modality_separability where all pairs share images or captions; relative_gap where all embeddings are equal.

Raises:
    {RAISES}
"""
_INPUTS_DESCRIPTION += """
Examples:
    Four pairs on the circle, images around 0 and captions around 90 degrees: a plane keeps them apart, and on a
    circle's arc both vary in hardly more than one direction.

    >>> import evaluate
    >>> metric = evaluate.load("space_geometry.py")
    >>> result = metric.compute(
    ...     image_embeds=[[1.0, -0.2], [1.0, -0.1], [1.0, 0.1], [1.0, 0.2]],
    ...     text_embeds=[[-0.2, 1.0], [-0.1, 1.0], [0.1, 1.0], [0.2, 1.0]],
    ... )
    >>> {name: round(value, 3) for name, value in result.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'uniformity_image': -0.124, 'uniformity_text': -0.124, 'uniformity_cross': -3.752, 'effective_rank_image': 1.016,
     'effective_rank_text': 1.016, 'modality_separability': 1.0, 'relative_gap': 0.969}
"""

_KINDS = ("image", "text", "cross")
_INVERSE_REGULARISATION = 32.0  # scikit-learn's C, for vectors scaled to a root mean square length of 1
_NO_SPREAD = 1e-12  # mean squared distance from the mean, below which float32 embeddings do not vary


def _log_mean_potential(x: UnitRows, y: UnitRows, block_size: int) -> float:
    """log of the mean over i != j of exp(-2 |x_i - y_j|^2); of one modality only tiles above the diagonal are made."""
    n, total = len(x), 0.0
    for rows in tqdm(list(blocks(n, block_size)), desc="Measuring distances", delay=2, leave=False):
        left = x[rows]
        for columns in blocks(n, block_size):
            if x is y and columns.start < rows.start:
                continue
            potential = left @ y[columns].T
            potential -= 1.0
            potential *= 4.0  # -2 |x - y|^2 = 4 (cos - 1)
            np.exp(potential, out=potential)
            if columns == rows:
                np.fill_diagonal(potential, 0.0)
            total += float(potential.sum()) * (2 if x is y and columns != rows else 1)
    return math.log(total / (n * (n - 1)))


def _moments(x: UnitRows) -> tuple[np.ndarray, np.ndarray]:
    """(D,), (D, D): the mean of the rows and their covariance, with N in the denominator."""
    mean, covariance = np.zeros(x.dim), np.zeros((x.dim, x.dim))
    for block in blocks(len(x)):
        mean += x[block].sum(axis=0) / len(x)
    for block in blocks(len(x)):
        centered = x[block] - mean
        covariance += centered.T @ centered / len(x)
    return mean, covariance


def _effective_rank(covariance: np.ndarray) -> float:
    """exp of the entropy of the normalised eigenvalues; nan where there is no variance."""
    if np.trace(covariance) <= _NO_SPREAD:
        return math.nan
    shares = np.linalg.eigvalsh(covariance).clip(min=0)
    shares = shares[shares > 0] / shares.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def _separability(image: UnitRows, text: UnitRows, images: np.ndarray, captions: np.ndarray, num_folds: int) -> float:
    """Cross-validated balanced accuracy of telling the distinct images and captions apart; nan of a single family."""
    families = families_of(images, captions)
    if len(set(families)) < 2:
        return math.nan
    first_image, first_caption = first_rows(images), first_rows(captions)
    items = np.concatenate([image[first_image], text[first_caption]])
    is_text = np.repeat([False, True], [len(first_image), len(first_caption)])
    groups = np.concatenate([families[first_image], families[first_caption]])
    predicted = np.empty_like(is_text)
    folds = GroupKFold(n_splits=min(num_folds, len(set(families))))
    for fitted, tested in folds.split(items, groups=groups):
        mean = items[fitted].mean(axis=0)
        scale = np.sqrt(np.mean(np.sum((items[fitted] - mean) ** 2, axis=1))) or 1.0
        classifier = LogisticRegression(C=_INVERSE_REGULARISATION, max_iter=1000, class_weight="balanced")
        with threadpool_limits(1):  # small matrices: threads would wait for one another
            classifier.fit((items[fitted] - mean) / scale, is_text[fitted])
            predicted[tested] = classifier.predict((items[tested] - mean) / scale)
    return float(balanced_accuracy_score(is_text, predicted))


def _mean_pair_cosine(x: UnitRows, y: UnitRows) -> float:
    return sum(float(np.sum(x[block] * y[block])) for block in blocks(len(x))) / len(x)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class SpaceGeometry(EmbeddingMetric):
    optional_inputs = ("image_ids", "caption_ids")

    def _info(self):
        info = pair_info(_DESCRIPTION, _INPUTS_DESCRIPTION, image_ids=STRING, caption_ids=STRING)
        info.citation, info.reference_urls = _CITATION, _URLS
        return info

    def _compute(self, image_embeds, text_embeds, image_ids, caption_ids, num_folds=5, block_size=1024):
        image, text = unit_pairs(image_embeds, text_embeds)
        n = len(image)
        names = [f"uniformity_{kind}" for kind in _KINDS] + [f"effective_rank_{kind}" for kind in _KINDS[:2]]
        if n == 1:
            return dict.fromkeys([*names, "modality_separability", "relative_gap"], math.nan)
        uniformity = [_log_mean_potential(*both, block_size) for both in ((image, image), (text, text), (image, text))]
        moments = _moments(image), _moments(text)
        ranks = [_effective_rank(covariance) for _, covariance in moments]
        # The mean over i != j of 1 - <x_i, x_j> is N / (N - 1) times the variance around the mean.
        inside = sum(float(np.trace(covariance)) for _, covariance in moments) / 2 * n / (n - 1)
        between = max(0.0, 1 - _mean_pair_cosine(image, text))
        return {
            **dict(zip(names, uniformity + ranks, strict=True)),
            "modality_separability": _separability(image, text, numbered(image_ids), numbered(caption_ids), num_folds),
            "relative_gap": between / (between + inside) if between + inside > _NO_SPREAD else math.nan,
        }
