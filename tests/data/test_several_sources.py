"""Lists of sources: what the entries may say, and what the pairs of all of them look like together."""

import csv
import logging

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Picture

from gap_closed_clip.data import DataArguments, PairCollator, load_checked_pairs, load_pairs
from gap_closed_clip.data.join import join_pairs

from .conftest import draw, gray_of


PHANTOMS = {"phantom_train_pairs": 6, "phantom_validation_pairs": 4, "phantom_test_pairs": 4, "phantom_size": 32}


@pytest.fixture
def own(tmp_path):
    """A folder with a train.csv of three pairs of two images, with a label and a column `source` of its own."""
    folder = tmp_path / "own"
    rows = [
        ("a.png", "one", "CT", "web", "7"),
        ("b.png", "two", "", "web", "8"),
        ("a.png", "again", "CT", "book", "7"),
    ]
    for gray, name in ((100, "a.png"), (101, "b.png")):
        draw(folder / name, gray)
    with open(folder / "train.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "text", "kind", "source", "case"), *rows])
    return folder


def entry(own, **fields) -> dict:
    columns = {"image_column": "file", "caption_column": "text", "label_columns": "kind"}
    return {"name": "mine", "source": str(own), **columns, **fields}


# The pairs of all


def test_pairs_of_all_sources(roco, own):
    pairs = load_pairs(DataArguments(source=[str(roco), entry(own)]), "train")
    assert pairs["source"] == ["roco"] * 3 + ["mine"] * 3
    assert pairs["image_id"] == [
        "roco/train_0",
        "roco/train_1",
        "roco/train_2",
        "mine/a.png",
        "mine/b.png",
        "mine/a.png",
    ]
    assert pairs["caption"] == ["caption 0 ü", "caption 1 ü", "caption 2 ü", "one", "two", "again"]
    assert pairs["label"] == ["", "", "", "CT", "", "CT"]
    assert pairs["case"] == [None, None, None, "7", "8", "7"]
    assert [gray_of(row) for row in pairs] == [0, 1, 2, 100, 101, 100]


def test_no_label_where_no_source_has_one(roco, own):
    pairs = load_pairs(DataArguments(source=[str(roco), entry(own, label_columns=None)]), "train")
    assert "label" not in pairs.column_names


def test_columns_of_different_types_become_text():
    text = Value("string")
    common = {"image": Image(decode=False), "caption": text, "image_id": text}
    rows = {"image": [{"bytes": b"x", "path": None}] * 2, "caption": ["a", "b"], "image_id": ["1", "2"]}
    modality = ClassLabel(names=["CT", "MR"])
    first = Dataset.from_dict(
        rows | {"age": [52, None], "kind": [1, -1], "side": [1, 2], "empty": [None, None]},
        features=Features(
            common | {"age": Value("int64"), "kind": modality, "side": Value("int64")} | {"empty": Value("null")}
        ),
    )
    second = Dataset.from_dict(
        rows | {"age": ["old", None], "side": [3, None], "empty": [5, None]},
        features=Features(common | {"age": text, "side": Value("int64"), "empty": Value("int64")}),
    )
    third = Dataset.from_dict(rows | {"kind": ["US", None]}, features=Features(common | {"kind": text}))
    joined = join_pairs([first, second, third])
    assert joined["age"] == ["52", None, "old", None, None, None]
    assert joined["side"] == [1, 2, 3, None, None, None]  # one type, which is kept
    assert joined["kind"] == ["MR", None, None, None, "US", None]
    assert joined["empty"] == [None, None, 5, None, None, None]
    assert joined.features["side"] == Value("int64") and joined[5]["image"] == {"bytes": b"x", "path": None}


def test_one_plain_source_is_as_before(own):
    """No prefix and no column, even if the source has one of that name: it would be taken for ours."""
    arguments = DataArguments(source=str(own), image_column="file", caption_column="text")
    pairs = load_pairs(arguments, "train")
    assert pairs["image_id"] == ["a.png", "b.png", "a.png"] and "source" not in pairs.column_names


@pytest.mark.parametrize("streaming", [False, True])
def test_folds_by_a_column_of_that_name(own, streaming):
    columns = {"image_column": "file", "caption_column": "text", "fold_column": "source"}
    columns["image_id_column"] = "text"  # by its path, one image is of two sources
    arguments = DataArguments(source=str(own), folds=2, streaming=streaming, shuffle_buffer=0, **columns)
    found = [list(load_pairs(arguments, split)) for split in ("train", "validation")]
    captions = {frozenset(row["caption"] for row in rows) for rows in found}
    assert captions <= {
        frozenset({"one", "two"}),
        frozenset({"again"}),
        frozenset(),
        frozenset({"one", "two", "again"}),
    }
    assert sum(map(len, found)) == 3 and not any("source" in row for rows in found for row in rows)


def test_folds_are_those_of_each_source_alone(roco, own):
    settings = {"folds": 3, "fold": 1}
    entries = [{"source": str(roco), "fold_column": "caption"}, entry(own, name="mine", source=str(roco))]
    entries[1] = {"name": "phantoms", "source": "phantoms", "fold_column": "modality"}
    together = {
        split: load_pairs(DataArguments(source=entries, **PHANTOMS, **settings), split)
        for split in ("train", "validation")
    }
    for split, pairs in together.items():
        expected = []
        for one in entries:
            fields = {key: value for key, value in one.items() if key != "name"}
            expected += load_pairs(DataArguments(**fields, **PHANTOMS, **settings), split)["caption"]
        assert pairs["caption"] == expected
    assert len(together["train"]) + len(together["validation"]) == 9


def test_first_pairs_of_each_source(roco):
    entries = [{"source": str(roco), "max_pairs": 1}, {"name": "again", "source": str(roco)}]
    pairs = load_pairs(DataArguments(source=entries, max_pairs=2), "train")
    assert pairs["image_id"] == ["roco/train_0", "again/train_0", "again/train_1"]


def test_held_out_pairs_are_not_augmented(roco):
    pairs = load_checked_pairs(DataArguments(source=[str(roco)], cache_images=4), "validation")
    assert pairs["augment"] == [False] * 3 and pairs["source"] == ["roco"] * 3


# Splits that a source lacks


def test_a_missing_split_is_named_with_its_source(roco, own):
    with pytest.raises(
        FileNotFoundError, match=r"data.source, 'roco': .*test/radiology' does not exist.*test_split: null"
    ):
        load_pairs(DataArguments(source=[str(roco)]), "test")
    with pytest.raises(
        ValueError, match=r"'mine': .* has no split 'validation'.*validation_split: null: it is then left"
    ):
        load_pairs(DataArguments(source=[str(roco), entry(own)]), "validation")


def test_a_source_without_the_split_is_left_out(roco, own):
    data = DataArguments(source=[str(roco), entry(own, validation_split=None)])
    assert set(load_pairs(data, "validation")["source"]) == {"roco"}
    assert set(load_pairs(data, "train")["source"]) == {"roco", "mine"}
    folds = DataArguments(source=[str(roco), entry(own, validation_split=None)], folds=2)
    assert set(load_pairs(folds, "validation")["source"]) == {"roco", "mine"}  # it is cut from the training split
    with pytest.raises(ValueError, match="None of the sources 'a', 'b' has a test split: data.test_split is null"):
        load_pairs(DataArguments(source=["x/a", "x/b"], test_split=None), "test")
    with pytest.raises(ValueError, match="'.*roco' has no test split: data.test_split is null"):
        load_pairs(DataArguments(source=str(roco), test_split=None), "test")


# What is wrong with a source


def test_a_broken_image_is_named_with_its_source(roco, own, caplog):
    (own / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"data.source, 'mine': 1 of 3 images cannot be read[\s\S]*b.png"):
        load_checked_pairs(DataArguments(source=[str(roco), entry(own)]), "train")
    with caplog.at_level(logging.WARNING):
        pairs = load_checked_pairs(DataArguments(source=[str(roco), entry(own, on_bad_image="skip")]), "train")
    assert len(pairs) == 5 and "own/b.png" in caplog.text


def test_half_pairs_are_named_with_their_source(roco, own, caplog):
    (own / "b.png").unlink()
    with pytest.raises(ValueError, match="data.source, 'mine': .*row 1: .*b.png"):
        load_pairs(DataArguments(source=[str(roco), entry(own)]), "train")
    with caplog.at_level(logging.WARNING):
        assert len(load_pairs(DataArguments(source=[str(roco), entry(own, on_missing="skip")]), "train")) == 5
    assert str(own) in caplog.text
    with pytest.raises(ValueError, match=r"data.source, 'mine': .*no column 'txt' \(data.caption_column\)"):
        load_pairs(DataArguments(source=[str(roco), entry(own, caption_column="txt")]), "train")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "data.source is 3; it must be a source, or a list"),
        ([], r"data.source is \[\]; it must be a source, or a list of at least one"),
        (["a.csv", 3], r"data.source\[1\] is 3; it must be a mapping"),
        ([{"name": "a"}], r"data.source\[0\] is \{'name': 'a'\}; it must be a mapping"),
        (["x/a", {"name": "a", "source": "b"}], "two sources of the name 'a'"),
        (["x/a.csv", "y/a.jsonl"], "two sources of the name 'a'"),
        (
            [{"source": "a", "fold_colum": "x"}],
            "data.source, 'a': unknown key 'fold_colum': did you mean 'fold_column'?",
        ),
        ([{"source": "a", "folds": 3}], "data.source, 'a': folds is one for all sources: set data.folds"),
        ([{"source": "a", "max_pairs": 0}], "data.source, 'a': data.max_pairs is 0"),
        ([{"source": "a", "name": "a/b"}], r"data.source\[0\].name is 'a/b'; it must be of letters"),
        ([{"source": "a", "name": 3}], r"data.source\[0\].name is 3"),
        ([{"source": "a", "name": "mean"}], r"data.source\[0\].name is 'mean'.* and not 'mean'"),
    ],
)
def test_entries_that_make_no_sense(source, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(source=source)


def test_names_and_own_fields():
    entries = [
        "$ROOT/medpix2/",
        "owner/ROCOv2",
        "pairs.csv",
        {"source": "b.csv.gz", "license": "mit", "label_columns": "x"},
    ]
    data = DataArguments(source=entries, license="cc0", label_columns=["y"])
    found = data.sources()
    assert list(found) == ["medpix2", "ROCOv2", "pairs", "b"] and data.title == "'medpix2', 'ROCOv2', 'pairs', 'b'"
    assert [own.source for own in found.values()] == ["$ROOT/medpix2/", "owner/ROCOv2", "pairs.csv", "b.csv.gz"]
    assert (found["b"].license, found["b"].label_columns) == ("mit", ["x"])
    assert (found["pairs"].license, found["pairs"].label_columns) == ("cc0", ["y"])
    assert entries[3] == {"source": "b.csv.gz", "license": "mit", "label_columns": "x"}  # the caller's are not changed


# Windows and streams


def test_each_source_has_its_own_window(tmp_path, tiny_processor):
    """16-bit images of one value: dark in one window, bright in another, and stretched to black in none."""
    for name in ("low", "high", "none"):
        folder = tmp_path / name / "train" / "radiology"
        (folder / "images").mkdir(parents=True)
        ramp = np.full((40, 40), 1000, dtype=np.uint16)
        ramp[0, 0], ramp[0, 1] = 0, 4000
        Picture.fromarray(ramp).save(folder / "images" / "x.png")
        (folder / "captions.txt").write_text("x\tan image\n")
    windows = {"low": (500, 1000), "high": (1000, 2000), "none": (None, None)}
    fields = {
        name: dict(zip(("window_center", "window_width"), values, strict=True)) for name, values in windows.items()
    }
    entries = [{"source": str(tmp_path / name), **fields[name]} for name in windows]
    pairs = load_pairs(DataArguments(source=entries, window_center=500, window_width=1000), "train")
    found = PairCollator(tiny_processor, window=(500.0, 1000.0))(list(pairs))["pixel_values"]
    for row, name in zip(found, windows, strict=True):
        alone = DataArguments(source=str(tmp_path / name), **fields[name])
        expected = PairCollator(tiny_processor, window=alone.window)(list(load_pairs(alone, "train")))["pixel_values"]
        assert (row == expected[0]).all()
    assert (found[0] != found[1]).any() and (found[1] != found[2]).any()
    same = load_pairs(
        DataArguments(source=[str(tmp_path / "low"), str(tmp_path / "high")], window_center=5, window_width=9), "train"
    )
    assert "window" not in same.column_names


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_stream_gives_every_row_once_and_sources_in_turn(roco, own, split):
    (own / "validation.csv").write_text((own / "train.csv").read_text())
    entries = [{"source": str(roco)}, entry(own), {"name": "drawn", "source": "phantoms"}]
    data = {"source": entries, **PHANTOMS, "phantom_train_pairs": 7, "phantom_validation_pairs": 7}
    rows = list(load_pairs(DataArguments(**data, streaming=True, shuffle_buffer=2), split))
    expected = load_pairs(DataArguments(**data), split)
    assert sorted((row["image_id"], row["caption"], row["source"], row["label"]) for row in rows) == sorted(
        zip(*(expected[name] for name in ("image_id", "caption", "source", "label")), strict=True)
    )
    assert [row["source"] for row in rows[:6]] == ["roco", "mine", "drawn"] * 2
    assert all(row.get("augment") == (None if split == "train" else False) for row in rows)
    assert {gray_of(row) for row in rows if row["source"] == "mine"} == {100, 101}


def test_real_sources(radiology_data):
    entries = [
        {"source": "$RADIOLOGY_DATA/medpix2", "label_columns": ["location_category"], "fold_column": "case_id"},
        {"source": "$RADIOLOGY_DATA/vqamed2019", "label_columns": ["organ"]},
        "$RADIOLOGY_DATA/rocov2_800",
    ]
    data = DataArguments(source=entries)
    train, validation = load_pairs(data, "train"), load_pairs(data, "validation")
    assert len(train) == 4064 and len(validation) == 489
    assert list(dict.fromkeys(train["source"])) == ["medpix2", "vqamed2019", "rocov2_800"]
    assert sum(label == "Head" for label in train["label"]) == 726
    assert {row["label"] for row in validation.filter(lambda row: row["source"] == "rocov2_800")} == {""}
    assert len(set(train["image_id"])) == 4064 and not set(train["image_id"]) & set(validation["image_id"])
