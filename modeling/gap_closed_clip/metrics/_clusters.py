"""k-means on the embeddings of several modalities stacked, compared with labels. No metric itself."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, v_measure_score


CLUSTERING = ("v_measure", "nmi", "ari")


@contextmanager
def few_rows_a_label() -> Iterator[None]:
    """Without scikit-learn's warning that labels might be a regression's, which it gives of small sets."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of unique classes is greater")
        yield


def cluster_scores(modalities: Sequence[np.ndarray], labels: Sequence[np.ndarray], seed: int = 0) -> dict[str, float]:
    """
    V-measure, NMI and adjusted Rand index of k-means (k = number of labels, 10 starts) on all rows stacked.

    Args:
        modalities: of each one its embeddings (N_m, D).
        labels: of each one the labels (N_m,) of its rows, numbers from 0 on.
        seed: of the starts.
    """
    truth = np.concatenate(labels)
    k_means = KMeans(n_clusters=int(truth.max()) + 1, n_init=10, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than labels: the scores say it
        clusters = k_means.fit_predict(np.concatenate(modalities))
    scores = (v_measure_score, normalized_mutual_info_score, adjusted_rand_score)
    with few_rows_a_label():
        return {name: float(score(truth, clusters)) for name, score in zip(CLUSTERING, scores, strict=True)}
