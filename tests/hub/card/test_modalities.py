"""What the card says of further modalities."""

import re

import pytest
from huggingface_hub import ModelCard

from gap_closed_clip.evaluation import write_metrics
from gap_closed_clip.hub.card_modalities import told_in_captions

from ..modality_models import FIELDS, WEIGHTS, model_of_four, processor_of_four
from .rendering import METRICS, blocks, render, section


@pytest.fixture
def four(tiny_processor, tmp_path, monkeypatch):
    """A folder of a model with a record and spectrograms, evaluated; its record has a long vocabulary."""
    monkeypatch.chdir(tmp_path)
    words = [f"ward {number}" for number in range(12)]
    fields = [*FIELDS[:3], {"name": "ward|`", "kind": "category", "categories": words}]
    model = model_of_four(fields, fusion_weights=WEIGHTS)
    model.save_pretrained(tmp_path / "demo")
    processor_of_four(tiny_processor, fields).save_pretrained(tmp_path / "demo")
    metrics = METRICS | {"caption_tells_record[sex]": 0.34, "caption_tells_record[age]": 0.0}
    write_metrics(tmp_path / "demo" / "metrics.json", {"demo": metrics}, {"phantom_size": 64}, "test")
    return tmp_path / "demo", model


def test_towers_fields_and_weights_are_those_of_the_folder(four):
    folder, model = four
    text = render(folder, repo_id="owner/four")
    own = section(text, "Further modalities")
    rows = re.findall(r"^\| `(.+?)` \| (\w+) \| (.+) \|$", own, flags=re.MULTILINE)
    shown = ", ".join(f"`ward {number}`" for number in range(10))
    assert rows == [
        ("sex", "category", "`female`, `male`"),
        ("age", "number", "mean 50, standard deviation 20"),
        ("birth", "date", "years to `study`: mean 50, standard deviation 20"),
        ("ward/'", "category", f"{shown}, and 2 more"),
    ]
    assert "`audio` takes an array of 24 x 16 numbers." in own and "learned embedding of its own" in own
    assert "`image` 1.5, `text` 2, `record` 0.25, `audio` 0.75." in own and "lacked modalities in training" in own
    for name in ("record", "audio"):
        number = sum(parameter.numel() for parameter in model.modality_towers[name].parameters())
        number += sum(buffer.numel() for buffer in model.modality_towers[name].buffers())
        assert f"- Tower of `{name}`: " in text and f"{number / 1e6:.3g} million parameters with its" in text
    assert "embeds images, captions and further modalities (record, audio) as unit vectors" in text
    assert "compare `image` with each other modality" in section(text, "Objective")
    limits = section(text, "Limits and biases")
    assert "`sex` in 34% of the samples" in limits and "such as age or sex, moves every" in limits
    assert len(blocks(own, "python")) == 2  # which a test of publishing runs
    assert ModelCard.load(folder / "README.md").data.model_name == "four"


def test_without_weights_and_an_anchor(four):
    folder, model = four
    model.config.fusion_weights, model.config.anchor = None, None
    model.save_pretrained(folder)
    text = render(folder, "data.on_missing=skip")
    assert "no weights were measured" in text and "compare every two modalities" in text
    assert "Samples of one modality alone were left out." in text


def test_a_model_of_two_modalities_says_nothing_of_others(folder):
    text = render(folder)
    assert "modalities are" not in text and "urther modalit" not in text and "record" not in text
    assert told_in_captions({"caption_tells_record[a b]": 0.5, "margin": 1.0}) == {"a b": 0.5}
