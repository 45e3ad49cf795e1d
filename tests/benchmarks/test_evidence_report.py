"""Tables and sentences of a report of evidence.py, by hand."""

import json

import numpy as np
import pytest
from evidence_report import report
from evidence_results import GEOMETRY, TASKS, Evidence, label_of, read, spearman
from evidence_tables import (
    association,
    comparison_table,
    map_cells,
    methods_table,
    robustness_table,
    tuning_table,
    weight_table,
)
from scipy.stats import t as student

from .evidence_example import cells, comparison, example, with_captions


MEAN = "mean of the sources"


@pytest.fixture
def evidence():
    return Evidence(example())


def test_methods_beside_one_another_with_marks(evidence):
    assert cells(methods_table(evidence, "own", MEAN, TASKS, chance=True)) == [
        ["method", "R@10 ↑", "median rank ↓ °", "kNN ↑"],
        ["CLIP (LT)", "51.0% ± 1.4%", "7.5 ± 0.7", "65.0% ± 0.0%"],
        ["CLIP, centered", "50.0% ± 0.0% ≈", "7.0 ± 0.0", "60.0% ± 0.0% °"],
        ["ours", "**58.0% ± 2.8%**", "6.0 ± 0.0", "75.0% ± 0.0% ≈"],  # kNN: in one direction alone
        ["*chance, or the most frequent label*", "*5.0%*", "", "*25.0%*"],
    ]
    assert cells(methods_table(evidence, "own", MEAN, GEOMETRY)) == [
        ["method", "gap ↓ °", "margin ↑"],
        ["CLIP (LT)", "0.210 ± 0.014", "0.320 ± 0.028"],
        ["CLIP, centered", "0.050 ± 0.000", "0.300 ± 0.000 °"],
        ["ours", "0.105 ± 0.021", "**0.480 ± 0.000**"],
    ]


def test_one_seed_has_no_deviation_and_without_tests_nothing_is_marked(evidence):
    assert cells(methods_table(evidence, "shared", MEAN, TASKS)) == [
        ["method", "R@10 ↑", "median rank ↓", "kNN ↑"],
        ["CLIP (LT)", "42.0%", "9.0", "60.0%"],
        ["ours", "50.0%", "8.0", "60.0%"],
    ]
    assert methods_table(evidence, "shared", "no such scope", TASKS) == ""


def test_both_directions_must_differ_in_one_sense():
    results = example()
    (other,) = [entry for entry in results["comparisons"] if entry["metric"].endswith("text_to_image")]
    knn = next(column for column in TASKS if column.name == "knn_accuracy")
    other["p_holm"] = 0.01
    assert Evidence(results).separable("ours", "own", MEAN, knn) is True
    other["difference"] = -0.1
    assert Evidence(results).separable("ours", "own", MEAN, knn) is False
    other["p_holm"] = None
    assert Evidence(results).separable("ours", "own", MEAN, knn) is None


def test_of_a_gap_the_smallest_is_the_best():
    results = example()
    results["comparisons"] = [
        comparison(name, "modality_gap", -0.1, 0.001, MEAN) for name in ("ours", "CLIP, centered")
    ]
    found = cells(methods_table(Evidence(results), "own", MEAN, GEOMETRY[:1]))
    assert [row[1] for row in found[1:]] == ["0.210 ± 0.014", "**0.050 ± 0.000**", "0.105 ± 0.021"]


def test_a_best_baseline_or_a_worse_method_is_not_bold():
    results = example()
    for entry in results["comparisons"]:
        entry["p_holm"] = 0.001
    for entry in results["runs"]:
        if entry["method"] == "CLIP (LT)":
            entry["metrics"][MEAN]["recall@10"] += 0.2
    assert "**" not in methods_table(Evidence(results), "own", MEAN, TASKS[:1])


def test_comparisons(evidence):
    head, first, second, *_, last = cells(comparison_table(evidence, "own", MEAN))
    assert head == ["metric", "method", "difference", "95% interval", "p", "Holm's p", "groups", "seeds", "test"]
    label, cases = "R@10, mean of both directions ↑", ["402", "2", "bootstrap over cases"]
    assert first == [label, "ours", "+7.0 points", "+5.0 to +9.0", "< 0.001", "< 0.001", *cases]
    assert second == [label, "CLIP, centered", "-1.0 points", "-3.0 to +1.0", "0.500", "1.000", *cases]
    margin = ["margin (true - random) ↑", "ours", "+0.160", "+0.140 to +0.180", "0.015", "0.030"]
    assert last == [*margin, "-", "2", "paired t over seeds"]


