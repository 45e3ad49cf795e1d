"""Recall@k and median rank, image to text and text to image, with several captions an image and images a caption."""

from numbers import Integral
from typing import NamedTuple

import evaluate
import numpy as np
from datasets.utils import tqdm

from ._embeddings import (
    ID_ARGUMENTS,
    PAIR_ARGUMENTS,
    RAISES,
    STRING,
    TIE,
    EmbeddingMetric,
    UnitRows,
    blocks,
    first_rows,
    numbered,
    pair_info,
    unit_pairs,
)


_DESCRIPTION = """\
Cross-modal retrieval in both directions by cosine. The galleries are the *distinct* images and the *distinct*
captions (an id's first embedding counts); every (image_id, caption_id) that occurs as a pair is correct, so several
captions an image and several images a caption all count. A query's rank, from 1, is that of its best correct item.

Ties count against the model: an incorrect item whose cosine is not below the best correct one (within 1e-9, so that
rounding cannot break a tie) ranks before it. A constant embedding gets the worst rank possible, not the first.

- `image_to_text_recall@k`: fraction (0..1) of the distinct images with a correct caption among the k nearest captions.
- `text_to_image_recall@k`: fraction of the distinct captions with a correct image among the k nearest images.
- `recall@k`: the mean of both.
- `image_to_text_chance_recall@k`, `text_to_image_chance_recall@k`, `chance_recall@k`: what a ranking drawn at random
  has on average: the mean over queries of 1 - C(G - P, k) / C(G, k), P correct items in a gallery of G.
- `image_to_text_median_rank`, `text_to_image_median_rank`: median of the ranks, 1 is best.

Every cosine is computed once, in float64, for both directions, in tiles: O(block_size * (block_size + D)) memory
beside the embeddings. The values depend on the size of the gallery: compare models on the same pairs only.
"""

_INPUTS_DESCRIPTION = f"""
Args:
{PAIR_ARGUMENTS}
{ID_ARGUMENTS}
    ks (`Sequence[int]`, defaults to (1, 5, 10)): the cut-offs of the recalls.
    block_size (`int`, defaults to 1024): images, and captions, of a tile of cosines.

Returns:
    dict of floats: for each k image_to_text_recall@k, text_to_image_recall@k and recall@k, each also with chance_
    before recall; image_to_text_median_rank and text_to_image_median_rank.

Raises:
    {RAISES}
"""
_INPUTS_DESCRIPTION += """
Examples:
    Two captions of one image "a"; the second lies nearer to the other image "b".

    >>> import evaluate
    >>> metric = evaluate.load("cross_modal_retrieval.py")
    >>> result = metric.compute(
    ...     image_embeds=[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]],
    ...     text_embeds=[[1.0, 0.1], [0.1, 1.0], [0.0, 1.0]],
    ...     image_ids=["a", "a", "b"],
    ...     caption_ids=["ring", "disc", "bar"],
    ...     ks=[1],
    ... )
    >>> {name: round(value, 4) for name, value in result.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'image_to_text_recall@1': 1.0, 'image_to_text_chance_recall@1': 0.5, 'image_to_text_median_rank': 1.0,
     'text_to_image_recall@1': 0.6667, 'text_to_image_chance_recall@1': 0.5, 'text_to_image_median_rank': 1.0,
     'recall@1': 0.8333, 'chance_recall@1': 0.5}
"""


_DIRECTIONS = ("image_to_text", "text_to_image")


class _Items:
    """The distinct items of one modality: their vectors, and what is known of the rank of each.

    Args:
        vectors: (N, D), of all rows.
        ids: N ids of items; an id's first row is its item's vector.
    """

    def __init__(self, vectors: UnitRows, ids: list[str]):
        self.vectors = vectors
        self.of_row = numbered(ids)
        self.rows = first_rows(self.of_row)
        self.threshold = np.full(len(self.rows), -np.inf)  # the cosine from which on a wrong item is ahead
        self.ahead = np.zeros(len(self.rows), dtype=np.int64)  # wrong items ahead of the best correct one

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, items: slice | np.ndarray) -> np.ndarray:
        return self.vectors[self.rows[items]]


