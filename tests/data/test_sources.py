"""Every source and every bad input. Expected pairs are written out by hand."""

import csv
import gzip
import json
import logging
import os
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from PIL import Image
from torch.utils.data import DataLoader

from gap_closed_clip.data import DataArguments, decode_image, load_pairs
from gap_closed_clip.data.roco import read_captions
from gap_closed_clip.data.sources import assign_folds


RADIOLOGY_DATA = os.environ.get("RADIOLOGY_DATA")
needs_data = pytest.mark.skipif(not RADIOLOGY_DATA, reason="RADIOLOGY_DATA does not name a folder of real data")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def draw(path: Path, gray: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), gray).save(path)
    return str(path)


@pytest.fixture
def roco(tmp_path) -> Path:
    """Two splits of three images; captions with the real sets' space after the tab."""
    for split in ("train", "validation"):
        folder = tmp_path / "roco" / split / "radiology"
        for index in range(3):
            draw(folder / "images" / f"{split}_{index}.png", index)
        lines = [f"{split}_{index}\t caption {index} ü\n" for index in range(3)]
        (folder / "captions.txt").write_text("".join(lines), encoding="utf-8")
    return tmp_path / "roco"


def train_folder(roco: Path) -> Path:
    return roco / "train" / "radiology"


def add_caption(roco: Path, line: str) -> None:
    with open(train_folder(roco) / "captions.txt", "a", encoding="utf-8") as file:
        file.write(line)


def gray_of(row: dict) -> int:
    return decode_image(row["image"]).getpixel((0, 0))[0]


# ROCO's layout


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
    (train_folder(roco) / "images").rename(train_folder(roco) / "pictures")
    with pytest.raises(FileNotFoundError, match=r"radiology/images' does not exist"):
        load_pairs(DataArguments(source=str(roco)), "train")


# Tables: csv, jsonl, parquet; image folders


ROWS = [("a/0.png", "zero", "007", "x"), ("a/1.png", "None", "008", ""), ("a/0.png", "again", "007", "y")]


@pytest.fixture
def table(tmp_path) -> Path:
    """A folder with two images, and no table yet."""
    for gray in range(2):
        draw(tmp_path / "table" / "a" / f"{gray}.png", gray)
    return tmp_path / "table"


