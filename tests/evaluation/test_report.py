"""The table as text, metrics.json as a file."""

import json
import math

import pytest

from gap_closed_clip.evaluation import (
    Evaluation,
    evaluate_embeddings,
    metrics_table,
    read_metrics,
    report,
    write_metrics,
    write_report,
)

from .conftest import synthetic


def test_table_written_out():
    clip = {"modality_gap": 0.39, "text_to_image_recall@10": 0.321, "text_to_image_median_rank": 17.5, "nmi": 0.1}
    ours = {"modality_gap": 0.1234, "text_to_image_recall@10": 0.395, "num_pairs": 512.0}
    assert metrics_table({"CLIP": clip, "ours": ours}) == (
        "| metric                      |  CLIP |  ours |\n"
        "| --------------------------- | ----: | ----: |\n"
        "| modality gap ↓              | 0.390 | 0.123 |\n"
        "| text to image R@10 ↑        | 32.1% | 39.5% |\n"
        "| text to image median rank ↓ |  17.5 |     - |\n"
        "| pairs                       |     - |   512 |"
    )


def test_several_runs_are_mean_and_standard_deviation():
    runs = [
        {"margin": 0.1, "v_measure": 0.2},
        {"margin": 0.2, "v_measure": 0.2},
        {"margin": 0.6, "v_measure": math.nan},
    ]
    lines = metrics_table({"ours": runs}).splitlines()
    assert lines[2] == "| margin (true - random) ↑ | 0.300 ± 0.265 |"
    assert lines[3] == "| V-measure ↑              |             - |"


def test_every_metric_has_a_row():
    """All but nmi, which equals the V-measure; chance and the mean of both directions at 10 alone."""
    metrics = evaluate_embeddings(synthetic())
    left_out = {"nmi", "recall@1", "recall@5", "chance_recall@1", "chance_recall@5"}
    left_out |= {f"{way}_chance_recall@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    assert len(metrics_table({"ours": metrics}).splitlines()) == 2 + len(metrics.keys() - left_out)


def test_chance_and_majority_stand_below_what_they_belong_to():
    """And show no direction that would be better."""
    table = metrics_table({"ours": evaluate_embeddings(synthetic())})
    names = [line.split("|")[1].strip() for line in table.splitlines()]
    above = {
        "chance: R@10, mean of both directions": "R@10, mean of both directions ↑",
        "chance: other kind in nearest 10": "mixed gallery: other kind in nearest 10",
        "chance: label precision": "mixed gallery: label precision ↑",
        "majority label, images to captions": "linear probe, captions to images ↑",
        "chance: balanced accuracy": "balanced linear probe, captions to images ↑",
    }
    assert {name: names[names.index(name) - 1] for name in above} == above
    assert [name for name in names if name.startswith("chance")] == [name for name in above if "chance" in name]


def test_metrics_file_round_trip(tmp_path):
    results = {"ours": {"modality_gap": 0.1, "v_measure": math.nan, "num_pairs": 3.0}, "CLIP": {"modality_gap": 0.4}}
    path = tmp_path / "new" / "metrics.json"
    write_metrics(path, results, {"source": "phantoms"}, "test")
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["data"] == {"source": "phantoms"} and content["split"] == "test"
    assert {"torch", "transformers", "gap_closed_clip", "python"} <= set(content["versions"])
    found = read_metrics(path)
    assert found["CLIP"] == results["CLIP"] and math.isnan(found["ours"]["v_measure"])
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.json"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "metrics.json"
    write_metrics(path, {"ours": {"margin": 0.1}}, {}, "test")
    with pytest.raises(ValueError):
        write_metrics(path, {"ours": {"margin": math.inf}}, {}, "test")
    assert read_metrics(path) == {"ours": {"margin": 0.1}}


def test_bad_metrics_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="metrics.json; `gap-closed-clip eval` writes one"):
        read_metrics(tmp_path / "metrics.json")
    for text in ('{"results": {"ours"', "[]", "{}"):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(ValueError, match="metrics.json is not a metrics file"):
            read_metrics(tmp_path / "metrics.json")


def test_report_folder(tmp_path):
    embeddings = {"CLIP": synthetic(gap=0.4), "ours": synthetic()}
    results = {name: evaluate_embeddings(found) for name, found in embeddings.items()}
    evaluations = {name: Evaluation(results[name], embeddings[name]) for name in results}
    table = write_report(tmp_path / "report", evaluations, {"source": "phantoms"}, "test")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "metrics.json",
        "metrics.md",
        "projection.png",
        "cosines.png",
    }
    assert (tmp_path / "report" / "metrics.md").read_text() == table + "\n"
    assert read_metrics(tmp_path / "report" / "metrics.json") == results


def test_figures_of_an_earlier_evaluation_do_not_stay_beside_other_metrics(tmp_path, monkeypatch):
    """A card shows the figures that lie beside metrics.json, whatever broke off the evaluation that wrote that."""

    def interrupted(*args):
        raise KeyboardInterrupt

    evaluation = Evaluation.of(synthetic(gap=0.4), evaluate_embeddings)
    write_report(tmp_path, {"CLIP": evaluation}, {"source": "phantoms"}, "test")
    figures = {"projection.png", "cosines.png"}
    with monkeypatch.context() as patch:
        patch.setattr(report, "plot_projection", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_report(tmp_path, {"ours": evaluation}, {"source": "phantoms"}, "test")
    assert list(read_metrics(tmp_path / "metrics.json")) == ["ours"]
    assert not figures & {path.name for path in tmp_path.iterdir()}
    write_report(tmp_path, {"ours": evaluation}, {"source": "phantoms"}, "test")
    with monkeypatch.context() as patch:
        patch.setattr(report, "write_metrics", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_report(tmp_path, {"CLIP": evaluation}, {"source": "phantoms"}, "test")
    assert figures <= {path.name for path in tmp_path.iterdir()}  # as metrics.json, which is the one from before
    write_report(tmp_path, {"a captioner": Evaluation({"cider_d": 1.0})}, {"source": "phantoms"}, "test")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "metrics.md"}
