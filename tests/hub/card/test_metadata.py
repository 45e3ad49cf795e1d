"""The metadata of the card, its examples, and the results for leaderboards."""

import io
import json

import numpy as np
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image

from gap_closed_clip.data import DataArguments, load_pairs
from gap_closed_clip.evaluation import write_metrics
from gap_closed_clip.hub import write_examples

from .rendering import METRICS, OF_THE_HUB, render, section


def test_metadata_of_phantoms_round_trips(folder):
    render(folder)
    data = ModelCard.load(folder / "README.md").data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert {"custom_code", "gap-closed-clip", "sentence-transformers"} <= set(data.tags)
    assert data.model_name == "demo"
    assert data.license is None and data.base_model is None and data.datasets is None
    assert "license" not in data.to_yaml()
    measured = json.loads((folder / "metrics.json").read_text())["results"]["demo"]
    headlines = {result.metric_type: result.metric_value for result in data.eval_results}
    assert headlines == {metric: measured[metric] for metric in data.metrics}
    assert set(headlines) == {
        "modality_gap",
        "debiased_modality_gap",
        "true_pair_cosine",
        "margin",
        "text_to_image_recall@10",
        "image_to_text_recall@10",
    }
    first = data.eval_results[0]
    assert (first.dataset_type, first.dataset_split, first.metric_name) == ("phantoms", "test", "modality gap")


def test_metadata_of_hub_ids(folder):
    data = {"source": OF_THE_HUB[2].partition("=")[2], "test_split": "held"}
    write_metrics(folder / "metrics.json", {"demo": METRICS}, data, "test")
    text = render(folder, *OF_THE_HUB, repo_id="somebody/roco-clip", license="cc-by-nc-4.0")
    data = ModelCard.load(folder / "README.md").data
    assert data.base_model == ["timm/eva_giant_patch14_clip_224.laion400m", "google-bert/bert-base-uncased"]
    assert data.datasets == ["eltorio/ROCOv2-radiology"]
    assert data.license == "cc-by-nc-4.0" and data.model_name == "roco-clip"
    assert data.eval_results[0].dataset_type == "eltorio/ROCOv2-radiology"
    assert data.eval_results[0].dataset_split == "held"
    assert "https://huggingface.co/datasets/eltorio/ROCOv2-radiology" in section(text, "Training data")
    assert "split `held`" in section(text, "Evaluation")
    assert text.count('"somebody/roco-clip", trust_remote_code=True)') == 7
    assert "hantom" not in text and "drawn" not in text


def test_local_sources_are_no_hub_ids(folder, tmp_path):
    for path in ("towers/vision", "minilm", "private/pairs.csv"):
        (tmp_path / path).mkdir(parents=True)
    source = tmp_path / "private" / "pairs.csv"
    text = render(folder, "model.vision=towers/vision", "model.text=minilm", f"data.source={source}")
    data = ModelCard.load(folder / "README.md").data
    assert data.base_model is None and data.datasets is None
    assert "`pairs.csv`, a local copy" in section(text, "Training data")
    text = render(folder, "model.checkpoint=package:some_package/weights", "data.source=$RADIOLOGY_DATA/medpix2")
    data = ModelCard.load(folder / "README.md").data
    assert data.base_model is None and data.datasets is None
    assert text.count("started from `package:some_package/weights`") == 2 and "`medpix2`, a local copy" in text


def test_examples_are_the_widget(folder):
    for name in ("chest_CT.png", "brain_MR.png", "notes.txt"):
        (folder / "examples" / name).parent.mkdir(exist_ok=True)
        (folder / "examples" / name).touch()
    render(folder, repo_id="owner/name")
    address = "https://huggingface.co/owner/name/resolve/main/examples"
    labels = "brain MR, chest CT"
    assert ModelCard.load(folder / "README.md").data.widget == [
        {"src": f"{address}/brain_MR.png", "candidate_labels": labels, "example_title": "brain MR"},
        {"src": f"{address}/chest_CT.png", "candidate_labels": labels, "example_title": "chest CT"},
    ]
    (folder / "examples" / "brain_MR.png").unlink()  # a single label tells nothing apart
    render(folder, repo_id="owner/name")
    assert ModelCard.load(folder / "README.md").data.get("widget") is None


def test_examples_are_held_out_phantoms_and_of_nobody_else(tmp_path):
    data = DataArguments(phantom_train_pairs=40, phantom_test_pairs=60, phantom_size=40)
    write_examples(tmp_path, data)
    names = {path.stem for path in (tmp_path / "examples").iterdir()}
    assert names == {"chest_radiograph", "chest_CT", "brain_MR", "ultrasound", "mammogram"}
    drawn = {name: load_pairs(data, name)["image"] for name in ("train", "test")}
    shown = {np.asarray(Image.open(path)).tobytes() for path in (tmp_path / "examples").iterdir()}
    pixels = {
        name: {np.asarray(Image.open(io.BytesIO(image["bytes"]))).tobytes() for image in images}
        for name, images in drawn.items()
    }
    assert shown <= pixels["test"] and not shown & pixels["train"]
    write_examples(tmp_path / "real", DataArguments(source="hospital/pairs"))
    assert not (tmp_path / "real").exists()


def test_eval_results_of_hub_data_sets(folder):
    source = OF_THE_HUB[2].partition("=")[2]
    write_metrics(folder / "metrics.json", {"demo": METRICS}, {"source": source, "test_split": "held"}, "test")
    render(folder, *OF_THE_HUB)
    (path,) = (folder / ".eval_results").iterdir()
    assert path.name == "ROCOv2-radiology.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert {entry.dataset_id for entry in entries} == {source}
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert [entry.value for entry in entries] == [result.metric_value for result in results] and len(entries) == 6
    assert entries[4].task_id == "text_to_image_recall_at_10" and entries[4].notes == "split held; text to image R@10"
    write_metrics(folder / "metrics.json", {"demo": METRICS}, {}, "test")
    render(folder)  # phantoms are no data set of the Hub
    assert not (folder / ".eval_results").exists()