def test_tuning_weights_and_long_trainings(evidence):
    assert cells(tuning_table(evidence)) == [
        ["method", "own budget", "best", "mean", "deviation", "best - mean", "budgets tried"],
        ["CLIP (LT)", "`num_train_epochs` 6, `learning_rate` 0.003", "40.0%", "35.0%", "7.1%", "+5.0 points", "2"],
        ["ours", "`num_train_epochs` 12, `learning_rate` 0.001", "42.0%", "41.0%", "1.4%", "+1.0 points", "2"],
    ]
    assert cells(weight_table(evidence)) == [
        ["ATP", "CU 0", "CU 4"],
        ["0", "50.0% / 0.30 / 0.06", "40.0% / 0.10 / 0.01 *scatter*"],
        ["6", "10.0% / 0.02 / 0.90 *collapse*", "52.0% / 0.45 / 0.05"],
    ]
    assert cells(robustness_table(evidence)) == [
        ["R@10 after epochs", "6", "24", "longest - best"],
        ["CLIP (LT)", "50.0%", "40.0%", "-10.0 points"],
        ["ours", "47.0%", "48.0%", "+0.0 points"],
    ]


@pytest.mark.parametrize(
    ("recall", "chance", "random", "margin", "mark"),
    [
        (0.10, 0.05, 0.50, 0.10, "collapse"),  # at both bounds
        (0.11, 0.05, 0.50, 0.10, ""),
        (0.10, 0.05, 0.49, 0.10, ""),
        (0.12, None, 0.90, 0.10, "collapse"),  # a quarter of the best, 0.5
        (0.13, None, 0.90, 0.10, ""),
        (0.30, 0.05, 0.09, 0.14, "scatter"),
        (0.30, 0.05, 0.09, 0.15, ""),
        (0.30, 0.05, 0.10, 0.14, ""),
    ],
)
def test_collapse_and_scatter(recall, chance, random, margin, mark):
    results = example()
    results["weight_map"] = results["weight_map"][:1]
    found = {"recall@10": recall, "chance_recall@10": chance, "random_pair_cosine": random, "margin": margin}
    results["weight_map"].append({"align_weight": 1, "uniformity_weight": 1, "metrics": found})
    assert map_cells(Evidence(results))[1, 1][1] == mark


def test_spearman_is_the_correlation_of_ranks():
    first, second = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0], [2.0, 7.0, 1.0, 8.0, 2.0, 8.0, float("nan")]
    ranks = [3, 1.5, 4, 1.5, 5, 6], [2.5, 4, 1, 5.5, 2.5, 5.5]  # of the six that both have, ties in the middle
    rho = np.corrcoef(*ranks)[0, 1]
    p = 2 * student.sf(abs(rho) * np.sqrt(4 / (1 - rho**2)), df=4)
    found = spearman(first, second)
    assert found.n == 6
    np.testing.assert_allclose([found.rho, found.p], [rho, p], atol=1e-12)
    assert spearman(first, [1.0] * 7) is None and spearman([1, 2, 3], [1, 2, 3]) is None


def test_the_gap_is_set_against_scores_over_runs_and_over_means(evidence):
    gap, recall = GEOMETRY[0], TASKS[0]
    # Ranks of gaps and recalls: CLIP, ours (shared); CLIP twice, centered twice, ours twice (own).
    gaps, recalls = [6.5, 4, 6.5, 8, 1.5, 1.5, 3, 5], [1, 3.5, 3.5, 6, 3.5, 3.5, 7, 8]
    assert association(evidence, gap, recall).rho == pytest.approx(np.corrcoef(gaps, recalls)[0, 1], abs=1e-12)
    of_means = association(evidence, gap, recall, of_means=True)
    gaps, recalls = [4, 2, 5, 1, 3], [1, 2.5, 4, 2.5, 5]
    assert of_means.n == 5 and of_means.rho == pytest.approx(np.corrcoef(gaps, recalls)[0, 1], abs=1e-12)


