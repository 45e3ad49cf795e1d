"""Do both modalities fall into the same semantic groups? k-means on both stacked, kNN and linear probe across them."""

import logging
import math
from collections.abc import Callable

import evaluate
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits

from ._clusters import CLUSTERING, cluster_scores, few_rows_a_label
from ._embeddings import (
    ID_ARGUMENTS,
    PAIR_ARGUMENTS,
    RAISES,
    STRING,
    TIE,
    EmbeddingMetric,
    families_of,
    numbered,
    pair_info,
    unit_pairs,
)


logger = logging.getLogger(__name__)

_DESCRIPTION = """\
Group-wise semantics of a space that two modalities share. Rows with an empty label are ignored.

- `v_measure`, `nmi`, `ari`: k-means (k = number of labels, 10 starts, fixed seed) on the embeddings of both modalities
  stacked (2 N rows), compared with the labels. A space split by modality wastes its clusters on the modality. 0..1,
  `ari` from -0.5. `nmi`, normalised mutual information, is normalised by the arithmetic mean of both entropies, so it
  equals the V-measure; both names are in use.
- `knn_accuracy_A_to_B`: every distinct item of modality B takes the label of the majority of its 5 nearest items of
  modality A. Items as near as the fifth vote too; between equal votes the larger sum of cosines decides.
- `linear_probe_accuracy_A_to_B`: logistic regression fitted on modality A, tested on modality B, 5-fold cross-fitted.
- `majority_accuracy_A_to_B`: every item of modality B takes the label that is the most frequent one (the first by name
  among equals) where the probe is fitted. What kNN and probe have to beat. Of labels that are equally frequent it
  predicts the one that the tested fold has least of, so it can fall below 1 / number of labels.
- `knn_balanced_accuracy_A_to_B`, `linear_probe_balanced_accuracy_A_to_B`: of the same predictions the mean over the
  labels of the share of the label's items that are right (its recall), so that rare labels count as much as frequent
  ones. `chance_balanced_accuracy`: 1 / number of labels, what guessing has, and predicting one label for all.

kNN and probe never predict an item from its own *family*: pairs that share an image or a caption, directly or through
other pairs. Otherwise the item's own partner would sit in the training set with the label asked for, and the figure
would measure retrieval instead of semantics. An item with several labels counts once with each.
"""

_INPUTS_DESCRIPTION = f"""
Args:
{PAIR_ARGUMENTS}
    labels: N strings or whole numbers, the group of each pair; "", None or NaN leaves the pair out.
{ID_ARGUMENTS}
    num_neighbors (`int`, defaults to 5): neighbours that vote.
    num_folds (`int`, defaults to 5): folds of the probe, at most one a family.
    seed (`int`, defaults to 0): of the k-means starts.
    block_size (`int`, defaults to 256): queries of the kNN scored at once.

Returns:
    dict of floats: v_measure, nmi, ari; knn_accuracy, linear_probe_accuracy, majority_accuracy, knn_balanced_accuracy
    and linear_probe_balanced_accuracy, each with _image_to_text and _text_to_image after it; chance_balanced_accuracy.
    All are nan with fewer than two labels, all but the first three also with a single family; a logged warning says
    which.

Raises:
    {RAISES}
"""
_INPUTS_DESCRIPTION += """
Examples:
    Two groups that both modalities keep apart.

    >>> import evaluate
    >>> metric = evaluate.load("cross_modal_grouping.py")
    >>> result = metric.compute(
    ...     image_embeds=[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]],
    ...     text_embeds=[[1.0, 0.2], [1.0, 0.1], [0.1, 1.0], [0.2, 1.0]],
    ...     labels=["CT", "CT", "MR", "MR"],
    ...     image_ids=["a", "b", "c", "d"],
    ...     caption_ids=["lung", "liver", "brain", "spine"],
    ...     num_neighbors=1,
    ... )
    >>> {name: round(value, 4) for name, value in result.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'v_measure': 1.0, 'nmi': 1.0, 'ari': 1.0, 'knn_accuracy_image_to_text': 1.0, 'knn_accuracy_text_to_image': 1.0,
     'linear_probe_accuracy_image_to_text': 1.0, 'linear_probe_accuracy_text_to_image': 1.0,
     'majority_accuracy_image_to_text': 0.0, 'majority_accuracy_text_to_image': 0.0,
     'knn_balanced_accuracy_image_to_text': 1.0, 'knn_balanced_accuracy_text_to_image': 1.0,
     'linear_probe_balanced_accuracy_image_to_text': 1.0, 'linear_probe_balanced_accuracy_text_to_image': 1.0,
     'chance_balanced_accuracy': 0.5}
"""

