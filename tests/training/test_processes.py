"""Several processes: refused where they don't train together; NaN, a folder in use and a process that hangs."""

import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import run_in_processes
from safetensors.torch import load_file
from tiny_run import TINY

import gap_closed_clip_cli
from gap_closed_clip.data import PairCollator
from gap_closed_clip.training import load_config, train
from gap_closed_clip.training.processes import check_processes
from gap_closed_clip.training.run_lock import RunLock


STEP = 20  # whose batch is broken
LONG = ["max_steps=24", "save_steps=6", "eval_strategy=no", "final_split=none", "per_device_train_batch_size=4"]
LAUNCHERS = {
    "torchrun": {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
    "srun": {"WORLD_SIZE": "4", "RANK": "0"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "2"},
    "accelerate launch --cpu": {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_that_do_not_train_together_are_refused(monkeypatch, launcher):
    check_processes(1)
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="use_cpu=true"):
        check_processes(1)
    check_processes(2)


@pytest.mark.parametrize("command", ["eval", "center", "publish", "export-onnx"])
def test_what_one_process_does_is_not_started_in_several(monkeypatch, capsys, command):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert gap_closed_clip_cli.main(command, ["nowhere"]) == 1
    assert "this is process 3 of 4, and all would write the same files." in capsys.readouterr().err


# --- two processes


def with_nan(images):
    """Breaks the second image of the batch of the step, in the first process alone."""
    batches = []

    def collate(self, rows):
        batch = images(self, rows)
        batches.append(rows)
        if len(batches) == STEP and os.environ["RANK"] == "0":
            batch["pixel_values"][1, 1, 3, 5] = math.nan
        return batch

    return collate


def sleeping(images):
    """The second process sleeps over its third batch."""
    batches = []

    def collate(self, rows):
        batches.append(rows)
        if len(batches) == 3 and os.environ["RANK"] == "1":
            time.sleep(600)
        return images(self, rows)

    return collate


def outcome(folder: Path, name: str, *words: str) -> None:
    """Notes what becomes of a run, in the words of this process."""
    try:
        train(load_config([folder / "tiny.yaml"], [f"output_dir={folder / name}", *LONG, *words]))
    except (ValueError, OSError) as error:
        (folder / f"{name}-{os.environ['RANK']}.txt").write_text(str(error))


def run_rank(folder: Path) -> None:
    images = PairCollator.images
    if os.environ.get("HANG"):
        PairCollator.images = sleeping(images)
        outcome(folder, "hangs", "ddp_timeout=12")
        return
    outcome(folder, "held")
    for name, words in {"nan": [], "micro": ["contrastive_batch_size=8", "per_device_train_batch_size=2"]}.items():
        PairCollator.images = with_nan(images)
        outcome(folder, name, *words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes leave that meet a folder in use and NaN."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "tiny.yaml").write_text(TINY)
    with RunLock(folder / "held"):
        run_in_processes(__file__, folder, 2)
    return folder


def test_a_folder_in_use_ends_all_processes(folder):
    said = [(folder / f"held-{rank}.txt").read_text() for rank in range(2)]
    assert said[0] == said[1] and f"process {os.getpid()} on" in said[0] and "is in use by another run" in said[0]


@pytest.mark.parametrize(("name", "step", "kept"), [("nan", 20, [6, 12, 18]), ("micro", 10, [6])])
def test_nan_in_one_process_ends_both_at_the_same_step(folder, name, step, kept):
    said = [(folder / f"{name}-{rank}.txt").read_text() for rank in range(2)]
    assert said[0].startswith(
        f"Step {step}: the loss is nan. NaN or infinity came in with pixel_values of training pa"
    )
    assert "The inputs of process 1 are finite: if another one names a sample, that is it" in said[1]
    assert said[1].startswith(f"Step {step}: ") and "Training stops here, before the weights are changed" in said[1]
    left = sorted(path.name for path in (folder / name).iterdir())
    assert left == sorted(f"checkpoint-{number}" for number in kept)
    weights = load_file(folder / name / f"checkpoint-{kept[-1]}" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_process_that_hangs_ends_all_and_is_named(tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setenv("HANG", "1")
    began = time.monotonic()
    with pytest.raises(AssertionError) as failed:  # exit codes other than 0; the message is what was said
        run_in_processes(__file__, tmp_path, 2)
    said = str(failed.value)
    assert time.monotonic() - began < 200
    assert "Process 0 of 2 (from 0): Step 2 has not ended within 10.8 s (process 1 has not begun it)." in said
    assert "Process 1 of 2 (from 0): Another process waits in vain for this one" in said and "in collate" in said


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_rank(Path(sys.argv[1]))
