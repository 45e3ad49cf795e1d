"""The command that compares ways to close the gap, on a tiny plan: what it trains, keeps, and finds again."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import evidence
import evidence_runs
import evidence_study
import numpy as np
import pytest
import yaml
from evidence_cases import queries_of
from evidence_compare import comparisons
from evidence_measure import measure
from evidence_plan import PLANS, read_plan
from evidence_runs import FeatureRuns, FolderRuns, Trained, config_of_pairs, open_runs
from evidence_store import Store, digest_of_code
from PIL import Image
from scipy.stats import ttest_rel

import gap_closed_clip
from gap_closed_clip.evaluation import PairEmbeddings, evaluate_embeddings
from gap_closed_clip.evaluation.post_hoc import fit_pairs
from gap_closed_clip.evaluation.statistics import Queries
from gap_closed_clip.training import load_config

from .conftest import PLAN


TRAININGS = 2 * 2 * 1 + 2 * 2 * 1 + 1 + 1  # of the grid, of both kinds of budgets, of the map, of the robustness


@pytest.fixture
def run(plan_file, tmp_path, monkeypatch):
    """run(stop_after) -> the results file, if one is left, and how many trainings were made here, in one folder."""

    def run(stop_after: int | None = None, folder=tmp_path, more=()):
        trained = []
        train = FeatureRuns.train

        def counted(self, *args, **kwargs):
            if len(trained) == stop_after:
                raise KeyboardInterrupt
            trained.append(args)
            return train(self, *args, **kwargs)

        monkeypatch.setattr(FeatureRuns, "train", counted)
        words = [str(plan_file), "--output", str(folder / "output"), "--report", str(folder / "report")]
        monkeypatch.setattr("sys.argv", ["evidence.py", *words, *more])
        try:
            evidence.main()
        except KeyboardInterrupt:
            return None, len(trained)
        finally:
            monkeypatch.setattr(FeatureRuns, "train", train)
        report = folder / "report" / "evidence_tiny.json"
        return report.read_text() if report.is_file() else None, len(trained)

    return run


def but_for_times(text: str) -> dict:
    content = json.loads(text)
    return {name: value for name, value in content.items() if name not in ("minutes", "command", "date")}


def test_a_run_that_is_stopped_twice_ends_in_the_same_report(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "draw", lambda *_: {})  # figures of the results, which have tests of their own
    assert run(stop_after=3) == (None, 3)
    # A kill may leave half a file, which is then made again.
    first = min((tmp_path / "output" / "trainings").glob("*.json"))
    first.write_text(first.read_text()[:50])
    assert run(stop_after=4) == (None, 4)
    found, trained = run()
    assert trained == TRAININGS - 3 + 1 - 4
    whole, trained = run(folder=tmp_path / "whole")
    assert trained == TRAININGS
    assert but_for_times(found) == but_for_times(whole)
    again, trained = run()
    assert trained == 0 and again == found

    content = json.loads(found)
    assert content["found"][0].startswith("phantoms: 24 training pairs")
    assert [*content["methods"]] == PLAN["methods"]
    assert len(content["runs"]) == 3 * 2 and len(content["weight_map"]) == 1
    for method, budget in content["budgets"]["own"].items():
        trials = content["grid"]["trials"][method]
        assert budget == max(trials, key=lambda trial: trial["score"])["budget"]
    for figure in content["figures"].values():
        assert (tmp_path / "report" / figure).stat().st_size > 1000
    assert (tmp_path / "report" / "evidence_tiny.md").read_text().startswith("# Tiny\n")


def test_a_helper_trains_and_leaves_the_report_to_the_process_that_started_it(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "draw", lambda *_: {})
    assert run(more=["--helper-of", str(os.getppid())]) == (None, TRAININGS)
    progress = [line.split("]")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert progress == [f"[{number}/{TRAININGS}" for number in range(1, TRAININGS + 1)]
    found, trained = run()
    assert trained == 0
    side_by_side, _ = run(folder=tmp_path / "two", more=["--workers", "2"])
    assert but_for_times(side_by_side) == but_for_times(found)
    stored = [json.loads(path.read_text()) for path in (tmp_path / "two" / "output" / "trainings").glob("*.json")]
    assert len(stored) == TRAININGS
    assert json.loads(side_by_side)["minutes"] == round(sum(each["seconds"] for each in stored) / 60, 1)
    assert "Traceback" not in (tmp_path / "two" / "output" / "helper_0.log").read_text()


def test_a_run_that_goes_on_elsewhere_names_both_machines(run, monkeypatch):
    monkeypatch.setattr(evidence, "draw", lambda *_: {})
    monkeypatch.setattr("evidence_store.machine", lambda device: f"a first {device}")
    run(stop_after=3)
    monkeypatch.setattr("evidence_store.machine", lambda device: f"a second {device}")
    content = json.loads(run()[0])
    assert content["machine"] == f"a second cpu ({TRAININGS - 3} of {TRAININGS}); a first cpu (3 of {TRAININGS})"
    assert content["versions"].startswith("torch 2.") and ";" not in content["versions"]


def test_another_state_of_the_code_trains_anew(run, monkeypatch):
    run(stop_after=2)
    monkeypatch.setattr("evidence_store.digest_of_code", lambda scripts: "another")
    assert run(stop_after=2) == (None, 2)


def test_what_decides_stored_numbers_is_the_state_of_the_code(monkeypatch, tmp_path):
    """Another objective trains anew; another test of two methods needs the report alone."""
    package = tmp_path / "gap_closed_clip"
    shutil.copytree(Path(gap_closed_clip.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(gap_closed_clip, "__file__", str(package / "__init__.py"))
    before = digest_of_code()
    for name, other in (("evaluation/statistics.py", False), ("evaluation/retrieval_hits.py", True)):
        path = package / name
        path.write_text(path.read_text() + "# changed\n")
        assert (digest_of_code() != before) == other


def test_other_images_of_the_same_names_are_trained_on_anew(run, tmp_path):
    rows = ["image,caption,split"]
    for number, split in enumerate(["train"] * 24 + ["validation"] * 8 + ["test"] * 8):
        Image.new("L", (32, 32), number).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,A square of brightness {number}.,{split}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))

    def trained_on():
        run(stop_after=1, more=[f"data.source={tmp_path / 'pairs.csv'}"])
        files = (tmp_path / "output" / "trainings").glob("*.json")
        return {json.loads(json.loads(path.read_text())["settings"])["pairs"] for path in files}

    first = trained_on()
    assert len(first) == 1 and trained_on() == first
    for number in (0, 39):  # one to train on, and one that is held out
        picture = (tmp_path / f"{number}.png").read_bytes()
        Image.new("L", (32, 32), 200).save(tmp_path / f"{number}.png")
        assert trained_on() > first
        (tmp_path / f"{number}.png").write_bytes(picture)
        first = trained_on()
    assert len(first) == 3


def test_methods_are_compared_run_by_run_with_holms_correction():
    rng = np.random.default_rng(0)
    runs = []
    for method, gain in (("CLIP (LT)", 0.0), ("ours", 0.3), ("SigLIP", 0.0)):
        for seed in (1, 0, 2):
            hits = (np.random.default_rng(seed).random(80) + gain * rng.random(80) > 0.6).astype(int).tolist()
            metrics = {"recall@10": np.mean(hits), "margin": 0.2 + gain + 0.01 * seed, "v_measure": rng.random()}
            about = {"method": method, "budget": "shared", "seed": seed, "hits": {"": {"image_to_text": hits}}}
            runs.append({**about, "metrics": {"all pairs": metrics}})
    queries = Queries(np.zeros(80), np.arange(80) // 2, np.zeros(80))
    found = comparisons(runs, read_plan("some.csv", []), queries)
    by_metric = {metric: [each for each in found if each["metric"] == metric] for metric in ("recall@10", "margin")}
    ours, siglip = by_metric["recall@10"]
    assert (ours["method"], siglip["method"]) == ("ours", "SigLIP") and ours["groups"] == 40 and ours["seeds"] == 3
    means = [np.mean([run["metrics"]["all pairs"]["recall@10"] for run in runs[k : k + 3]]) for k in (0, 3)]
    assert ours["difference"] == pytest.approx(means[1] - means[0], abs=1e-6)
    smaller, larger = sorted([ours["p"], siglip["p"]])
    assert sorted([ours["p_holm"], siglip["p_holm"]]) == pytest.approx(
        [min(2 * smaller, 1), max(min(2 * smaller, 1), larger)], abs=2e-6
    )
    v_measures = [[run["metrics"]["all pairs"]["v_measure"] for run in runs[k : k + 3]] for k in (0, 6)]
    t = next(each for each in found if (each["metric"], each["method"]) == ("v_measure", "SigLIP"))
    assert t["p"] == pytest.approx(ttest_rel(*v_measures).pvalue, abs=1e-6) and t["groups"] is None
    assert {each["difference"] for each in by_metric["margin"]} == {0.3, 0.0}


@pytest.fixture(scope="module")
def trained(plan_file, tmp_path_factory):
    plan = read_plan(str(plan_file), [])
    runs = FeatureRuns(plan, tmp_path_factory.mktemp("models"))
    return plan, runs, runs.train("CLIP (LT)", {"max_steps": 2}, 0, embed_train=True)


def test_hits_are_those_of_the_metric_and_stand_for_cases(trained):
    _, runs, found = trained
    measured = measure(found, runs.classes)
    ((scope, metrics),) = measured["metrics"].items()
    assert scope == "all pairs"
    hits = measured["hits"][""]
    means = [np.mean(hits[direction]) for direction in ("text_to_image", "image_to_text")]
    assert np.mean(means) == pytest.approx(metrics["recall@10"], abs=1e-6)
    queries = queries_of(found.test, runs.groups)
    assert len(queries.groups) == len(queries.parts) == sum(map(len, hits.values()))


def test_a_post_hoc_method_is_fitted_on_training_pairs_and_moves_prompts_too(trained):
    plan, _, found = trained
    method = plan.known_methods["CLIP, centered after"]
    moved = evidence_study.mapped(found, method)
    maps = fit_pairs("centering", found.train)
    assert evaluate_embeddings(moved.test) == evaluate_embeddings(maps.apply(found.test))
    np.testing.assert_allclose(moved.prompts[1], maps.text(found.prompts[1]))
    with pytest.raises(ValueError, match="needs embedded training pairs"):
        evidence_study.mapped(moved, method)


def test_what_is_trained_has_the_heads_of_the_embeddings_and_the_towers_stay(trained):
    plan, runs, found = trained
    before = [weight.clone() for weight in runs.parts.encoder.vision_model.parameters()]
    other = runs.train("CLIP (LT)", {"max_steps": 2}, 0)
    np.testing.assert_array_equal(found.test.image_embeds, other.test.image_embeds)  # the same seed, the same heads
    np.testing.assert_array_equal(found.prompts, other.prompts)
    assert other.train is None and len(found.curve) == 2 and found.curve[-1][0] == 1
    for weight, was in zip(runs.parts.encoder.vision_model.parameters(), before, strict=True):
        assert weight.equal(was)


def test_a_configuration_without_a_final_split_is_compared_on_the_validation_pairs(plan_file, tmp_path):
    content = yaml.safe_load((plan_file.parent / "small.yaml").read_text())
    del content["training"]["final_split"]
    decided = {"eval_strategy": "steps", "load_best_model_at_end": True, "eval_on_start": True}  # here by nothing
    content["training"] |= decided
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    plan = dataclasses.replace(read_plan(str(plan_file), []), config=(tmp_path / "small.yaml",))
    runs = FeatureRuns(plan, tmp_path)
    assert "10 validation pairs" in runs.describe()[0] and len(runs.test_pairs) == 10
    assert len(runs.train("ours", {"max_steps": 1}, 0).test) == 10


def test_a_plan_with_a_first_stage_trains_both_on_its_pairs_and_needs_no_folder_before(plan_file, tmp_path):
    first, second = plan_file.parent / "small.yaml", tmp_path / "second.yaml"
    release = {
        "model": {"checkpoint": "nowhere/first", "freeze_vision": False},
        "training": {"tower_learning_rate": 1e-4},
    }
    second.write_text(yaml.safe_dump(release))
    content = {
        "config": [str(first), str(second)],
        "start": [str(first)],
        "start_budgets": {"ours": {"max_steps": 2}},
        "methods": ["CLIP (LT)", "ours"],
        "shared": {},
        "grid": {},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content))
    plan = read_plan(str(tmp_path / "plan.yaml"), ["data.phantom_train_pairs=16"])
    runs = open_runs(plan, tmp_path / "models")
    assert isinstance(runs, FolderRuns) and len(runs.train_pairs) == 16
    assert len(runs.train("ours", {"max_steps": 1}, 0).test) == 12
    stages = {
        path.parent.name: (config.data.phantom_train_pairs, config.training["max_steps"], config.model.checkpoint)
        for path in (tmp_path / "models").glob("*/train_config.yaml")
        for config in [load_config([path])]
    }
    start = str(tmp_path / "models" / "ours_start_seed0")
    assert stages == {"ours_start_seed0": (16, 2, None), "ours_max_steps_1_seed0": (16, 1, start)}


@pytest.mark.parametrize("name", sorted(path.stem for path in PLANS.glob("*.yaml") if path.stem != "methods"))
def test_the_pairs_of_each_plan_of_ours_are_read_without_a_folder_of_models(name, monkeypatch, tmp_path):
    monkeypatch.setenv("RADIOLOGY_DATA", str(tmp_path))
    assert config_of_pairs(read_plan(name, [])).model.checkpoint is None


def test_held_out_pairs_that_are_one_case_are_told_before_training(plan_file, tmp_path):
    for number in range(12):
        Image.new("L", (32, 32), 20 * number).save(tmp_path / f"{number}.png")
    rows = [f"{number}.png,the same,{'train' if number < 8 else 'test'}" for number in range(12)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption,split", *rows]))
    plan = read_plan(str(plan_file), [f"data.source={tmp_path / 'pairs.csv'}", "data.validation_split=null"])
    with pytest.raises(ValueError, match="The 4 held-out pairs, .* are a single case: .*data.fold_column.* captions"):
        FeatureRuns(plan, tmp_path)


def test_where_no_method_to_show_is_trained_all_are_shown(plan_file, tmp_path):
    plan = dataclasses.replace(read_plan(str(plan_file), [], methods=["CLIP (LT)"]), grid={}, shown=("SigLIP",))
    study = evidence_study.Evidence(plan, FeatureRuns(plan, tmp_path), Store(tmp_path))
    images, texts = np.random.default_rng(0).normal(size=(2, 12, 4))
    np.savez(tmp_path / "arrays.npz", **{"/image": images, "/text": texts})
    study.arrays = {"CLIP (LT)": tmp_path / "arrays.npz"}
    spaces, metrics = study.spaces()
    assert [*spaces] == [*metrics] == ["CLIP (LT)"]


def test_an_image_of_two_cases_is_in_one_fold_of_the_budgets(plan_file, tmp_path):
    rows = ["image,caption,split,case"]
    for row in range(32):
        if row % 2 == 0:
            Image.new("L", (32, 32), 8 * row).save(tmp_path / f"{row // 2}.png")
        rows.append(f"{row // 2}.png,caption {row},{'train' if row < 20 else 'test'},P{row}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    words = [f"data.source={tmp_path / 'pairs.csv'}", "data.fold_column=case", "data.validation_split=null"]
    plan = read_plan(str(plan_file), words)
    runs = FeatureRuns(plan, tmp_path)
    ids = np.array(runs.train_pairs["image_id"])
    held_out, trained_on = ({*ids[runs.folds == fold]} for fold in (0, 1))
    assert len(held_out) == len(trained_on) == 5 and not held_out & trained_on
    with pytest.raises(ValueError, match="num_folds is 11, but the training pairs are of 10 cases"):
        FeatureRuns(dataclasses.replace(plan, num_folds=11), tmp_path)


def test_a_budget_has_a_batch_size_of_its_own(plan_file, tmp_path, monkeypatch):
    """24 pairs are 3 batches of 8, or 6 of 4."""
    runs, steps, curve_of = FeatureRuns(read_plan(str(plan_file), []), tmp_path), [], evidence_runs.curve_of
    monkeypatch.setattr(evidence_runs, "curve_of", lambda log, last: steps.append(last) or curve_of(log, last))
    for budget in ({}, {"per_device_train_batch_size": 4}):
        runs.train("ours", {"num_train_epochs": 1, **budget}, seed=0)
    assert steps == [3, 6]


def test_trials_of_texts_are_named_and_those_of_another_cut_into_folds_are_made_anew(plan_file, tmp_path, monkeypatch):
    plan = dataclasses.replace(read_plan(str(plan_file), []), grid={"lr_scheduler_type": ["cosine", "linear"]})
    trained = []
    monkeypatch.setattr(FeatureRuns, "train", lambda self, *given: trained.append((self.plan.num_folds, *given)))
    monkeypatch.setattr(evidence_study, "score", lambda _: 0.5)
    for num_folds, made in ((2, 2), (2, 2), (3, 4)):
        runs = FeatureRuns(dataclasses.replace(plan, num_folds=num_folds), tmp_path)
        evidence_study.Evidence(runs.plan, runs, Store(tmp_path / "trainings")).trials("ours")
        assert len(trained) == made


def test_a_source_of_one_label_is_left_out_of_the_means_of_labels():
    """V-measure of sources with and without groups: the mean over those that have it."""
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(2, 24, 8)).astype(np.float32)
    labels = ["CT", "MR"] * 6 + ["CT"] * 12
    ids = [str(row) for row in range(24)]
    pairs = PairEmbeddings(images, texts, ids, ids, labels, ["a"] * 12 + ["b"] * 12)
    prompts = rng.normal(size=(1, 2, 8)).astype(np.float32)
    metrics = measure(Trained(pairs, None, prompts, 10.0, []), ["CT", "MR"])["metrics"]
    assert "v_measure" not in metrics["b"]
    for name in ("v_measure", "knn_accuracy_image_to_text"):
        assert metrics["mean of the sources"][name] == metrics["a"][name]


def test_an_image_has_the_label_that_any_of_its_captions_has():
    """Of zero-shot classification it was left out where its first caption has none."""
    rng = np.random.default_rng(0)
    images, texts = np.repeat(rng.normal(size=(12, 8)), 2, axis=0), rng.normal(size=(24, 8))
    image_ids, caption_ids = ([str(row // parts) for row in range(24)] for parts in (2, 1))
    prompts = rng.normal(size=(1, 2, 8)).astype(np.float32)
    found = []
    full = [("CT", "MR")[row // 2 % 2] for row in range(24)]
    for labels in (full, ["" if row < 12 and row % 2 == 0 else label for row, label in enumerate(full)]):
        pairs = PairEmbeddings(images, texts, image_ids, caption_ids, labels)
        metrics = measure(Trained(pairs, None, prompts, 10.0, []), ["CT", "MR"])["metrics"]["all pairs"]
        found.append({name: value for name, value in metrics.items() if name.startswith("zero_shot_")})
    assert found[0] == found[1] and found[0]
