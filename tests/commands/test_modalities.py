"""`gap-closed-clip eval` and `center` of a model with records, as a user calls them."""

import json
import re

import numpy as np
import pytest
import yaml
from conftest import CAPTIONS, noise_image
from evaluation.records import record_model
from transformers import AutoModel

from gap_closed_clip.checkpoint import load_checkpoint
from gap_closed_clip.data import DataArguments, load_pairs
from gap_closed_clip.evaluation import embed_pairs, evaluate_embeddings, read_metrics
from gap_closed_clip.evaluation.post_hoc import METHODS


DATA = {
    "source": "phantoms",
    "phantom_train_pairs": 40,
    "phantom_validation_pairs": 24,
    "phantom_test_pairs": 12,
    "phantom_size": 32,
    "modalities": {"record": ["age", "sex"]},
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    model, processor = record_model()
    model.save_pretrained("outputs/ours")
    processor.save_pretrained("outputs/ours")
    (tmp_path / "outputs/ours/train_config.yaml").write_text(yaml.safe_dump({"data": DATA}))
    return "outputs/ours"


def test_eval(command, folder):
    code, out, err = command("eval", folder, "num_workers=0", "split=validation")
    assert code == 0, err
    for title in (
        "every two modalities",
        "two modalities as one query, R@10",
        "fields of the record from the caption",
    ):
        assert f"### ours: {title}" in out
    assert re.search(r"Captions tell, word for word, .*'age' in \d+%", out)
    assert "| image + record to text |" in out and "| image - record |" in out
    metrics = read_metrics("outputs/eval/metrics.json")["ours"]
    expected = evaluate_embeddings(
        embed_pairs(*load_checkpoint(folder), load_pairs(DataArguments(**DATA), "validation"))
    )
    assert metrics.keys() == expected.keys()
    assert metrics["image_record_margin"] == pytest.approx(expected["image_record_margin"], abs=1e-5)
    with open("outputs/eval/metrics.md", encoding="utf-8") as file:
        assert "image - record" in file.read()
    config = json.loads(open(f"{folder}/config.json").read())
    assert config.get("fusion_weights") is None


def test_own_weights_of_a_model(command, folder):
    model, _ = load_checkpoint(folder)
    model.config.fusion_weights = {"image": 3.0, "text": 3.0, "record": 1.0}
    model.save_pretrained(folder)
    code, out, err = command("eval", folder, "num_workers=0", "split=validation")
    assert code == 0, err
    metrics = read_metrics("outputs/eval/metrics.json")["ours"]
    assert metrics["image+record_to_text_weight_image"] == pytest.approx(0.75)


def test_sources_apart(command, folder, tmp_path):
    sources = [{"source": "phantoms", "name": name} for name in ("a", "b")]
    own = {**DATA, "source": sources}
    (tmp_path / "outputs/ours/train_config.yaml").write_text(yaml.safe_dump({"data": own}))
    code, out, err = command("eval", folder, "num_workers=0", "split=test")
    assert code == 0, err
    assert "### ours, a: every two modalities" in out


@pytest.mark.parametrize("method", METHODS)
def test_center(command, folder, method):
    code, out, err = command("center", folder, f"method={method}", "num_workers=0")
    assert code == 0, err
    new = f"outputs/ours-{method}"
    before, after = read_metrics(f"{new}/metrics.json").values()
    model = AutoModel.from_pretrained(new)
    assert model.config.modality_names == ("image", "text", "record")
    held_out = load_pairs(DataArguments(**DATA), "validation")
    found = evaluate_embeddings(embed_pairs(*load_checkpoint(new), held_out), grouping=False)
    for name in ("image_record_margin", "text_record_modality_gap", "centroid_spread"):
        assert found[name] == pytest.approx(after[name], abs=2e-4), name
    assert after["centroid_spread"] < before["centroid_spread"]
    if method == "centering":
        features = embed_pairs(*load_checkpoint(new), load_pairs(DataArguments(**DATA), "train"), normalize=False)
        for name in features.modalities:
            mean = features.having(name).embeds(name).mean(axis=0)
            assert np.abs(mean).max() < 1e-5, name


def test_center_where_no_held_out_sample_has_image_and_caption(command, folder, tmp_path):
    rows = ["image,caption,age,sex,split"]
    for number in range(24):
        noise_image(60, (32, 32), seed=number).save(tmp_path / f"{number}.png")
        image, caption = f"{number}.png", f"{CAPTIONS[number % 6]} {CAPTIONS[number // 6]}"
        kept = (image, caption) if number < 12 else (image, "") if number % 2 else ("", caption)
        rows.append(",".join([*kept, str(30 + number), "fm"[number % 3 == 0], "train" if number < 12 else "val"]))
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    code, out, err = command("center", folder, "data.source=pairs.csv", "num_workers=0")
    assert code == 0, err
    assert "The model is in outputs/ours-centering." in out and "R@10 (mean of both directions) fell" not in out
    after = read_metrics("outputs/ours-centering/metrics.json")["ours-centering"]
    assert "image_to_record_recall@10" in after and "recall@10" not in after


def test_eval_of_models_of_different_records(command, folder, caplog):
    model, processor = load_checkpoint(folder)
    model.save_pretrained("outputs/narrow")
    processor.save_pretrained("outputs/narrow")
    wider = {"record": ["age", "sex", "organ"], "size": ["finding_size"]}
    settings = [f"data.modalities={json.dumps(wider)}", "num_workers=1", "split=test"]
    code, _, err = command("eval", folder, "outputs/narrow", *settings)
    assert code == 0, err
    for name in ("ours", "narrow"):
        assert caplog.messages.count(f"{name}: the data's organ is not a field of its record.") == 1
        assert caplog.messages.count(f"{name} does not embed 'size' (it has record): left out.") == 1


def test_eval_says_in_one_line_which_record_is_wrong(command, folder, tmp_path):
    rows = ["image,caption,age,sex"]
    for number in range(6):
        noise_image(60, (32, 32), seed=number).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{CAPTIONS[number]},{'62 y' if number == 4 else 30 + number},f")
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    code, _, err = command(
        "eval", folder, "data.source=pairs.csv", "data.test_split=train", "split=test", "batch_size=2"
    )
    told = "gap-closed-clip eval: The pairs' 'record': Record, row 4 (from 0), field 'age': '62 y' is no number."
    assert code == 1 and err.splitlines()[-1].startswith(told) and "Traceback" not in err, err


@pytest.mark.parametrize("method", ["centering", "whitening"])
def test_center_measures_queries_with_the_weights_of_the_model(command, folder, method):
    model, _ = load_checkpoint(folder)
    weights = model.config.fusion_weights = {"image": 3.0, "text": 3.0, "record": 1.0}
    model.save_pretrained(folder)
    code, out, err = command("center", folder, f"method={method}", "num_workers=0")
    assert code == 0, err
    before, after = read_metrics(f"outputs/ours-{method}/metrics.json").values()
    name = "image+record_to_text_weight_image"
    assert before[name] == pytest.approx(0.75)
    saved = AutoModel.from_pretrained(f"outputs/ours-{method}").config.fusion_weights
    assert saved == (weights if method == "centering" else None)
    assert (after[name] == pytest.approx(0.75)) == (method == "centering")