def write_table(file: Path, rows=ROWS, names=("file", "text", "patient", "label")) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix in (".csv", ".tsv"):
        with open(file, "w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, delimiter="\t" if file.suffix == ".tsv" else ",").writerows([names, *rows])
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    else:
        Dataset.from_dict({name: [row[i] for row in rows] for i, name in enumerate(names)}).to_parquet(str(file))
    return file


def table_arguments(source: Path, **options) -> DataArguments:
    return DataArguments(source=str(source), image_column="file", caption_column="text", **options)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_table_file(table, ending, streaming):
    file = write_table(table / f"pairs.{ending}")
    arguments = table_arguments(file, streaming=streaming, shuffle_buffer=0, label_columns=["label", "patient"])
    pairs = load_pairs(arguments, "train")
    assert isinstance(pairs, IterableDataset if streaming else Dataset)
    rows = list(pairs)
    assert [row["caption"] for row in rows] == ["zero", "None", "again"]  # the word None is a caption
    assert [row["patient"] for row in rows] == ["007", "008", "007"]  # zeros in front are kept
    assert [row["label"] for row in rows] == ["x / 007", "", "y / 007"]
    assert [row["image_id"] for row in rows] == ["a/0.png", "a/1.png", "a/0.png"]  # the same on every machine
    assert rows[1]["image"] == {"bytes": None, "path": str(table / "a" / "1.png")}
    assert [gray_of(row) for row in rows] == [0, 1, 0]


def test_table_beside_many_images(table):
    write_table(table / "train.csv")
    write_table(table / "test.csv", ROWS[:1])
    assert len(load_pairs(table_arguments(table), "train")) == 3
    assert len(load_pairs(table_arguments(table), "test")) == 1
    with pytest.raises(ValueError, match="no split 'validation'.*The splits are: test, train.*data.folds"):
        load_pairs(table_arguments(table), "validation")


def test_folder_of_tables(table, tmp_path):
    write_table(tmp_path / "sharded" / "train-00000.csv", ROWS[:2])
    write_table(tmp_path / "sharded" / "train-00001.csv", ROWS[2:])
    pairs = load_pairs(table_arguments(tmp_path / "sharded", image_root=str(table)), "train")
    assert pairs["patient"] == ["007", "008", "007"]
    assert [gray_of(row) for row in pairs] == [0, 1, 0]


def test_slice_of_a_split(table):
    arguments = table_arguments(write_table(table / "p.csv"), train_split="train[:2]", validation_split="train[2:]")
    assert load_pairs(arguments, "train")["caption"] == ["zero", "None"]
    pairs = load_pairs(arguments, "validation")
    assert pairs["caption"] == ["again"] and gray_of(pairs[0]) == 0


def test_image_folder_with_metadata(table):
    for name, gray in (("train", 3), ("validation", 4)):
        draw(table / name / "0.png", gray)
        record = {"file_name": "0.png", "caption": "one", "n": 5}
        (table / name / "metadata.jsonl").write_text(json.dumps(record) + "\n")
    pairs = load_pairs(DataArguments(source=str(table)), "validation")
    expected = {"bytes": None, "path": str(table / "validation" / "0.png")}
    assert pairs[0] == {"image": expected, "n": 5, "caption": "one", "image_id": "validation/0.png", "augment": False}
    assert "augment" not in load_pairs(DataArguments(source=str(table)), "train").column_names


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_with_images_inside(table, tmp_path, streaming):
    features = Features(image=datasets.Image(), caption=Value("string"), label=ClassLabel(names=["CT", "MR"]))
    data = {"image": [Image.new("L", (8, 8), gray) for gray in (5, 6, 5)], "caption": list("abc"), "label": [1, 0, -1]}
    file = tmp_path / "inside.parquet"
    Dataset.from_dict(data, features).to_parquet(str(file))
    pairs = list(load_pairs(DataArguments(source=str(file), streaming=streaming, shuffle_buffer=0), "train"))
    assert [gray_of(row) for row in pairs] == [5, 6, 5]
    assert [row["label"] for row in pairs] == ["MR", "CT", ""]
    assert pairs[0]["image_id"] == pairs[2]["image_id"] != pairs[1]["image_id"]  # by content


def test_images_inside_are_not_copied(tmp_path):
    features = Features(image=datasets.Image(), caption=Value("string"))
    rows = {"image": [Image.new("L", (8, 8), gray) for gray in range(4)], "caption": list("abcd")}
    file = str(tmp_path / "inside.parquet")
    Dataset.from_dict(rows, features).to_parquet(file)
    pairs = load_pairs(DataArguments(source=file, folds=2), "train")
    loaded = datasets.load_dataset("parquet", data_files={"train": file}, split="train")
    assert pairs.cache_files == loaded.cache_files  # still the file that `datasets` makes when loading
    assert len(pairs) == 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"caption_column": "txt"}, r"no column 'txt' \(data\.caption_column\)\. Did you mean 'text'\? "
                                    r"The columns are: file, text, patient, label\."),
        ({"image_column": "picture"}, r"no column 'picture' \(data\.image_column\)"),
        ({"image_id_column": "patients"}, r"'patients' \(data\.image_id_column\)\. Did you mean 'patient'"),
        ({"label_columns": ["label", "lable"]}, r"'lable' \(data\.label_columns\)\. Did you mean 'label'"),
        ({"folds": 2, "fold_column": "case_id"}, r"'case_id' \(data\.fold_column\)"),
    ],
)  # fmt: skip
def test_missing_column(table, options, message, streaming):
    options = {"image_column": "file", "caption_column": "text"} | options
    arguments = DataArguments(source=str(write_table(table / "p.csv")), streaming=streaming, **options)
    with pytest.raises(ValueError, match=message):
        load_pairs(arguments, "train")


