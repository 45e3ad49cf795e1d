"""Tables (csv, tsv, jsonl, parquet) and image folders. Expected pairs are written out by hand."""

import csv
import gzip
import json
import logging

import datasets
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from PIL import Image

from gap_closed_clip.data import DataArguments, PairCollator, load_pairs

from .conftest import ROWS, draw, gray_of, table_arguments, write_table


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


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["csv", "csv.gz", "jsonl"])
def test_a_table_in_another_encoding_is_told_with_its_line(tmp_path, ending, streaming):
    """In a stream, too, before any row: where the first one with an umlaut comes after hours, it ended a training."""
    rows = [{"image": f"{number}.png", "caption": "plain" if number < 5000 else "Säge"} for number in range(5003)]
    lines = [json.dumps(row, ensure_ascii=False) if ending == "jsonl" else ",".join(row.values()) for row in rows]
    data = "\n".join([*(["image,caption"] if ending != "jsonl" else []), *lines]).encode("latin-1")
    (tmp_path / f"pairs.{ending}").write_bytes(gzip.compress(data) if ending == "csv.gz" else data)
    arguments = DataArguments(source=str(tmp_path / f"pairs.{ending}"), streaming=streaming)
    line = 5001 if ending == "jsonl" else 5002
    with pytest.raises(ValueError, match=rf"pairs\.{ending}' is not in UTF-8 \(line {line}\): save it in that"):
        load_pairs(arguments, "train")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_csv_with_semicolons_as_excel_writes_it_where_the_comma_stands_in_numbers(table, separator, streaming):
    reports = ['Größe 3,5 cm;\nkein "Anhalt"', "one, two, three", "again"]
    with open(table / "pairs.csv", "w", encoding="utf-8-sig", newline="") as file:  # with a byte order mark
        writer = csv.writer(file, delimiter=separator, lineterminator="\r\n")
        writer.writerow(["file", "text", "patient"])
        writer.writerows(zip(["a/0.png", "a/1.png", "a/0.png"], reports, ["007", "", "007"], strict=True))
    arguments = table_arguments(table / "pairs.csv", streaming=streaming, shuffle_buffer=0)
    rows = list(load_pairs(arguments, "train"))
    assert [row["caption"] for row in rows] == reports
    assert [row["patient"] for row in rows] == ["007", "", "007"] and [gray_of(row) for row in rows] == [0, 1, 0]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("on_disk", "in_table"),
    [
        ("R\u00f6ntgen/Gr\u00f6\u00dfe 1.png", "Ro\u0308ntgen/Gro\u0308\u00dfe 1.png"),
        ("Ro\u0308ntgen/Gro\u0308\u00dfe 1.png", "R\u00f6ntgen/Gr\u00f6\u00dfe 1.png"),
        ("CT/Kopf/1.png", "CT\\Kopf\\1.png"),
        ("R\u00f6ntgen/1.png", "Ro\u0308ntgen\\1.png"),
    ],
    ids=["composed", "decomposed", "backslash", "both"],
)
def test_paths_as_windows_and_macos_write_them(table, on_disk, in_table, streaming):
    """An o with its dots is one character of Unicode or two, and a table and an unpacked archive may differ."""
    draw(table / on_disk, 7)
    file = write_table(table / "p.jsonl", [(in_table, "there", "1", ""), ("a/1.png", "plain", "2", "")])
    arguments = table_arguments(file, streaming=streaming, shuffle_buffer=0, modalities={"second": "file"})
    rows = list(load_pairs(arguments, "train"))
    assert [gray_of(row) for row in rows] == [7, 1] and [row["image_id"] for row in rows] == [on_disk, "a/1.png"]
    assert rows[0]["second"]["path"] == str(table / on_disk)
    write_table(file, [("R\u00f6ntgen\\2.png", "gone", "1", ""), ("a/1.png", "plain", "2", "")])
    with pytest.raises((ValueError, FileNotFoundError), match=r"R\u00f6ntgen\\2\.png"):
        list(load_pairs(arguments, "train"))


