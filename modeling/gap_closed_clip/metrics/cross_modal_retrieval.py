"""Recall@k and median rank, image to text and text to image, with several captions an image and images a caption."""

import datasets
import evaluate
import numpy as np
from datasets.utils import tqdm


_DESCRIPTION = """\
Cross-modal retrieval in both directions by cosine. The galleries are the *distinct* images and the *distinct*
captions (an id's first embedding counts); every (image_id, caption_id) that occurs as a pair is correct, so several
captions an image and several images a caption all count. A query's rank, from 1, is that of its best correct item.

Ties count against the model: an incorrect item whose cosine is not below the best correct one (within 1e-9, so that
rounding cannot break a tie) ranks before it. A constant embedding gets the worst rank possible, not the first.

- `image_to_text_recall@k`: fraction (0..1) of the distinct images with a correct caption among the k nearest captions.
- `text_to_image_recall@k`: fraction of the distinct captions with a correct image among the k nearest images.
- `image_to_text_median_rank`, `text_to_image_median_rank`: median of the ranks, 1 is best.

Computed in float64 by blocks of queries: O(block_size * gallery) memory. The values depend on the size of the
gallery: compare models on the same pairs only.
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
    image_ids: N strings, equal for rows that show the same image.
    caption_ids: N strings, equal for rows that carry the same caption (the caption itself will do).
    ks (`Sequence[int]`, defaults to (1, 5, 10)): the cut-offs of the recalls.
    block_size (`int`, defaults to 256): queries scored at once.

Returns:
    dict of floats: image_to_text_recall@k and text_to_image_recall@k for each k, image_to_text_median_rank and
    text_to_image_median_rank.

Raises:
    ValueError: no pair, rows of different length, a zero vector, or a value that is not finite; the row is named.

Examples:
    Two captions of one image "a"; the second lies nearer to the other image "b".

    >>> import evaluate
    >>> metric = evaluate.load("cross_modal_retrieval.py")
    >>> result = metric.compute(
    ...     image_embeds=[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]],
    ...     text_embeds=[[1.0, 0.1], [0.1, 1.0], [0.0, 1.0]],
    ...     image_ids=["a", "a", "b"],
    ...     caption_ids=["ring", "disc", "bar"],
    ...     ks=[1, 2],
    ... )
    >>> {name: round(value, 4) for name, value in result.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'image_to_text_recall@1': 1.0, 'image_to_text_recall@2': 1.0, 'image_to_text_median_rank': 1.0,
     'text_to_image_recall@1': 0.6667, 'text_to_image_recall@2': 1.0, 'text_to_image_median_rank': 1.0}
"""

_TIE = 1e-9  # cosines this close are equal: well above float64 rounding, well below that of float32 embeddings


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


def _distinct(ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """First row of every distinct id, and for every row the position of its id among them."""
    position: dict[str, int] = {}
    inverse = np.array([position.setdefault(identifier, len(position)) for identifier in ids])
    first = np.unique(inverse, return_index=True)[1]
    return first, inverse


def _ranks(queries: np.ndarray, gallery: np.ndarray, relevant: np.ndarray, block_size: int, name: str) -> np.ndarray:
    """Rank (from 1) of each query's best correct item.

    Args:
        queries, gallery: (Q, D) and (G, D) unit vectors.
        relevant: (P, 2) distinct (query, gallery) positions of the correct items, sorted; every query has one.
    """
    ranks = np.empty(len(queries), dtype=np.int64)
    for start in tqdm(range(0, len(queries), block_size), desc=f"Ranking {name}", delay=2, leave=False):
        stop = min(start + block_size, len(queries))
        low, high = np.searchsorted(relevant[:, 0], [start, stop])
        query, item = relevant[low:high, 0] - start, relevant[low:high, 1]
        scores = queries[start:stop] @ gallery.T  # (block, G)
        best = np.full(stop - start, -np.inf)
        np.maximum.at(best, query, scores[query, item])
        scores[query, item] = -np.inf  # the query's other correct items are not ahead of its best one
        ranks[start:stop] = 1 + (scores >= best[:, None] - _TIE).sum(axis=1)
    return ranks


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class CrossModalRetrieval(evaluate.Metric):
    def _info(self):
        embedding = datasets.Sequence(datasets.Value("float32"))
        identifier = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {
                    "image_embeds": embedding,
                    "text_embeds": embedding,
                    "image_ids": identifier,
                    "caption_ids": identifier,
                }
            ),
            reference_urls=["https://arxiv.org/abs/2602.20046", "https://arxiv.org/abs/2601.18525"],
        )

    def _compute(self, image_embeds, text_embeds, image_ids, caption_ids, ks=(1, 5, 10), block_size=256):
        image, text = _unit_pairs(image_embeds, text_embeds)
        image_rows, image_index = _distinct(image_ids)
        text_rows, text_index = _distinct(caption_ids)
        image, text = image[image_rows], text[text_rows]  # (images, D), (captions, D)
        directions = {
            "image_to_text": (image, text, np.stack([image_index, text_index], axis=1)),
            "text_to_image": (text, image, np.stack([text_index, image_index], axis=1)),
        }
        result = {}
        for name, (queries, gallery, pairs) in directions.items():
            ranks = _ranks(queries, gallery, np.unique(pairs, axis=0), block_size, name)
            result |= {f"{name}_recall@{k}": float(np.mean(ranks <= k)) for k in ks}
            result[f"{name}_median_rank"] = float(np.median(ranks))
        return result
