"""Where sources are found, folds, sizes, streams, and the arguments that choose them."""

import logging
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from torch.utils.data import DataLoader

from gap_closed_clip.data import DataArguments, decode_image, load_checked_pairs, load_pairs
from gap_closed_clip.data.folds import assign_folds, join_groups

from .conftest import draw, table_arguments, train_folder, write_table


# Where a source is found


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
    rows = [(f"{i // 3}.png", f"caption {i}", f"case {i // 3}", "") for i in range(60)]
    for case in range(20):
        draw(table / f"{case}.png", case)
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


def test_an_image_of_two_cases_is_in_one_fold(table):
    # Case i has image i; beside it, images 0 and 1 are also of case "both", image 2 of no case.
    for image in range(12):
        draw(table / f"{image}.png", image)
    rows = [(f"{i}.png", f"caption {i}", f"case {i}", "") for i in range(12)]
    rows += [("0.png", "x", "both", ""), ("1.png", "y", "both", ""), ("2.png", "z", "", "")]
    together = [{"caption 0", "caption 1", "x", "y"}, {"caption 2", "z"}, *({f"caption {i}"} for i in range(3, 12))]
    file = write_table(table / "p.csv", rows)
    seen = []
    for fold in range(3):
        arguments = table_arguments(file, folds=3, fold=fold, fold_column="patient")
        train, held_out = (set(load_pairs(arguments, split)["caption"]) for split in ("train", "validation"))
        assert train | held_out == {row[1] for row in rows} and not train & held_out
        assert all(group <= train or group <= held_out for group in together)
        seen.append(held_out)
    assert sorted(map(len, seen)) == [5, 5, 5]


def test_joined_groups_do_not_depend_on_the_order_of_rows():
    random = np.random.default_rng(0)
    rows = [(f"case {random.integers(60)}", f"image {random.integers(60)}") for _ in range(70)]
    rows += [("case 3", ""), ("case 5", ""), ("case 99", "")]  # no image that they share
    sets: list[set[str]] = []  # the reference: what has something in common is put together, row after row
    for case, image in rows:
        new = {case, image} - {""}
        sets = [each for each in sets if not each & new] + [new.union(*(each for each in sets if each & new))]
    names = {case: min(each - {name for name in each if name.startswith("image")}) for each in sets for case in each}
    assert join_groups(*map(list, zip(*rows, strict=True))) == [names[case] for case, _ in rows]
    assert 1 < len({*names.values()}) < len({case for case, _ in rows}) and names["case 99"] == "case 99"
    shuffled = [rows[index] for index in random.permutation(len(rows))]
    assert join_groups(*map(list, zip(*shuffled, strict=True))) == [names[case] for case, _ in shuffled]


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


@pytest.fixture
def saved(tmp_path, roco) -> Path:
    """What `save_to_disk` writes of a DatasetDict: images in its tables, beside paths from its folder."""
    source = train_folder(roco) / "images"
    content = [path.read_bytes() for path in sorted(source.iterdir())]
    rows = {"image": [{"bytes": each, "path": None} for each in content], "caption": ["one", "two", "three"]}
    features = Features({"image": datasets.Image(), "caption": Value("string")})
    pairs = Dataset.from_dict(rows, features=features)
    DatasetDict({"train": pairs, "validation": pairs.select([0, 1])}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_save_to_disk(saved, tmp_path, streaming):
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    arguments = DataArguments(source=str(saved), streaming=streaming, shuffle_buffer=0, test_split=None)
    rows = [*load_checked_pairs(arguments, "train")]
    assert [row["caption"] for row in rows] == ["one", "two", "three"] and len({row["image_id"] for row in rows}) == 3
    assert decode_image(rows[0]["image"]).mode
    assert [row["caption"] for row in load_checked_pairs(arguments, "validation")] == ["one", "two"]
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before  # no caches among them
    one = DataArguments(source=str(saved / "train"), streaming=streaming, shuffle_buffer=0)
    assert [row["caption"] for row in load_checked_pairs(one, "train")] == ["one", "two", "three"]
    labelled = Dataset.load_from_disk(saved / "train").add_column("split", ["train", "test", "dev"])
    labelled.save_to_disk(tmp_path / "labelled")
    by_column = DataArguments(source=str(tmp_path / "labelled"), streaming=streaming)
    assert [row["caption"] for row in load_pairs(by_column, "validation")] == ["three"]


def test_a_folder_of_save_to_disk_that_cannot_be_read(saved):
    with pytest.raises(ValueError, match="has no split 'test'"):
        load_pairs(DataArguments(source=str(saved)), "test")
    with pytest.raises(ValueError, match=r"'train\[:90%\]' asks for a part of a split, and .* save_to_disk"):
        load_pairs(DataArguments(source=str(saved), train_split="train[:90%]"), "train")
    next((saved / "train").glob("*.arrow")).write_bytes(b"no table")
    with pytest.raises(ValueError, match="cannot be read"):
        load_pairs(DataArguments(source=str(saved)), "train")


def test_a_local_source_has_no_subset(roco, table):
    for source in (roco, table):
        with pytest.raises(ValueError, match="data.subset is 'en', a configuration of a Hub data set, and .*null"):
            load_pairs(DataArguments(source=str(source), subset="en"), "train")


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
     ("contrast", -0.1), ("cache_images", 0), ("phantom_test_pairs", 0),
     ("max_caption_tokens", 2)],
)  # fmt: skip
def test_arguments_out_of_range(field, value):
    with pytest.raises(ValueError, match=field):
        DataArguments(**{field: value})


def test_fold_out_of_range():
    with pytest.raises(ValueError, match="data.fold is 5; with data.folds=5 it is 0 to 4"):
        DataArguments(folds=5, fold=5)


# Real pairs


@pytest.mark.usefixtures("radiology_data")
def test_medpix2():
    arguments = DataArguments(source="$RADIOLOGY_DATA/medpix2", label_columns=["modality", "location_category"])
    train, validation = (load_pairs(arguments, split) for split in ("train", "validation"))
    assert [len(train), len(set(train["caption"]))] == [1578, 1064]
    assert [len(validation), len(set(validation["caption"]))] == [189, 127]
    assert len(set(train["image_id"])) == 1578
    assert Counter(label.split(" / ")[0] for label in validation["label"]) == {"CT": 81, "MR": 108}
    assert len(set(train["case_id"])) == 516 and not set(train["case_id"]) & set(validation["case_id"])


@pytest.mark.usefixtures("radiology_data")
def test_medpix2_folds():
    seen = Counter()
    for fold in range(5):
        arguments = DataArguments(source="$RADIOLOGY_DATA/medpix2", folds=5, fold=fold, fold_column="case_id")
        train, held_out = (load_pairs(arguments, split) for split in ("train", "validation"))
        assert len(train) + len(held_out) == 1578 and len(held_out) in (315, 316)
        assert not set(train["case_id"]) & set(held_out["case_id"])
        seen.update(held_out["image_id"])
    assert len(seen) == 1578 and set(seen.values()) == {1}
