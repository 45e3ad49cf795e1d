"""What `evidence.py` measures of a training: every task on held-out pairs, and a hit or a miss for each query."""

from typing import Any

import numpy as np
from evidence_plan import Method
from evidence_runs import Trained

from gap_closed_clip.evaluation import PairEmbeddings, evaluate_embeddings, load_metric
from gap_closed_clip.evaluation.post_hoc import fit_pairs
from gap_closed_clip.evaluation.statistics import retrieval_hits


ALL, MEAN, GALLERY = "all pairs", "mean of the sources", "all in one gallery"
# What is kept of each source, and of all pairs in one gallery; of the main scope everything is.
OF_EACH_SOURCE = (
    "recall@10", "chance_recall@10", "text_to_image_recall@1", "image_to_text_recall@1", "debiased_modality_gap",
    "true_pair_cosine", "random_pair_cosine", "margin", "v_measure", "knn_accuracy_image_to_text",
    "knn_accuracy_text_to_image", "zero_shot_balanced_accuracy", "other_kind_share@10", "mixed_label_precision@10",
    "num_pairs",
)  # fmt: skip
DIGITS = 6  # that are kept of every number
OF_GROUPS = ("v_measure", "nmi", "ari", "knn_", "linear_probe_", "majority_accuracy_", "chance_balanced_accuracy")


def mapped(trained: Trained, method: Method) -> Trained:
    """The same training with a post-hoc method, which is fitted on the training pairs' embeddings."""
    if method.post_hoc is None or trained.train is None:
        raise ValueError("A post-hoc method needs embedded training pairs.")
    maps = fit_pairs(method.post_hoc, trained.train)
    templates, classes, dim = trained.prompts.shape
    prompts = maps.text(trained.prompts.reshape(-1, dim)).reshape(templates, classes, dim)
    return Trained(maps.apply(trained.test), None, prompts, trained.logit_scale, [])


def measure(trained: Trained, classes: list[str]) -> dict[str, Any]:
    """
    Every task's metrics by scope, and the hits of each query by source.

    Args:
        classes: the labels that `trained.prompts` belong to.

    Returns:
        `metrics`, {scope: {name: value}}, whose first scope is the main one; `hits`, {source: {direction: 0s and 1s}}.
    """
    test = trained.test
    sources = test.by_source()
    if len(sources) < 2:
        metrics = {ALL: _tasks(test, trained, classes)}
        return {"metrics": rounded(metrics), "hits": {"": _hits(test)}}
    each = {name: _tasks(part, trained, classes) for name, part in sources.items()}
    gallery = _tasks(test, trained, classes)
    metrics = {MEAN: mean_of(each)}
    metrics |= {name: _some(found) for name, found in {**each, GALLERY: gallery}.items()}
    return {"metrics": rounded(metrics), "hits": {name: _hits(part) for name, part in sources.items()}}


def mean_of(each: dict[str, dict[str, float]]) -> dict[str, float]:
    """The plain mean over the sources, of every metric over those that have it (labels, above all)."""
    names = dict.fromkeys(name for found in each.values() for name in found if name != "num_pairs")
    means = {name: float(np.mean([found[name] for found in each.values() if name in found])) for name in names}
    return means | {"num_pairs": float(sum(found["num_pairs"] for found in each.values()))}


def rounded(metrics: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The numbers with as many digits as are kept; without those that are NaN, which JSON does not have."""
    return {
        scope: {name: round(float(value), DIGITS) for name, value in found.items() if np.isfinite(value)}
        for scope, found in metrics.items()
    }


def _some(found: dict[str, float]) -> dict[str, float]:
    return {name: found[name] for name in OF_EACH_SOURCE if name in found}


def _tasks(test: PairEmbeddings, trained: Trained, classes: list[str]) -> dict[str, float]:
    found = evaluate_embeddings(test, geometry=True)
    if len({label.strip() for label in test.labels} - {""}) < 2:  # nothing to group by, so there is no such task
        found = {name: value for name, value in found.items() if not name.startswith(OF_GROUPS)}
    return found | _zero_shot(test, trained, classes)


def _zero_shot(test: PairEmbeddings, trained: Trained, classes: list[str]) -> dict[str, float]:
    """Labels of the images by the prompts of those labels that the pairs have."""
    labelled = [row for row, label in enumerate(test.labels) if label]
    rows = sorted({test.image_ids[row]: row for row in reversed(labelled)}.values())  # the first one of each image
    present = sorted({test.labels[row] for row in rows})
    if len(present) < 2:
        return {}
    prompts = trained.prompts[:, [classes.index(label) for label in present]]
    labels = [present.index(test.labels[row]) for row in rows]
    metric = load_metric("zero_shot_classification")
    given = {"image_embeds": test.image_embeds[rows], "labels": labels, "logit_scale": trained.logit_scale}
    single = metric.compute(class_embeds=prompts[0], **given)
    ensemble = metric.compute(class_embeds=prompts, **given)
    found = {name: value for name, value in single.items() if name.startswith(("zero_shot_", "chance_", "majority_"))}
    return found | {f"{name}_ensemble": value for name, value in ensemble.items() if name.startswith("zero_shot_")}


def _hits(test: PairEmbeddings) -> dict[str, list[int]]:
    hits = retrieval_hits(test.image_embeds, test.text_embeds, test.image_ids, test.caption_ids, k=10)
    return {name: getattr(hits, name).astype(int).tolist() for name in ("text_to_image", "image_to_text")}