_DIRECTIONS = ("image_to_text", "text_to_image")
_ACROSS = (
    *(f"{what}_accuracy_{way}" for what in ("knn", "linear_probe", "majority") for way in _DIRECTIONS),
    *(f"{what}_balanced_accuracy_{way}" for what in ("knn", "linear_probe") for way in _DIRECTIONS),
    "chance_balanced_accuracy",
)
_INVERSE_REGULARISATION = 32.0  # scikit-learn's C, for vectors scaled to a root mean square length of 1


def _folds(families: np.ndarray, num_folds: int) -> np.ndarray:
    """(F,) fold of each family: whole families, folds with about as many rows each."""
    num_families = int(families.max()) + 1
    fold_of_family = np.empty(num_families, dtype=np.int64)
    folds = GroupKFold(n_splits=min(num_folds, num_families)).split(families, groups=families)
    for fold, (_, test_rows) in enumerate(folds):
        fold_of_family[families[test_rows]] = fold
    return fold_of_family


def _items(vectors: np.ndarray, ids: np.ndarray, labels: np.ndarray, families: np.ndarray) -> tuple[np.ndarray, ...]:
    """Distinct (id, label) items of one modality: vectors (I, D), labels (I,), families (I,)."""
    rows = np.unique(np.stack([ids, labels]), axis=1, return_index=True)[1]
    return vectors[rows], labels[rows], families[rows]


def _knn(fitted: tuple, tested: tuple, num_neighbors: int, block_size: int) -> np.ndarray:
    """(T,) the label that wins the vote of each tested item's nearest fitted items from other families."""
    gallery, gallery_labels, gallery_families = fitted
    queries, _, query_families = tested
    k = min(num_neighbors, len(gallery))
    membership = np.eye(int(gallery_labels.max()) + 1)[gallery_labels]  # (G, labels)
    predicted = []
    for start in range(0, len(queries), block_size):
        block = slice(start, start + block_size)
        scores = queries[block] @ gallery.T  # (block, G)
        scores[query_families[block, None] == gallery_families[None, :]] = -np.inf
        kth = np.partition(scores, -k, axis=1)[:, -k, None]
        near = (scores >= kth - TIE) & np.isfinite(scores)
        # One vote each; all cosines together weigh less than half a vote, so they only decide between equal votes.
        cosines = np.where(near, scores, 0.0) / (4 * near.sum(axis=1, keepdims=True))
        votes = np.round((near + cosines) @ membership, 9)  # rounded: what is left equal goes to the first label
        predicted.append(votes.argmax(axis=1))
    return np.concatenate(predicted)


