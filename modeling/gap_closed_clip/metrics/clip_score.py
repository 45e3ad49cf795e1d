"""CLIPScore and RefCLIPScore of captions from the embeddings of a dual encoder."""

import datasets
import evaluate
import numpy as np

from ._embeddings import EMBEDDING, EmbeddingMetric, UnitRows, blocks, require_one_space


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
    image_embeds: (N, D) image embeddings: a numpy array, a torch tensor, or one list of D floats an image. They are
        read as float32 and normalised to unit length here.
    caption_embeds: (N, D) embeddings of the generated captions, row i belongs to image i; likewise.
    reference_embeds: optional, N times (R_i, D) embeddings of the true captions, one or more an image; likewise.

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


def _best_reference(caption: UnitRows, references: list) -> np.ndarray:
    """(N,) largest cosine of each caption with one of its references."""
    best = []
    for row, vectors in enumerate(references):
        if len(vectors) == 0:
            raise ValueError(f"reference_embeds: row {row} has no reference; give one or more for each image or none.")
        name = f"reference_embeds of row {row}"
        unit = UnitRows(vectors, name)
        require_one_space(caption, unit, name)
        best.append(np.max(unit[:] @ caption[row : row + 1][0]))
    return np.array(best)


def _harmonic_mean(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """2 x y / (x + y) of values from 0; 0 where one is 0."""
    return 2 * x * y / np.where(x + y > 0, x + y, 1.0)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class ClipScore(EmbeddingMetric):
    optional_inputs = ("reference_embeds",)

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {
                    "image_embeds": EMBEDDING,
                    "caption_embeds": EMBEDDING,
                    "reference_embeds": datasets.Sequence(EMBEDDING),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2104.08718"],
        )

    def _compute(self, image_embeds, caption_embeds, reference_embeds):
        image = UnitRows(image_embeds, "image_embeds", "captions")
        caption = UnitRows(caption_embeds, "caption_embeds", "captions")
        require_one_space(image, caption, "caption_embeds")
        cosine = np.concatenate([np.sum(image[block] * caption[block], axis=1) for block in blocks(len(image))])
        clip_score = _WEIGHT * np.maximum(cosine, 0)
        result = {"clip_score": float(clip_score.mean()), "image_caption_cosine": float(cosine.mean())}
        if not any(map(len, reference_embeds)):
            return result
        best = _best_reference(caption, reference_embeds)
        ref_clip_score = _harmonic_mean(clip_score, np.maximum(best, 0))
        return result | {
            "ref_clip_score": float(ref_clip_score.mean()),
            "caption_reference_cosine": float(best.mean()),
        }
