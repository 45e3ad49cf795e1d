"""ROCO's layout. Expected pairs are written out by hand."""

import gzip
import json
import logging
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest

from gap_closed_clip.data import DataArguments, load_pairs
from gap_closed_clip.data.roco import read_captions

from .conftest import add_caption, draw, gray_of, train_folder


def test_roco_pairs(roco):
    pairs = load_pairs(DataArguments(source=str(roco)), "train")
    assert pairs.features["image"] == datasets.Image(decode=False)
    path = str(train_folder(roco) / "images" / "train_1.png")
    assert pairs[1] == {
        "image": {"bytes": None, "path": path}, "caption": "caption 1 ü", "image_id": "train_1"
    }  # fmt: skip
    assert [gray_of(row) for row in pairs] == [0, 1, 2]
    assert load_pairs(DataArguments(source=str(roco)), "validation")["image_id"] == [
        "validation_0", "validation_1", "validation_2"
    ]  # fmt: skip


def test_roco_gzipped_captions_and_windows_lines(roco):
    file = train_folder(roco) / "captions.txt"
    text = file.read_text(encoding="utf-8").replace("\n", "\r\n")
    file.unlink()
    with gzip.open(train_folder(roco) / "captions.txt.gz", "wt", encoding="utf-8-sig", newline="") as gz:
        gz.write(text)
    pairs = load_pairs(DataArguments(source=str(roco)), "train")
    assert pairs["caption"] == [f"caption {index} ü" for index in range(3)]
    assert pairs["image_id"][0] == "train_0"  # no byte order mark


def test_roco_metadata_gives_columns_and_labels(roco):
    records = [
        {"file_name": "images/train_2.png", "id": "train_2", "caption": "other", "modality": "CT", "plane": "axial",
         "case_id": 7, "findings": ["a"]},
        {"file_name": "images/train_0.png", "modality": "MR", "plane": None, "case_id": 8, "age": "80"},
    ]  # fmt: skip
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (train_folder(roco) / "metadata.jsonl").write_text(lines)
    pairs = load_pairs(DataArguments(source=str(roco), label_columns=["modality", "plane"]), "train")
    assert set(pairs.column_names) == {
        "image", "caption", "image_id", "label", "modality", "plane", "case_id", "age"
    }  # fmt: skip
    assert pairs["label"] == ["", "", "CT / axial"]
    assert pairs["case_id"] == [8, None, 7]
    assert pairs["age"] == ["80", None, None]
    assert pairs["caption"] == [f"caption {index} ü" for index in range(3)]


def test_roco_several_captions_of_one_image(roco):
    add_caption(roco, "train_0\tanother caption\n")
    pairs = load_pairs(DataArguments(source=str(roco)), "train")
    assert Counter(pairs["image_id"])["train_0"] == 2
    assert gray_of(pairs[3]) == 0


@pytest.mark.parametrize(
    "line, message",
    [
        ("train_0 no tab here\n", r"captions\.txt, line 4: no tab in 'train_0 no tab here'"),
        ("\tcaption\n", r"captions\.txt, line 4: no ID before the tab"),
        (
            "train_1\t  \n",
            r"captions\.txt has half pairs: empty captions: 1 \(line 4: train_1\).*data\.on_missing=skip",
        ),
        ("train_1\tcaption 1 ü\n", r"captions\.txt, line 4: repeats line 2 \(ID 'train_1'"),
        ("train_8\tx\ntrain_9\ty\n", r"captions without an image file: 2 \(train_8, train_9\).*data\.on_missing=skip"),
    ],
)
def test_roco_bad_captions(roco, line, message):
    add_caption(roco, line)
    with pytest.raises(ValueError, match=message):
        load_pairs(DataArguments(source=str(roco)), "train")


def test_roco_images_without_caption(roco):
    for index in range(7):
        draw(train_folder(roco) / "images" / f"extra_{index}.png", 0)
    (train_folder(roco) / "images" / "Thumbs.db").write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"images without a caption: 7 \(extra_0, .*extra_4, \.\.\.\).*on_missing=skip"
    ):
        load_pairs(DataArguments(source=str(roco)), "train")


