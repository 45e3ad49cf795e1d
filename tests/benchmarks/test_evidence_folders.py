"""The command that compares ways to close the gap, on models that are there already."""

import json
from pathlib import Path

import evidence
import evidence_runs
import pytest
import torch
import yaml
from conftest import tiny_config
from evidence_plan import read_plan
from evidence_runs import open_runs

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.data import load_pairs
from gap_closed_clip.evaluation import embed_pairs, evaluate_embeddings, post_hoc
from gap_closed_clip.training import load_config

from .conftest import TINY


@pytest.fixture
def plan_file(tiny_processor, tmp_path) -> Path:
    """Two methods of two seeds: tiny models, each with weights of its own."""
    for name, seed in [("base", 3), ("base", 8), ("mine", 3), ("mine", 8)]:
        torch.manual_seed(len(name) + seed * (name == "mine"))
        folder = tmp_path / f"{name}-{seed}"
        GapClosedClipModel(tiny_config(center_projections=name == "mine")).save_pretrained(folder)
        tiny_processor.save_pretrained(folder)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(TINY))
    plan = {
        "config": [str(tmp_path / "small.yaml")],
        "folders": {name: str(tmp_path / f"{name}-{{seed}}") for name in ("base", "mine")},
        "methods": ["base", "mine", "CLIP, centered after"],
        "baseline": "base",
        "seeds": [3, 8],
    }
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(plan))
    return tmp_path / "given.yaml"


@pytest.fixture
def run(plan_file, monkeypatch):
    """run() -> the results, the page, and the folders of the models that were measured."""
    measured = []

    def counted(folder, *args, **kwargs):
        measured.append(Path(folder).name)
        return load(folder, *args, **kwargs)

    def never(*args, **kwargs):
        raise AssertionError("Something is trained.")

    load = evidence_runs.load_checkpoint
    monkeypatch.setattr(evidence_runs, "load_checkpoint", counted)
    monkeypatch.setattr(evidence_runs, "run_once", never)
    monkeypatch.setattr(evidence, "draw", lambda *_: {})  # figures of the results, which have tests of their own

    def run() -> tuple[dict, str, list[str]]:
        measured.clear()
        monkeypatch.setattr("sys.argv", ["evidence.py", str(plan_file), "--output", str(plan_file.parent / "output")])
        evidence.main()
        path = plan_file.parent / "output" / "evidence_given.json"
        return json.loads(path.read_text()), path.with_suffix(".md").read_text(), list(measured)

    return run


def test_models_that_are_there_are_measured_as_they_are(run, plan_file):
    found, page, measured = run()
    assert measured == ["base-3", "mine-3", "base-8", "mine-8"]
    assert found["budgets"] == {"given": {}} and {each["budget"] for each in found["runs"]} == {"given"}
    kinds = {name: method["kind"] for name, method in found["methods"].items()}
    assert kinds == {"base": "given", "mine": "given", "CLIP, centered after": "post-hoc"}
    assert "## At the budgets that the models were trained with" in page and "base-{seed}" in page

    data = load_config([plan_file.parent / "small.yaml"]).data
    pairs, training = load_pairs(data, "test"), load_pairs(data, "train")
    runs = {(each["method"], each["seed"]): each["metrics"]["all pairs"] for each in found["runs"]}
    assert len(runs) == 6
    for name, seed in [("base", 3), ("base", 8), ("mine", 3), ("mine", 8)]:
        model = GapClosedClipModel.from_pretrained(plan_file.parent / f"{name}-{seed}")
        processor = evidence_runs.load_checkpoint(plan_file.parent / f"{name}-{seed}")[1]
        embedded = embed_pairs(model, processor, pairs)
        expected = {(name, seed): evaluate_embeddings(embedded)}
        if name == "base":
            maps = post_hoc.fit_pairs("centering", embed_pairs(model, processor, training))
            expected["CLIP, centered after", seed] = evaluate_embeddings(maps.apply(embedded))
        for key, metrics in expected.items():
            for metric in ("recall@10", "margin", "debiased_modality_gap", "v_measure"):
                assert runs[key][metric] == pytest.approx(metrics[metric], abs=1e-5), (key, metric)


def test_only_a_model_that_has_changed_is_measured_again(run, plan_file):
    first, _, _ = run()
    assert run()[2] == []
    torch.manual_seed(99)
    GapClosedClipModel(tiny_config()).save_pretrained(plan_file.parent / "mine-8")
    second, _, measured = run()
    assert measured == ["mine-8"]
    changed = [(a["method"], a["seed"]) for a, b in zip(first["runs"], second["runs"], strict=True) if a != b]
    assert changed == [("mine", 8)]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"baseline": "CLIP (LT)"}, "no method 'CLIP .LT.' in folders"),
        ({"baseline": "CLIP, whitened"}, "`baseline` is to be one of base, mine"),
        ({"methods": ["base", "mine", "ours"]}, "no method 'ours' in folders"),
        ({"folders": {"base": "outputs/base"}, "methods": []}, "one folder, for 2 seeds: put {seed} where"),
        ({"folders": {"base": ["a", "b"]}}, "folders is .*; give a name and a path for each method"),
        ({"folders": "outputs/base"}, "folders is 'outputs/base'; give a name and a path for each method"),
        ({"grid": {"max_steps": [1]}, "own": {"base": {}}}, "nothing is trained: leave out grid, own"),
    ],
)
def test_plans_of_models_name_what_is_wrong_with_them(plan_file, change, said):
    content = yaml.safe_load(plan_file.read_text())
    plan_file.write_text(yaml.safe_dump({**content, **change}))
    with pytest.raises(ValueError, match=said):
        read_plan(str(plan_file), [])


def test_a_model_that_is_missing_is_named_before_any_is_measured(plan_file, tmp_path):
    (plan_file.parent / "mine-8" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"folders, mine: there is no model in .*mine-8\."):
        open_runs(read_plan(str(plan_file), []), tmp_path)
