"""Search where images and captions lie in one gallery: which kind comes first, and does what comes fit?"""

import logging
import math
from dataclasses import dataclass

import evaluate
import numpy as np
from datasets.utils import tqdm
from scipy.sparse import csr_array

from ._embeddings import (
    ID_ARGUMENTS,
    PAIR_ARGUMENTS,
    RAISES,
    STRING,
    TIE,
    EmbeddingMetric,
    blocks,
    families_of,
    first_rows,
    numbered,
    pair_info,
    unit_pairs,
)


logger = logging.getLogger(__name__)

_DESCRIPTION = """\
Search by cosine in a gallery of both kinds: all *distinct* images and all *distinct* captions (an id's first embedding
counts). Every one of them is a query, too. What belongs to the query's own *family* is left out of its gallery: pairs
that share an image or a caption with it, directly or through other pairs. So it is not asked whether an image finds
its caption (that is retrieval), but what else lies around it. Across a modality gap every item sees its own kind
first, however well images and captions match.

Of the k = 10 nearest items (fewer, if the gallery has fewer; those as near as the tenth, within 1e-9, count too):

- `other_kind_share@k`: share of the other kind among them: of captions around an image, of images around a caption.
- `chance_other_kind_share@k`: what a ranking drawn at random has on average: the share of the other kind in the
  query's gallery. Where the gap is closed, both are equal; below it an item prefers its own kind, above it the other.
- `mixed_label_precision@k`: share of those with the query's label among them. An image or a caption has the labels of
  all its pairs, and two items fit if they have one in common. Only items that have a label are counted.
- `chance_mixed_label_precision@k`: what a ranking drawn at random has on average: the share of those with the query's
  label among the labelled items of the query's gallery.
- `other_kind_label_precision@k`: as `mixed_label_precision@k`, but only neighbours of the other kind are counted.

Each is the mean of one value a query, and every query counts the same, be it an image or a caption. The first two are
means over all queries. The precisions are means over those queries that have a label and see at least one item with a
label among what is counted; `chance_mixed_label_precision@k` is a mean over the same queries as the precision. Across
a wide gap few queries or none see the other kind, and `other_kind_label_precision@k` then speaks of these few, or is
nan.

All cosines are computed in float32; those that could be among the k highest again in float64, which decides.
O(block_size * G) memory beside the G vectors of the gallery.
"""

_INPUTS_DESCRIPTION = f"""
Args:
{PAIR_ARGUMENTS}
    labels: N strings or whole numbers, the group of each pair; "", None or NaN is none. Without them nothing is said
        of labels.
{ID_ARGUMENTS}
    k (`int`, defaults to 10): neighbours of a query.
    block_size (`int`, defaults to 256): queries scored at once.

Returns:
    dict of floats: other_kind_share@k and chance_other_kind_share@k; where a pair has a label also
    mixed_label_precision@k, chance_mixed_label_precision@k and other_kind_label_precision@k. All are nan with a single
    family, which leaves nothing to search; a logged warning says so.

Raises:
    {RAISES} Or k is below 1.
"""
_INPUTS_DESCRIPTION += """
Examples:
    Two groups, and images and captions of a group side by side: the nearest item fits, and half of the time is of the
    other kind.

    >>> import evaluate
    >>> metric = evaluate.load("mixed_gallery_search.py")
    >>> result = metric.compute(
    ...     image_embeds=[[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [0.2, 1.0]],
    ...     text_embeds=[[1.0, 0.1], [1.0, 0.4], [0.1, 1.0], [0.4, 1.0]],
    ...     labels=["CT", "CT", "MR", "MR"],
    ...     k=1,
    ... )
    >>> {name: round(value, 4) for name, value in result.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'other_kind_share@1': 0.5, 'chance_other_kind_share@1': 0.5, 'mixed_label_precision@1': 1.0,
     'chance_mixed_label_precision@1': 0.3333, 'other_kind_label_precision@1': 1.0}
"""

_NAMES = (
    "other_kind_share",
    "chance_other_kind_share",
    "mixed_label_precision",
    "chance_mixed_label_precision",
    "other_kind_label_precision",
)
_FEW = 100  # candidates a query, up to which their cosines are computed one by one


