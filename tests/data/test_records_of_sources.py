"""Records that sources make of their columns: tables, ROCO's layout, phantoms, MedPix 2.0."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from datasets import Array2D, ClassLabel, Dataset, Features, Value

from gap_closed_clip.data import DataArguments, load_pairs
from gap_closed_clip.model.record_processing_gap_closed_clip import RecordProcessor

from .conftest import draw, train_folder


ARRAY = [[1.0, 2.0], [3.0, 4.0]]
MEDPIX = Path(os.environ.get("RADIOLOGY_DATA", "/nowhere")) / "medpix2"


def test_a_record_of_classes_and_of_columns_that_have_other_uses(tmp_path):
    features = Features(
        {"image": Value("string"), "caption": Value("string"), "label": ClassLabel(names=["cat", "dog"])}
        | {"seen": Value("timestamp[s]"), "spectrogram": Array2D((2, 2), "float32"), "path": Value("string")}
    )
    np.save(tmp_path / "array.npy", np.array(ARRAY))
    rows = {
        "image": [draw(tmp_path / "0.png", 0), draw(tmp_path / "1.png", 1)],
        "caption": ["a", "b"],
        "label": [1, -1],
        "seen": [None, "2020-02-03"],
        "spectrogram": [ARRAY, None],
        "path": ["array.npy", None],
    }
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    modalities = {"record": ["label", "seen"], "sound": "spectrogram", "file": "path"}
    pairs = load_pairs(
        DataArguments(source=str(tmp_path / "train.parquet"), modalities=modalities, image_root=str(tmp_path)), "train"
    )
    assert pairs["label"] == ["dog", ""]
    assert pairs[0]["record"] == {"label": "dog", "seen": None}
    assert pairs[1]["record"]["label"] is None and pairs[1]["record"]["seen"].isoformat()[:10] == "2020-02-03"
    assert np.asarray(pairs[0]["sound"]).tolist() == ARRAY and pairs[1]["sound"] is None
    assert pairs[0]["file"] == {"bytes": None, "path": str(tmp_path / "array.npy")} and pairs[1]["file"] is None


def test_roco_with_records(roco):
    lines = [{"id": "train_0", "age": 60}, {"id": "train_1", "age": None}, {"id": "other", "age": 3}]
    (train_folder(roco) / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (train_folder(roco) / "images" / "train_2.png").unlink()
    (train_folder(roco) / "images" / "train_0.png").rename(train_folder(roco) / "images" / "other.png")
    args = DataArguments(source=str(roco), modalities={"record": ["age"]}, on_missing="skip")
    pairs = load_pairs(args, "train")
    assert [(row["caption"], row["image_id"], row["record"]) for row in pairs] == [
        ("caption 0 ü", "", {"age": 60}),
        ("caption 1 ü", "train_1", None),
        ("", "other", {"age": 3}),
    ]
    with pytest.raises(ValueError, match=r"samples of one modality alone: 1 \(row 2: the text\)"):
        load_pairs(DataArguments(source=str(roco), modalities={"record": ["age"]}, on_missing="error"), "train")


def test_records_of_phantoms():
    args = DataArguments(
        phantom_train_pairs=60, phantom_size=32, modalities={"record": ["age", "sex", "organ", "finding_size"]}
    )
    pairs, plain = (
        load_pairs(args, "train"),
        load_pairs(DataArguments(phantom_train_pairs=60, phantom_size=32), "train"),
    )
    assert pairs["caption"] == plain["caption"] and pairs["image"] == plain["image"]
    processor = RecordProcessor.fit(pairs["record"])
    assert processor.field_names == ["age", "finding_size", "sex", "organ"]
    batch = processor(pairs["record"])
    given = np.array([[row["age"] is not None, row["finding_size"] is not None] for row in pairs])
    assert (batch["numbers_mask"].numpy() == given).all() and not given.all()
    ages = np.array([row["age"] for row in pairs if row["age"] is not None], np.float64)
    standardised = batch["numbers"][batch["numbers_mask"][:, 0], 0].numpy()
    np.testing.assert_allclose(standardised, (ages - ages.mean()) / ages.std(), atol=1e-5)


@pytest.mark.skipif(not MEDPIX.is_dir(), reason="needs RADIOLOGY_DATA with medpix2")
@pytest.mark.parametrize("fields", [["age", "sex"], ["age", "sex", "location_category", "modality", "plane"]])
def test_records_of_medpix(fields):
    args = DataArguments(source=str(MEDPIX), modalities={"record": fields})
    pairs = load_pairs(args, "train")
    lines = [json.loads(line) for line in open(MEDPIX / "train" / "radiology" / "metadata.jsonl", encoding="utf-8")]
    metadata = {line["id"]: {field: line[field] for field in fields} for line in lines}
    assert all((row["record"] or dict.fromkeys(fields)) == metadata[row["image_id"]] for row in pairs)
    processor = RecordProcessor.fit(pairs["record"])
    assert processor.field_names == fields
    ages = np.array([float(line["age"]) for line in lines if line["age"]])
    assert processor.fields[0]["mean"] == pytest.approx(ages.mean())
    held_out = processor(load_pairs(args, "validation")["record"])
    known = {field["name"]: set(field["categories"]) for field in processor.fields if field["kind"] == "category"}
    lines = [
        json.loads(line) for line in open(MEDPIX / "validation" / "radiology" / "metadata.jsonl", encoding="utf-8")
    ]
    unknown = sum(
        line[name] is not None and line[name] not in words for line in lines for name, words in known.items()
    )
    assert (held_out["categories"] == 1).sum().item() == unknown