def test_roco_skips_and_counts_halves(roco, caplog):
    draw(train_folder(roco) / "images" / "extra.png", 0)
    add_caption(roco, "gone\tx\nextra2\t \n")
    with caplog.at_level(logging.WARNING):
        pairs = load_pairs(DataArguments(source=str(roco), on_missing="skip"), "train")
    assert pairs["image_id"] == ["train_0", "train_1", "train_2"]
    for text in ("empty captions: 1 (line 5: extra2)", "without an image file: 2 (gone, extra2)",
                 "images without a caption: 1 (extra)"):  # fmt: skip
        assert text in caplog.text


def test_roco_two_images_of_one_id(roco):
    draw(train_folder(roco) / "images" / "train_0.bmp", 9)
    with pytest.raises(ValueError, match=r"two images of the ID 'train_0': train_0\.bmp and train_0\.png"):
        load_pairs(DataArguments(source=str(roco)), "train")


def test_roco_not_utf8(roco):
    (train_folder(roco) / "captions.txt").write_bytes(b"train_0\t\xfc\n")
    with pytest.raises(ValueError, match=r"captions\.txt is not UTF-8"):
        load_pairs(DataArguments(source=str(roco)), "train")


def test_metadata_of_other_ids_are_told(roco, caplog):
    """Such as numbers where the names of the files begin with zeros."""
    file = train_folder(roco) / "metadata.jsonl"
    lines = [{"id": "train_0", "label": "x"}, {"id": 1, "label": "y"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs = load_pairs(DataArguments(source=str(roco)), "train")
    assert pairs["label"] == ["x", "", ""]
    assert f"{file} tells nothing of 2 of 3 images (train_1, train_2), and 1 of its lines are of no" in caplog.text
    caplog.clear()
    file.write_text(json.dumps(lines[0]) + "\n")  # of some images alone
    assert load_pairs(DataArguments(source=str(roco)), "train")["label"] == ["x", "", ""]
    assert not caplog.text


def test_roco_bad_metadata_line(roco):
    (train_folder(roco) / "metadata.jsonl").write_text('{"id": "train_0"}\n{"id": \n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: not a JSON object"):
        load_pairs(DataArguments(source=str(roco)), "train")


def test_roco_missing_parts(roco):
    with pytest.raises(FileNotFoundError, match=r"validate/radiology' does not exist. Did you mean 'validation'\?"):
        load_pairs(DataArguments(source=str(roco), validation_split="validate"), "validation")
    (train_folder(roco) / "captions.txt").rename(train_folder(roco) / "texts.txt")
    with pytest.raises(FileNotFoundError, match=r"captions\.txt' does not exist"):
        load_pairs(DataArguments(source=str(roco)), "train")
    (train_folder(roco) / "texts.txt").rename(train_folder(roco) / "captions.txt")
    (train_folder(roco) / "images").rename(train_folder(roco) / "scans")
    with pytest.raises(FileNotFoundError, match=r"radiology/images' does not exist"):
        load_pairs(DataArguments(source=str(roco)), "train")


@pytest.mark.parametrize("split, number", [("validation", 8180), ("test", 8179)])
def test_real_roco_captions(radiology_data, split, number):
    captions = read_captions(Path(radiology_data) / "roco_captions" / split / "radiology" / "captions.txt.gz")
    assert len(captions) == number
    assert all(image_id.startswith("ROCO_") and text and text == text.strip() for _, image_id, text in captions)
    words = np.mean([len(text.split()) for _, _, text in captions])
    assert abs(words - {"validation": 20.0, "test": 20.4}[split]) < 0.06


@pytest.mark.usefixtures("radiology_data")
def test_real_captions_without_images():
    with pytest.raises(FileNotFoundError, match=r"roco_captions/test/radiology/images' does not exist"):
        load_pairs(DataArguments(source="$RADIOLOGY_DATA/roco_captions"), "test")
