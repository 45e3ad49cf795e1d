"""A small configuration, and the fixture that writes files of them."""

from pathlib import Path

import pytest


BASE = """
model:
  vision: {architecture: eva02_tiny_patch14_224, model_args: {img_size: 28}}
  text: {hidden_size: 48, num_attention_heads: 3}
  projection_dim: 64
  align_weight: 2.0
data:
  phantom_train_pairs: 100
training:
  learning_rate: 1e-3
  num_train_epochs: 3
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "base.yaml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write
