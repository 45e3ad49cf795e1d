"""The metrics put together, inside the Trainer too, and post-hoc centering."""

import dataclasses

import numpy as np
import pytest
from datasets import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments

from gap_closed_clip.data import PairCollator, group_ids
from gap_closed_clip.evaluation import (
    build_compute_metrics,
    embed_pairs,
    evaluate_embeddings,
    evaluate_model,
    load_metric,
    metrics_table,
)

from .conftest import synthetic


WAYS = ("image_to_text", "text_to_image")
OF_LABELS = ("v_", "nmi", "ari", "knn_", "linear_", "majority_", "chance_balanced_", "mixed_", "chance_mixed_",
             "other_kind_label_")  # fmt: skip
KEYS = {
    "modality_gap",
    "debiased_modality_gap",
    "true_pair_cosine",
    "random_pair_cosine",
    "margin",
    "mean_cosine_image",
    "mean_cosine_text",
    *(f"{way}recall@{k}" for way in ("text_to_image_", "image_to_text_", "") for k in (1, 5, 10)),
    *(f"{way}chance_recall@{k}" for way in ("text_to_image_", "image_to_text_", "") for k in (1, 5, 10)),
    "text_to_image_median_rank",
    "image_to_text_median_rank",
    "v_measure",
    "nmi",
    "ari",
    *(f"{what}_accuracy_{way}" for what in ("knn", "linear_probe", "majority") for way in WAYS),
    *(f"{what}_balanced_accuracy_{way}" for what in ("knn", "linear_probe") for way in WAYS),
    "chance_balanced_accuracy",
    "other_kind_share@10",
    "chance_other_kind_share@10",
    "mixed_label_precision@10",
    "chance_mixed_label_precision@10",
    "other_kind_label_precision@10",
    "num_pairs",
}


def test_all_metrics_flat():
    embeddings = synthetic()
    result = evaluate_embeddings(embeddings)
    assert set(result) == KEYS
    assert all(type(value) is float for value in result.values())
    assert result["num_pairs"] == 120
    vectors = {"image_embeds": embeddings.image_embeds, "text_embeds": embeddings.text_embeds}
    assert result["margin"] == load_metric("modality_gap").compute(**vectors)["margin"]


def test_geometry_is_added_where_it_is_asked_for():
    embeddings = synthetic()
    plain, result = (evaluate_embeddings(embeddings, grouping=False, geometry=geometry) for geometry in (False, True))
    vectors = {"image_embeds": embeddings.image_embeds, "text_embeds": embeddings.text_embeds}
    ids = {"image_ids": embeddings.image_ids, "caption_ids": embeddings.caption_ids}
    assert result == plain | load_metric("space_geometry").compute(**vectors, **ids)
    told, told_of_plain = (metrics_table({"model": found}).splitlines() for found in (result, plain))
    assert len(told) == len(told_of_plain) + 7


def test_without_labels_nothing_is_said_of_them():
    embeddings = dataclasses.replace(synthetic(), labels=[""] * 120)
    assert set(evaluate_embeddings(embeddings)) == {name for name in KEYS if not name.startswith(OF_LABELS)}


def test_one_caption_in_two_spellings_is_one():
    """Both images are correct for it, and it for both: were it two, each would tie with the other's."""
    embeddings = synthetic(n=3)
    embeddings.captions[:] = ["CT of the chest", "ct of  the Chest", "MR"]
    embeddings.image_embeds[:] = embeddings.text_embeds[:] = np.eye(24)[[0, 0, 1]]
    result = evaluate_embeddings(embeddings)
    assert result["text_to_image_recall@1"] == result["image_to_text_recall@1"] == 1
    embeddings.captions[1] = "CT of the abdomen"
    assert evaluate_embeddings(embeddings)["text_to_image_recall@1"] == pytest.approx(1 / 3)


