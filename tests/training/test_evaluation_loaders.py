"""Which pairs our Trainer evaluates, and in which order: all of them, as the metrics expect them."""

import pytest
from conftest import CAPTIONS
from datasets import Dataset
from datasets import Image as ImageFeature
from trainers import make_trainer, png

from gap_closed_clip.evaluation import build_compute_metrics


def different_pairs(n: int = 18) -> Dataset:
    """n pairs none of which shares an image or a caption with another; their labels tell whether rows are mixed up."""
    rows = {
        "image_id": [f"image {i}" for i in range(n)],
        "caption": [f"{CAPTIONS[i % 6]} Case {i}." for i in range(n)],
        "label": [f"kind {i * i % 5}" for i in range(n)],
        "augment": [False] * n,
        "length": [1 + i * 7 % n for i in range(n)],
    }
    images = [{"bytes": png(i), "path": None} for i in range(n)]
    return Dataset.from_dict(rows).add_column("image", images, feature=ImageFeature(decode=False))


def evaluated(folder, pairs, metrics_of=None, **arguments) -> dict[str, float]:
    trainer = make_trainer("ours", folder, eval_dataset=pairs, per_device_eval_batch_size=4, **arguments)
    trainer.compute_metrics = build_compute_metrics(different_pairs() if metrics_of is None else metrics_of)
    times = ("runtime", "per_second", "preparation_time", "loss")  # the loss is a mean over batches of other pairs
    return {name: value for name, value in trainer.evaluate().items() if not name.endswith(times)}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return evaluated(tmp_path_factory.mktemp("expected"), different_pairs(), dataloader_num_workers=0)


def test_training_by_length_leaves_the_order_of_evaluations(tmp_path, expected):
    by_length = {"train_sampling_strategy": "group_by_length", "distinct_batches": False}
    assert evaluated(tmp_path, different_pairs(), **by_length) == pytest.approx(expected)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_is_evaluated_in_order(tmp_path, expected, workers):
    stream = different_pairs().to_iterable_dataset(num_shards=3)
    assert evaluated(tmp_path, stream, dataloader_num_workers=workers) == pytest.approx(expected)


def test_other_data_sets_are_evaluated_where_workers_live_on(tmp_path):
    """transformers keeps the loader of the first evaluation for all others."""
    kept = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make_trainer("ours", tmp_path, eval_dataset=different_pairs(), **kept)
    trainer.compute_metrics = lambda prediction: {"rows": len(prediction.predictions[0])}
    pairs = different_pairs()
    found = [trainer.evaluate(rows)["eval_rows"] for rows in (pairs.select(range(7)), None, pairs.select(range(5)))]
    assert found == [7, 18, 5]


@pytest.mark.parametrize("drop_last", [True, False])
def test_predictions_are_of_all_pairs(tmp_path, drop_last):
    trainer = make_trainer("ours", tmp_path, dataloader_drop_last=drop_last)
    assert len(trainer.predict(different_pairs()).predictions[0]) == 18  # in batches of 8
    assert trainer.args.dataloader_drop_last is drop_last
