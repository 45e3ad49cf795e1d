"""train() with frozen towers, which run once: the best epoch, early stopping, resuming, a second run."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_run import TINY

from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.data import PairCollator, load_pairs
from gap_closed_clip.training import GapClosedTrainingArguments, load_config, precompute, train


FROZEN = ["freeze_vision=true", "freeze_text=true", "projection_hidden_dim=24", "eval_grouping=false"]


@pytest.fixture
def configure(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)

    def configured(folder="run", *words):
        given = [f"output_dir={tmp_path / folder}", f"data.feature_cache={tmp_path / 'features'}", *FROZEN, *words]
        return load_config([tmp_path / "tiny.yaml"], given)

    return configured


def history_of(folder, step):
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return {entry["step"]: entry for entry in state["log_history"] if "eval_mean_recall@10" in entry}, state


def test_training_reads_no_image_and_leaves_a_whole_model(configure, tmp_path, monkeypatch):
    train(configure("first"))

    def refuse(*args, **kwargs):
        raise AssertionError("an image was decoded for the tower again")

    with monkeypatch.context() as patch:
        patch.setattr(precompute, "decode_image", refuse)  # a second run, of another objective and order
        patch.setattr(PairCollator, "images", refuse)
        train(configure("second", "align_weight=1.0", "data_seed=3", "final_split=none"))
    model, processor = load_checkpoint(tmp_path / "second")
    pairs = load_pairs(configure().data, "validation")
    outputs = model(**PairCollator(processor)([pairs[0], pairs[1]]))
    assert outputs.loss.isfinite() and outputs.image_embeds.shape == (2, 16)


def test_the_best_epoch_is_kept_and_training_stops_where_recall_does_not_rise(configure, tmp_path):
    best = ["save_strategy=best", "load_best_model_at_end=true", "metric_for_best_model=mean_recall@10"]
    words = [*best, "early_stopping_patience=2", "eval_steps=1", "max_steps=40", "learning_rate=0.0", "save_steps=1"]
    result = train(configure("run", *words, "final_split=validation"))
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")  # nothing is learned: the first evaluation is the best
    assert checkpoint.name == "checkpoint-1"
    entries, state = history_of(tmp_path / "run", 1)
    assert state["best_metric"] == pytest.approx(entries[1]["eval_mean_recall@10"])
    assert result.metrics["recall@10"] == pytest.approx(state["best_metric"], abs=0.11)  # pixels, not float16 features
    events = json.loads((checkpoint / "trainer_state.json").read_text())
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["num_steps"], facts["kept_step"]) == (3, 1)
    assert events["max_steps"] == 40 and not (tmp_path / "run" / "checkpoint-40").exists()


STOPPING = ["load_best_model_at_end=true", "metric_for_best_model=mean_recall@10", "eval_steps=1", "save_steps=1"]
STOPPING += ["max_steps=9", "learning_rate=0.0"]  # nothing is learned: the first evaluation is the best


@pytest.mark.parametrize(("step", "last"), [(2, 4), (3, 4), (4, 4)])
def test_a_resumed_run_stops_as_early_as_an_unbroken_one(configure, tmp_path, step, last):
    stopping = [*STOPPING, "early_stopping_patience=3", "final_split=none"]
    train(configure("whole", *stopping))
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["num_steps"] == 4
    (tmp_path / "parts").mkdir()
    for kept in (1, step):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{kept}", tmp_path / "parts" / f"checkpoint-{kept}")
    train(configure("parts", *stopping, "resume_from_checkpoint=true"))
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["num_steps"] == last


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_resumed_stream_stops_as_early_as_an_unbroken_one(configure, tmp_path, step):
    """Where a pass ends the Trainer evaluates again when it goes on, and counts that evaluation once."""
    words = [*STOPPING, "max_steps=20", "data.streaming=true", "eval_strategy=epoch", "save_strategy=epoch"]
    words += ["early_stopping_patience=2", "final_split=none"]
    train(configure("whole", *words))
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["num_steps"] == 9
    (tmp_path / "parts").mkdir()
    for kept in {3, step}:
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{kept}", tmp_path / "parts" / f"checkpoint-{kept}")
    train(configure("parts", *words, "resume_from_checkpoint=true"))
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["num_steps"] == 9


def test_a_run_may_be_told_to_stop_early_when_it_goes_on(configure, tmp_path):
    train(configure("run", *STOPPING, "max_steps=2", "final_split=none"))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    words = [*STOPPING, "early_stopping_patience=3", "final_split=none", "resume_from_checkpoint=true"]
    train(configure("run", *words))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["num_steps"] == 5


def test_a_resumed_run_is_an_unbroken_one(configure, tmp_path):
    train(configure("whole"))
    train(configure("parts"))
    parts = tmp_path / "parts"
    for name in ("config.json", "model.safetensors"):
        (parts / name).unlink()
    for step in (4, 6):
        for path in sorted((parts / f"checkpoint-{step}").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (parts / f"checkpoint-{step}").rmdir()
    train(configure("parts", "resume_from_checkpoint=true"))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, values in whole.items():
        torch.testing.assert_close(resumed[name], values, rtol=0, atol=0)


def test_features_that_are_off_run_the_towers_in_every_step(configure, tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        train(configure("run", "data.feature_views=0", "final_split=none", "eval_strategy=no"))
    assert not (tmp_path / "features").exists()


def test_a_model_folder_does_not_tell_where_the_features_are(configure, tmp_path):
    train(configure("run"))
    told = [
        path.name for path in (tmp_path / "run").glob("*.*") if str(tmp_path / "features") in path.read_text("latin-1")
    ]
    assert told == []


BEST = ["save_strategy=best", "load_best_model_at_end=true", "eval_steps=1", "max_steps=3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["early_stopping_patience=1"], "metric_for_best_model=.*load_best_model_at_end=true"),
        (
            ["early_stopping_patience=1", *BEST, "metric_for_best_model=loss", "eval_strategy=no"],
            "eval_strategy=epoch",
        ),
        ([*BEST, "metric_for_best_model=mean_recal@10"], "no 'mean_recal@10': did you mean 'mean_recall@10'"),
        ([*BEST, "metric_for_best_model=v_measure"], "no 'v_measure'"),  # eval_grouping is off
    ],
)
def test_what_cannot_choose_the_best_model_is_said_before_anything_is_deleted(configure, tmp_path, words, message):
    train(configure("run", "final_split=none", "eval_strategy=no"))
    before = sorted((tmp_path / "run").iterdir())
    with pytest.raises(ValueError, match=message):
        train(configure("run", "overwrite_output_dir=true", *words))
    assert sorted((tmp_path / "run").iterdir()) == before


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("mean_debiased_modality_gap", False), ("medpix2_text_to_image_median_rank", False), ("eval_loss", False),
     ("mean_recall@10", True), ("eval_margin", True), ("v_measure", True)],
)  # fmt: skip
def test_which_way_is_better_is_that_of_the_reports(tmp_path, metric, greater):
    args = GapClosedTrainingArguments(output_dir=str(tmp_path), metric_for_best_model=metric, use_cpu=True)
    assert args.greater_is_better is greater
