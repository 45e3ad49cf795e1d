"""What evidence.py takes from before, and what it makes anew: numbers of another model are never a report's."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import comparison
import evidence_captions
import evidence_plan
import evidence_study
import pytest
import yaml
from comparison import run_once
from evidence_plan import CaptionPlan, Method, read_plan
from evidence_store import Store

from gap_closed_clip.evaluation.report import write_metrics
from gap_closed_clip.training import RunConfig, load_config


def plan_of(folder: Path, **content):
    (folder / "plan.yaml").write_text(yaml.safe_dump({"methods": ["CLIP (LT)", "ours"], "seeds": [0], **content}))
    return read_plan(str(folder / "plan.yaml"), [])


@pytest.fixture
def made(tmp_path, monkeypatch):
    """made(plan) -> what evidence.py trains for all that the plan asks for, as (method, budget), in one folder."""

    def made(plan):
        trained = []
        runs = SimpleNamespace(
            pairs_digest="pairs",
            folds_digest="folds",
            train=lambda method, budget, *_: trained.append((method, budget)),
        )
        study = evidence_study.Evidence(plan, runs, Store(tmp_path / "trainings"))
        measured = {"curve": [], "methods": {"": {"metrics": {"all pairs": {"recall@10": 0.5}}}}}
        monkeypatch.setattr(study, "_measured", lambda *_: measured)
        for calls in study.steps():
            for call in calls:
                call()
        return trained

    return made


def test_the_map_of_weights_is_at_ours_own_budget_even_if_that_is_the_configurations(made, tmp_path):
    weights = {"align_weight": [2], "uniformity_weight": [1]}
    point = {"align_weight": 2, "uniformity_weight": 1, "center_projections": True}
    for own in ({}, {"num_train_epochs": 3}):
        budgets = {"own": {"ours": own, "CLIP (LT)": {}}, "shared": {"num_train_epochs": 9}}
        assert made(plan_of(tmp_path, **budgets, weight_map=weights))[-1] == ("ours", {**own, **point})
    alone = {"methods": ["CLIP (LT)"], "own": {"CLIP (LT)": {"num_train_epochs": 4}}}
    plan = plan_of(tmp_path, **{**alone, "shared": {"num_train_epochs": 9}, "weight_map": weights})
    assert made(plan)[-1] == ("ours", {"num_train_epochs": 9, **point})


def test_a_method_of_ones_own_that_is_fitted_otherwise_is_measured_anew(made, tmp_path, monkeypatch):
    known = evidence_plan.all_methods()
    for kind, trainings in (("whitening", 2), ("whitening", 0), ("realign", 1)):
        mine = {**known, "mine": Method("Mine.", "nowhere", post_hoc=kind)}
        monkeypatch.setattr(evidence_plan, "all_methods", lambda mine=mine: mine)
        plan = plan_of(tmp_path, methods=["CLIP (LT)", "ours", "mine"], grid={}, shared={})
        assert len(made(plan)) == trainings


def test_a_first_stage_with_other_settings_makes_what_starts_from_it_anew(made, tmp_path):
    config = tmp_path / "first.yaml"
    for epochs, trainings in ((2, 2), (2, 0), (3, 2)):
        config.write_text(f"training: {{num_train_epochs: {epochs}}}\n")
        assert len(made(plan_of(tmp_path, start=[str(config)], grid={}, shared={}))) == trainings


def test_another_model_to_start_from_in_the_same_folder_makes_everything_anew(made, tmp_path):
    start, config = tmp_path / "start", tmp_path / "second.yaml"
    start.mkdir()
    config.write_text(f"model: {{checkpoint: {start}}}\n")
    for weights, trainings in (("one", 2), ("one", 0), ("another", 2)):
        (start / "model.safetensors").write_text(weights)
        assert len(made(plan_of(tmp_path, config=[str(config)], grid={}, shared={}))) == trainings


@pytest.mark.parametrize("what", ["stage", "folder"])
def test_captions_on_encoders_that_start_otherwise_are_written_anew(tmp_path, monkeypatch, what):
    """As on a decoder's folder, which has the same name as before."""
    keys = []
    for value in ("1", "1", "2"):
        start, config = tmp_path / "start", tmp_path / "config.yaml"
        start.mkdir(exist_ok=True)
        (start / "model.safetensors").write_text(value)
        config.write_text(f"training: {{num_train_epochs: {value}}}\n" if what == "stage" else "")
        given = {"start": [str(config)]} if what == "stage" else {"words": [f"model.checkpoint={start}"]}
        plan = dataclasses.replace(plan_of(tmp_path, grid={}, shared={}, **given), captions=CaptionPlan())
        study = evidence_captions.CaptionStudy(plan, SimpleNamespace(), SimpleNamespace(), {"shared": {}})
        keys.append(json.dumps(study._encoder_settings("ours", 0), sort_keys=True))
    assert keys[0] == keys[1] != keys[2]


def test_what_starts_from_a_model_that_was_trained_anew_is_trained_anew(tmp_path, monkeypatch):
    """A decoder of captions on its encoder, the second stage on the first: their own settings are as before."""
    trained = []

    def train(config: RunConfig) -> None:
        trained.append(config.training["output_dir"])
        folder = Path(config.training["output_dir"])
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_text(f"{config.training['num_train_epochs']}")
        write_metrics(folder / "metrics.json", {"run": {"margin": float(len(trained))}}, {}, "validation")
        config.save(folder / "train_config.yaml")

    monkeypatch.setattr(comparison, "train", train)
    first, second = tmp_path / "first", tmp_path / "second"
    made = []
    for epochs in (1, 1, 2, 2):
        run_once(load_config([], [f"num_train_epochs={epochs}"]), first)
        run_once(load_config([], [f"model.checkpoint={first}", "num_train_epochs=1"]), second)
        made.append([Path(folder).name for folder in trained])
        trained.clear()
    assert made == [["first", "second"], [], ["first", "second"], []]
    # One of an earlier version left no note of what it started from.
    (second / comparison.START_FILE).unlink()
    run_once(load_config([], [f"model.checkpoint={first}", "num_train_epochs=1"]), second)
    assert trained == []