BAD_ROWS = [*ROWS, ("a/0.png", " \t", "1", ""), ("a/gone.png", "text", "1", "")]


def test_bad_rows_of_a_table(table, caplog):
    file = write_table(table / "p.csv", BAD_ROWS)
    with pytest.raises(ValueError, match=r"empty captions: 1 \(row 3\); images that do not exist: 1 \(row 4: '.*a/gone"
                                         r"\.png'\).*data\.image_root.*data\.on_missing=skip"):  # fmt: skip
        load_pairs(table_arguments(file), "train")
    with caplog.at_level(logging.WARNING):
        assert len(load_pairs(table_arguments(file, on_missing="skip"), "train")) == 3
    assert "skipped empty captions: 1 (row 3); images that do not exist: 1" in caplog.text


def test_bad_rows_of_a_stream(table, caplog):
    file = write_table(table / "p.csv", BAD_ROWS)
    rows = iter(load_pairs(table_arguments(file, streaming=True, shuffle_buffer=0), "train"))
    assert [next(rows)["caption"] for _ in range(3)] == ["zero", "None", "again"]
    with pytest.raises(ValueError, match=r"row 3 \(from 0\): its caption is empty.*data\.on_missing=skip"):
        next(rows)
    skipping = table_arguments(file, streaming=True, on_missing="skip", shuffle_buffer=0)
    with caplog.at_level(logging.WARNING):
        assert len(list(load_pairs(skipping, "train"))) == 3
    assert "row 3 (from 0): skipped, its caption is empty" in caplog.text
    assert "row 4 (from 0): skipped, its image" in caplog.text


def test_null_captions_and_all_rows_bad(table):
    file = write_table(table / "p.jsonl", [("a/0.png", None, "1", ""), ("a/0.png", "x", "1", None)])
    with pytest.raises(ValueError, match=r"empty captions: 1 \(row 0\)"):
        load_pairs(table_arguments(file), "train")
    assert load_pairs(table_arguments(file, on_missing="skip"), "train")["label"] == [""]
    file = write_table(table / "q.jsonl", [("a/0.png", None, "1", "")])
    with pytest.raises(ValueError, match="holds no pair of an image and a caption"):
        load_pairs(table_arguments(file, on_missing="skip"), "train")


def test_one_id_for_two_images(table, tmp_path):
    rows = [("a/0.png", "x", "p1", ""), ("a/1.png", "y", "p2", ""), ("a/1.png", "z", "p1", "")]
    file = write_table(table / "p.csv", rows)
    with pytest.raises(ValueError, match=r"rows 0 and 2 \(from 0\): the id 'p1' of column 'patient' stands for two"):
        load_pairs(table_arguments(file, image_id_column="patient"), "train")
    file = write_table(table / "q.csv", [("a/0.png", "x", "p1", ""), ("a/0.png", "y", "p1", "")])
    assert load_pairs(table_arguments(file, image_id_column="patient"), "train")["image_id"] == ["p1", "p1"]

    features = Features(image=datasets.Image(), caption=Value("string"), image_id=Value("int64"))
    data = {"image": [Image.new("L", (8, 8), gray) for gray in (5, 6)], "caption": list("ab"), "image_id": [1, 1]}
    Dataset.from_dict(data, features).to_parquet(str(tmp_path / "inside.parquet"))
    with pytest.raises(ValueError, match="rows 0 and 1 .* the id '1'"):
        load_pairs(DataArguments(source=str(tmp_path / "inside.parquet")), "train")


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_image_id(table, streaming):
    """It is not the same "" or "None" for all rows that lack one."""
    file = write_table(table / "p.jsonl", [("a/0.png", "x", "p1", ""), ("a/1.png", "y", None, "")])
    arguments = table_arguments(file, image_id_column="patient", streaming=streaming, shuffle_buffer=0)
    with pytest.raises(ValueError, match=r"row 1 \(from 0\): 'patient' is empty\..*data\.image_id_column"):
        list(load_pairs(arguments, "train"))


