"""The modality gap and what tells a closed gap from a collapsed or a scattered space."""

import math

import evaluate
import numpy as np

from ._embeddings import PAIR_ARGUMENTS, RAISES, EmbeddingMetric, blocks, pair_info, unit_pairs


_DESCRIPTION = """\
How far apart the two modalities of a contrastive model sit on the unit sphere, and whether true pairs stand out there.
All values come from sums over the rows, in float64 and O(N * D) time; the N x N cosines are never formed.

- `modality_gap`: || mean_i x_i - mean_i y_i ||, the distance between the centroids of the unit vectors (0..2).
- `debiased_modality_gap`: sqrt(max(0, gap^2 - (mean_i |d_i|^2 - gap^2) / (N - 1))), d_i = x_i - y_i. N independent
  pairs with no gap at all still show a gap of about sqrt(E|d|^2 / N); this takes that sampling floor away. Pairs that
  are not independent (several images of one case) have a higher floor than is taken away.
- `true_pair_cosine`: mean_i <x_i, y_i>.
- `random_pair_cosine`: mean over i != j of <x_i, y_j>.
- `margin`: true_pair_cosine - random_pair_cosine. A high true-pair cosine without a margin is a collapse into a cone.
- `mean_cosine_image`, `mean_cosine_text`: mean over i != j of the cosine inside one modality (the papers' "mean
  angular value"): 1 is a single point, 0 a modality spread over the sphere.
"""

_INPUTS_DESCRIPTION = f"""
Args:
{PAIR_ARGUMENTS}

Returns:
    dict of floats: modality_gap, debiased_modality_gap, true_pair_cosine, random_pair_cosine, margin,
    mean_cosine_image, mean_cosine_text. A single pair (N = 1) defines modality_gap and true_pair_cosine only, the
    others are nan.

Raises:
    {RAISES}
"""
_INPUTS_DESCRIPTION += """
Examples:
    Two pairs on the circle: both images at 0 degrees, the captions at 90 and 0 degrees.

    >>> import evaluate
    >>> metric = evaluate.load("modality_gap.py")
    >>> result = metric.compute(image_embeds=[[2.0, 0.0], [1.0, 0.0]], text_embeds=[[0.0, 1.0], [3.0, 0.0]])
    >>> {name: round(value, 4) for name, value in result.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'modality_gap': 0.7071, 'debiased_modality_gap': 0.0, 'true_pair_cosine': 0.5, 'random_pair_cosine': 0.5,
     'margin': 0.0, 'mean_cosine_image': 1.0, 'mean_cosine_text': 0.0}
"""


def _mean_off_diagonal(sum_x: np.ndarray, sum_y: np.ndarray, diagonal: float, n: int) -> float:
    """mean over i != j of <x_i, y_j>, as (all pairs - the diagonal) / (N (N - 1)); nan for N = 1."""
    return float((sum_x @ sum_y - diagonal) / (n * (n - 1))) if n > 1 else math.nan


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class ModalityGap(EmbeddingMetric):
    def _info(self):
        return pair_info(_DESCRIPTION, _INPUTS_DESCRIPTION)

    def _compute(self, image_embeds, text_embeds):
        image, text = unit_pairs(image_embeds, text_embeds)
        n, sums, cosines, squares = len(image), np.zeros((2, image.dim)), 0.0, 0.0
        for block in blocks(n):
            x, y = image[block], text[block]
            sums += x.sum(axis=0), y.sum(axis=0)
            cosines += float(np.sum(x * y))
            squares += float(np.sum((x - y) ** 2))
        sum_image, sum_text = sums
        gap_squared = float(np.sum(((sum_image - sum_text) / n) ** 2))
        spread = squares / n - gap_squared  # variance of d_i, summed over dimensions
        true_pair, random_pair = cosines / n, _mean_off_diagonal(sum_image, sum_text, cosines, n)
        return {
            "modality_gap": math.sqrt(gap_squared),
            "debiased_modality_gap": math.sqrt(max(0.0, gap_squared - spread / (n - 1))) if n > 1 else math.nan,
            "true_pair_cosine": true_pair,
            "random_pair_cosine": random_pair,
            "margin": true_pair - random_pair,
            "mean_cosine_image": _mean_off_diagonal(sum_image, sum_image, n, n),
            "mean_cosine_text": _mean_off_diagonal(sum_text, sum_text, n, n),
        }
