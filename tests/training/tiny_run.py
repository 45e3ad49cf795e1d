"""A tiny run on phantoms, finished once for all tests, and the same interrupted."""

import shutil
from pathlib import Path

import pytest

from gap_closed_clip.training import load_config, train


TINY = """
model:
  vision:
    architecture: eva02_tiny_patch14_224
    model_args: {img_size: 28, embed_dim: 48, depth: 1, num_heads: 3}
  text: {hidden_size: 48, num_hidden_layers: 1, num_attention_heads: 3, intermediate_size: 64, vocab_size: 300, max_position_embeddings: 96}
  projection_dim: 16
  align_weight: [[0.2, 1.0], [0.8, 3.0]]
  uniformity_weight: 0.0
  center_projections: true
data:
  phantom_train_pairs: 24
  phantom_validation_pairs: 10
  phantom_test_pairs: 12
  phantom_size: 32
training:
  max_steps: 6
  per_device_train_batch_size: 8
  per_device_eval_batch_size: 8
  learning_rate: 1e-3
  logging_steps: 1
  save_steps: 2
  eval_strategy: steps
  eval_steps: 3
  final_split: test
  use_cpu: true
  disable_tqdm: true
  report_to: none
"""  # noqa: E501
# What matters when only the beginning of a run is looked at.
NO_MORE = ["max_steps=1", "eval_strategy=no", "final_split=none", "save_strategy=no"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def configure(tiny, tmp_path):
    """configure("seed=3", ...) -> the tiny run, into a new folder `run`."""
    return lambda *words: load_config([tiny], [f"output_dir={tmp_path / 'run'}", *words])


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """Folder, configuration and result of a run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = load_config([tiny], [f"output_dir={folder}", "report_to=tensorboard"])
    return folder, config, train(config)


@pytest.fixture
def interrupted(finished, tmp_path) -> Path:
    """The run as if it had been killed while it wrote its second checkpoint."""
    folder = tmp_path / "run"
    shutil.copytree(finished[0] / "checkpoint-2", folder / "checkpoint-2")
    shutil.copytree(finished[0] / "checkpoint-4", folder / "checkpoint-4")
    state = folder / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    return folder
