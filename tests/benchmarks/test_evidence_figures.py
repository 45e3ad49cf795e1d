"""What the figures of a report of evidence.py draw."""

import numpy as np
import pytest
from evidence_figures import GREY, draw, looks, plot_curves, plot_gap_and_scores, plot_robustness, plot_weight_map
from evidence_results import Evidence
from matplotlib.colors import to_hex

from .evidence_example import example


@pytest.fixture
def evidence():
    return Evidence(example())


def test_curves_are_means_with_bands_of_one_deviation(evidence):
    evidence.runs[3]["curve"] = [[0.0, 1.0, 0.3], [0.5, 0.6, 0.3], [1.0, 0.2, 0.4]]  # the second seed of CLIP
    figure = plot_curves(evidence)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        f"{what}, {at}" for at in ("shared budget", "own budgets") for what in ("modality gap", "true-pair cosine")
    ]
    gap = figure.axes[2]
    clip, _ = gap.lines
    assert len(gap.lines) == 2 and len(gap.collections) == 2  # post-hoc methods have no curve
    np.testing.assert_allclose(clip.get_ydata()[[0, 50, 100]], [0.9, 0.55, 0.2])
    band = gap.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose([band[:, 1].max(), band[:, 1].min()], [0.9 + 0.1 * 2**0.5, 0.2], atol=1e-9)
    assert not figure.axes[0].collections  # of one seed


def test_what_is_not_separable_is_grey(evidence):
    figure = plot_gap_and_scores(evidence)
    recall, rank, _ = figure.axes
    shown = {
        (collection.get_offsets()[0][0], collection.get_offsets()[0][1]): to_hex(collection.get_edgecolor()[0])
        for collection in recall.collections
    }
    colors = {name: look.color.lower() for name, look in looks(evidence).items()}
    assert shown[0.05, 0.50] == GREY.lower()  # CLIP, centered
    assert shown[0.09, 0.56] == colors["ours"] and shown[0.20, 0.50] == colors["CLIP (LT)"]
    assert [text.get_text() for text in rank.texts][0].endswith(", not tested")
    assert [text.get_text() for text in recall.texts][0].startswith("ρ = ")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:3] == list(evidence.results["methods"]) and labels[-1] == "not separable from the baseline"


def test_the_map_has_numbers_and_marks(evidence):
    recall, margin, random = plot_weight_map(evidence).axes
    assert [text.get_text() for text in recall.texts if text.get_text()] == ["50%", "40%", "10%", "52%"]
    assert [text.get_text() for text in random.texts if text.get_text()] == ["0.06", "0.01", "0.90", "0.05"]
    marks = {patch.get_hatch(): patch.get_xy() for patch in margin.patches}
    assert marks == {"....": (0.5, -0.5), "////": (-0.5, 0.5)}
    assert [text.get_text() for text in margin.get_figure().legends[0].get_texts()] == ["scatter", "collapse"]


def test_long_trainings_have_a_line_for_each_method(evidence):
    (axes,) = plot_robustness(evidence).axes
    clip, ours = axes.lines
    assert list(clip.get_xdata()) == [6, 24] and list(clip.get_ydata()) == [0.5, 0.4]
    assert list(ours.get_ydata()) == [0.47, 0.48]


def test_many_methods_look_different():
    results = example()
    results["methods"] |= {f"method {number}": {} for number in range(11)}
    found = looks(Evidence(results))
    assert len({(look.color, look.dash) for look in found.values()}) == len(found) == 14
    assert len({look.marker for look in found.values()}) == 14


def test_figures_are_the_same_bytes_and_absent_parts_are_not_drawn(tmp_path):
    results = example()
    for part in ("weight_map", "grid"):
        del results[part]
    for entry in results["runs"]:
        entry["curve"] = []
        entry["metrics"] = {}
    files = draw(results, tmp_path / "a")
    assert files == {"robustness": "evidence_small_robustness.png"}
    draw(results, tmp_path / "b")
    first, second = ((tmp_path / name / files["robustness"]).read_bytes() for name in ("a", "b"))
    assert first == second and first.startswith(b"\x89PNG")
