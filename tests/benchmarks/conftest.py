"""The scripts under benchmarks/, which import one another by name, and a tiny plan of `evidence.py`."""

import sys
from pathlib import Path

import pytest
import yaml


sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

TINY = {
    "model": {
        "vision": {
            "architecture": "eva02_tiny_patch14_224",
            "model_args": {"img_size": 28, "embed_dim": 48, "depth": 1, "num_heads": 3},
        },
        "text": {
            "hidden_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "intermediate_size": 64,
            "vocab_size": 300,
            "max_position_embeddings": 96,
        },
        "projection_dim": 16,
        "center_projections": True,
        "freeze_vision": True,
        "freeze_text": True,
    },
    "data": {
        "phantom_train_pairs": 24,
        "phantom_validation_pairs": 10,
        "phantom_test_pairs": 12,
        "phantom_size": 32,
        "feature_views": 1,
    },
    "training": {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-3,
        "final_split": "test",
        "use_cpu": True,
    },
}
PLAN = {
    "title": "Tiny",
    "methods": ["CLIP (LT)", "ours", "CLIP, centered after"],
    "seeds": [0],
    "shared": {"max_steps": 2},
    "grid": {"max_steps": [1, 2]},
    "num_folds": 2,
    "folds": 1,
    "weight_map": {"align_weight": [3], "uniformity_weight": [1]},
    "robustness": {"methods": ["ours"], "num_train_epochs": [1]},
}


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    data = {**TINY["data"], "feature_cache": str(folder / "features")}
    (folder / "small.yaml").write_text(yaml.safe_dump({**TINY, "data": data}))
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**PLAN, "config": [str(folder / "small.yaml")]}))
    return folder / "tiny.yaml"