def test_table_beside_many_images(table):
    write_table(table / "train.csv")
    write_table(table / "test.csv", ROWS[:1])
    assert len(load_pairs(table_arguments(table), "train")) == 3
    assert len(load_pairs(table_arguments(table), "test")) == 1
    with pytest.raises(ValueError, match="no split 'validation'.*The splits are: test, train.*data.folds"):
        load_pairs(table_arguments(table), "validation")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["CSV", "tsv.gz", "CSV.GZ", "JSONL", "jsonl.gz"])
def test_endings_in_capitals_and_packed_tables(table, ending, streaming):
    plain = write_table(table / f"all.{ending.lower().removesuffix('.gz')}")
    content = plain.read_bytes()
    plain.unlink()
    data = gzip.compress(content) if ending.lower().endswith("gz") else content
    options = {"streaming": streaming, "shuffle_buffer": 0}
    (table / f"PAIRS.{ending}").write_bytes(data)
    pairs = load_pairs(table_arguments(table, **options), "train")  # the only table of a folder of images
    assert [row["patient"] for row in pairs] == ["007", "008", "007"]
    assert list(load_pairs(table_arguments(table / f"PAIRS.{ending}", **options), "train")) == list(pairs)
    (table / f"PAIRS.{ending}").rename(table / f"val.{ending}")
    write_table(table / "train.csv", ROWS[:1])
    if ending.lower().split(".")[0] == "csv":  # the splits of a source are of one kind
        assert len(list(load_pairs(table_arguments(table, **options), "validation"))) == 3


def test_folder_of_tables(table, tmp_path):
    write_table(tmp_path / "sharded" / "train-00000.csv", ROWS[:2])
    write_table(tmp_path / "sharded" / "train-00001.csv", ROWS[2:])
    pairs = load_pairs(table_arguments(tmp_path / "sharded", image_root=str(table)), "train")
    assert pairs["patient"] == ["007", "008", "007"]
    assert [gray_of(row) for row in pairs] == [0, 1, 0]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_splits_of_other_columns(table, ending, streaming):
    """A test set often has no labels, and a column that the training set lacks."""
    write_table(table / f"train.{ending}")
    write_table(table / f"test.{ending}", [("seven", "a/1.png", 5)], ("text", "file", "age"))
    arguments = table_arguments(table, streaming=streaming, shuffle_buffer=0)
    train, test = (list(load_pairs(arguments, split)) for split in ("train", "test"))
    assert [(gray_of(row), row["caption"], row["label"]) for row in train] == [
        (0, "zero", "x"),
        (1, "None", ""),
        (0, "again", "y"),
    ]
    assert [(gray_of(row), row["caption"], str(row["age"])) for row in test] == [(1, "seven", "5")]
    assert "age" not in train[0] and "label" not in test[0]
    with pytest.raises(ValueError, match="no split 'validation'.*The splits are: test, train"):
        load_pairs(arguments, "validation")


def test_a_split_in_two_formats_is_told(table, caplog):
    write_table(table / "train.csv")
    write_table(table / "train.jsonl", ROWS[:1])
    write_table(table / "test.csv")
    assert len(load_pairs(table_arguments(table), "train")) == 1
    assert "has train.csv and train.jsonl for one split, train: train.jsonl is read." in caplog.text
    assert "test.csv" not in caplog.text


@pytest.mark.parametrize("name", ["latest", "Retrieval", "my_interval"])
def test_the_only_table_may_hold_letters_of_a_split_in_a_word(table, name):
    """With the images beside it, of which load_dataset would make a folder of images without captions."""
    write_table(table / f"{name}.csv")
    assert load_pairs(table_arguments(table), "train")["caption"] == ["zero", "None", "again"]


def test_hidden_files_are_no_tables(table):
    """As macOS leaves them on disks of other systems."""
    write_table(table / "pairs.csv")
    (table / "._pairs.csv").write_bytes(b"\x00\x05\x16\x07")
    assert load_pairs(table_arguments(table), "train")["caption"] == ["zero", "None", "again"]


