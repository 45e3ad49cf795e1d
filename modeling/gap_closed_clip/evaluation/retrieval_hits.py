"""The hits of single queries of a search, and which of them are not independent: what `statistics` compares."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..metrics._embeddings import families_of, numbered
from ..metrics.cross_modal_retrieval import retrieval_ranks


class Queries(NamedTuple):
    """
    A score of each query, and what it belongs to; the metric is the mean over the parts of the parts' means.

    Args:
        scores: (N,), or (S, N) of S seeds.
        groups: (N,) ids: queries with the same one are not independent.
        parts: (N,) ids: of the direction of a search, or of its source.
    """

    scores: np.ndarray
    groups: np.ndarray
    parts: np.ndarray


@dataclass(frozen=True)
class RetrievalHits:
    """
    Which queries found a correct item among the k nearest: 1.0 or 0.0 a distinct caption and a distinct image.

    Their means are `text_to_image_recall@k` and `image_to_text_recall@k` of the metric `cross_modal_retrieval`.

    Args:
        text_to_image: (C,), of the distinct captions by their ids' order.
        image_to_text: (I,), of the distinct images likewise.
        caption_rows, image_rows: (C,) and (I,), the first row of each among the N pairs.
    """

    text_to_image: np.ndarray
    image_to_text: np.ndarray
    caption_rows: np.ndarray
    image_rows: np.ndarray

    def queries(self, groups: Sequence[str] | np.ndarray) -> Queries:
        """
        Those of both directions, the parts 0 (text to image) and 1; the mean over the parts is `recall@k`.

        Args:
            groups: (N,) ids of the pairs' cases, as `joined_groups` gives them.
        """
        rows = np.concatenate([self.caption_rows, self.image_rows])
        parts = np.repeat([0, 1], [len(self.caption_rows), len(self.image_rows)])
        return Queries(np.concatenate([self.text_to_image, self.image_to_text]), np.asarray(groups)[rows], parts)


def retrieval_hits(
    image_embeds: np.ndarray,
    text_embeds: np.ndarray,
    image_ids: Sequence[str] | None = None,
    caption_ids: Sequence[str] | None = None,
    k: int = 10,
) -> RetrievalHits:
    """
    The single hits that the metric `cross_modal_retrieval` counts, by its own ranking.

    Args:
        image_embeds, text_embeds: (N, D), row i of both one pair; they are normalised here.
        image_ids, caption_ids: N ids each, as of the metric; without them every row is an item of its own.
        k: the cut-off.

    Raises:
        ValueError: as the metric.
    """
    own = [f"row {row:012}" for row in range(len(image_embeds))]
    images, captions = (own if ids is None else list(ids) for ids in (image_ids, caption_ids))
    found = retrieval_ranks(image_embeds, text_embeds, images, captions)
    text_to_image, image_to_text = ((ranks <= k).astype(float) for ranks in (found.text_to_image, found.image_to_text))
    return RetrievalHits(text_to_image, image_to_text, found.caption_rows, found.image_rows)


def joined_groups(first: Sequence[str], *others: Sequence[str]) -> np.ndarray:
    """
    (N,) numbers: rows that share an id in any of the columns, directly or through other rows, have the same.

    Args:
        first, others: N ids each, such as cases, images and captions.
    """
    groups = numbered(list(first))
    for ids in others:
        groups = families_of(groups, numbered(list(ids)))
    return groups


def stack_queries(parts: Sequence[Queries]) -> Queries:
    """Those of several sources as one, whose metric is the plain mean over the sources where all have as many parts.

    Groups keep their ids: sources that do not share cases need ids that differ.
    """
    starts = np.cumsum([0, *(len(np.unique(each.parts)) for each in parts)])
    numbers = [
        start + np.unique(each.parts, return_inverse=True)[1] for start, each in zip(starts, parts, strict=False)
    ]
    scores = np.concatenate([each.scores for each in parts], axis=-1)
    return Queries(scores, np.concatenate([each.groups for each in parts]), np.concatenate(numbers))


__all__ = ["Queries", "RetrievalHits", "joined_groups", "retrieval_hits", "stack_queries"]
