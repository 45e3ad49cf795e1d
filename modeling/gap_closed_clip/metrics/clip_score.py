"""CLIPScore and RefCLIPScore of captions from the embeddings of a dual encoder."""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """\
How well captions fit their images, and their references, in the space of a CLIP-like model (Hessel et al. 2021), from
embeddings v of the image, c of the caption and r of its references; means over the rows:

- `clip_score`: CLIP-S = 2.5 max(cos(c, v), 0), 0..2.5. No reference is needed.
- `image_caption_cosine`: cos(c, v), -1..1. The 2.5 was chosen to stretch the cosines of OpenAI's ViT-B/32 to about
  0..1. In a model with another temperature or another modality gap it has no such meaning: read the cosine there.
- `ref_clip_score`: RefCLIP-S = the harmonic mean of CLIP-S (with its 2.5) and max(max_r cos(c, r), 0); 0 where one of
  them is 0. Only with references.
- `caption_reference_cosine`: max_r cos(c, r), -1..1. Only with references.

**Scores of different embedding models cannot be compared**, nor can those of the model that made the captions with
another's: a model that closes the modality gap has larger cosines for the same captions. The paper embeds captions
after the prompt "A photo depicts"; which prompt, if any, is up to who embeds.
"""

_CITATION = """\
@inproceedings{hessel2021clipscore,
  title     = {{CLIPScore}: A Reference-free Evaluation Metric for Image Captioning},
  author    = {Hessel, Jack and Holtzman, Ari and Forbes, Maxwell and Le Bras, Ronan and Choi, Yejin},
  booktitle = {Conference on Empirical Methods in Natural Language Processing (EMNLP)},
  year      = {2021}
}
"""

_INPUTS_DESCRIPTION = """
Args:
    image_embeds: (N, D) image embeddings, one list of D floats an image; they are normalised to unit length here.
    caption_embeds: (N, D) embeddings of the generated captions, row i belongs to image i; normalised likewise.
    reference_embeds: optional, N lists of (R_i, D) embeddings of the true captions, one or more an image; likewise.

Returns:
    dict of floats: clip_score, image_caption_cosine, and with references ref_clip_score, caption_reference_cosine.

Raises:
    ValueError: no row, rows of different length, a zero vector, a value that is not finite, or references for some of
    the images only; the row is named.

Examples:
    The first caption lies at 60 degrees from its image and on its first reference; the second opposite its image.

    >>> import evaluate
    >>> metric = evaluate.load("clip_score.py")
    >>> result = metric.compute(
    ...     image_embeds=[[1.0, 0.0], [1.0, 0.0]],
    ...     caption_embeds=[[0.5, 0.75**0.5], [-1.0, 0.0]],
    ...     reference_embeds=[[[0.5, 0.75**0.5], [0.0, 1.0]], [[0.0, 1.0]]],
    ... )
    >>> {name: round(value, 4) for name, value in result.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'clip_score': 0.625, 'image_caption_cosine': -0.25, 'ref_clip_score': 0.5556, 'caption_reference_cosine': 0.5}
"""

_WEIGHT = 2.5  # w of the paper


def _unit_rows(rows: list[list[float]], name: str) -> np.ndarray:
    """(N, D) float64 unit vectors; ValueError names the first row that has no direction."""
    if not rows:
        raise ValueError(f"{name}: empty, there are no captions to measure.")
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


def _same_dimensions(x: np.ndarray, y: np.ndarray, name: str) -> None:
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"image_embeds have {x.shape[1]} dimensions, {name} {y.shape[1]}.")


def _best_reference(caption: np.ndarray, references: list[list[list[float]]]) -> np.ndarray:
    """(N,) largest cosine of each caption with one of its references."""
    best = []
    for row, vectors in enumerate(references):
        if not vectors:
            raise ValueError(f"reference_embeds: row {row} has no reference; give one or more for each image or none.")
        unit = _unit_rows(vectors, f"reference_embeds of row {row}")  # (R_i, D)
        _same_dimensions(caption, unit, f"reference_embeds of row {row}")
        best.append(np.max(unit @ caption[row]))
    return np.array(best)


def _harmonic_mean(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """2 x y / (x + y) of values from 0; 0 where one is 0."""
    return 2 * x * y / np.where(x + y > 0, x + y, 1.0)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class ClipScore(evaluate.Metric):
    def _info(self):
        embedding = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {
                    "image_embeds": embedding,
                    "caption_embeds": embedding,
                    "reference_embeds": datasets.Sequence(embedding),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2104.08718"],
        )

    def add_batch(self, *, reference_embeds=None, **inputs):
        """As every metric's; without `reference_embeds` (`evaluate` knows no optional input) all lists are empty."""
        if reference_embeds is None:
            reference_embeds = [[] for _ in inputs["image_embeds"]]
        super().add_batch(reference_embeds=reference_embeds, **inputs)

    def add(self, *, reference_embeds=None, **inputs):
        """As every metric's; `reference_embeds` is optional."""
        super().add(reference_embeds=[] if reference_embeds is None else reference_embeds, **inputs)

    def _compute(self, image_embeds, caption_embeds, reference_embeds):
        image, caption = _unit_rows(image_embeds, "image_embeds"), _unit_rows(caption_embeds, "caption_embeds")
        _same_dimensions(image, caption, "caption_embeds")
        cosine = np.sum(image * caption, axis=1)
        clip_score = _WEIGHT * np.maximum(cosine, 0)
        result = {"clip_score": float(clip_score.mean()), "image_caption_cosine": float(cosine.mean())}
        if not any(reference_embeds):
            return result
        best = _best_reference(caption, reference_embeds)
        ref_clip_score = _harmonic_mean(clip_score, np.maximum(best, 0))
        return result | {
            "ref_clip_score": float(ref_clip_score.mean()),
            "caption_reference_cosine": float(best.mean()),
        }