def test_captions_that_are_no_text(table):
    file = table / "p.jsonl"
    file.write_text(json.dumps({"file": "a/0.png", "text": ["one", "two"]}) + "\n")
    with pytest.raises(ValueError, match="'text' .* holds List.*, not text"):
        load_pairs(table_arguments(file), "train")


@pytest.mark.parametrize("streaming", [False, True])
def test_images_that_are_none(table, streaming):
    file = write_table(table / "p.jsonl", [(3, "text", "1", "")])
    with pytest.raises(ValueError, match="'file' .* holds Value.'int64'.*a column of images, image bytes"):
        load_pairs(table_arguments(file, streaming=streaming), "train")


@pytest.mark.parametrize("streaming", [False, True])
def test_bare_image_bytes(table, streaming):
    data = [(table / "a" / f"{gray}.png").read_bytes() for gray in range(2)]
    Dataset.from_dict({"file": data, "text": ["x", "y"]}).to_parquet(str(table / "p.parquet"))
    arguments = table_arguments(table / "p.parquet", streaming=streaming, shuffle_buffer=0)
    assert [gray_of(row) for row in load_pairs(arguments, "train")] == [0, 1]


def test_files_that_cannot_be_parsed(table):
    (table / "p.jsonl").write_text('{"file": "a/0.png", "text": "x"}\n{"file": \n')
    with pytest.raises(ValueError, match=r"p\.jsonl' cannot be read"):
        load_pairs(table_arguments(table / "p.jsonl"), "train")
    (table / "p.csv").write_text("")
    with pytest.raises(ValueError, match=r"p\.csv' is no table"):
        load_pairs(table_arguments(table / "p.csv"), "train")
    (table / "p.xlsx").write_text("x")
    with pytest.raises(ValueError, match=r"p\.xlsx' is of no known kind; it must be one of \.csv"):
        load_pairs(table_arguments(table / "p.xlsx"), "train")


# Where a source is


def test_environment_variables(roco, monkeypatch):
    monkeypatch.setenv("SOME_ROOT", str(roco.parent))
    for source in ("$SOME_ROOT/roco", "${SOME_ROOT}/roco"):
        assert len(load_pairs(DataArguments(source=source), "train")) == 3
    monkeypatch.delenv("SOME_ROOT")
    with pytest.raises(ValueError, match=r"data\.source is '\$SOME_ROOT/roco', but .* SOME_ROOT is not set"):
        load_pairs(DataArguments(source="$SOME_ROOT/roco"), "train")


@pytest.mark.parametrize("source", ["phantom", "./no/such", "/no/such", "a/b/c"])
def test_nothing_there(source):
    with pytest.raises(FileNotFoundError, match=f"data.source '{source}'.*neither a Hub id.*nor 'phantoms'"):
        load_pairs(DataArguments(source=source), "train")


@pytest.mark.parametrize("name", [None, "notes.bin"])
def test_a_folder_without_pairs(tmp_path, name):
    folder = tmp_path / "empty"
    folder.mkdir()
    if name is not None:
        (folder / name).touch()
    message = f"^data.source '{folder}' holds no pairs. A folder has .*train/radiology/.*train.csv, .*metadata.jsonl"
    with pytest.raises(FileNotFoundError, match=message):
        load_pairs(DataArguments(source=str(folder)), "train")


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_id_without_network(streaming):
    message = r"'eltorio/ROCOv2-radiology' is no file .*Hub cannot be reached.*HF_HUB_OFFLINE.*download"
    with pytest.raises(ConnectionError, match=message):
        load_pairs(DataArguments(source="eltorio/ROCOv2-radiology", streaming=streaming), "train")


