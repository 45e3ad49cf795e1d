"""The card of a model of several sources: each with its licence and its figures, none with a path of the machine."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard

from gap_closed_clip.data import DataArguments
from gap_closed_clip.evaluation import write_metrics
from gap_closed_clip.hub import write_examples

from .rendering import METRICS, PHANTOMS, render, section


ROCO = {"name": "roco", "source": "eltorio/ROCOv2-radiology", "license": "CC BY-NC 4.0", "subset": "small"}
OURS = {"name": "ours", "source": "/data/private/pairs.csv", "max_pairs": 500, "test_split": "held"}
DRAWN = {"name": "drawn", "source": "phantoms", "test_split": None}


def words(*sources: dict) -> list[str]:
    return [*PHANTOMS, f"data.source={yaml.safe_dump(list(sources), default_flow_style=True, width=9999).strip()}"]


@pytest.fixture
def measured(folder):
    """The folder measured on the two sources that have a test split, with another margin on each."""
    parts = {name: {"demo": METRICS | {"margin": margin}} for name, margin in (("roco", 0.25), ("ours", 0.75))}
    write_metrics(folder / "metrics.json", {"demo": METRICS}, {"source": [ROCO, OURS, DRAWN]}, "test", sources=parts)
    return folder


def test_each_source_with_its_licence(measured):
    text = render(measured, *words(ROCO, OURS, DRAWN), "mix_sources=false", num_train_pairs=900)
    lines = [line for line in section(text, "Training data").splitlines() if line]
    assert lines[:5] == [
        "Image-caption pairs of 3 sources, trained on together, each batch of pairs of one of them.",
        "- [`eltorio/ROCOv2-radiology`](https://huggingface.co/datasets/eltorio/ROCOv2-radiology) (`small`), split "
        "`train`. Licence of the pairs: CC BY-NC 4.0.",
        "- `ours`, a local copy, split `train`, the first 500 pairs of it. This card does not know their licence: see "
        "their source.",
        "- `drawn`, drawn by a program and not medical, split `train`. Licence: Apache-2.0.",
        "- In all, 900 pairs were trained on.",
    ]
    prose = text.replace(section(text, "Training command"), "")  # the configuration says it, as of one source
    assert "/data/private" not in prose
    assert "do not use it on medical images" not in text
    assert ModelCard.load(measured / "README.md").data.datasets == ["eltorio/ROCOv2-radiology"]
    assert "trained on together.\n" in render(measured, *words(ROCO, OURS))


def test_figures_of_each_source(measured):
    text = section(render(measured, *words(ROCO, OURS, DRAWN)), "Evaluation")
    assert (
        "On 97 pairs of `eltorio/ROCOv2-radiology` (split `test`) and `ours` (split `held`). One" in text
        and "Each source was also measured by itself" in text
    )
    assert re.search(r"\| metric +\| all in one gallery \| +roco \| +ours \| mean of the sources \|", text)
    assert re.search(r"\| margin \(true - random\) ↑ +\| +0.674 \| 0.250 \| 0.750 \| +0.500 \|", text)
    found = ModelCard.load(measured / "README.md").data.eval_results
    margins = {
        (result.dataset_type, result.dataset_config, result.dataset_split): result.metric_value
        for result in found
        if result.metric_type == "margin"
    }
    assert margins == {("eltorio/ROCOv2-radiology", "small", "test"): 0.25, ("ours", None, "held"): 0.75}
    (path,) = (measured / ".eval_results").iterdir()  # of the Hub's data set alone
    entries = yaml.safe_load(path.read_text())
    assert path.name == "roco.yaml" and [e["value"] for e in entries if "margin" in str(e)] == [0.25]


def test_a_list_of_one_reads_like_one(folder):
    write_metrics(
        folder / "metrics.json", {"demo": METRICS}, {"source": [OURS]}, "test", sources={"ours": {"demo": METRICS}}
    )
    text = render(folder, *words(OURS), num_train_pairs=9)
    assert "Image-caption pairs of `ours`, a local copy. This card does not know" in section(text, "Training data")
    assert "- Split: `train`, the first 500 pairs of it; 9 pairs were trained on." in text
    evaluation = section(text, "Evaluation")
    assert "On 97 pairs of `ours` (split `held`). One" in evaluation and "by itself" not in evaluation


def test_several_phantoms_are_phantoms(folder, tmp_path):
    two = [{**DRAWN, "phantom_test_pairs": 30, "phantom_size": 40}, {**DRAWN, "name": "more"}]
    text = render(folder, *words(*two))
    assert "They are not medical images" in section(text, "Training data") and "do not use it on medical" in text
    write_examples(tmp_path, DataArguments(source=two))
    assert list((tmp_path / "examples").glob("*.png"))
    write_examples(tmp_path / "mixed", DataArguments(source=[*two, OURS]))
    assert not (tmp_path / "mixed").exists()


def test_damaged_sources_are_named(folder):
    for source in (3, [{"name": "a"}]):
        write_metrics(folder / "metrics.json", {"demo": METRICS}, {"source": source}, "test")
        with pytest.raises(ValueError, match="metrics.json: data.source.*Write it anew"):
            render(folder, *PHANTOMS)
