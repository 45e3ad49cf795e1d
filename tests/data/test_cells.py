"""What cells of a table may hold beside what they should: nothing, NaN, white space, mixed types, bytes and paths."""

import io
import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gap_closed_clip.data import load_pairs

from .conftest import ROWS, gray_of, table_arguments, write_table


@pytest.mark.parametrize("streaming", [False, True])
def test_nan_and_white_space_are_no_labels(table, streaming):
    labels = [0.0, float("nan"), 1.0]
    frame = pd.DataFrame({"file": "a/0.png", "text": ["a", "b", "c"], "label": labels, "patient": "x"})
    pq.write_table(pa.Table.from_pydict(frame.to_dict("list")), table / "p.parquet")
    arguments = table_arguments(table / "p.parquet", streaming=streaming, shuffle_buffer=0)
    assert [row["label"] for row in load_pairs(arguments, "train")] == ["0", "", "1"]
    rows = [("a/0.png", caption, "x", label) for caption, label in (("a", "one"), ("b", " "), ("c", "one "))]
    arguments = table_arguments(write_table(table / "p.csv", rows), streaming=streaming, shuffle_buffer=0)
    assert [row["label"] for row in load_pairs(arguments, "train")] == ["one", "", "one"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", [pa.int64(), pa.float64()])
def test_whole_numbers_in_a_column_with_gaps_have_no_decimals(table, kind, streaming):
    """A data frame, and the files that it writes, has floating-point numbers in such a column."""
    numbers, splits = [7, 12, 7, *range(40, 60)], [1, 0, 1, *[0] * 20]
    names, texts = [str(number) for number in numbers], [f"caption {row}" for row in range(23)]
    columns = {
        "file": [f"a/{number % 2}.png" for number in numbers],
        "text": texts,
        **{name: pa.array(values, kind) for name, values in (("number", numbers), ("part", splits))},
    }
    pq.write_table(pa.table(columns), table / "p.parquet")

    def load(**options):
        arguments = table_arguments(table / "p.parquet", streaming=streaming, shuffle_buffer=0, **options)
        return list(load_pairs(arguments, "train"))

    assert [row["label"] for row in load(label_columns=["number"])] == names
    assert [row["image_id"] for row in load(image_id_column="number")] == names
    parts = {"split_column": "part", "train_split": "0", "validation_split": None, "test_split": "1"}
    assert [row["caption"] for row in load(**parts)] == [texts[1], *texts[3:]]
    # The fold of a case is that of its name as text.
    rows = [(file, text, name, "") for file, text, name in zip(columns["file"], texts, names, strict=True)]
    options = {"folds": 3, "image_id_column": "text", "streaming": streaming, "shuffle_buffer": 0}
    of_text = table_arguments(write_table(table / "p.csv", rows), fold_column="patient", **options)
    expected = [row["caption"] for row in load_pairs(of_text, "train")]
    found = load(fold_column="number", folds=3, image_id_column="text")
    assert [row["caption"] for row in found] == expected and 0 < len(expected) < 23


@pytest.mark.parametrize("streaming", [False, True])
def test_white_space_makes_no_other_case_and_nan_none(table, streaming):
    cases = [f"P{i // 2}" + " " * (i % 2) for i in range(40)]
    rows = [("a/0.png", f"caption {i}", case, "") for i, case in enumerate(cases)]
    options = {"folds": 4, "fold_column": "patient", "image_id_column": "text"}  # each row an image of its own
    arguments = table_arguments(write_table(table / "p.csv", rows), streaming=streaming, **options)
    parts = [{row["patient"].strip() for row in load_pairs(arguments, split)} for split in ("train", "validation")]
    assert all(parts) and not set.intersection(*parts)

    content = {"file": ["a/0.png"] * 4 + ["a/1.png"], "text": list("abcde"), "patient": [float("nan")] * 5}
    pq.write_table(pa.Table.from_pydict({**content, "label": [""] * 5}), table / "p.parquet")
    arguments = table_arguments(table / "p.parquet", folds=2, fold_column="patient")
    assert [len(load_pairs(arguments, split)) for split in ("train", "validation")] == [1, 4]  # by image


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["text", "file"])
def test_folds_by_the_captions_or_by_the_images(table, column, streaming):
    """Also where these columns have another name than among the pairs."""
    rows = [(f"a/{i % 2}.png", f"caption {i // 4}", "", "") for i in range(40)]
    options = {"folds": 2, "fold_column": column}
    if column == "text":
        options["image_id_column"] = "patient"
        rows = [(file, text, f"id {i}", "") for i, (file, text, *_) in enumerate(rows)]
    arguments = table_arguments(write_table(table / "p.csv", rows), streaming=streaming, **options)
    name = {"text": "caption", "file": "image_id"}[column]
    parts = [[row[name] for row in load_pairs(arguments, split)] for split in ("train", "validation")]
    assert sum(map(len, parts)) == 40 and not set(parts[0]) & set(parts[1])
    assert streaming or all(parts)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("image_id", {"image_id_column": "patient"}),
        ("label", {"label_columns": ["patient"]}),
        ("label", {"label_columns": ["label", "patient"]}),
        ("caption", {}),
        ("image", {}),
    ],
)
def test_a_fold_column_whose_name_another_column_gets_is_told_of(table, name, options, streaming):
    """`load_pairs` calls the column of captions `caption`: folds were cut by that, and not by the source's own."""
    names = ["file", "text", "patient", *({name, "label"})]
    rows = [{**dict.fromkeys(names, f"case {i // 4}"), "file": "a/0.png", "patient": f"{i}"} for i in range(20)]
    (table / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = table_arguments(table / "p.jsonl", streaming=streaming, folds=2, fold_column=name, **options)
    argument = "label_columns" if name == "label" else f"{name}_column"
    message = rf"has a column '{name}' that data\.fold_column names, but data\.{argument} names another"
    with pytest.raises(ValueError, match=message):
        list(load_pairs(arguments, "train"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("column", "options"), [("case", {"folds": 2, "fold_column": "case"}), ("case", {"image_id_column": "case"})]
)
def test_ids_of_mixed_types_are_told_of(table, column, options, streaming):
    rows = [{"file": "a/0.png", "text": "a", "patient": "", "label": "", column: value} for value in (1, "B1", 2)]
    (table / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argument = "fold_column" if "folds" in options else "image_id_column"
    message = rf"column 'case' of .* holds .*; data\.{argument} must name a column with one text or one number in each"
    with pytest.raises(ValueError, match=message):
        list(load_pairs(table_arguments(table / "p.jsonl", streaming=streaming, **options), "train"))


def test_images_are_no_ids(table):
    with pytest.raises(ValueError, match=r"holds .*; data\.image_id_column must name a column with one text or one"):
        buffer = io.BytesIO()
        Image.new("L", (8, 8), 7).save(buffer, "PNG")
        content = {"file": [{"bytes": buffer.getvalue(), "path": None}], "text": ["a"], "label": [""]}
        pq.write_table(pa.Table.from_pydict({**content, "patient": ["x"]}), table / "p.parquet")
        load_pairs(table_arguments(table / "p.parquet", image_id_column="file"), "train")


def test_images_of_which_some_are_stored_and_some_are_files(table, monkeypatch):
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 7).save(buffer, "PNG")
    (table / "elsewhere" / "a").mkdir(parents=True)
    Image.new("L", (8, 8), 200).save(table / "elsewhere" / "a" / "1.png")
    monkeypatch.chdir(table / "elsewhere")  # a file of the same name, which is another image
    images = [{"bytes": None, "path": "a/1.png"}, {"bytes": buffer.getvalue(), "path": "x.png"}]
    content = {"file": [*images, {"bytes": None, "path": "a/0.png"}], "text": list("abc"), "patient": list("xyz")}
    pq.write_table(pa.Table.from_pydict({**content, "label": list("klm")}), table / "p.parquet")
    pairs = load_pairs(table_arguments(table / "p.parquet"), "train")
    assert [gray_of(row) for row in pairs] == [1, 7, 0]
    assert [row["image"]["path"] for row in pairs] == [str(table / "a/1.png"), "x.png", str(table / "a/0.png")]
    assert pairs["caption"] == list("abc") and pairs["label"] == list("klm") and pairs["patient"] == list("xyz")


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_file(table, streaming):
    (table / "p.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"p\.jsonl' holds no rows\."):
        load_pairs(table_arguments(table / "p.jsonl", streaming=streaming), "train")


def test_a_table_without_rows(table):
    pq.write_table(
        pa.table({"file": pa.array([], pa.string()), "text": pa.array([], pa.string())}), table / "p.parquet"
    )
    with pytest.raises(ValueError, match=r"p\.parquet' holds no rows\."):
        load_pairs(table_arguments(table / "p.parquet"), "train")


# --- the words that name a folder's tables


@pytest.mark.parametrize("word", ["val", "valid", "dev", "Validation"])
def test_other_words_for_the_splits(table, word):
    for name, rows in (("train", ROWS[:2]), (word, ROWS[2:]), ("testing", ROWS[:1])):
        write_table(table / f"{name}.csv", rows)
    found = [load_pairs(table_arguments(table), split)["caption"] for split in ("train", "validation", "test")]
    assert found == [["zero", "None"], ["again"], ["zero"]]


def test_the_splits_own_names_come_first(table):
    for name, rows in (("train", ROWS[:2]), ("val", ROWS[2:]), ("validation", ROWS[:1])):
        write_table(table / f"{name}.csv", rows)
    assert load_pairs(table_arguments(table), "validation")["caption"] == ["zero"]
    assert load_pairs(table_arguments(table, validation_split="val"), "validation")["caption"] == ["again"]


def test_two_words_for_one_split(table):
    for name in ("train", "val", "dev"):
        write_table(table / f"{name}.csv")
    with pytest.raises(ValueError, match=r"has dev\.csv and val\.csv for one split, validation: say which with"):
        load_pairs(table_arguments(table), "train")
    assert len(load_pairs(table_arguments(table, validation_split="dev"), "validation")) == 3