def test_no_such_split_name(roco):
    with pytest.raises(ValueError, match="no split 'dev'; it must be one of train, validation, test"):
        load_pairs(DataArguments(source=str(roco)), "dev")


# Folds, sizes, streams


def test_folds_are_balanced_and_keep_groups():
    random = np.random.default_rng(0)
    groups = [f"case {case}" for case in range(100) for _ in range(random.integers(1, 9))]
    folds = assign_folds(groups, 5)
    assert len({(group, fold) for group, fold in zip(groups, folds, strict=True)}) == 100
    sizes = Counter(folds)
    assert set(sizes) == set(range(5)) and max(sizes.values()) - min(sizes.values()) <= 1
    assert folds == assign_folds(groups, 5)
    shuffled = random.permutation(len(groups))
    assert assign_folds([groups[i] for i in shuffled], 5) == [folds[i] for i in shuffled]
    with pytest.raises(ValueError, match="data.folds is 3, but .* only 2 groups"):
        assign_folds(["a", "b", "a"], 3)


@pytest.mark.parametrize("streaming", [False, True])
def test_folds_cut_the_training_split(table, streaming):
    rows = [(f"a/{i % 2}.png", f"caption {i}", f"case {i // 3}", "") for i in range(60)]
    file = write_table(table / "p.csv", rows)
    held_out = []
    for fold in range(4):
        arguments = table_arguments(file, folds=4, fold=fold, fold_column="patient", streaming=streaming)
        train, validation = (list(load_pairs(arguments, split)) for split in ("train", "validation"))
        assert len(train) + len(validation) == 60
        assert not {row["patient"] for row in train} & {row["patient"] for row in validation}
        held_out += [row["caption"] for row in validation]
        if not streaming:
            assert len(validation) == 15
    assert sorted(held_out) == sorted(row[1] for row in rows)


def test_rows_without_a_case_are_cases_of_their_own(table):
    rows = [("a/0.png", f"caption {i}", "", "") for i in range(4)] + [("a/1.png", "x", "", "")]
    arguments = table_arguments(write_table(table / "p.csv", rows), folds=2, fold_column="patient")
    assert [len(load_pairs(arguments, split)) for split in ("train", "validation")] == [1, 4]  # by image


@pytest.mark.parametrize("streaming", [False, True])
def test_max_pairs(roco, streaming):
    pairs = load_pairs(DataArguments(source=str(roco), max_pairs=2, streaming=streaming, shuffle_buffer=0), "train")
    assert [row["image_id"] for row in pairs] == ["train_0", "train_1"]
    assert len(list(load_pairs(DataArguments(source=str(roco), max_pairs=9), "train"))) == 3


def test_stream_shuffles_training_anew_each_epoch(table):
    rows = [("a/0.png", f"caption {i}", "", "") for i in range(50)]
    arguments = table_arguments(write_table(table / "p.csv", rows), streaming=True)
    pairs = load_pairs(arguments, "train")
    first = [row["caption"] for row in pairs]
    pairs.set_epoch(1)
    second = [row["caption"] for row in pairs]
    in_order = [row[1] for row in rows]
    assert sorted(first) == sorted(second) == sorted(in_order)
    assert in_order != first != second != in_order


def test_stream_is_divided_among_workers(roco):
    pairs = load_pairs(DataArguments(source=str(roco), streaming=True), "train")
    rows = [row for batch in DataLoader(pairs, 1, collate_fn=list, num_workers=2) for row in batch]
    assert sorted(row["image_id"] for row in rows) == ["train_0", "train_1", "train_2"]


def test_stream_skips_bad_images(roco, caplog):
    (train_folder(roco) / "images" / "train_1.png").write_bytes(b"no image")
    arguments = DataArguments(source=str(roco), streaming=True, on_bad_image="skip", shuffle_buffer=0)
    with caplog.at_level(logging.WARNING):
        assert [row["image_id"] for row in load_pairs(arguments, "train")] == ["train_0", "train_2"]
    assert "Skipped a pair: The image 'train_1' cannot be read" in caplog.text


