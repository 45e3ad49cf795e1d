"""Two processes whose samples lack different modalities train as one process does."""

import json
import sys
from pathlib import Path

import pytest
import torch
from modality_runs import RUN, write_table
from processes import run_in_processes
from safetensors.torch import load_file

from gap_closed_clip.training import load_config, train


# Without dropout, whose masks would differ between the processes; SGD, because Adam would scale rounding up to a step.
EXACT = [
    *("optim=sgd", "learning_rate=0.01", "max_steps=3", "save_strategy=steps", "save_steps=3", "eval_strategy=no"),
    *("data.augment=false", "dataloader_pin_memory=false", "model.text.hidden_dropout_prob=0.0"),
    *("model.text.attention_probs_dropout_prob=0.0", "model.modalities.record.tower.hidden_dropout_prob=0.0"),
    *("data.modalities={record: [age, sex], audio: spectrogram}", "per_device_train_batch_size=8"),
    "model.modalities.audio.tower={model_type: audio-spectrogram-transformer, hidden_size: 16, num_hidden_layers: "
    "1, num_attention_heads: 2, intermediate_size: 16, patch_size: 8, max_length: 24, num_mel_bins: 16, "
    "frequency_stride: 8, time_stride: 8, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}",
]
# In two processes: the same batches of 8, whole and in micro-batches.
SHARED = {
    "whole": ["per_device_train_batch_size=4"],
    "micro-batches": ["per_device_train_batch_size=2", "contrastive_batch_size=8"],
}


def run(folder: Path, name: str, *words: str) -> None:
    """Trains into the folder `name`; the table lies beside it."""
    source = f"data.source={folder / 'table' / 'samples.parquet'}"
    train(load_config([folder / "run.yaml"], [*EXACT, source, f"output_dir={folder / name}", *words]))


def result_of(folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of all steps, and the weights."""
    history = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folders of one process, `alone`, and of two."""
    folder = tmp_path_factory.mktemp("modalities")
    write_table(folder / "table")
    (folder / "run.yaml").write_text(RUN)
    run(folder, "alone")
    run_in_processes(__file__, folder, 2)
    return folder


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_with_other_samples_missing_train_as_one(folder, name):
    losses, weights = result_of(folder / name)
    expected_losses, expected = result_of(folder / "alone")
    assert losses == pytest.approx(expected_losses, rel=1e-4) and len(set(losses)) == 3
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-4, atol=1e-4)
    configs = [json.loads((folder / run / "config.json").read_text()) for run in (name, "alone")]
    assert configs[0]["fusion_weights"] == pytest.approx(configs[1]["fusion_weights"], abs=1e-2)


if __name__ == "__main__":
    for name, words in SHARED.items():
        run(Path(sys.argv[1]), name, *words)
