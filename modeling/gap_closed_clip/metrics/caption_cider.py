"""CIDEr-D of captions, several references an image."""

import math
from collections import Counter
from collections.abc import Callable

import evaluate
import numpy as np

from ._caption_tokens import (
    ARGUMENTS,
    ORDERS,
    RAISES,
    TOKENISATION,
    caption_info,
    ngrams,
    tokenize,
    tokenize_references,
)


_DESCRIPTION = f"""\
CIDEr-D of generated captions (Vedantam et al. 2015), what COCO's evaluation reports as CIDEr: the mean over images,
references and n = 1..4 of the cosine of tf-idf weighted n-grams, the caption's weights cut off at those of the
reference, times exp(-(difference in words)^2 / (2 * 6^2)).

**Scale: 0..10**, that of the paper and of pycocoevalcap before it is printed in percent: a published "153.2" is 1.532
here.

The document frequency of an n-gram is the number of images of the *evaluated set* with it in a reference (at least 1),
so the figure depends on the set: compare on the same images only. A single image has no frequencies to go by
(log 1 = 0) and scores 0, as in the published code; a small set scores low in what its images have in common. Own code,
because no light library computes it.

{TOKENISATION}"""

_CITATION = """\
@inproceedings{vedantam2015cider,
  title     = {{CIDEr}: Consensus-based Image Description Evaluation},
  author    = {Vedantam, Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2015}
}
"""

_INPUTS_DESCRIPTION = f"""
Args:
{ARGUMENTS}

Returns:
    dict of one float: cider_d, 0..10.

Raises:
    {RAISES}
"""
_INPUTS_DESCRIPTION += """
Examples:
    The first caption is its only reference, and has a cosine of 1 for n = 1, 2 and no longer n-gram: 10 * 2 / 4. The
    second has nothing in common with its own.

    >>> import evaluate
    >>> metric = evaluate.load("caption_cider.py")
    >>> references = [["axial CT"], ["chest radiograph"]]
    >>> metric.compute(predictions=["Axial CT.", "Axial CT."], references=references)
    {'cider_d': 2.5}
"""

_SIGMA = 6.0  # words

_Weights = list[dict[tuple[str, ...], float]]  # of the n-grams of each order


def _inverse_frequency(references: list[list[list[str]]]) -> Callable[[tuple[str, ...]], float]:
    """n-gram -> log(images / images with it in a reference); log(images) for one that none has."""
    frequency: Counter[tuple[str, ...]] = Counter()
    for texts in references:
        frequency.update({ngram for text in texts for counts in ngrams(text) for ngram in counts})
    return lambda ngram: math.log(len(references) / max(1, frequency[ngram]))


def _weights(tokens: list[str], idf: Callable[[tuple[str, ...]], float]) -> _Weights:
    """tf-idf; the counts stay counts, as in the published code: their sum cancels in the cosine, save in the cut."""
    return [{ngram: count * idf(ngram) for ngram, count in counts.items()} for counts in ngrams(tokens)]


def _similarity(caption: _Weights, reference: _Weights) -> float:
    """Mean over the orders of sum min(c, r) r / (|c| |r|), 0 for an order that one of them does not have."""
    total = 0.0
    for x, y in zip(caption, reference, strict=True):
        norms = math.hypot(*x.values()) * math.hypot(*y.values())
        if norms:
            total += sum(min(weight, y[ngram]) * y[ngram] for ngram, weight in x.items() if ngram in y) / norms
    return total / ORDERS


def scores_of_images(predictions: list[str], references: list[list[str]]) -> list[float]:
    """The score of each image, 0..10, whose mean is the metric; all images' references weight the n-grams."""
    texts_of_images = tokenize_references(references)
    idf = _inverse_frequency(texts_of_images)
    scores = []
    for caption, texts in zip(map(tokenize, predictions), texts_of_images, strict=True):
        weights = _weights(caption, idf)
        penalties = [math.exp(-((len(caption) - len(text)) ** 2) / (2 * _SIGMA**2)) for text in texts]
        similarities = [_similarity(weights, _weights(text, idf)) for text in texts]
        scores.append(10 * float(np.dot(penalties, similarities)) / len(texts))
    return scores


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class CaptionCider(evaluate.Metric):
    def _info(self):
        urls = ["https://arxiv.org/abs/1411.5726"]
        return caption_info(_DESCRIPTION, _CITATION, _INPUTS_DESCRIPTION, urls)

    def _compute(self, predictions, references):
        return {"cider_d": float(np.mean(scores_of_images(predictions, references)))}
