"""The output folder and its lock, and going on from a checkpoint."""

import json
import os
import shutil
import signal
import socket
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import PythonProcess
from safetensors.torch import load_file
from tiny_run import NO_MORE, configure, finished, interrupted, tiny  # noqa: F401

from gap_closed_clip.model.record_processing_gap_closed_clip import RecordProcessor
from gap_closed_clip.training import last_complete_checkpoint, run_lock, train
from gap_closed_clip.training.run_lock import LOCK_FILE, RunLock


# --- the output folder


def test_another_run_is_not_written_over(finished, configure, interrupted):
    for folder in (finished[0], interrupted):
        with pytest.raises(ValueError, match=f"training.output_dir {folder} holds another run.*overwrite_output_dir"):
            train(configure(f"output_dir={folder}", "source=nowhere"))  # seen before the data are


def test_a_folder_with_other_things_is_kept(configure, tmp_path):
    (tmp_path / "run" / "checkpoint-notes").mkdir(parents=True)
    (tmp_path / "run" / "notes.txt").touch()
    train(configure(*NO_MORE, "overwrite_output_dir=true"))
    assert {"notes.txt", "checkpoint-notes", "model.safetensors"} <= {p.name for p in (tmp_path / "run").iterdir()}


def test_overwriting_deletes_the_other_run_but_not_before_the_new_one_can_start(configure, interrupted):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(configure("overwrite_output_dir=true", "source=nowhere"))
    with pytest.raises(ValueError, match="max_caption_tokens"):
        train(configure("overwrite_output_dir=true", "max_caption_tokens=1000"))
    assert (interrupted / "checkpoint-2" / "model.safetensors").exists()
    train(configure(*NO_MORE, "overwrite_output_dir=true"))
    assert (interrupted / "model.safetensors").exists() and not list(interrupted.glob("checkpoint-*"))


# --- resuming


