"""Search where images and captions lie in one gallery: which kind comes first, and does what comes fit?"""

import logging
import math

import evaluate
import numpy as np
from datasets.utils import tqdm
from scipy.sparse import coo_array, csr_array

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
    labels: N strings, the group of each pair; "" is none. Without them nothing is said of labels.
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

_OF_KINDS = ("other_kind_share", "chance_other_kind_share")
_OF_LABELS = ("mixed_label_precision", "chance_mixed_label_precision", "other_kind_label_precision")
_FEW = 100  # candidates a query, up to which their cosines are computed one by one


def _labels_of_items(items: np.ndarray, labels: list[str]) -> csr_array | None:
    """(G, labels) booleans, which labels each item has; None where no row has one.

    Args:
        items: (N,) the item of each row.
        labels: N names, "" for none.
    """
    labelled = np.array([label != "" for label in labels])
    if not labelled.any():
        return None
    groups = numbered([label for label in labels if label])
    shape = (int(items.max()) + 1, int(groups.max()) + 1)
    return coo_array((np.ones(len(groups), dtype=bool), (items[labelled], groups)), shape=shape).tocsr()


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


class _Gallery:
    """All distinct items, the images first, and what is known of each.

    Args:
        vectors: (G, D) unit vectors, float64.
        is_caption: (G,) booleans.
        families: (G,) numbers.
        labels: (G, labels) booleans, or None.
    """

    def __init__(self, vectors: np.ndarray, is_caption: np.ndarray, families: np.ndarray, labels: csr_array | None):
        self.vectors, self.is_caption, self.families, self.labels = vectors, is_caption, families, labels
        self.rounded = vectors.astype(np.float32)
        # Twice what a float32 cosine of unit vectors may be off, D + 2 half units in the last place, and a little.
        self.margin = TIE + (vectors.shape[1] + 4) * float(np.finfo(np.float32).eps)

    def __len__(self) -> int:
        return len(self.vectors)

    def search(self, queries: slice, k: int) -> list[np.ndarray]:
        """Each a (block,) value of each of these items as a query; those of _OF_KINDS, then those of _OF_LABELS."""
        left = self.families[queries, None] != self.families  # (block, G)
        size, count = np.count_nonzero(left, axis=1), len(left)
        row, column = self._nearest(queries, left, k)
        kinds = self.is_caption[queries]
        of_other_kind = kinds[row] != self.is_caption[column]
        captions_left = np.count_nonzero(left & self.is_caption, axis=1)
        values = [
            _share(row, of_other_kind, np.full(len(row), True), count),
            np.where(kinds, size - captions_left, captions_left) / size,
        ]
        if self.labels is None:
            return values
        fits = (self.labels[queries] @ self.labels.T).toarray()  # one label or more in common
        has_label = np.diff(self.labels.indptr) > 0  # (G,)
        hits, counted = fits[row, column], has_label[queries][row] & has_label[column]
        precision = _share(row, hits, counted, count)
        with np.errstate(invalid="ignore"):
            chance = np.count_nonzero(left & fits, axis=1) / np.count_nonzero(left & has_label, axis=1)
        chance[np.isnan(precision)] = math.nan
        return [*values, precision, chance, _share(row, hits, counted & of_other_kind, count)]

    def _nearest(self, queries: slice, left: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Row and column in `left` of the k nearest items of each query, and of those that tie with the last."""
        scores = self.rounded[queries] @ self.rounded.T
        scores[~left] = -np.inf
        kth = np.partition(scores, -min(k, len(self)), axis=1)[:, -min(k, len(self)), None]
        row, column = np.divmod(np.flatnonzero((scores >= kth - self.margin) & left), len(self))
        vectors = self.vectors[queries]
        if len(row) < _FEW * len(vectors):
            cosines = np.einsum("nd,nd->n", vectors[row], self.vectors[column])
        else:  # a crowded space: the product of all is faster, and needs less memory
            cosines = (vectors @ self.vectors.T)[row, column]
        order, start = np.lexsort((-cosines, row)), np.searchsorted(row, np.arange(len(vectors) + 1))
        last = np.minimum(start[:-1] + k, start[1:]) - 1  # no query is without any: there are two families or more
        near = cosines >= cosines[order][last][row] - TIE
        return row[near], column[near]


def _mean(values: np.ndarray) -> float:
    """Of those that are not nan; nan of none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


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
            _labels_of_items(items, 2 * [label.strip() for label in labels]),
        )
        names = [f"{name}@{k}" for name in (_OF_KINDS if gallery.labels is None else _OF_KINDS + _OF_LABELS)]
        if len(set(families)) < 2:
            logger.warning("mixed_gallery_search: all pairs share images or captions, all is nan.")
            return dict.fromkeys(names, math.nan)
        queries = list(blocks(len(gallery.families), block_size))
        found = [gallery.search(block, k) for block in tqdm(queries, desc="Searching", delay=2, leave=False)]
        columns = [_mean(np.concatenate(values)) for values in zip(*found, strict=True)]
        return dict(zip(names, columns, strict=True))