def _rank(images: _Items, captions: _Items, pairs: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks, from 1, of each image's best correct caption and of each caption's best correct image.

    The cosines of the pairs say first what a wrong item must reach to be ahead. Then one pass over all cosines, in
    float64 and tile by tile, counts for both directions.

    Args:
        pairs: (P, 2) the distinct pairs as numbers of an image and a caption, by image.
    """
    for block in blocks(len(pairs)):
        image, caption = pairs[block].T
        cosines = np.sum(images[image] * captions[caption], axis=1)
        np.maximum.at(images.threshold, image, cosines - TIE)
        np.maximum.at(captions.threshold, caption, cosines - TIE)
    for rows in tqdm(list(blocks(len(images), block_size)), desc="Ranking", delay=2, leave=False):
        queries = images[rows]
        correct = pairs[slice(*np.searchsorted(pairs[:, 0], [rows.start, rows.stop]))]
        for columns in blocks(len(captions), block_size):
            cosines = queries @ captions[columns].T  # (block_size, block_size)
            row, column = correct[(correct[:, 1] >= columns.start) & (correct[:, 1] < columns.stop)].T
            cosines[row - rows.start, column - columns.start] = -np.inf  # no correct item is ahead of another
            images.ahead[rows] += np.sum(cosines >= images.threshold[rows, None], axis=1)
            captions.ahead[columns] += np.sum(cosines >= captions.threshold[columns], axis=0)
    return 1 + images.ahead, 1 + captions.ahead


class Ranks(NamedTuple):
    """
    What retrieval counts: one rank, from 1, a distinct image and a distinct caption.

    Args:
        image_to_text, text_to_image: (I,) ranks of the images' best captions, (C,) ranks of the captions' best images.
        image_rows, caption_rows: (I,) and (C,), the first row of each; its embedding is the one that counts.
        pairs: (P, 2) the distinct pairs as numbers of an image and a caption.
    """

    image_to_text: np.ndarray
    text_to_image: np.ndarray
    image_rows: np.ndarray
    caption_rows: np.ndarray
    pairs: np.ndarray


def retrieval_ranks(image_embeds, text_embeds, image_ids, caption_ids, block_size=1024) -> Ranks:
    """The ranks of which the metric tells recalls and medians; arguments and errors are those of the metric."""
    image, text = unit_pairs(image_embeds, text_embeds)
    images, captions = _Items(image, image_ids), _Items(text, caption_ids)
    pairs = np.unique(np.stack([images.of_row, captions.of_row], axis=1), axis=0)
    return Ranks(*_rank(images, captions, pairs, block_size), images.rows, captions.rows, pairs)


def _chance_recall(num_correct: np.ndarray, size: int, k: int) -> float:
    """The mean recall@k of random rankings of `size` items, `num_correct` of which are correct for each query."""
    counts, queries = np.unique(num_correct, return_counts=True)
    drawn = np.arange(min(k, size))
    misses = np.prod(np.maximum(size - counts[:, None] - drawn, 0) / (size - drawn), axis=1)  # one draw after another
    return float(1 - np.average(misses, weights=queries))


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class CrossModalRetrieval(EmbeddingMetric):
    optional_inputs = ("image_ids", "caption_ids")

    def _info(self):
        return pair_info(_DESCRIPTION, _INPUTS_DESCRIPTION, image_ids=STRING, caption_ids=STRING)

    def _compute(self, image_embeds, text_embeds, image_ids, caption_ids, ks=(1, 5, 10), block_size=1024):
        if wrong := [k for k in ks if not isinstance(k, Integral) or k < 1]:
            raise ValueError(f"cross_modal_retrieval: ks holds {wrong[0]}, each has to be a whole number, 1 or more.")
        found = retrieval_ranks(image_embeds, text_embeds, image_ids, caption_ids, block_size)
        both, sizes = found[:2], (len(found.caption_rows), len(found.image_rows))
        result = {}
        for name, ranks, column, size in zip(_DIRECTIONS, both, found.pairs.T, sizes, strict=True):
            result |= {f"{name}_recall@{k}": float(np.mean(ranks <= k)) for k in ks}
            num_correct = np.bincount(column)
            result |= {f"{name}_chance_recall@{k}": _chance_recall(num_correct, size, k) for k in ks}
            result[f"{name}_median_rank"] = float(np.median(ranks))
        for name in (f"{what}@{k}" for what in ("recall", "chance_recall") for k in ks):
            result[name] = sum(result[f"{direction}_{name}"] for direction in _DIRECTIONS) / 2
        return result
