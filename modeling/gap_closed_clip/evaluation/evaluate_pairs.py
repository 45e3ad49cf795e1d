"""From embeddings to figures: all metrics of one set of pairs, for a finished model and inside the Trainer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import evaluate
import numpy as np
from datasets import Dataset, IterableDataset
from transformers import EvalPrediction

from .by_source import flat_metrics, measure_sources
from .embed import Columns, PairEmbeddings, columns_of


METRICS_FOLDER = Path(__file__).parent.parent / "metrics"


def load_metric(name: str, **kwargs) -> evaluate.Metric:
    """One of this package's metrics: the name of a file in `metrics`, e.g. "modality_gap" or "caption_cider".

    Args:
        kwargs: of `evaluate.load`, e.g. num_process, process_id and experiment_id.
    """
    return evaluate.load(str(METRICS_FOLDER / f"{name}.py"), **kwargs)


def evaluate_embeddings(
    embeddings: PairEmbeddings, ks: tuple[int, ...] = (1, 5, 10), grouping: bool = True
) -> dict[str, float]:
    """All metrics of the pairs, flat, and `num_pairs`; recalls and V-measure as fractions.

    Where no pair has a label, the metrics of labels are left out; without `grouping`, grouping and search in a mixed
    gallery are, which take seconds.
    """
    vectors = {"image_embeds": embeddings.image_embeds, "text_embeds": embeddings.text_embeds}
    ids = {"image_ids": embeddings.image_ids, "caption_ids": embeddings.caption_ids}
    result = load_metric("modality_gap").compute(**vectors)
    result |= load_metric("cross_modal_retrieval").compute(**vectors, **ids, ks=ks)
    if not grouping:
        return result | {"num_pairs": float(len(embeddings))}
    result |= load_metric("mixed_gallery_search").compute(**vectors, **ids, labels=embeddings.labels)
    if any(embeddings.labels):
        result |= load_metric("cross_modal_grouping").compute(**vectors, **ids, labels=embeddings.labels)
    return result | {"num_pairs": float(len(embeddings))}


def build_compute_metrics(
    pairs: Dataset | IterableDataset, grouping: bool = True
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Makes the `compute_metrics` of a `Trainer` that evaluates on these pairs, in their order.

    It gives the metrics of all pairs; of several sources each one's own too, `<source>_<metric>`; and the mean over
    the sources of a few, `mean_recall@10`, `mean_margin` and `mean_debiased_modality_gap`, whether there is one or
    more.

    Args:
        grouping: as of `evaluate_embeddings`.

    Raises (when it is called):
        ValueError: the predictions are not one row a pair; or not in this order, where the model hands `group_ids` on.
    """
    columns = columns_of(pairs)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        image_embeds, text_embeds, *rest = prediction.predictions
        if len(image_embeds) != len(columns.image_ids):
            raise ValueError(
                f"compute_metrics was built for {len(columns.image_ids)} pairs but got {len(image_embeds)} "
                "predictions: build it with the very data set that the Trainer evaluates."
            )
        embeddings = PairEmbeddings(image_embeds, text_embeds, *columns)
        if rest and rest[0].ndim == 2:
            _check_order(columns.image_ids, rest[0][:, 0], "image_id")
            _check_order(embeddings.caption_ids, rest[0][:, 1], "caption")
        measure = partial(evaluate_embeddings, grouping=grouping)
        metrics = measure(embeddings)
        return flat_metrics(metrics, measure_sources(embeddings, metrics, measure))

    return compute_metrics


def metric_names(pairs: Dataset, grouping: bool = True) -> list[str]:
    """The names of what `build_compute_metrics` of these pairs will give, found with made-up embeddings of a few."""
    columns = columns_of(pairs)
    few = [index for source in dict.fromkeys(columns.sources) for index in _first_of(columns, source)]
    embeddings = np.random.default_rng(0).standard_normal((2, len(few), 4), dtype=np.float32)
    made_up = EvalPrediction(predictions=tuple(embeddings), label_ids=None)
    return list(build_compute_metrics(pairs.select(few), grouping)(made_up))


def _first_of(columns: Columns, source: str, number: int = 4) -> list[int]:
    """The first rows of a source, those with a label before those without."""
    rows = [index for index, other in enumerate(columns.sources) if other == source]
    return sorted(rows, key=lambda index: not columns.labels[index])[:number]


def _check_order(ids: list[str], group_ids: np.ndarray, name: str) -> None:
    """Raises where equal ids have different group ids, or different ids equal ones."""
    matches = len(set(zip(ids, group_ids.tolist(), strict=True)))
    if not matches == len(set(ids)) == len(np.unique(group_ids)):
        raise ValueError(
            f"The predictions are not in the order of the pairs ({name} does not match their group_ids): do not "
            "shuffle the evaluation set, and build compute_metrics with the very data set that the Trainer evaluates."
        )


def modality_means(embeddings: PairEmbeddings) -> tuple[np.ndarray, np.ndarray]:
    """((D,), (D,)): mean image and mean text embedding."""
    image, text = embeddings.image_embeds, embeddings.text_embeds
    return image.mean(axis=0, dtype=np.float64), text.mean(axis=0, dtype=np.float64)
