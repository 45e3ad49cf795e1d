"""A table whose column says which split a row belongs to. Expected rows are written out by hand."""

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from gap_closed_clip.data import DataArguments, load_pairs

from .conftest import draw, table_arguments, write_table


NAMES = ("file", "text", "split")
WORDS = ["train", "test", "val", "Train ", "valid", "dev", "validation", "TEST"]
ROWS = [(f"a/{index % 2}.png", f"caption {index}", word) for index, word in enumerate(WORDS)]
EXPECTED = {"train": [0, 3], "validation": [2, 4, 5, 6], "test": [1, 7]}

both_ways = pytest.mark.parametrize("streaming", [False, True])


def captions_of(arguments: DataArguments, split: str) -> list[int]:
    """The numbers of the rows that were taken."""
    return [int(row["caption"].removeprefix("caption ")) for row in load_pairs(arguments, split)]


@both_ways
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_rows_go_to_the_split_that_they_name(table, ending, streaming):
    file = write_table(table / f"pairs.{ending}", ROWS, NAMES)
    arguments = table_arguments(file, streaming=streaming, shuffle_buffer=0)
    assert {split: captions_of(arguments, split) for split in EXPECTED} == EXPECTED
    renamed = write_table(table / f"other.{ending}", ROWS, ("file", "text", "part"))
    named = table_arguments(renamed, streaming=streaming, shuffle_buffer=0, split_column="part")
    assert {split: captions_of(named, split) for split in EXPECTED} == EXPECTED
    whole = table_arguments(file, streaming=streaming, shuffle_buffer=0, split_column=None)
    assert captions_of(whole, "train") == list(range(8))


@both_ways
@pytest.mark.parametrize("name", ["Split", "SPLIT", " Split "])
def test_its_name_counts_in_any_case_as_its_words_do(table, name, streaming):
    """Passed over without a word, the rows of the test split were training pairs."""
    file = write_table(table / "pairs.csv", ROWS, ("file", "text", name))
    arguments = table_arguments(file, streaming=streaming, shuffle_buffer=0)
    assert {split: captions_of(arguments, split) for split in EXPECTED} == EXPECTED
    whole = table_arguments(file, streaming=streaming, shuffle_buffer=0, split_column=None)
    assert captions_of(whole, "train") == list(range(8))


@both_ways
def test_of_two_the_one_of_the_very_name_counts(table, streaming):
    rows = [(*ROWS[0][:2], "test", "train"), (*ROWS[1][:2], "train", "test")]
    file = write_table(table / "pairs.csv", rows, ("file", "text", "Split", "split"))
    assert captions_of(table_arguments(file, streaming=streaming, shuffle_buffer=0), "train") == [0]


def test_a_folder_of_one_table_under_any_name(table):
    """With the images beside it, of which load_dataset would make a folder of images."""
    draw(table / "0.png", 3)
    write_table(table / "pairs.csv", ROWS, NAMES)
    assert {split: captions_of(table_arguments(table), split) for split in EXPECTED} == EXPECTED
    assert load_pairs(table_arguments(table), "test")[0]["image"]["path"] == str(table / "a" / "1.png")
    write_table(table / "notes.csv", ROWS[:1], NAMES)  # now it is not known which
    with pytest.raises(ValueError):
        load_pairs(table_arguments(table), "train")


def test_metadata_of_a_folder_of_images(table):
    write_table(table / "metadata.csv", ROWS[:3], ("file_name", "caption", "split"))
    assert captions_of(DataArguments(source=str(table)), "test") == [1]


@both_ways
@pytest.mark.parametrize("first", ["", "unlabeled"])
def test_a_first_row_without_a_split_does_not_make_all_rows_training_pairs(table, first, streaming):
    rows = [(ROWS[0][0], ROWS[0][1], first), *ROWS[1:]]
    arguments = table_arguments(write_table(table / "pairs.csv", rows, NAMES), streaming=streaming, shuffle_buffer=0)
    with pytest.raises(
        ValueError, match=f"holds {repr(first) if first else 'an empty cell'}, which is the name of no"
    ):
        captions_of(arguments, "train")


