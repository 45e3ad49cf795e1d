"""Further modalities of any source: which samples have which, held against batches written out by hand."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gap_closed_clip import GapClosedClipProcessor
from gap_closed_clip.data import (
    DataArguments,
    DistinctSampler,
    PairCollator,
    group_ids,
    group_ids_of,
    load_checked_pairs,
    load_pairs,
)
from gap_closed_clip.data.features import FeaturePairs, FeatureStore, StoredFeatures
from gap_closed_clip.evaluation.embed import collate
from gap_closed_clip.model.record_processing_gap_closed_clip import ArrayProcessor, RecordProcessor

from .conftest import draw


ARRAY = [[1.0, 2.0], [3.0, 4.0]]
AGE = {"name": "age", "kind": "number", "mean": 50.0, "std": 10.0}
SEX = {"name": "sex", "kind": "category", "categories": ["f", "m"]}
MODALITIES = {"record": ["age", "sex"], "audio": "wave"}


@pytest.fixture
def source(tmp_path) -> Path:
    """A table of all kinds of samples; its last row has one modality alone."""
    for gray in range(3):
        draw(tmp_path / "set" / f"{gray}.png", gray)
    rows = [
        {"image": "0.png", "caption": "zero", "age": 60, "sex": "f", "wave": ARRAY},
        {"image": "", "caption": "one", "age": None, "sex": "m", "wave": None},
        {"image": "1.png", "caption": "", "age": 40, "sex": None, "wave": ARRAY},
        {"image": "2.png", "caption": "two", "age": None, "sex": "", "wave": None},
        {"image": "", "caption": "", "age": 30, "sex": "m", "wave": ARRAY},
        {"image": "", "caption": "only text", "age": None, "sex": "", "wave": []},
    ]
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "set"


def arguments(source: Path | str, **options) -> DataArguments:
    return DataArguments(source=str(source), **{"modalities": MODALITIES, "on_missing": "skip", **options})


@pytest.fixture
def processor(tiny_processor) -> GapClosedClipProcessor:
    further = {"record": RecordProcessor([AGE, SEX]), "audio": ArrayProcessor("input_values", [2, 2])}
    return GapClosedClipProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, further)


@pytest.mark.parametrize("streaming", [False, True])
def test_batch_of_samples_that_lack_something(source, processor, streaming, caplog):
    pairs = load_pairs(arguments(source, streaming=streaming, shuffle_buffer=0), "train")
    rows = list(pairs)
    assert [row["caption"] for row in rows] == ["zero", "one", "", "two", ""]
    assert [bool(row["image_id"]) for row in rows] == [True, False, True, True, False]
    assert [row["record"] for row in rows] == [
        {"age": 60, "sex": "f"},
        {"age": None, "sex": "m"},
        {"age": 40, "sex": None},
        None,
        {"age": 30, "sex": "m"},
    ]
    batch = PairCollator(processor)(rows)
    mask = [[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]]
    assert batch["modality_mask"].tolist() == [[bool(value) for value in row] for row in mask]
    assert batch["record_numbers"].tolist() == [[1], [0], [-1], [0], [-2]]
    assert batch["record_numbers_mask"].tolist() == [[True], [False], [True], [False], [True]]
    assert batch["record_categories"].tolist() == [[2], [3], [0], [0], [3]]
    assert batch["audio_input_values"].tolist() == [ARRAY, [[0, 0]] * 2, ARRAY, [[0, 0]] * 2, ARRAY]
    plain = PairCollator(processor)([rows[0], rows[2], rows[3]])["pixel_values"]
    assert torch.equal(batch["pixel_values"][[0, 2, 3]], plain) and not batch["pixel_values"][[1, 4]].any()
    empty = processor.tokenizer("")["input_ids"]
    assert batch["input_ids"][2, : len(empty)].tolist() == empty and batch["attention_mask"][2].sum() == len(empty)
    told = " ".join(record.getMessage() for record in caplog.records)
    assert ("row 5" in told) and ("the text" in told)
    assert (
        streaming
        or "of 5 samples some lack something (the image: 2, the text: 2, the record: 1, the audio: 2)" in told
    )


def test_equal_values_have_equal_ids(processor):
    image = Image.new("RGB", (30, 30))
    samples = [
        ("a", "one", {"age": 60, "sex": "f"}, ARRAY),
        ("b", "One ", {"age": 60.0, "sex": " F"}, np.array(ARRAY, dtype=np.float32)),
        ("c", "two", {"age": 60, "sex": None}, [[1.0, 2.0], [3.0, 5.0]]),
        ("d", "two", {"sex": "f", "age": 60}, None),
        ("a", "three", {"age": None, "sex": ""}, ARRAY),
    ]
    names = ("image_id", "caption", "record", "audio")
    batch = PairCollator(processor)([{"image": image, **dict(zip(names, sample, strict=True))} for sample in samples])
    found = batch["modality_ids"]
    assert found.dtype == torch.int64 and torch.equal(found[:, :2], batch["group_ids"])
    equal = [[[i, j] for i in range(5) for j in range(i) if ids[i] == ids[j]] for ids in found.T]
    assert equal == [[[4, 0]], [[1, 0], [3, 2]], [[1, 0], [3, 0], [3, 1]], [[1, 0], [4, 0], [4, 1]]]
    assert not batch["modality_mask"][4, 2] and not batch["modality_mask"][3, 3]
    assert "modality_ids" not in PairCollator(GapClosedClipProcessor(processor.image_processor, processor.tokenizer))(
        [{"image": image, "image_id": "a", "caption": "one"}]
    )


def test_a_record_of_its_reference_date_alone_is_none(processor):
    """... since a date that others are relative to is no field; in training and in evaluation."""
    rows = [
        {"image": Image.new("RGB", (30, 30), (gray, 0, 0)), "image_id": str(gray), "caption": f"caption {gray}"}
        for gray in range(3)
    ]
    records = [
        {"birth": "1960-01-01", "study": "2020-01-01"},
        {"birth": None, "study": "2020-01-01"},
        {"birth": "1980-01-01", "study": "2020-06-01"},
    ]
    age = RecordProcessor.fit(records, [{"name": "birth", "kind": "date", "relative_to": "study"}])
    assert age.field_names == ["birth"] and age.column_names == ["birth", "study"]
    both = GapClosedClipProcessor(processor.image_processor, processor.tokenizer, {"record": age})
    rows = [{**row, "record": record} for row, record in zip(rows, records, strict=True)]
    batch = PairCollator(both)(rows)
    assert batch["modality_mask"][:, 2].tolist() == [True, False, True]
    assert batch["record_numbers_mask"].flatten().tolist() == [True, False, True]
    encoded = both(record=records)
    assert encoded["modality_mask"][:, 2].tolist() == [True, False, True]
    assert torch.equal(encoded["record_numbers"], batch["record_numbers"])
    with pytest.raises(ValueError, match="field 'birht' .* no such field"):  # which is not nothing
        both(record=[{"birht": "1960-01-01", "study": "2020-01-01"}])
    columns, inputs = collate(rows, PairCollator(both), ["image", "record"])
    assert [bool(each) for each in columns.values["record"].ids] == [True, False, True]
    assert torch.equal(inputs["record"]["numbers"], batch["record_numbers"][[0, 2]])


def test_one_modality_alone_is_an_error_that_names_it(source):
    message = r"has half pairs: samples of one modality alone: 1 \(row 5: the text\).*data.on_missing=skip"
    with pytest.raises(ValueError, match=message):
        load_pairs(arguments(source, on_missing="error"), "train")
    with pytest.raises(
        ValueError, match=r"row 5 \(from 0\): it has the text alone\. Complete .* data.on_missing=skip"
    ):
        list(load_pairs(arguments(source, on_missing="error", streaming=True, shuffle_buffer=0), "train"))


def test_a_path_to_nothing_is_a_mistake_and_no_empty_cell(source):
    (source / "1.png").unlink()
    with pytest.raises(ValueError, match=r"images that do not exist: 1 \(row 2: '.*1.png'\); samples of one"):
        load_pairs(arguments(source, on_missing="error"), "train")
    assert len(load_pairs(arguments(source), "train")) == 4


def test_without_further_modalities_half_pairs_are_errors(source):
    with pytest.raises(ValueError, match=r"empty captions: 2 \(row 2, row 4\); images that do not exist: 3"):
        load_pairs(arguments(source, modalities=None, on_missing="error"), "train")
    assert load_pairs(arguments(source, modalities=None), "train").column_names == [
        "age",
        "sex",
        "caption",
        "image_id",
        "image",
    ]


def test_damaged_images_are_found_and_lacking_ones_are_none(source):
    pairs = load_checked_pairs(arguments(source), "train")
    assert len(pairs) == 5
    cached = load_checked_pairs(arguments(source, cache_images=4), "train")
    assert [row["image"]["bytes"] is not None for row in cached] == [True, False, True, True, False]
    (source / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 5 images cannot be read"):
        load_checked_pairs(arguments(source), "train")
    assert len(load_checked_pairs(arguments(source, on_bad_image="skip"), "train")) == 4
    streamed = load_checked_pairs(arguments(source, on_bad_image="skip", streaming=True), "train")
    assert len(list(streamed)) == 4


def test_what_is_lacking_makes_no_group(source, processor):
    pairs = load_pairs(arguments(source), "train")
    groups = group_ids_of(pairs)
    assert len({image for image, _ in groups}) == len({caption for _, caption in groups}) == 5
    assert groups[0] == group_ids("0.png", "zero")
    batch = PairCollator(processor)(list(pairs))["group_ids"]
    assert all(len(set(batch[:, place].tolist())) == 5 for place in (0, 1))
    assert batch[0].tolist() == list(groups[0]) and batch[3].tolist() == list(groups[3])
    assert (batch >= 0).all() and torch.equal(PairCollator(processor)(list(pairs))["group_ids"], batch)
    order = list(DistinctSampler(groups, batch_size=5))
    assert sorted(order) == list(range(5))


def test_rows_in_memory_without_ids_or_columns(processor, caplog):
    image = Image.new("L", (28, 28), 9)
    rows = [{"image": image, "caption": None, "record": {"age": 60}}, {"image": None, "caption": "a", "record": None}]
    batch = PairCollator(processor)(rows)
    assert batch["modality_mask"].tolist() == [[True, False, True, False], [False, True, False, False]]
    assert caplog.text.count("no column 'audio', of which the model has a tower") == 1
    assert batch["audio_input_values"].tolist() == [[[0, 0]] * 2] * 2


def test_of_two_modalities_nothing_changes(tiny_processor, source):
    rows = [{"image": Image.new("L", (28, 28)), "caption": "a", "image_id": "1", "record": {"age": 60}}]
    names = {"pixel_values", "group_ids", "input_ids", "attention_mask", "token_type_ids"}
    assert set(PairCollator(tiny_processor)(rows)) == names


def test_a_bad_record_is_told_by_the_collator(processor):
    rows = [{"image": Image.new("L", (28, 28)), "caption": "a", "record": {"age": "old", "sex": None}}]
    with pytest.raises(ValueError, match="The modality 'record': Record, row 0 .*field 'age': 'old' is no number"):
        PairCollator(processor)(rows)


# --- features of frozen towers


def stored(folder: Path, rows: list[int], width: int) -> StoredFeatures:
    store = FeatureStore(folder, {"width": width}, 1, width)
    digests = [bytes([index]) * 16 for index in range(3)]
    with store.writing(digests):
        store.append(digests, np.arange(1, 3 * width + 1, dtype=np.float32).reshape(3, 1, width))
    return StoredFeatures(store, np.array(rows))


def test_features_and_what_goes_with_them(source, processor, tmp_path):
    pairs = load_pairs(arguments(source), "train")
    images, texts = stored(tmp_path / "f", [0, -1, 1, 2, -1], 2), stored(tmp_path / "f", [0, 1, -1, 2, -1], 3)
    whole = PairCollator(processor)(list(pairs))
    both = FeaturePairs(pairs, images, texts, varied=True, further=["record", "audio"])
    for given in (both, pickle.loads(pickle.dumps(both)), both.plain(), both.select(range(5))):
        batch = PairCollator(processor)(given.__getitems__([0, 1, 2, 3, 4]))
        assert batch["pooled_image"].tolist() == [[1, 2], [0, 0], [3, 4], [5, 6], [0, 0]]
        assert batch["pooled_text"].tolist() == [[1, 2, 3], [4, 5, 6], [0, 0, 0], [7, 8, 9], [0, 0, 0]]
        for name in ("modality_mask", "record_numbers", "record_categories", "audio_input_values"):
            assert torch.equal(batch[name], whole[name])
        assert len(set(batch["group_ids"][:, 0].tolist())) == 5
    only_images = FeaturePairs(pairs, images, None, further=["record", "audio"])
    batch = PairCollator(processor)(only_images.__getitems__([0, 1, 2, 3, 4]))
    assert torch.equal(batch["input_ids"], whole["input_ids"]) and torch.equal(
        batch["modality_mask"], whole["modality_mask"]
    )
    assert PairCollator(processor)(both.select([4, 0]).__getitems__([0]))["pooled_image"].tolist() == [[0, 0]]
    assert set(FeaturePairs(pairs, images, texts)[0]) == {"group_ids", "pooled_image", "pooled_text"}


# --- sources


def test_a_source_without_captions_or_images(source):
    for column, lacking in (("caption_column", 1), ("image_column", 0)):
        for streaming in (False, True):
            pairs = list(
                load_pairs(arguments(source, **{column: None}, streaming=streaming, shuffle_buffer=0), "train")
            )
            there = [(bool(row["image_id"]), bool(row["caption"])) for row in pairs]
            assert not any(each[lacking] for each in there) and len(pairs) == (3 if lacking else 4)
    with pytest.raises(ValueError, match="then data.modalities must name something beside"):
        load_pairs(arguments(source, caption_column=None, modalities=None), "train")


@pytest.mark.parametrize("streaming", [False, True])
def test_several_sources_of_different_modalities(source, roco, streaming, tmp_path):
    for index in range(2):
        draw(tmp_path / "c" / f"{index}.png", index)
    table = "image,caption,age,ward\n0.png,c0,7.0,A\n1.png,c1,,\n"
    (tmp_path / "c" / "train.csv").write_text(table)
    entries = [
        {"source": str(source), "name": "a"},
        {"source": str(roco), "name": "b", "modalities": None},
        {"source": str(tmp_path / "c" / "train.csv"), "name": "c", "modalities": {"record": ["age", "ward"]}},
    ]
    args = DataArguments(
        source=entries, modalities=MODALITIES, on_missing="skip", streaming=streaming, shuffle_buffer=0
    )
    assert args.all_modalities == {"record": ["age", "sex", "ward"], "audio": "wave"}
    rows = sorted(load_pairs(args, "train"), key=lambda row: row["source"])
    records = [row["record"] for row in rows]
    assert len(rows) == 10 and [row["source"] for row in rows] == [*"aaaaa", *"bbb", *"cc"]
    assert set(records[0]) == {"age", "sex", "ward"} and records[3] is None and records[5:8] == [None] * 3
    assert records[8]["ward"] == "A" and records[8]["sex"] is None and records[0]["sex"] == "f" and records[9] is None
    found = [None if record is None else record["age"] for record in records]
    assert found == ["60", None, "40", None, "30", None, None, None, "7.0", None]  # texts, as in the one that is a csv
    assert [row["audio"] for row in rows] == [ARRAY, None, ARRAY, None, ARRAY, *[None] * 5]
    assert [row["image_id"] for row in rows][:2] == ["a/0.png", ""]


def test_folds_keep_samples_without_an_image_apart(source):
    held_out = [len(load_pairs(arguments(source, folds=5, fold=fold), "validation")) for fold in range(5)]
    assert held_out == [1] * 5
    streams = [
        list(load_pairs(arguments(source, folds=2, fold=fold, streaming=True), "validation")) for fold in (0, 1)
    ]
    assert sorted(map(len, streams)) != [0, 5] and sum(map(len, streams)) == 5


@pytest.mark.parametrize(
    ("modalities", "message"),
    [
        ({}, "must be a mapping of names to columns"),
        ([], "must be a mapping of names to columns"),
        ({"image": ["age"]}, "data.modalities: A modality cannot be called 'image'"),
        ({"record": []}, "data.modalities.record is []"),
        ({"record": 3}, "data.modalities.record is 3"),
        ({"record": ["age", "path"]}, "data.modalities.record has the column 'path': a record cannot"),
        ({"record": ["array"]}, "data.modalities.record has the column 'array': a record cannot"),
        ({"record": ["age", "age"]}, "data.modalities.record names a column twice: age, age."),
    ],
)
def test_bad_modalities_are_told_at_once(modalities, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataArguments(modalities=modalities)


@pytest.mark.parametrize(
    ("modalities", "message"),
    [
        (
            {"record": ["aeg"]},
            r"has no column 'aeg' \(data.modalities.record\). Did you mean 'age'\?.* in its own entry",
        ),
        ({"record": ["wave"]}, r"The column 'wave' of .* a record \(data.modalities.record\) takes columns of single"),
        ({"audio": "age"}, r"must name a column of arrays, of images or of files. For a record .* audio: \[age\]"),
    ],
)
def test_columns_that_cannot_be(source, modalities, message):
    with pytest.raises(ValueError, match=message):
        load_pairs(arguments(source, modalities=modalities), "train")


def test_sources_that_contradict_one_another(source):
    entries = [{"source": "a.csv"}, {"source": "b.csv", "modalities": {"record": "wave"}}]
    with pytest.raises(ValueError, match="'b': the modality 'record' is a record .* in one source and one column"):
        DataArguments(source=entries, modalities={"record": ["age"]})
    with pytest.raises(ValueError, match="data.modalities: 'age' is data.fold_column, too"):
        DataArguments(source=str(source), modalities={"age": ["age"]}, fold_column="age", folds=2)
