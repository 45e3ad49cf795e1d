"""From embeddings to figures: all metrics of one set of pairs, for a finished model and inside the Trainer."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations, islice
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import EvalPrediction

from ..data.hashing import stable_hash
from .by_source import flat_metrics, measure_sources
from .every_pair import measure_every_pair
from .load_metric import load_metric
from .pair_embeddings import Columns, PairEmbeddings, columns_of, record_modalities
from .queries import measure_queries
from .record_fields import predict_record_fields, told_in_captions


def evaluate_embeddings(
    embeddings: PairEmbeddings,
    ks: tuple[int, ...] = (1, 5, 10),
    grouping: bool = True,
    fusion_weights: Mapping[str, float] | None = None,
    geometry: bool = False,
) -> dict[str, float]:
    """All metrics of the pairs, flat, and `num_pairs`; recalls and V-measure as fractions.

    Where no pair has a label, the metrics of labels are left out; without `grouping`, grouping and search in a mixed
    gallery are, which take seconds.

    With further modalities those of images and captions, under the same names, are over the samples that have both,
    and are left out where there is none. Beside them: `measure_every_pair`; with `grouping` also `measure_queries`,
    `predict_record_fields`; and `told_in_captions`.

    Args:
        ks: cut-offs of the recalls.
        fusion_weights: the model's own (`config.fusion_weights`), as of `measure_queries`.
        geometry: whether to add those of `space_geometry` (uniformity, effective rank, separability and relative gap
            of images and captions), whose time grows with the square of the pairs.
    """
    pairs = embeddings.having("image", "text")
    result = _image_and_text(pairs, ks, grouping, geometry) if len(pairs) else {}
    if not embeddings.further:
        return result
    # Those of images and captions win, which are told over the samples that have both.
    result = measure_every_pair(embeddings, result, ks, grouping) | result
    if grouping:
        result |= measure_queries(embeddings, ks, fusion_weights)
        for name in record_modalities(embeddings):
            result |= predict_record_fields(embeddings, name)
    return result | told_in_captions(embeddings)


def _image_and_text(
    embeddings: PairEmbeddings, ks: tuple[int, ...], grouping: bool, geometry: bool
) -> dict[str, float]:
    vectors = {"image_embeds": embeddings.image_embeds, "text_embeds": embeddings.text_embeds}
    ids = {"image_ids": embeddings.image_ids, "caption_ids": embeddings.caption_ids}
    result = load_metric("modality_gap").compute(**vectors)
    result |= load_metric("cross_modal_retrieval").compute(**vectors, **ids, ks=ks)
    if geometry:
        result |= load_metric("space_geometry").compute(**vectors, **ids)
    if not grouping:
        return result | {"num_pairs": float(len(embeddings))}
    result |= load_metric("mixed_gallery_search").compute(**vectors, **ids, labels=embeddings.labels)
    if any(embeddings.labels):
        result |= load_metric("cross_modal_grouping").compute(**vectors, **ids, labels=embeddings.labels)
    return result | {"num_pairs": float(len(embeddings))}


def build_compute_metrics(
    pairs: Dataset | IterableDataset,
    grouping: bool = True,
    modalities: Sequence[str] | None = None,
    fusion_weights: Mapping[str, float] | None = None,
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Makes the `compute_metrics` of a `Trainer` that evaluates on these pairs, in their order.

    It gives the metrics of all pairs; of several sources each one's own too, `<source>_<metric>`; and the mean over
    the sources of a few, `mean_recall@10`, `mean_margin` and `mean_debiased_modality_gap`, whether there is one or
    more.

    Args:
        grouping, fusion_weights: as of `evaluate_embeddings`.
        modalities: names of the further ones; default: those that the predictions have.

    Raises (when it is called):
        ValueError: the predictions are not one row a pair; or not in this order, where the model hands `group_ids` on.
    """
    if isinstance(pairs, Dataset):
        pairs = pairs.with_format(None)  # ids and captions are in the columns, not in what a transform makes of them
    known: dict[tuple[str, ...], Columns] = {}
    # At once, so that what is wrong with the pairs is said before training. Which further modalities there are, only
    # the predictions tell, if nobody did.
    expected = tuple(modalities or ())
    known[expected] = columns_of(pairs, expected)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        image_embeds, text_embeds, group_ids, further = _parts_of(prediction.predictions)
        names = tuple(further)
        if names not in known:
            known[names] = columns_of(pairs, names)
        columns = known[names]
        if len(image_embeds) != len(columns.image_ids):
            raise ValueError(
                f"compute_metrics was built for {len(columns.image_ids)} pairs but got {len(image_embeds)} "
                "predictions: build it with the very data set that the Trainer evaluates."
            )
        embeds = {"image": image_embeds, "text": text_embeds, **further}
        present: dict[str, np.ndarray] = {name: np.any(z != 0, axis=1) for name, z in embeds.items() if further}
        embeddings = PairEmbeddings(image_embeds, text_embeds, *columns, further=further, present=present)
        if group_ids is not None:
            ids_of_columns = {"image_id": columns.image_ids, "caption": embeddings.caption_ids}
            for column, (name, ids) in enumerate(ids_of_columns.items()):
                given = [row for row, each in enumerate(ids) if each != "" or not further]
                _check_order([ids[row] for row in given], group_ids[given, column], name)
        measure = partial(evaluate_embeddings, grouping=grouping, fusion_weights=fusion_weights)
        metrics = measure(embeddings)
        return flat_metrics(metrics, measure_sources(embeddings, metrics, measure))

    return compute_metrics


