"""A full or locked disk: one line that names the folder, nothing half-written left, and the same command goes on."""

import errno
import resource
import shutil
from contextlib import contextmanager

import evaluate
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import configure, finished, tiny  # noqa: F401

import gap_closed_clip_cli
from gap_closed_clip import disk
from gap_closed_clip.commands import train as train_command
from gap_closed_clip.disk import DiskFull, is_disk_full, replacing, writing
from gap_closed_clip.evaluation import report
from gap_closed_clip.training import last_complete_checkpoint, train
from gap_closed_clip.training import run as training_run
from gap_closed_clip.training.checked_trainer import CheckedTrainer


@contextmanager
def files_of_at_most(number: int):
    """Lets the system refuse to write more than so many bytes into a file: what libraries say then is their own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def limited(function, number: int):
    def call(*args, **kwargs):
        with files_of_at_most(number):
            return function(*args, **kwargs)

    return call


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


WRITERS = {
    "safetensors": lambda path: save_file({"weight": torch.zeros(100_000)}, path),
    "torch.save": lambda path: torch.save({"weight": torch.zeros(100_000)}, path),
    "write_bytes": lambda path: path.write_bytes(bytes(400_000)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_each_library_says_of_a_full_disk(tmp_path, writer):
    with pytest.raises(DiskFull, match=f"Weights could not be written to {tmp_path}: .* free there. Make room there."):
        with writing(tmp_path, "Weights"), files_of_at_most(100_000):
            WRITERS[writer](tmp_path / "file")


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (RuntimeError("basic_ios::clear: iostream error"), True),  # torch.save on a full tmpfs
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("No space left on device"), False),  # what a caption may say
        (RuntimeError("PytorchStreamReader failed reading zip archive"), False),
    ],
)
def test_which_errors_are_those_of_a_full_disk(error, full):
    assert bool(is_disk_full(error)) is full
    caught = DiskFull if full else type(error)
    with pytest.raises(caught), writing(".", "It"):
        raise error


def test_a_disk_that_is_too_full_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 5_000_000)
    with writing(tmp_path / "run", "It", 5_000_000):
        pass
    with pytest.raises(
        DiskFull, match=r"It takes at least 7.0 GB, and 5.0 MB are free there. Make room there. Go on."
    ):
        with writing(tmp_path / "run", "It", 7_000_000_000, "Go on."):
            pytest.fail("It was begun.")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize(
    ("name", "locked"), [("cache/a/file", True), ("cache", True), ("", True), ("pairs.csv", False)]
)
def test_what_may_not_be_written_is_named_and_what_may_not_be_read_is_not_it(tmp_path, number, name, locked):
    """An error of something in the folder, or above it, where it could not be made; not of data that is read."""
    error = OSError(number, "not allowed", str(tmp_path / name))
    with pytest.raises(OSError, match="not allowed|could not be written") as caught:
        with writing(tmp_path / "cache" / "a", "It", None, "Or set HF_HOME."):
            raise error
    assert (caught.value is not error) == locked
    if locked:
        assert str(caught.value).startswith(f"It could not be written: {error.filename}: ")
        assert str(caught.value).endswith(". Make it writable. Or set HF_HOME.")


def test_a_cache_of_metrics_that_may_not_be_written_ends_a_run_before_it_trains(tmp_path, configure, monkeypatch):
    """`evaluate` locks a metric whenever it loads one, the evaluation after training too."""
    path = evaluate.config.HF_MODULES_CACHE

    def locked(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", f"{path}/evaluate_modules/metrics/modality_gap.lock")

    monkeypatch.setattr(evaluate, "load", locked)
    monkeypatch.setattr(CheckedTrainer, "train", lambda *args, **kwargs: pytest.fail("It trained."))
    with pytest.raises(
        OSError, match="modality_gap.lock: permission denied. Make it writable. Or set HF_HOME, or HF_"
    ):
        train(configure("output_dir=" + str(tmp_path / "run")))


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("before")
    with pytest.raises(OSError, match="No space"), replacing(path) as draft:
        draft.write_text("aft")
        no_space()
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as draft:
        draft.write_text("after")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("limit", [200_000, 600_000], ids=["weights", "optimizer"])
def test_a_checkpoint_that_does_not_fit(finished, configure, tmp_path, monkeypatch, limit):
    """The first is whole; the second breaks off where its weights, or the optimizer's state, are written."""
    broken = finished[0] / "checkpoint-4" / ("model.safetensors" if limit == 200_000 else "optimizer.pt")
    assert limit < broken.stat().st_size
    quick = ["final_split=none"]
    save = CheckedTrainer._save_checkpoint

    def full_at_the_second(self, *args):
        return (limited(save, limit) if self.state.global_step == 4 else save)(self, *args)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(CheckedTrainer, "_save_checkpoint", full_at_the_second)
        with pytest.raises(
            DiskFull, match=f"checkpoint-4 could not be written to {folder}: .*resume_from_checkpoint="
        ):
            train(configure(*quick))
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    assert last_complete_checkpoint(folder) == folder / "checkpoint-2"
    train(configure("resume_from_checkpoint=auto", *quick))
    expected, weights = (load_file(each / "model.safetensors") for each in (finished[0], folder))
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


def test_room_is_looked_for_before_a_checkpoint(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 800_000)  # less than weights and Adam's two moments
    with pytest.raises(
        DiskFull, match=r"checkpoint-2 .*: the disk is too full. It takes at least 1\.\d MB, and 0.8 MB"
    ):
        train(configure("eval_strategy=no"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("module", "name", "what"),
    [
        (training_run, "save_model_folder", "The trained model"),
        (report, "plot_projection", "Metrics and figures"),
        (train_command, "write_card", "The model card"),
    ],
)
def test_after_training(finished, configure, tmp_path, monkeypatch, capsys, module, name, what):
    """One line on the screen, exit code 1."""
    words = ["resume_from_checkpoint=auto"]
    configuration = configure(*words)
    folder = tmp_path / "run"
    shutil.copytree(finished[0] / "checkpoint-6", folder / "checkpoint-6")  # nothing is left to train
    monkeypatch.setattr(train_command, "parse", lambda words: configuration)
    monkeypatch.setattr(module, name, no_space)
    assert gap_closed_clip_cli.main("train", []) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"gap-closed-clip train: {what} could not be written to {folder}: the disk is full." in last
