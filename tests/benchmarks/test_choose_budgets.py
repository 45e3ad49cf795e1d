"""Which pairs stay in one fold, which budget is the best, and tables of several runs."""

import argparse
from types import SimpleNamespace

import choose_budgets
import numpy as np
import yaml
from choose_budgets import Trial, cases, report, same
from comparison import report_of_runs


class Columns(dict):
    """Pairs by their columns."""

    def __len__(self) -> int:
        return len(self["image_id"])

    @property
    def pairs(self):
        return SimpleNamespace(column_names=list(self))


def test_cases_and_blocks_of_numbers_stay_together():
    ids = ["m/images/MPX1_synpic7.jpg", "m/images/MPX1_synpic950.jpg", "v/synpic101.jpg", "v/synpic199.jpg"]
    pairs = Columns(image_id=[*ids, "v/synpic200.jpg", "r/a.jpg"], case_id=["MPX1", "MPX1", None, None, None, None])
    groups = cases(pairs)
    assert groups[0] == groups[1] and groups[2] == groups[3]
    assert len(set(groups)) == 4
    without = cases(Columns(image_id=["a", "b", "a"]))
    assert without[0] == without[2] != without[1]


def trial(method, rate, fold, recall, objective=None):
    budget = {"num_train_epochs": 6, "learning_rate": rate, "projection_dropout": 0.1}
    metrics = {"recall@10": recall, "margin": 0.3, "debiased_modality_gap": 0.1, "random_pair_cosine": 0.05}
    return Trial(method, objective or {}, budget, fold, metrics)


def test_the_best_budget_is_that_of_the_highest_mean_and_of_the_objective_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(choose_budgets, "BUDGETS", tmp_path / "budgets")
    monkeypatch.setattr(choose_budgets, "RESULTS", tmp_path / "results")
    trials = [trial("ours", 0.1, 0, 0.9, {"align_weight": 1.0})]  # of another balance, before
    trials += [trial("ours", 0.1, fold, recall, {"align_weight": 3.0}) for fold, recall in enumerate((0.5, 0.1))]
    trials += [trial("ours", 0.2, fold, recall, {"align_weight": 3.0}) for fold, recall in enumerate((0.35, 0.33))]
    report(trials, argparse.Namespace(config="some/small.yaml", cpu=True, folds=2, num_folds=4))
    (budget,) = yaml.safe_load((tmp_path / "budgets" / "small.yaml").read_text()).values()
    assert budget["learning_rate"] == 0.2
    table = (tmp_path / "results" / "budgets_small.md").read_text()
    assert "34.0%" in table and "30.0%" in table and "90.0%" not in table


def test_a_trial_is_the_same_whatever_it_gave():
    assert same(trial("ours", 0.1, 0, 0.5), trial("ours", 0.1, 0, 0.6))
    assert not same(trial("ours", 0.1, 0, 0.5), trial("ours", 0.1, 1, 0.5))
    assert not same(trial("ours", 0.1, 0, 0.5), trial("ours", 0.1, 0, 0.5, {"align_weight": 1.0}))


def test_tables_of_runs_have_the_mean_over_sources_by_hand():
    runs = {"ours": [{"recall@10": 0.1}, {"recall@10": 0.2}]}
    by_source = {
        "a": {"ours": [{"recall@10": 0.2}, {"recall@10": 0.4}]},
        "b": {"ours": [{"recall@10": 0.4}, {"recall@10": 0.8}]},
    }
    text = report_of_runs(runs, by_source)
    means = text.split("## a")[0]
    assert f"45.0% ± {100 * np.std([0.3, 0.6], ddof=1):.1f}%" in means
    assert "15.0%" in text.split("## All in one gallery")[1]
    assert "##" not in report_of_runs(runs, {})
