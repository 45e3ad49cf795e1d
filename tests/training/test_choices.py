"""The first run on pairs of one's own: two columns, and no split but the one."""

import csv
import json
import logging

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers.utils import logging as transformers_logging

from gap_closed_clip.training import load_config, train
from gap_closed_clip.training.choices import fitting_batch_size
from gap_closed_clip.training.preflight import preflight


CONFIG = """
model:
  vision: {architecture: eva02_tiny_patch14_224, model_args: {img_size: 28, embed_dim: 48, depth: 1, num_heads: 3}}
  text: {hidden_size: 48, num_hidden_layers: 1, num_attention_heads: 3, intermediate_size: 64, vocab_size: 300}
  projection_dim: 16
data:
  source: phantoms
training:
  num_train_epochs: 1
  per_device_train_batch_size: 64
  eval_strategy: epoch
  save_strategy: "no"
  final_split: test
  use_cpu: true
  disable_tqdm: true
  report_to: none
"""


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What is logged."""
    monkeypatch.setattr(transformers_logging.get_logger("gap_closed_clip"), "propagate", True)
    monkeypatch.setattr(transformers_logging.get_logger(), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.fixture
def my_pairs(tmp_path):
    """my_pairs(40, train=30, test=10) -> a folder with images and one table; without words, without `split`."""

    def make(number: int, **splits: int):
        folder = tmp_path / "my_pairs"
        (folder / "images").mkdir(parents=True)
        words = [word for word, count in splits.items() for _ in range(count)]
        random = np.random.default_rng(0)
        with open(folder / "pairs.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "caption", *(["split"] if splits else [])])
            for index in range(number):
                Image.fromarray(random.integers(0, 256, (32, 32), dtype=np.uint8)).save(folder / f"images/{index}.png")
                writer.writerow([f"images/{index}.png", f"caption number {index}", *words[index : index + 1]])
        return folder

    return make


@pytest.fixture
def configure(tmp_path):
    (tmp_path / "base.yaml").write_text(CONFIG)
    return lambda *words: load_config([tmp_path / "base.yaml"], [f"output_dir={tmp_path / 'run'}", *words])


def test_the_first_run_on_a_table_of_two_columns(configure, my_pairs, warnings, tmp_path):
    config = configure(f"data.source={my_pairs(40)}")
    result = train(config)
    assert result.num_train_pairs == 32 and result.metrics["num_pairs"] == 8
    assert "has no test split: the final evaluation is on its validation split" in warnings.text
    assert "has no validation split: a fifth of its training pairs is held out instead (data.folds=5)" in warnings.text
    assert "32 training pairs, fewer than a batch of 64: training.per_device_train_batch_size is 8" in warnings.text
    saved = yaml.safe_load((tmp_path / "run" / "train_config.yaml").read_text())
    assert saved["data"]["folds"] == 5  # so that `eval` and a second run meet the same pairs
    assert saved["training"]["final_split"] == "validation" and saved["training"]["per_device_train_batch_size"] == 8
    again = preflight(load_config([tmp_path / "run" / "train_config.yaml"], [f"output_dir={tmp_path / 'again'}"]))
    assert len(again.train_pairs) == 32
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["split"] == "validation"


def test_splits_that_are_there_are_used(configure, my_pairs, warnings):
    inputs = preflight(configure(f"data.source={my_pairs(40, train=20, val=12, test=8)}"))
    assert len(inputs.train_pairs) == 20 and len(inputs.eval_pairs) == 12 and len(inputs.final_pairs) == 8
    assert "held out" not in warnings.text and "no test split" not in warnings.text
    assert inputs.args.per_device_train_batch_size == 4


def test_a_validation_split_stands_for_a_test_split(configure, my_pairs, warnings):
    config = configure(f"data.source={my_pairs(40, train=20, validation=20)}")
    inputs = preflight(config)
    assert len(inputs.train_pairs) == 20 and len(inputs.final_pairs) == 20 and config.data.folds is None
    assert "no test split" in warnings.text and "no validation split" not in warnings.text


def test_a_test_split_is_no_validation_split(configure, my_pairs):
    config = configure(f"data.source={my_pairs(40, train=30, test=10)}", "per_device_train_batch_size=8")
    inputs = preflight(config)
    assert [len(pairs) for pairs in (inputs.train_pairs, inputs.eval_pairs, inputs.final_pairs)] == [24, 6, 10]
    no_evaluation = configure("data.source=" + config.data.source, "per_device_train_batch_size=8", "eval_strategy=no")
    assert len(preflight(no_evaluation).train_pairs) == 30 and no_evaluation.data.folds is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["final_split=test"], "has no split 'test'.*needed because of training.final_split=test"),
        (["per_device_train_batch_size=64"], "has 32 training pairs, fewer than one batch of 64 .* e.g. to 8"),
        (["contrastive_batch_size=64"], "fewer than one batch of 64 .* lower training.contrastive_batch_size"),
        (["data.validation_split=null"], r"data\.validation_split is null"),
    ],
)
def test_what_was_asked_for_is_not_changed(configure, my_pairs, words, message):
    with pytest.raises(ValueError, match=message):
        preflight(configure(f"data.source={my_pairs(40)}", *words))


def test_what_is_inherited(configure, tmp_path):
    every = {"num_train_epochs", "per_device_train_batch_size", "eval_strategy", "save_strategy", "final_split"}
    every |= {"use_cpu", "disable_tqdm", "report_to"}
    assert configure().inherited == frozenset()
    assert configure("data.source=a.csv").inherited == every
    assert configure("data.source=a.csv", "final_split=test").inherited == every - {"final_split"}
    (tmp_path / "own.yaml").write_text("data: {source: a.csv}\ntraining: {final_split: test}")
    files = [tmp_path / "base.yaml", tmp_path / "own.yaml"]
    assert load_config(files, ["use_cpu=false"]).inherited == every - {"final_split", "use_cpu"}
    assert load_config(files[1:]).inherited == load_config(files[1:], ["seed=3"]).inherited == frozenset()


@pytest.mark.parametrize(
    ("num_pairs", "num_devices", "expected"),
    [
        (32, 1, 8),
        (1000, 1, 128),
        (1024, 1, 256),
        (7, 1, 2),
        (8, 1, 2),
        (3, 1, 2),
        (2, 1, 2),
        (1, 1, 1),
        (0, 1, 0),
        (64, 4, 4),
    ],
)
def test_a_batch_that_fits(num_pairs, num_devices, expected):
    assert fitting_batch_size(num_pairs, num_devices) == expected
