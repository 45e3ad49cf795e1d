"""The hits of single queries of a search, and which of them are not independent: what `statistics` compares."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..metrics._embeddings import _as_matrix, _string, _strings, families_of, is_missing, numbered
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
        num_pairs: N.
    """

    text_to_image: np.ndarray
    image_to_text: np.ndarray
    caption_rows: np.ndarray
    image_rows: np.ndarray
    num_pairs: int

    def queries(self, groups: Sequence[str] | np.ndarray) -> Queries:
        """
        Those of both directions, the parts 0 (text to image) and 1; the mean over the parts is `recall@k`.

        Args:
            groups: (N,) ids of the pairs' cases, as `joined_groups` gives them.

        Raises:
            ValueError: groups of another number of pairs.
        """
        if len(groups) != self.num_pairs:
            raise ValueError(
                f"The hits are of {self.num_pairs} pairs and there are {len(groups)} groups: give each pair one, in "
                "the order of the embeddings."
            )
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
        image_embeds, text_embeds: (N, D) arrays or tensors, row i of both one pair; they are normalised here.
        image_ids, caption_ids: N ids each, as of the metric; without them every row is an item of its own.
        k: the cut-off.

    Raises:
        ValueError: as the metric; ids of another number, or a cut-off below 1.
    """
    if k < 1:
        raise ValueError(f"retrieval_hits: k is {k}, it has to be 1 or more.")
    own = [f"row {row:012}" for row in range(len(image_embeds))]
    given = {"image_ids": image_ids, "caption_ids": caption_ids}
    images, captions = (own if ids is None else _strings(name, ids) for name, ids in given.items())
    for name, ids in (("image_ids", images), ("caption_ids", captions)):
        if len(ids) != len(own):
            raise ValueError(f"retrieval_hits: there are {len(own)} pairs and {len(ids)} {name}: give one a pair.")
    image, text = (
        embeds if (matrix := _as_matrix(embeds)) is None else matrix for embeds in (image_embeds, text_embeds)
    )
    found = retrieval_ranks(image, text, images, captions)
    text_to_image, image_to_text = ((ranks <= k).astype(float) for ranks in (found.text_to_image, found.image_to_text))
    return RetrievalHits(text_to_image, image_to_text, found.caption_rows, found.image_rows, len(own))


def joined_groups(first: Sequence[str], *others: Sequence[str]) -> np.ndarray:
    """
    (N,) numbers: rows that share an id in any of the columns, directly or through other rows, have the same.

    Args:
        first, others: N ids each, such as cases, images and captions. Rows that have none there (None, NaN, an empty
            text) share nothing by that.

    Raises:
        ValueError: columns of different length; or an id, among texts and numbers, that is neither text nor whole
            number.
    """
    if len(lengths := {len(ids) for ids in (first, *others)}) > 1:
        raise ValueError(f"joined_groups: the columns have {sorted(lengths)} rows: give each row an id, or None.")
    groups = _numbered_apart(first)
    for ids in others:
        groups = families_of(groups, _numbered_apart(ids))
    return groups


def lacks_id(identifier: Any) -> bool:
    """Whether this stands for no id: None, NaN, pandas.NA, or a text of white space alone."""
    return is_missing(identifier) or (isinstance(identifier, str) and not identifier.strip())


def _numbered_apart(column: Sequence[Any] | np.ndarray) -> np.ndarray:
    """`numbered`, with a number of its own behind the others for each row without an id."""
    ids = list(column)
    given = np.array([not lacks_id(identifier) for identifier in ids], dtype=bool)
    if len({isinstance(ids[row], str) for row in np.flatnonzero(given)}) > 1:  # 7 and "A7" have no order, "7" has one
        ids = [
            _string("ids", row, identifier) if is_given and not isinstance(identifier, str) else identifier
            for row, (identifier, is_given) in enumerate(zip(ids, given, strict=True))
        ]
    known = numbered([identifier for identifier, is_given in zip(ids, given, strict=True) if is_given])
    numbers = np.arange(len(ids)) + len(ids)  # those of ids are below
    numbers[given] = known
    return np.unique(numbers, return_inverse=True)[1]


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


__all__ = ["Queries", "RetrievalHits", "joined_groups", "lacks_id", "retrieval_hits", "stack_queries"]