def _across_folds(
    fitted: tuple,
    tested: tuple,
    fold_of_family: np.ndarray,
    predict: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """(T,) the label of each tested item, predicted from the fitted items of the families of the other folds.

    Args:
        predict: takes fitted vectors, their labels and tested vectors; returns the labels of these.
    """
    train_vectors, train_labels, train_families = fitted
    test_vectors, test_labels, test_families = tested
    predicted = np.empty_like(test_labels)
    for fold in range(int(fold_of_family.max()) + 1):
        train, test = fold_of_family[train_families] != fold, fold_of_family[test_families] == fold
        predicted[test] = predict(train_vectors[train], train_labels[train], test_vectors[test])
    return predicted


def _majority(x: np.ndarray, y: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """The most frequent label of `y`, whatever is asked."""
    return np.full(len(tested), np.bincount(y).argmax())


def _probe(x: np.ndarray, y: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """The labels by logistic regression."""
    if len(np.unique(y)) == 1:  # nothing to fit
        return np.full(len(tested), y[0])
    # Both modalities are moved and scaled by the same numbers, so that neither convergence nor regularisation
    # depends on how crowded the space is. Each one's own mean must not be taken away: the offset between the
    # modalities is what the probe has to bear.
    mean = x.mean(axis=0)
    scale = np.sqrt(np.mean(np.sum((x - mean) ** 2, axis=1))) or 1.0
    # The matrices are small: on a busy machine threads that wait for one another take fifty times as long.
    with threadpool_limits(1), few_rows_a_label():
        probe = LogisticRegression(C=_INVERSE_REGULARISATION, max_iter=1000).fit((x - mean) / scale, y)
    return probe.predict((tested - mean) / scale)


def _accuracies(direction: str, truth: np.ndarray, predictions: dict[str, np.ndarray]) -> dict[str, float]:
    """Accuracy of each prediction, and balanced accuracy of all but the majority's, which is close to chance."""
    result = {f"{name}_accuracy_{direction}": float(np.mean(labels == truth)) for name, labels in predictions.items()}
    for name in predictions.keys() - {"majority"}:
        with few_rows_a_label():
            balanced = balanced_accuracy_score(truth, predictions[name])
        result[f"{name}_balanced_accuracy_{direction}"] = float(balanced)
    return result


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class CrossModalGrouping(EmbeddingMetric):
    optional_inputs = ("image_ids", "caption_ids")

    def _info(self):
        return pair_info(_DESCRIPTION, _INPUTS_DESCRIPTION, labels=STRING, image_ids=STRING, caption_ids=STRING)

    def _compute(
        self,
        image_embeds,
        text_embeds,
        labels,
        image_ids,
        caption_ids,
        num_neighbors=5,
        num_folds=5,
        seed=0,
        block_size=256,
    ):
        for name, value, least in (("num_neighbors", num_neighbors, 1), ("num_folds", num_folds, 2)):
            if value < least:
                raise ValueError(f"cross_modal_grouping: {name} is {value}, it has to be {least} or more.")
        image, text = unit_pairs(image_embeds, text_embeds)
        images, captions = numbered(image_ids), numbered(caption_ids)
        families = families_of(images, captions)  # over all rows: those without a label link images and captions too

        names = [(label or "").strip() for label in labels]
        keep = np.array([name != "" for name in names])
        found = sorted(set(names) - {""})
        if len(found) < 2:
            logger.warning("cross_modal_grouping needs two different labels or more, got %s: all is nan.", found)
            return dict.fromkeys(CLUSTERING + _ACROSS, math.nan)
        groups = numbered([name for name in names if name])
        image, text, images, captions, families = (part[keep] for part in (image, text, images, captions, families))
        result = cluster_scores([image, text], [groups, groups], seed)

        if len(set(families)) < 2:
            logger.warning("cross_modal_grouping: all pairs share images or captions, kNN and linear probe are nan.")
            return result | dict.fromkeys(_ACROSS, math.nan)
        families = np.unique(families, return_inverse=True)[1]
        fold_of_family = _folds(families, num_folds)
        image_items, text_items = _items(image, images, groups, families), _items(text, captions, groups, families)
        directions = ((image_items, text_items), (text_items, image_items))
        for direction, (fitted, tested) in zip(_DIRECTIONS, directions, strict=True):
            predictions = {
                "knn": _knn(fitted, tested, num_neighbors, block_size),
                "linear_probe": _across_folds(fitted, tested, fold_of_family, _probe),
                "majority": _across_folds(fitted, tested, fold_of_family, _majority),
            }
            result |= _accuracies(direction, tested[1], predictions)
        result["chance_balanced_accuracy"] = 1 / len(found)
        return {name: result[name] for name in (*CLUSTERING, *_ACROSS)}