def _parts_of(predictions: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, dict[str, np.ndarray]]:
    """Images, texts, group ids (N, 2) if there are any and further modalities, of what a Trainer collects.

    What a sample lacks is a row of zeros, so `modality_mask`, which is among them, says nothing more.
    """
    image_embeds, text_embeds, *rest = predictions
    further = next((dict(part) for part in rest if isinstance(part, Mapping)), {})
    arrays = [part for part in rest if isinstance(part, np.ndarray) and part.ndim == 2 and part.dtype.kind == "i"]
    return image_embeds, text_embeds, arrays[0] if arrays else None, further


def metric_names(pairs: Dataset, grouping: bool = True, modalities: Sequence[str] = ()) -> list[str]:
    """The names of what `build_compute_metrics` of these pairs will give, found with made-up embeddings of a few.

    Args:
        modalities: names of the further ones that the model will have. Those of records' fields may be more in fact.
    """
    columns = columns_of(pairs, modalities)
    few = [index for source in dict.fromkeys(columns.sources) for index in _first_of(columns, source)]
    rng = np.random.default_rng(0)
    image, text, *others = rng.standard_normal((2 + len(modalities), len(few), 4), dtype=np.float32)
    further = dict(zip(modalities, others, strict=True))
    for name, z in further.items():
        z[[columns.values[name].ids[index] == "" for index in few]] = 0
    if further:
        image[[columns.image_ids[index] == "" for index in few]] = 0
        text[[columns.captions[index] == "" for index in few]] = 0
    made_up = EvalPrediction(predictions=(image, text, *([further] if further else [])), label_ids=None)
    return list(build_compute_metrics(pairs.select(few), grouping, list(modalities) or None)(made_up))


def _first_of(columns: Columns, source: str, number: int = 4) -> list[int]:
    """
    The first rows of a source, those that lack the least, and among them those with a label, before the others; and
    two that have both of each two modalities, or all of each three (a query of two and its target), if there are any.
    """
    rows = [index for index, other in enumerate(columns.sources) if other == source]
    parts = [columns.image_ids, columns.captions, *(values.ids for values in columns.values.values())]
    if not columns.values:
        parts = []

    def lacks(index: int) -> tuple[int, bool]:
        return sum(part[index] == "" for part in parts), not columns.labels[index]

    few = sorted(rows, key=lacks)[:number]
    for chosen in (*combinations(parts, 2), *combinations(parts, 3)):
        few += islice((index for index in rows if all(part[index] != "" for part in chosen)), 2)
    return list(dict.fromkeys(few))


def _check_order(ids: list[str], group_ids: np.ndarray, name: str) -> None:
    """Raises where a row has the group id of another one; of ids that are not `PairCollator`'s, where equal ids have
    different group ids, or different ids equal ones.
    """
    hashes = [stable_hash(each) for each in ids]
    given = group_ids.tolist()
    if set(hashes).isdisjoint(given):
        in_order = len(set(zip(ids, given, strict=True))) == len(set(ids)) == len(set(given))
    else:
        in_order = hashes == given
    if not in_order:
        raise ValueError(
            f"The predictions are not in the order of the pairs ({name} does not match their group_ids): do not "
            "shuffle the evaluation set, build compute_metrics with the very data set that the Trainer evaluates, and "
            "read a stream with one worker (dataloader_num_workers=1), since each makes batches of its own part."
        )


def modality_means(embeddings: PairEmbeddings) -> tuple[np.ndarray, np.ndarray]:
    """((D,), (D,)): mean image and mean text embedding."""
    image, text = embeddings.image_embeds, embeddings.text_embeds
    return image.mean(axis=0, dtype=np.float64), text.mean(axis=0, dtype=np.float64)