@both_ways
def test_classes(table, streaming):
    features = Features(file=Value("string"), text=Value("string"), split=ClassLabel(names=["val", "train"]))
    rows = {"file": ["a/0.png", "a/1.png"], "text": ["caption 0", "caption 1"], "split": [0, 1]}
    Dataset.from_dict(rows, features).to_parquet(str(table / "p.parquet"))
    arguments = table_arguments(table / "p.parquet", streaming=streaming, shuffle_buffer=0)
    assert captions_of(arguments, "train") == [1] and captions_of(arguments, "validation") == [0]


@both_ways
def test_names_of_ones_own(table, streaming):
    file = write_table(table / "p.csv", [(*row[:2], word) for row, word in zip(ROWS, "abat", strict=False)], NAMES)
    options = {
        "train_split": "a",
        "validation_split": "b",
        "test_split": "t",
        "streaming": streaming,
        "shuffle_buffer": 0,
    }
    arguments = table_arguments(file, **options)
    assert [captions_of(arguments, split) for split in EXPECTED] == [[0, 2], [1], [3]]


def test_folds_are_cut_from_the_rows_of_training(table):
    rows = [(f"a/{index % 2}.png", f"caption {index}", "train" if index % 3 else "test") for index in range(12)]
    arguments = table_arguments(write_table(table / "p.csv", rows, NAMES), folds=2)
    found = [captions_of(arguments, split) for split in ("train", "validation")]
    assert sorted(found[0] + found[1]) == [index for index in range(12) if index % 3] and all(found)
    assert captions_of(arguments, "test") == [0, 3, 6, 9]


@both_ways
def test_a_column_of_that_name_that_says_other_things_is_left_alone(table, streaming):
    file = write_table(table / "p.csv", [(*row[:2], "lateral") for row in ROWS], NAMES)
    arguments = table_arguments(file, streaming=streaming, shuffle_buffer=0)
    rows = list(load_pairs(arguments, "train"))
    assert len(rows) == 8 and {row["split"] for row in rows} == {"lateral"}


@both_ways
@pytest.mark.parametrize(
    ("words", "options", "split", "message"),
    [
        (
            ["train", "holdout"],
            {},
            "train",
            r"'split' of .* holds 'holdout', .* Understood are train, training, val, ",
        ),
        (["train", ""], {}, "train", r"holds an empty cell.* data\.split_column=null"),
        (
            ["train", "test"],
            {},
            "validation",
            r"p\.csv' has no split 'validation'\. The splits are: train, test\..*folds",
        ),
        (
            ["train", "test"],
            {"split_column": "fold"},
            "train",
            r"no column 'fold' \(data\.split_column\)\. .*The columns",
        ),
        (["lateral", "b"], {"split_column": "text"}, "train", "The column 'text' of .* holds 'caption 0'"),
        (["train", "val"], {"train_split": "train[:1]"}, "train", r"'train\[:1\]' asks for a part of the whole table"),
    ],
)
def test_columns_that_are_not_understood(table, words, options, split, message, streaming):
    file = write_table(table / "p.csv", [(*row[:2], word) for row, word in zip(ROWS, words, strict=False)], NAMES)
    with pytest.raises(ValueError, match=message):
        list(load_pairs(table_arguments(file, streaming=streaming, shuffle_buffer=0, **options), split))


def test_splits_of_its_own_and_a_column(table):
    for split in ("train", "test"):
        write_table(table / f"{split}.csv", ROWS, NAMES)
    assert len(load_pairs(table_arguments(table), "train")) == 8
    with pytest.raises(ValueError, match=r"data\.split_column: .* has splits of its own \(test, train\)"):
        load_pairs(table_arguments(table, split_column="text"), "train")


def test_each_source_of_a_list_has_its_own(table):
    first = write_table(table / "first.csv", ROWS, NAMES)
    second = write_table(table / "second.csv", ROWS, ("file", "text", "part"))
    sources = [{"source": str(first)}, {"source": str(second), "split_column": "part"}]
    pairs = load_pairs(DataArguments(source=sources, image_column="file", caption_column="text"), "test")
    assert pairs["caption"] == ["caption 1", "caption 7"] * 2


def test_a_zero_is_no_empty_cell(table):
    rows = [(f"a/{index % 2}.png", f"caption {index}", fold) for index, fold in enumerate([0, 1, 0])]
    file = write_table(table / "pairs.parquet", rows, ("file", "text", "fold"))
    with pytest.raises(ValueError, match="column 'fold' of .* holds 0, 1, which is the name of no split"):
        load_pairs(table_arguments(file, split_column="fold"), "train")