def _label_sets(items: np.ndarray, labels: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(G,) the number of each item's set of labels, and (S, S) booleans, which two sets have a label in common.

    Args:
        items: (N,) the item of each row.
        labels: N names, "" for none.
    """
    of_item: list[set[str]] = [set() for _ in range(int(items.max()) + 1)]
    for item, label in zip(items, labels, strict=True):
        of_item[item] |= {label} - {""}
    position: dict[frozenset[str], int] = {}
    sets = np.array([position.setdefault(frozenset(found), len(position)) for found in of_item])
    column = {label: number for number, label in enumerate(sorted(set(labels)))}
    members = [(row, column[label]) for found, row in position.items() for label in found]
    rows, columns = np.array(members, dtype=np.int64).reshape(-1, 2).T
    has = csr_array((np.ones(len(rows), bool), (rows, columns)), shape=(len(position), len(column)))
    return sets, (has @ has.T).toarray()


def _share(rows: np.ndarray, part: np.ndarray, whole: np.ndarray, count: int) -> np.ndarray:
    """(count,) of each query's neighbours that are counted the share that hits; nan where none is counted.

    Args:
        rows: (n,) the query of each neighbour.
        part: (n,) booleans, which neighbours hit.
        whole: (n,) booleans, which are counted.
    """
    counted, hits = (np.bincount(rows[kept], minlength=count) for kept in (whole, whole & part))
    with np.errstate(invalid="ignore"):
        return hits / counted


def _mean(values: np.ndarray) -> float:
    """Of those that are not nan; nan of none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _kth_highest(scores: np.ndarray, k: int) -> np.ndarray:
    """(block,) the k-th highest of each row, or the lowest of fewer."""
    k = min(k, scores.shape[1])
    return np.partition(scores, -k, axis=1)[:, -k]


def _bound(scores: np.ndarray, k: int) -> np.ndarray:
    """(block,) what the k-th highest score of each row is at least, in a fraction of the time that finding it takes.

    It is the k-th highest of the maxima of groups of 16 scores each, which differs from it where two of the k highest
    are in one group.
    """
    width = scores.shape[1] // 16
    if width <= k:
        return _kth_highest(scores, k)
    best = scores[:, :width].copy()
    for start in range(width, 16 * width, width):
        np.maximum(best, scores[:, start : start + width], out=best)
    return _kth_highest(best, k)


@dataclass
class _Gallery:
    """All distinct items, the images first, and what is known of each.

    Args:
        vectors: (G, D) unit vectors, float64.
        is_caption: (G,) booleans.
        families: (G,) numbers.
        sets: (G,) numbers of the items' sets of labels.
        shares: (S, S) booleans, which two sets have a label in common.
    """

    vectors: np.ndarray
    is_caption: np.ndarray
    families: np.ndarray
    sets: np.ndarray
    shares: np.ndarray

    def __post_init__(self):
        self.has_label = self.shares.diagonal()[self.sets]  # (G,)
        self.rounded = self.vectors.astype(np.float32)
        # Twice what a float32 cosine of unit vectors may be off, D + 2 half units in the last place, and a little.
        self.margin = TIE + (self.vectors.shape[1] + 4) * float(np.finfo(np.float32).eps)

    def __len__(self) -> int:
        return len(self.vectors)

    def _left(self, counted: np.ndarray) -> np.ndarray:
        """(G,) how many of the items that are `counted`, (G,) booleans, are not of each item's own family."""
        return np.count_nonzero(counted) - np.bincount(self.families, weights=counted)[self.families]

    def chance(self) -> tuple[np.ndarray, np.ndarray]:
        """(G,), (G,): for each query, the shares of the other kind and of items with its label in its gallery."""
        size, captions = self._left(np.ones(len(self), bool)), self._left(self.is_caption)
        other_kind = np.where(self.is_caption, size - captions, captions) / size
        shares = csr_array(self.shares)
        in_family = csr_array((np.ones(len(self)), (self.families, self.sets)))  # (families, S) how many items
        fit = (shares @ np.bincount(self.sets))[self.sets]
        fit_in_family = shares[self.sets].multiply(in_family[self.families]).sum(axis=1)
        with np.errstate(invalid="ignore"):
            return other_kind, (fit - fit_in_family) / self._left(self.has_label)

    def search(self, queries: slice, k: int) -> list[np.ndarray]:
        """Each a (block,) value of each of these items as a query: the share of the other kind, both precisions."""
        row, column = self._nearest(queries, k)
        query = row + queries.start
        of_other_kind = self.is_caption[query] != self.is_caption[column]
        fits = self.shares[self.sets[query], self.sets[column]]
        counted = self.has_label[query] & self.has_label[column]
        shares = (of_other_kind, np.full(len(row), True)), (fits, counted), (fits, counted & of_other_kind)
        return [_share(row, part, whole, queries.stop - queries.start) for part, whole in shares]

    def _nearest(self, queries: slice, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(n,), (n,): query in the block and item, of the k nearest items of each and of those that tie with the last.

        float32 says which items could be among them, float64 which are.
        """
        scores = self.rounded[queries] @ self.rounded.T  # (block, G)
        scores[self.families[queries, None] == self.families] = -np.inf
        candidates = scores >= _bound(scores, k)[:, None] - self.margin
        row, column = np.divmod(np.flatnonzero(candidates), len(self))
        left = self.families[queries][row] != self.families[column]  # the bound is -inf where fewer than k are left
        row, column = row[left], column[left]
        vectors = self.vectors[queries]
        if len(row) < _FEW * len(vectors):
            cosines = np.einsum("nd,nd->n", vectors[row], self.vectors[column])
        else:  # a crowded space: the product of all is faster, and needs less memory
            cosines = (vectors @ self.vectors.T)[row, column]
        place = np.arange(len(row)) - np.searchsorted(row, row)  # of each candidate among those of its query
        exact = np.full((len(vectors), int(place.max()) + 1), -np.inf)
        exact[row, place] = cosines
        near = cosines >= _kth_highest(exact, k)[row] - TIE
        return row[near], column[near]


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class MixedGallerySearch(EmbeddingMetric):
    optional_inputs = ("labels", "image_ids", "caption_ids")

    def _info(self):
        return pair_info(_DESCRIPTION, _INPUTS_DESCRIPTION, labels=STRING, image_ids=STRING, caption_ids=STRING)

    def _compute(self, image_embeds, text_embeds, labels, image_ids, caption_ids, k=10, block_size=256):
        if k < 1:
            raise ValueError(f"mixed_gallery_search: k is {k}, it has to be 1 or more.")
        image, text = unit_pairs(image_embeds, text_embeds)
        images, captions = numbered(image_ids), numbered(caption_ids)
        families = families_of(images, captions)
        first_image, first_caption = first_rows(images), first_rows(captions)
        items = np.concatenate([images, len(first_image) + captions])  # of all rows, as images and as captions
        gallery = _Gallery(
            np.concatenate([image[first_image], text[first_caption]]),
            np.repeat([False, True], [len(first_image), len(first_caption)]),
            np.concatenate([families[first_image], families[first_caption]]),
            *_label_sets(items, 2 * [(label or "").strip() for label in labels]),
        )
        names = [f"{name}@{k}" for name in (_NAMES if gallery.has_label.any() else _NAMES[:2])]
        if len(set(families)) < 2:
            logger.warning("mixed_gallery_search: all pairs share images or captions, all is nan.")
            return dict.fromkeys(names, math.nan)
        queries = tqdm(list(blocks(len(gallery), block_size)), desc="Searching", delay=2, leave=False)
        found = [gallery.search(block, k) for block in queries]
        share, precision, precision_of_other = (np.concatenate(values) for values in zip(*found, strict=True))
        chance_share, chance_precision = gallery.chance()
        chance_precision[np.isnan(precision)] = math.nan
        values = [share, chance_share, precision, chance_precision, precision_of_other]
        return {name: _mean(value) for name, value in zip(names, values[: len(names)], strict=True)}