def test_phantoms():
    arguments = DataArguments(phantom_train_pairs=6, phantom_validation_pairs=5, phantom_test_pairs=4, phantom_size=32)
    splits = [load_pairs(arguments, split) for split in ("train", "validation", "test")]
    assert [len(pairs) for pairs in splits] == [6, 5, 4]
    assert {"image", "caption", "image_id", "label"} <= set(splits[0].column_names)
    assert decode_image(splits[0][0]["image"]).size == (32, 32)
    images = [{row["image"]["bytes"] for row in pairs} for pairs in splits]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]
    assert load_pairs(arguments, "train")[:] == splits[0][:]
    other = DataArguments(phantom_train_pairs=6, phantom_size=32, phantom_seed=1)
    assert load_pairs(other, "train")["caption"] != splits[0]["caption"]


@pytest.mark.parametrize(
    "field, value",
    [("on_missing", "drop"), ("on_bad_image", True), ("max_pairs", 0), ("folds", 1), ("shuffle_buffer", -1),
     ("window_center", 40.0), ("window_width", 400.0), ("crop_scale", [0.0, 1.0]), ("brightness", 1.5),
     ("contrast", -0.1), ("cache_images", 0), ("phantom_test_pairs", 0)],
)  # fmt: skip
def test_arguments_out_of_range(field, value):
    with pytest.raises(ValueError, match=field):
        DataArguments(**{field: value})


def test_fold_out_of_range():
    with pytest.raises(ValueError, match="data.fold is 5; with data.folds=5 it runs from 0 to 4"):
        DataArguments(folds=5, fold=5)


# Real pairs


@needs_data
def test_medpix2():
    arguments = DataArguments(source="$RADIOLOGY_DATA/medpix2", label_columns=["modality", "location_category"])
    train, validation = (load_pairs(arguments, split) for split in ("train", "validation"))
    assert [len(train), len(set(train["caption"]))] == [1578, 1064]
    assert [len(validation), len(set(validation["caption"]))] == [189, 127]
    assert len(set(train["image_id"])) == 1578
    assert Counter(label.split(" / ")[0] for label in validation["label"]) == {"CT": 81, "MR": 108}
    assert len(set(train["case_id"])) == 516 and not set(train["case_id"]) & set(validation["case_id"])


@needs_data
def test_medpix2_folds():
    seen = Counter()
    for fold in range(5):
        arguments = DataArguments(source="$RADIOLOGY_DATA/medpix2", folds=5, fold=fold, fold_column="case_id")
        train, held_out = (load_pairs(arguments, split) for split in ("train", "validation"))
        assert len(train) + len(held_out) == 1578 and len(held_out) in (315, 316)
        assert not set(train["case_id"]) & set(held_out["case_id"])
        seen.update(held_out["image_id"])
    assert len(seen) == 1578 and set(seen.values()) == {1}


@needs_data
@pytest.mark.parametrize("split, number", [("validation", 8180), ("test", 8179)])
def test_real_roco_captions(split, number):
    captions = read_captions(Path(RADIOLOGY_DATA) / "roco_captions" / split / "radiology" / "captions.txt.gz")
    assert len(captions) == number
    assert all(image_id.startswith("ROCO_") and text and text == text.strip() for _, image_id, text in captions)
    words = np.mean([len(text.split()) for _, _, text in captions])
    assert abs(words - {"validation": 20.0, "test": 20.4}[split]) < 0.06


@needs_data
def test_real_captions_without_images():
    with pytest.raises(FileNotFoundError, match=r"roco_captions/test/radiology/images' does not exist"):
        load_pairs(DataArguments(source="$RADIOLOGY_DATA/roco_captions"), "test")
