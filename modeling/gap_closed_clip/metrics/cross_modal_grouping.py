"""Do both modalities fall into the same semantic groups? k-means on both stacked, kNN and linear probe across them."""

import logging
import math
import warnings

import evaluate
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, v_measure_score
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits

from ._embeddings import ID_ARGUMENTS, PAIR_ARGUMENTS, RAISES, STRING, TIE, EmbeddingMetric, pair_info, unit_pairs


logger = logging.getLogger(__name__)

_DESCRIPTION = """\
Group-wise semantics of a space that two modalities share. Rows with an empty label are ignored.

- `v_measure`, `nmi`, `ari`: k-means (k = number of labels, 10 starts, fixed seed) on the embeddings of both modalities
  stacked (2 N rows), compared with the labels. A space split by modality wastes its clusters on the modality. 0..1,
  `ari` from -0.5. `nmi` is normalised by the arithmetic mean, so it equals the V-measure; both names are in use.
- `knn_accuracy_A_to_B`: every distinct item of modality B takes the label of the majority of its 5 nearest items of
  modality A. Items as near as the fifth vote too; between equal votes the larger sum of cosines decides.
- `linear_probe_accuracy_A_to_B`: logistic regression fitted on modality A, tested on modality B, 5-fold cross-fitted.

kNN and probe never predict an item from its own *family*: pairs that share an image or a caption, directly or through
other pairs. Otherwise the item's own partner would sit in the training set with the label asked for, and the figure
would measure retrieval instead of semantics. An item with several labels counts once with each.
"""

_INPUTS_DESCRIPTION = f"""
Args:
{PAIR_ARGUMENTS}
    labels: N strings, the group of each pair; "" leaves the pair out.
{ID_ARGUMENTS}
    num_neighbors (`int`, defaults to 5): neighbours that vote.
    num_folds (`int`, defaults to 5): folds of the probe, at most one a family.
    seed (`int`, defaults to 0): of the k-means starts.
    block_size (`int`, defaults to 256): queries of the kNN scored at once.

Returns:
    dict of floats: v_measure, nmi, ari, knn_accuracy_image_to_text, knn_accuracy_text_to_image,
    linear_probe_accuracy_image_to_text, linear_probe_accuracy_text_to_image. All are nan with fewer than two labels,
    kNN and probe also with a single family; a logged warning says which.

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
     'linear_probe_accuracy_image_to_text': 1.0, 'linear_probe_accuracy_text_to_image': 1.0}
"""

_CLUSTERING = ("v_measure", "nmi", "ari")
_ACROSS = (
    "knn_accuracy_image_to_text",
    "knn_accuracy_text_to_image",
    "linear_probe_accuracy_image_to_text",
    "linear_probe_accuracy_text_to_image",
)
_INVERSE_REGULARISATION = 32.0  # scikit-learn's C, for vectors scaled to a root mean square length of 1


def _numbered(names: list[str]) -> np.ndarray:
    """(N,) position of each name among the sorted distinct ones."""
    position = {name: number for number, name in enumerate(sorted(set(names)))}
    return np.array([position[name] for name in names])


