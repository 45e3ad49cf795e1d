"""The modality gap and what tells a closed gap from a collapsed or a scattered space."""

import math

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """\
How far apart the two modalities of a contrastive model sit on the unit sphere, and whether true pairs stand out there.
All values come from sums over the rows (float64, O(N * D) time and memory; the N x N cosines are never formed).

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

_CITATION = """\
@inproceedings{grassucci2025closing,
  title     = {Closing the gap in multimodal medical representation alignment},
  author    = {Grassucci, Eleonora and Cicchetti, Giordano and Comminiello, Danilo},
  booktitle = {IEEE International Workshop on Machine Learning for Signal Processing (MLSP)},
  year      = {2025},
  note      = {arXiv:2602.20046}
}
@inproceedings{grassucci2026groupwise,
  title     = {Closing the Modality Gap Aligns Group-Wise Semantics},
  author    = {Grassucci, Eleonora and Cicchetti, Giordano and Frasca, Emanuele and Uncini, Aurelio and
               Comminiello, Danilo},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2026},
  note      = {arXiv:2601.18525}
}
"""

_INPUTS_DESCRIPTION = """
Args:
    image_embeds: (N, D) image embeddings, one list of D floats a pair; they are normalised to unit length here.
    text_embeds: (N, D) text embeddings, row i is the caption of image i; normalised likewise.

Returns:
    dict of floats: modality_gap, debiased_modality_gap, true_pair_cosine, random_pair_cosine, margin,
    mean_cosine_image, mean_cosine_text. A single pair (N = 1) defines modality_gap and true_pair_cosine only, the
    others are nan.

Raises:
    ValueError: no pair, rows of different length, a zero vector, or a value that is not finite; the row is named.

Examples:
    Two pairs on the circle: both images at 0 degrees, the captions at 90 and 0 degrees.

    >>> import evaluate
    >>> metric = evaluate.load("modality_gap.py")
    >>> result = metric.compute(image_embeds=[[2.0, 0.0], [1.0, 0.0]], text_embeds=[[0.0, 1.0], [3.0, 0.0]])
    >>> {name: round(value, 4) for name, value in result.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'modality_gap': 0.7071, 'debiased_modality_gap': 0.0, 'true_pair_cosine': 0.5, 'random_pair_cosine': 0.5,
     'margin': 0.0, 'mean_cosine_image': 1.0, 'mean_cosine_text': 0.0}
"""


def _unit_rows(rows: list[list[float]], name: str) -> np.ndarray:
    """(N, D) float64 unit vectors; ValueError names the first row that has no direction."""
    if not rows:
        raise ValueError(f"{name}: empty, there are no pairs to measure.")
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"{name}: rows differ in length, {sorted({len(row) for row in rows})} values.")
    matrix = np.asarray(rows, dtype=np.float64)  # (N, D)
    finite = np.isfinite(matrix).all(axis=1)
    if not finite.all():
        raise ValueError(f"{name}: row {int(np.argmin(finite))} holds NaN or infinity, the embeddings are broken.")
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    if not norms.all():
        raise ValueError(f"{name}: row {int(np.argmin(norms))} is a zero vector, it has no direction on the sphere.")
    return matrix / norms


def _unit_pairs(image_embeds: list[list[float]], text_embeds: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Both modalities as (N, D) float64 unit vectors of one space."""
    image, text = _unit_rows(image_embeds, "image_embeds"), _unit_rows(text_embeds, "text_embeds")
    if image.shape != text.shape:
        raise ValueError(f"image_embeds have {image.shape[1]} dimensions, text_embeds {text.shape[1]}.")
    return image, text


def _mean_off_diagonal(x: np.ndarray, y: np.ndarray) -> float:
    """mean over i != j of <x_i, y_j>, as (all pairs - the diagonal) / (N (N - 1)); nan for N = 1."""
    n = len(x)
    if n < 2:
        return math.nan
    return float((x.sum(axis=0) @ y.sum(axis=0) - np.sum(x * y)) / (n * (n - 1)))


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class ModalityGap(evaluate.Metric):
    def _info(self):
        embedding = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"image_embeds": embedding, "text_embeds": embedding}),
            reference_urls=["https://arxiv.org/abs/2602.20046", "https://arxiv.org/abs/2601.18525"],
        )

    def _compute(self, image_embeds, text_embeds):
        image, text = _unit_pairs(image_embeds, text_embeds)
        n = len(image)
        difference = image - text
        gap_squared = float(np.sum(difference.mean(axis=0) ** 2))
        spread = float(np.mean(np.sum(difference**2, axis=1))) - gap_squared  # variance of d_i, summed over dimensions
        true_pair, random_pair = float(np.mean(np.sum(image * text, axis=1))), _mean_off_diagonal(image, text)
        return {
            "modality_gap": math.sqrt(gap_squared),
            "debiased_modality_gap": math.sqrt(max(0.0, gap_squared - spread / (n - 1))) if n > 1 else math.nan,
            "true_pair_cosine": true_pair,
            "random_pair_cosine": random_pair,
            "margin": true_pair - random_pair,
            "mean_cosine_image": _mean_off_diagonal(image, image),
            "mean_cosine_text": _mean_off_diagonal(text, text),
        }