def test_model_in_one_call(tiny_model, tiny_processor, pairs):
    evaluation = evaluate_model(tiny_model, tiny_processor, pairs, batch_size=4)
    metrics, embeddings = evaluation.metrics, evaluation.embeddings
    assert metrics == evaluate_embeddings(embed_pairs(tiny_model, tiny_processor, pairs, batch_size=4))
    assert embeddings.image_ids == pairs["image_id"][:]


def test_plain_trainer_computes_the_same(tiny_model, tiny_processor, pairs, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=3, remove_unused_columns=False, report_to="none", use_cpu=True
    )
    trainer = Trainer(
        tiny_model,
        arguments,
        data_collator=PairCollator(tiny_processor),
        eval_dataset=pairs,
        compute_metrics=build_compute_metrics(pairs),
    )
    found = trainer.evaluate()
    expected = evaluate_model(tiny_model, tiny_processor, pairs).metrics
    assert "eval_loss" in found
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(value, abs=1e-5, nan_ok=True), name


def prediction(pairs, order, with_ids=True) -> EvalPrediction:
    embeds = np.random.default_rng(0).normal(size=(2, len(order), 4)).astype(np.float32)
    ids = np.array([group_ids(row["image_id"], row["caption"]) for row in pairs.select(order)])
    return EvalPrediction(predictions=(*embeds, ids) if with_ids else tuple(embeds), label_ids=None)


def test_predictions_out_of_order_are_noticed(pairs):
    compute_metrics = build_compute_metrics(pairs)
    compute_metrics(prediction(pairs, range(8)))
    for order in ([1, 0, *range(2, 8)], [*range(6), 7, 6]):
        with pytest.raises(ValueError, match="not in the order of the pairs .image_id"):
            compute_metrics(prediction(pairs, order))
    with pytest.raises(ValueError, match="not in the order of the pairs .caption"):
        compute_metrics(prediction(pairs, [3, 1, 2, 0, *range(4, 8)]))  # rows 0 and 3 show one image


def test_predictions_of_another_set_are_noticed(pairs):
    with pytest.raises(ValueError, match="8 pairs but got 7 predictions"):
        build_compute_metrics(pairs)(prediction(pairs, range(7), with_ids=False))


def test_compute_metrics_of_a_stream(pairs):
    found = build_compute_metrics(pairs.to_iterable_dataset())(prediction(pairs, range(8)))
    assert found == pytest.approx(build_compute_metrics(pairs)(prediction(pairs, range(8))), nan_ok=True)


def test_compute_metrics_of_pairs_with_a_transform(pairs):
    transformed = pairs.with_transform(lambda rows: {"pixels": rows["image"], "text": rows["caption"]})
    found = build_compute_metrics(transformed)(prediction(pairs, range(8)))
    assert found == pytest.approx(build_compute_metrics(pairs)(prediction(pairs, range(8))), nan_ok=True)


def test_another_order_of_pairs_that_share_nothing_is_noticed():
    """Their ids can be told from one another in any order; their labels would be those of other pairs."""
    rows = [{"image_id": f"i {k}", "caption": f"c {k}", "label": f"kind {k % 3}"} for k in range(9)]
    pairs = Dataset.from_list(rows)
    compute_metrics = build_compute_metrics(pairs)
    compute_metrics(prediction(pairs, range(9)))
    for order in (range(8, -1, -1), [1, 0, *range(2, 9)]):
        with pytest.raises(ValueError, match="not in the order of the pairs .image_id"):
            compute_metrics(prediction(pairs, order))


def test_group_ids_of_ones_own_are_compared_with_one_another(pairs):
    compute_metrics = build_compute_metrics(pairs)
    (image, text, ids), numbers = prediction(pairs, range(8)).predictions, np.zeros((8, 2), np.int64)
    for column in range(2):
        numbers[:, column] = np.unique(ids[:, column], return_inverse=True)[1]
    compute_metrics(EvalPrediction(predictions=(image, text, numbers), label_ids=None))
    with pytest.raises(ValueError, match="not in the order of the pairs .image_id"):
        compute_metrics(EvalPrediction(predictions=(image, text, numbers[[1, 0, *range(2, 8)]]), label_ids=None))