def test_the_page_says_what_differs_and_what_does_not(evidence):
    text = report(evidence.results)
    assert text.startswith("# A small one\n\n40 training and 20 test pairs. No labels.\n\n- `python benchmarks/")
    assert "\n- date: 2026-11-26\n- minutes: 1.5\n" in text
    own = text.partition("At each method's own budget:\n\n")[2].partition("\n\n")[0]
    assert own.splitlines() == [
        "- In R@10, ours (58.0% against 51.0%, +7.0 points, p < 0.001) differs from CLIP (LT) (Holm's p below 0.05).",
        "- In R@10, CLIP, centered is not separable from CLIP (LT).",
        "- The gap as a ratio to that of CLIP (LT): CLIP, centered 0.24; ours 0.50.",
        "- The margin as a ratio to that of CLIP (LT): CLIP, centered 0.94; ours 1.50.",
    ]
    shared = text.partition("At the shared budget:\n\n")[2].partition("\n\n")[0]
    assert shared.startswith("- In R@10, ours was not tested against CLIP (LT).\n")
    assert "[arXiv 2103.00020](https://arxiv.org/abs/2103.00020)" in text and "Means \\| taken away." in text
    assert "out of a grid of 2." in text and "The budget: `num_train_epochs` 24." in text
    assert "![Curves](evidence_small_curves.png)" in text and "None" not in text and "nan" not in text


@pytest.mark.parametrize("margin", [0.0, -0.1, None, 0.004])
def test_there_is_no_ratio_to_a_margin_that_is_about_zero_or_less(margin):
    results = example()
    for entry in results["runs"]:
        if entry["method"] == "CLIP (LT)":
            entry["metrics"][MEAN]["margin"] = margin
    text = report(results)
    assert "The gap as a ratio" in text and "The margin as a ratio" not in text


def test_a_page_is_the_same_for_the_same_file_and_lacks_what_was_not_asked_for():
    results = example("all pairs")
    text = report(results)
    assert report(json.loads(json.dumps(results))) == text
    assert "All pairs; means over 2 seeds" in text and "\n## all in one" not in text.lower()
    for part in ("comparisons", "grid", "weight_map", "robustness", "figures", "budgets", "found", "machine"):
        del results[part]
    results["runs"] = results["runs"][:2]
    text = report(results)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["# A small one", "## In short", "## Methods", "## At the shared budget"]
    assert "≈" not in text and "°" not in text and "±" not in text and "No method was tested" in text
    results["runs"] = results["runs"][:1]  # nothing to compare with the baseline
    assert "## In short" not in report(results)


def test_each_source_follows_the_main_scope():
    results = example()
    for entry in results["runs"]:
        found = entry["metrics"][MEAN]
        entry["metrics"] = {"all in one gallery": found, "medpix2": found, MEAN: found}
    assert Evidence(results).scopes == [MEAN, "medpix2", "all in one gallery"]
    text = report(results)
    assert text.index("## At each method's own") < text.index("## medpix2") < text.index("## All in one gallery")


def test_captions_follow_with_what_each_kind_is_and_their_comparisons():
    text = report(with_captions())
    section = text.partition("\n## Captions\n\n")[2].partition("\n## ")[0]
    assert "20 images of the test split" in section and "means over 2 seeds" in section
    assert "with `max_caption_tokens=48`, in float32: the same" in section
    assert "pixels" not in section and "No noise" not in section
    assert "Captions are cut after 48 tokens; " in section
    head, *rows = cells(section.split("\n\n")[-1])
    assert head[:4] == ["captions", "metric", "method", "difference"]
    nearest = ["nearest caption", "CIDEr-D ↑", "ours", "+0.000", "-0.020 to +0.020", "0.500", "1.000"]
    assert rows[0] == [*nearest, "402", "2", "bootstrap over cases"]
    assert [row[:2] for row in rows[1:]] == [["text-only", "CIDEr-D ↑"], ["text-only", "ROUGE-L ↑"]]
    untested = with_captions()
    untested["captions"]["comparisons"] = []
    assert "Nothing was tested against captions with the encoder of CLIP (LT)." in report(untested)
    assert "Captions" not in report(example())
    unlimited = with_captions()
    unlimited["captions"]["settings"]["max_caption_tokens"] = None
    assert "Captions are cut where the text tower's input ends; " in report(unlimited)


def test_words_of_metrics():
    assert label_of("zero_shot_nll_ensemble") == "zero-shot negative log-likelihood, several templates ↓"
    assert label_of("recall@10") == "R@10, mean of both directions ↑"
    assert label_of("something_else") == "something_else"


def test_files_that_are_not_results_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="evidence_x.json; `python benchmarks/evidence.py` writes one"):
        read(tmp_path / "evidence_x.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="a.json is not a results file"):
        read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"title": "x", "runs": []}')
    with pytest.raises(ValueError, match="a.json lacks baseline, methods;"):
        read(tmp_path / "a.json")