def test_several_tables_of_a_folder_are_told(table, tmp_path, caplog):
    for name in ("pairs.csv", "pairs_old.csv"):
        write_table(table / name, ROWS[:2])
        draw(table / "a" / f"{len(name)}.png", 3)  # more images than tables, so that load_dataset reads them
    with pytest.raises(ValueError, match="no column 'file'"):
        load_pairs(table_arguments(table), "train")
    assert "has several tables (pairs.csv, pairs_old.csv); read is none of them but the images" in caplog.text
    assert f"data.source={table / 'pairs.csv'}." in caplog.text
    for name in ("a", "b"):
        write_table(tmp_path / "tables" / f"{name}.csv", ROWS[:2])
    assert len(load_pairs(table_arguments(tmp_path / "tables", image_root=str(table)), "train")) == 4
    assert "has several tables (a.csv, b.csv); read is a.csv, b.csv, as one. Name the one" in caplog.text
    caplog.clear()
    for number in range(2):
        write_table(tmp_path / "parts" / f"part-{number}.csv", ROWS[:2])
    assert len(load_pairs(table_arguments(tmp_path / "parts", image_root=str(table)), "train")) == 4
    assert not caplog.text


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
        ({"image_column": "scan"}, r"no column 'scan' \(data\.image_column\)"),
        ({"image_id_column": "patients"}, r"'patients' \(data\.image_id_column\)\. Did you mean 'patient'"),
        ({"label_columns": ["label", "lable"]}, r"'lable' \(data\.label_columns\)\. Did you mean 'label'"),
        ({"label_columns": "organ"}, r"'organ' \(data\.label_columns\)\. .* there is none, data\.label_columns=null"),
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


@pytest.mark.parametrize("streaming", [False, True])
def test_of_an_overlong_path_both_ends_are_told(table, streaming):
    """Its middle was, too, of thousands of letters."""
    file = write_table(table / "p.jsonl", [("a/" * 2000 + "last.png", "text", "1", "")])
    with pytest.raises(ValueError, match=r"a/a.*\.\.\..*a/last\.png'") as raised:
        list(load_pairs(table_arguments(file, streaming=streaming, shuffle_buffer=0), "train"))
    assert len(str(raised.value)) < 800


def test_captions_that_are_no_text(table):
    file = table / "p.jsonl"
    file.write_text(json.dumps({"file": "a/0.png", "text": ["one", "two"]}) + "\n")
    with pytest.raises(ValueError, match="'text' .* holds List.*, not text; .* a row of its own .*'text'"):
        load_pairs(table_arguments(file), "train")
    rows = pd.read_json(file, lines=True).explode("text")
    rows.to_json(file, orient="records", lines=True)
    pairs = load_pairs(table_arguments(file), "train")
    assert pairs["caption"][:] == ["one", "two"] and len(set(pairs["image_id"])) == 1


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


@pytest.mark.parametrize("name", ["pooled_text", "pooled_image", "group_ids", "present"])
def test_a_column_called_like_an_internal_one_is_not_kept(name, tmp_path, tiny_processor):
    (tmp_path / "0.ppm").write_bytes(b"P5 2 2 255\n" + bytes(4))
    path = tmp_path / "pairs.csv"
    path.write_text(f"image,caption,{name},age\n0.ppm,one,x,3\n0.ppm,two,y,4\n", encoding="utf-8")
    pairs = load_pairs(DataArguments(source=str(path)), "train")
    assert name not in pairs.column_names and pairs["age"] == ["3", "4"]
    batch = PairCollator(tiny_processor)([pairs[0], pairs[1]])
    assert set(batch) == {"pixel_values", "group_ids", "input_ids", "attention_mask", "token_type_ids"}


def test_a_column_called_like_an_internal_one_may_say_the_folds(tmp_path):
    (tmp_path / "0.ppm").write_bytes(b"P5 2 2 255\n" + bytes(4))
    path = tmp_path / "pairs.csv"
    rows = "".join(f"0.ppm,caption {number},{number % 3}\n" for number in range(6))
    path.write_text(f"image,caption,group_ids\n{rows}", encoding="utf-8")
    arguments = DataArguments(source=str(path), folds=3, fold_column="group_ids", image_id_column="caption")
    held_out = load_pairs(arguments, "validation")
    assert len(held_out) == 2 and "group_ids" not in held_out.column_names
