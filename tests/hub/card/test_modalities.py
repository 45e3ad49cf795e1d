"""What the card says of further modalities."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from PIL import Image

from gap_closed_clip import GapClosedClipProcessor
from gap_closed_clip.evaluation import write_metrics
from gap_closed_clip.hub import write_card
from gap_closed_clip.hub.card_modalities import told_in_captions
from gap_closed_clip.hub.samples import records
from gap_closed_clip.model.record_processing_gap_closed_clip import RecordProcessor
from gap_closed_clip.training import load_config

from ..modality_models import FIELDS, WEIGHTS, model_of_four, processor_of_four
from .rendering import METRICS, PHANTOMS, blocks, render, section


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
    assert "takes any text, number or boolean" in own and "a value of a number or a date that is none" in own
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


def test_an_adapter_shows_a_query_of_image_and_record_with_its_own_weights(four, monkeypatch):
    folder, model = four
    adapter = folder.parent / "adapter"
    peft = get_peft_model(model, LoraConfig(target_modules=["query"]))
    peft.peft_config["default"].base_model_name_or_path = str(folder)
    peft.save_pretrained(adapter)
    peft.unload()
    processor = GapClosedClipProcessor.from_pretrained(folder)
    processor.save_pretrained(adapter)
    config = load_config([], PHANTOMS)
    config.save(adapter / "train_config.yaml")
    (adapter / "run.json").write_text(json.dumps({"fusion_weights": {**WEIGHTS, "record": 3.5}}))
    write_card(adapter)
    own = section((adapter / "README.md").read_text(encoding="utf-8"), "Further modalities")
    assert "`record` 3.5" in own and "no weights were measured" not in own
    (code,) = blocks(own, "python")
    monkeypatch.chdir(folder.parent)
    Image.new("RGB", (40, 40)).save("image.png")
    names = {"model": model.eval(), "processor": processor}
    exec(code, names)
    embeds = names["embeds"]
    expected = 1.5 * embeds["image"].double() + 3.5 * embeds["record"].double()
    torch.testing.assert_close(names["query"].double(), expected / expected.norm(), atol=1e-6, rtol=0)


def test_figures_and_items_of_a_model_of_two_and_of_four(four, folder):
    def show(folder):
        (folder / "projection.png").touch()
        (folder / "modules.json").write_text("[]")
        return " ".join(render(folder).split())

    text = show(four[0])
    assert "between those two of their means that are farthest apart" in text and "Both modalities seen" not in text
    assert "the sum of its two unit vectors with the weights 1.5 (image) and 2 (text), normalised" in text
    text = show(folder)
    assert "Both modalities seen along the direction from the mean caption to the mean image" in text
    assert "an item of both is the mean of its two unit vectors, normalised" in text


def test_numbers_of_an_example_are_as_people_write_them():
    fields = [{"name": "a", "kind": "number", "mean": 47.312345, "std": 19.83}]
    fields += [{"name": "b", "kind": "number", "mean": 0.0123456, "std": 0.00234}]
    full, _ = records(RecordProcessor(fields))
    assert full == {"a": 67.0, "b": 0.0147}