def test_resuming_takes_the_last_complete_checkpoint_and_ends_where_the_unbroken_run_did(
    finished, interrupted, configure, caplog
):
    (interrupted / "checkpoint-best").mkdir()  # not the Trainer's
    result = train(configure("resume_from_checkpoint=true"))
    assert f"{interrupted}/checkpoint-4 is passed over: trainer_state.json is damaged." in caplog.text
    history = json.loads((interrupted / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    expected, weights = (load_file(folder / "model.safetensors") for folder in (finished[0], interrupted))
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
    assert result.metrics == pytest.approx(finished[2].metrics, nan_ok=True)


def test_resuming_from_a_named_checkpoint(finished, interrupted, configure):
    train(configure(f"resume_from_checkpoint={interrupted / 'checkpoint-2'}"))
    expected, weights = (load_file(folder / "model.safetensors") for folder in (finished[0], interrupted))
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


def test_nothing_to_resume_from(interrupted, configure, tmp_path, finished):
    shutil.rmtree(interrupted / "checkpoint-2")
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: {interrupted} holds no complete checkpoint"):
        train(configure("resume_from_checkpoint=true"))
    for name in ("checkpoint-4", "checkpoint-9"):
        with pytest.raises(ValueError, match=f"{name} is no complete checkpoint: "):
            train(configure(f"resume_from_checkpoint={interrupted / name}"))
    with pytest.raises(ValueError, match="holds another run"):  # whose run is not the checkpoint's
        train(configure(f"resume_from_checkpoint={finished[0] / 'checkpoint-2'}"))


# --- resume_from_checkpoint=auto, damaged checkpoints, other settings


def test_auto_needs_checkpoints_to_go_on_from(configure):
    """It would begin anew after each interruption."""
    with pytest.raises(ValueError, match="save_only_model is true, .*resume_from_checkpoint is auto"):
        train(configure("resume_from_checkpoint=auto", "save_only_model=true"))


def test_auto_goes_on_where_it_can_and_starts_anew_where_it_cannot(finished, interrupted, configure):
    train(configure("resume_from_checkpoint=auto"))
    history = json.loads((interrupted / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    expected, weights = (load_file(folder / "model.safetensors") for folder in (finished[0], interrupted))
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
    for folder in interrupted.glob("checkpoint-*"):
        shutil.rmtree(folder)
    train(configure("resume_from_checkpoint=auto"))  # the same run, finished, without checkpoints: once more
    again = load_file(interrupted / "model.safetensors")
    assert all(torch.equal(expected[name], again[name]) for name in expected)
    for folder in interrupted.glob("checkpoint-*"):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="holds another run"):  # which is not to be written over
        train(configure("resume_from_checkpoint=auto", "learning_rate=0.5"))


def test_a_run_killed_after_its_last_step_takes_no_more_steps(configure, tmp_path):
    """In the middle of an epoch of three steps."""
    words = ["max_steps=2", "save_steps=2", "eval_strategy=no", "final_split=none", "resume_from_checkpoint=auto"]
    train(configure(*words))
    expected = load_file(tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "model.safetensors").unlink()
    train(configure(*words))
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(expected[name], weights[name]) for name in expected)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_best_checkpoint_of_a_run_that_was_moved(configure, tmp_path, caplog):
    """Killed after its last step. Its folder is elsewhere than the checkpoints note; and then the best one is gone."""
    best = ["load_best_model_at_end=true", "metric_for_best_model=loss", "eval_grouping=false", "final_split=none"]
    words = ["max_steps=2", "save_steps=1", "eval_steps=1", *best, "learning_rate=0.05"]
    train(configure(*words))
    folder = tmp_path / "run"
    state = folder / "checkpoint-2" / "trainer_state.json"
    noted = {"best_global_step": 1, "best_model_checkpoint": "/gone/run/checkpoint-1"}
    state.write_text(json.dumps(json.loads(state.read_text()) | noted))

    def resumed_from(step: int) -> bool:
        """Whether a resumed run ends in the weights of a checkpoint, but for the centers."""
        expected = load_file(folder / f"checkpoint-{step}" / "model.safetensors")
        result = train(configure(*words, "resume_from_checkpoint=auto"))
        found = load_file(folder / "model.safetensors")
        kept = step if step == 1 else None
        assert result.kept_step == kept and json.loads((folder / "run.json").read_text()).get("kept_step") == kept
        return all(torch.equal(found[name], value) for name, value in expected.items() if "centering" not in name)

    assert resumed_from(1)
    shutil.rmtree(folder / "checkpoint-1")
    assert resumed_from(2)
    assert "after step 1, of which there is no checkpoint: the weights are those after the last" in caplog.text


def test_auto_with_nothing_but_half_a_checkpoint(interrupted, configure):
    shutil.rmtree(interrupted / "checkpoint-2")
    train(configure("resume_from_checkpoint=auto", "max_steps=2"))
    assert (interrupted / "checkpoint-2" / "trainer_state.json").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path, configure, caplog, name):
    folder = tmp_path / "run"
    for number in (2, 4):
        shutil.copytree(finished[0] / f"checkpoint-{number}", folder / f"checkpoint-{number}")
    path = folder / "checkpoint-4" / name
    content = bytearray(path.read_bytes())
    if name == "model.safetensors":
        del content[-100:]  # cut short
    else:
        with zipfile.ZipFile(path) as archive:
            start = max(archive.infolist(), key=lambda part: part.file_size).header_offset
        name_length, extra_length = struct.unpack("<HH", content[start + 26 : start + 30])
        content[start + 30 + name_length + extra_length] ^= 255  # as long as before
    path.write_bytes(content)
    assert last_complete_checkpoint(folder) == folder / "checkpoint-2"
    train(configure("resume_from_checkpoint=true"))
    assert f"checkpoint-4 is passed over: {name} is damaged." in caplog.text
    expected, weights = (load_file(each / "model.safetensors") for each in (finished[0], folder))
    assert all(torch.equal(expected[key], weights[key]) for key in expected)


@pytest.mark.parametrize("name", ["config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_that_lacks_a_file_is_not_complete(finished, tmp_path, name):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(finished[0] / "checkpoint-2", checkpoint)
    assert last_complete_checkpoint(tmp_path) == checkpoint
    (checkpoint / name).unlink()
    assert last_complete_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["seed=7"], "training.seed was 42 and is 7"),
        (["per_device_train_batch_size=4"], r"pairs in a step \(per_device_train_batch_size\) was 8 and is 4"),
        (["phantom_train_pairs=23"], "training pairs was 24 and is 23"),
        (["phantom_seed=5"], "data.phantom_seed was 0 and is 5"),
        (["projection_dim=8"], "model.projection_dim was 16 and is 8"),
        (["learning_rate=2e-3"], "training.learning_rate was 0.001 and is 0.002"),
        (["weight_decay=0.5"], "training.weight_decay was 0.0 and is 0.5"),
        (["adam_beta1=0.5", "optim=sgd"], "adam_beta1 was 0.9 and is 0.5; training.optim was 'adamw_.*' and is 'sgd'"),
        (["lr_scheduler_type=cosine"], "training.lr_scheduler_type was 'linear' and is 'cosine'"),
        (["max_grad_norm=0.1", "warmup_steps=3"], "training.warmup_steps was .*; training.max_grad_norm was 1.0 and"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(interrupted, configure, words, difference):
    for resume in ("true", "auto", str(interrupted / "checkpoint-2")):
        with pytest.raises(ValueError, match=f"is of a run with other settings: .*{difference}"):
            train(configure(f"resume_from_checkpoint={resume}", *words))


def test_a_longer_run_goes_on_and_says_that_its_schedule_is_another(interrupted, configure, caplog):
    train(configure("resume_from_checkpoint=true", "max_steps=7", "num_train_epochs=9"))
    assert (interrupted / "checkpoint-7").is_dir()
    assert "training.max_steps was 6 and is 7: from here on the learning rate" in caplog.text
    assert "num_train_epochs" not in caplog.text  # with max_steps it says nothing


def test_other_pairs_of_the_same_number_are_noticed(tmp_path, configure):
    """With a text tower whose vocabulary is made of the captions, it ended in a mismatch of weights."""
    colours = ["red", "green", "blue", "gray", "white", "black", "pink", "brown"]
    for name in colours:
        Image.new("RGB", (32, 32), name).save(tmp_path / f"{name}.png")
    table = tmp_path / "pairs.csv"

    def write(words: str) -> None:
        rows = [f"{name}.png,{name} {words}" for name in colours]
        table.write_text("\n".join(["image,caption", *rows]) + "\n")

    write("is a colour")
    more = [f"source={table}", "eval_strategy=no", "final_split=none", "per_device_train_batch_size=4", "save_steps=1"]
    train(configure(*more, "max_steps=1"))
    write("of quite another and longer vocabulary")
    with pytest.raises(ValueError, match="other settings: the training pairs have changed [^;]*[.] Going on"):
        train(configure(*more, "max_steps=1", "resume_from_checkpoint=true"))
    note = tmp_path / "run" / "checkpoint-1" / "run_settings.json"
    older = json.loads(note.read_text())
    write("is a colour")
    for name in [*older]:
        if name == "digest of the training pairs" or name.startswith("training.adam"):
            del older[name]
    note.write_text(json.dumps(older))  # as versions before wrote it
    train(configure(*more, "max_steps=1", "resume_from_checkpoint=true", "adam_beta1=0.8"))


def test_other_records_of_the_same_pairs_are_noticed(tmp_path, configure):
    """With as many words of each record the weights fitted, and each word had the token of another."""
    for number in range(8):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    table = tmp_path / "pairs.csv"

    def write(sexes: str) -> list[str]:
        rows = [f"{number}.png,caption {number},{sex}" for number, sex in enumerate(sexes)]
        table.write_text("\n".join(["image,caption,sex", *rows]) + "\n")
        return RecordProcessor.fit([{"sex": sex} for sex in sexes], ["sex"]).fields[0]["categories"]

    before = write("fffffmmm")
    more = [f"source={table}", "data.modalities={record: [sex]}", "eval_strategy=no", "final_split=none"]
    more += ["per_device_train_batch_size=4", "save_steps=1"]
    train(configure(*more, "max_steps=1"))
    assert write("fffmmmmm") == before[::-1]
    again = configure(*more, "max_steps=2", "resume_from_checkpoint=true")
    with pytest.raises(ValueError, match="other settings: the records of the training pairs have changed[.] Going on"):
        train(again)
    assert write("fffffmmm") == before
    note = tmp_path / "run" / "checkpoint-1" / "run_settings.json"
    older = json.loads(note.read_text())
    del older["digest of the records"]
    note.write_text(json.dumps(older))  # as versions before wrote it
    train(again)


# --- one run, one folder


def test_overwriting_leaves_what_no_run_wrote(finished, configure, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    own = {"precious.txt", "notes.md", "my-model.safetensors", "examples/normal_chest.png", "checkpoint-best/weights"}
    for name in own:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    train(configure(*NO_MORE, "overwrite_output_dir=true"))
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert own <= left and all((folder / name).read_text() == "mine" for name in own)
    assert not {name for name in left if name.startswith(("checkpoint-2", "runs", "metrics", "cosines"))}
    assert not (folder / LOCK_FILE).exists()


HOLD = """
import sys, time
from gap_closed_clip.training.run_lock import RunLock
with RunLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_told_who_holds_the_folder(configure, tmp_path):
    """Another process, killed the hard way in the end."""
    folder = tmp_path / "run"
    other = PythonProcess(["-c", HOLD, str(folder)], os.environ)
    try:
        while other.is_running and other.printed() != "held\n":
            time.sleep(0.1)
        who = rf"in use by another run \(user \S+, process {other.pid} on {socket.gethostname()}\)"
        for words in ([], ["overwrite_output_dir=true"], ["resume_from_checkpoint=auto"]):
            with pytest.raises(ValueError, match=who):
                train(configure(*NO_MORE, *words))
    finally:
        other.kill()
    assert other.wait().returncode == -signal.SIGKILL
    assert (folder / LOCK_FILE).exists()
    train(configure(*NO_MORE))
    assert sorted(path.name for path in folder.glob(f"{LOCK_FILE}*")) == []


def test_of_several_that_find_a_stale_lock_one_goes_on(tmp_path):
    (tmp_path / LOCK_FILE).write_text(json.dumps({"host": socket.gethostname(), "process": 2**30, "began": "1"}))
    script = HOLD.replace("time.sleep(60)", "time.sleep(3)")
    runs = [PythonProcess(["-c", script, str(tmp_path)], os.environ) for _ in range(2)]
    ended = [run.wait() for run in runs]
    assert sum(run.stdout == "held\n" for run in ended) >= 1
    assert all(run.stdout or "in use by another run" in run.stderr for run in ended)
    assert not list(tmp_path.glob(f"{LOCK_FILE}*"))


@pytest.mark.parametrize("content", [{"host": "another", "process": 1, "user": "someone"}, {}])
def test_a_lock_of_another_machine_holds_as_long_as_it_is_touched(tmp_path, content):
    lock = tmp_path / LOCK_FILE
    lock.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"delete {lock}"), RunLock(tmp_path):
        pass
    long_ago = time.time() - run_lock.STALE_SECONDS - 5
    os.utime(lock, (long_ago, long_ago))
    with RunLock(tmp_path):
        assert json.loads(lock.read_text())["process"] == os.getpid()
    assert not lock.exists()


def test_a_process_of_the_same_number_is_not_the_same(tmp_path):
    content = {"host": socket.gethostname(), "process": os.getpid(), "began": "another time"}
    (tmp_path / LOCK_FILE).write_text(json.dumps(content))
    with RunLock(tmp_path):
        pass


def test_a_run_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    with RunLock(tmp_path):
        lock = tmp_path / LOCK_FILE
        os.utime(lock, (1, 1))
        for _ in range(100):
            if lock.stat().st_mtime > 1:
                break
            time.sleep(0.05)
        assert lock.stat().st_mtime > 1


def test_a_run_that_cannot_start_leaves_no_folder(configure, tmp_path):
    with pytest.raises(FileNotFoundError):
        train(configure("source=nowhere"))
    assert not Path(tmp_path / "run").exists()