def _families(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """(N,) number of each row's family: the connected parts of the graph whose edges are the pairs.

    The numbers follow those of the images, so neither families nor folds depend on the order of the rows.
    """
    num_images = int(images.max()) + 1
    size = num_images + int(captions.max()) + 1
    edges = coo_array((np.ones(len(images)), (images, num_images + captions)), shape=(size, size))
    return connected_components(edges, directed=False)[1][images]


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


def _knn_accuracy(fitted: tuple, tested: tuple, num_neighbors: int, block_size: int) -> float:
    """Share of the tested items whose label wins the vote of their nearest fitted items from other families."""
    gallery, gallery_labels, gallery_families = fitted
    queries, query_labels, query_families = tested
    k = min(num_neighbors, len(gallery))
    membership = np.eye(int(gallery_labels.max()) + 1)[gallery_labels]  # (G, labels)
    correct = 0
    for start in range(0, len(queries), block_size):
        block = slice(start, start + block_size)
        scores = queries[block] @ gallery.T  # (block, G)
        scores[query_families[block, None] == gallery_families[None, :]] = -np.inf
        kth = np.partition(scores, -k, axis=1)[:, -k, None]
        near = (scores >= kth - TIE) & np.isfinite(scores)
        # One vote each; all cosines together weigh less than half a vote, so they only decide between equal votes.
        cosines = np.where(near, scores, 0.0) / (4 * near.sum(axis=1, keepdims=True))
        votes = np.round((near + cosines) @ membership, 9)  # rounded: what is left equal goes to the first label
        correct += int(np.sum(votes.argmax(axis=1) == query_labels[block]))
    return correct / len(queries)


def _probe_accuracy(fitted: tuple, tested: tuple, fold_of_family: np.ndarray) -> float:
    """Share of the tested items that logistic regression gets right, fitted on the families of the other folds."""
    train_vectors, train_labels, train_families = fitted
    test_vectors, test_labels, test_families = tested
    correct = 0
    for fold in range(int(fold_of_family.max()) + 1):
        train, test = fold_of_family[train_families] != fold, fold_of_family[test_families] == fold
        x, y = train_vectors[train], train_labels[train]
        if len(np.unique(y)) == 1:  # nothing to fit
            correct += int(np.sum(test_labels[test] == y[0]))
            continue
        # Both modalities are moved and scaled by the same numbers, so that neither convergence nor regularisation
        # depends on how crowded the space is. Each one's own mean must not be taken away: the offset between the
        # modalities is what the probe has to bear.
        mean = x.mean(axis=0)
        scale = np.sqrt(np.mean(np.sum((x - mean) ** 2, axis=1))) or 1.0
        # The matrices are small: on a busy machine threads that wait for one another take fifty times as long.
        with threadpool_limits(1):
            probe = LogisticRegression(C=_INVERSE_REGULARISATION, max_iter=1000).fit((x - mean) / scale, y)
        correct += int(np.sum(probe.predict((test_vectors[test] - mean) / scale) == test_labels[test]))
    return correct / len(test_vectors)


def _cluster(image: np.ndarray, text: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, float]:
    """V-measure, NMI and ARI of k-means on both modalities stacked."""
    k_means = KMeans(n_clusters=int(labels.max()) + 1, n_init=10, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than labels: the scores say it
        clusters = k_means.fit_predict(np.concatenate([image, text]))
    truth = np.concatenate([labels, labels])
    scores = (v_measure_score, normalized_mutual_info_score, adjusted_rand_score)
    return {name: float(score(truth, clusters)) for name, score in zip(_CLUSTERING, scores, strict=True)}


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
        image, text = unit_pairs(image_embeds, text_embeds)
        images, captions = _numbered(image_ids), _numbered(caption_ids)
        families = _families(images, captions)  # over all rows: those without a label link images and captions too

        names = [label.strip() for label in labels]
        keep = np.array([name != "" for name in names])
        found = sorted(set(names) - {""})
        if len(found) < 2:
            logger.warning("cross_modal_grouping needs two different labels or more, got %s: all is nan.", found)
            return dict.fromkeys(_CLUSTERING + _ACROSS, math.nan)
        groups = _numbered([name for name in names if name])
        image, text, images, captions, families = (part[keep] for part in (image, text, images, captions, families))
        result = _cluster(image, text, groups, seed)

        if len(set(families)) < 2:
            logger.warning("cross_modal_grouping: all pairs share images or captions, kNN and linear probe are nan.")
            return result | dict.fromkeys(_ACROSS, math.nan)
        families = np.unique(families, return_inverse=True)[1]
        fold_of_family = _folds(families, num_folds)
        image_items, text_items = _items(image, images, groups, families), _items(text, captions, groups, families)
        accuracies = (
            _knn_accuracy(image_items, text_items, num_neighbors, block_size),
            _knn_accuracy(text_items, image_items, num_neighbors, block_size),
            _probe_accuracy(image_items, text_items, fold_of_family),
            _probe_accuracy(text_items, image_items, fold_of_family),
        )
        return result | dict(zip(_ACROSS, accuracies, strict=True))
