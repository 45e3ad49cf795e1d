"""Embeddings of three and four modalities, of samples that lack some, against one forward pass a sample."""

import dataclasses

import numpy as np
import pytest
import torch
from datasets import Dataset

from gap_closed_clip.data import PairCollator
from gap_closed_clip.data.modality_ids import record_id
from gap_closed_clip.evaluation import embed_pairs
from gap_closed_clip.evaluation.modality_values import values_of
from gap_closed_clip.model.record_processing_gap_closed_clip import RecordProcessor

from .records import RECORDS, record_model, record_pairs, record_processor


@pytest.fixture
def counted():
    """A model of four modalities, its processor, and how many of each it was given."""
    model, processor = record_model(audio=True, center_projections=True)
    counts = dict.fromkeys(("pixel_values", "input_ids", "record_numbers", "audio_input_values"), 0)

    def count(module, args, kwargs):
        for name in counts:
            counts[name] += len(kwargs.get(name, ()))

    model.register_forward_pre_hook(count, with_kwargs=True)
    return model, processor, counts


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_equal_a_forward_pass_of_their_own(counted, batch_size, streaming):
    model, processor, counts = counted
    pairs = record_pairs(audio=True)
    found = embed_pairs(model, processor, pairs.to_iterable_dataset() if streaming else pairs, batch_size=batch_size)
    # Five images, five captions, four records (of which one has two spellings), three spectrograms.
    assert counts == {"pixel_values": 5, "input_ids": 5, "record_numbers": 4, "audio_input_values": 3}
    assert found.modalities == ("image", "text", "record", "audio")
    collator = PairCollator(processor)
    model.eval()
    with torch.no_grad():
        for row, pair in enumerate(pairs):
            outputs = model(**collator([pair]))
            for name, embeds in outputs.embeds.items():
                np.testing.assert_allclose(found.embeds(name)[row], embeds[0].numpy(), atol=2e-6)
    lacking = {name: np.flatnonzero(~present).tolist() for name, present in found.present.items()}
    assert lacking == {"image": [2], "text": [5], "record": [3, 7], "audio": [5]}
    assert not found.image_embeds[2].any() and not found.further["record"][3].any()
    assert found.image_ids[2] == found.captions[5] == ""


def test_equal_records_are_one_item():
    found = embed_pairs(*record_model(), record_pairs()).ids("record")
    assert found[0] == found[1] and found[2] == found[5] and found[3] == found[7] == ""
    assert len({*found}) == 5
    assert record_id({"age": 45, "sex": "F"}) == record_id({"sex": "f ", "age": 45.0, "size": None, "x": float("nan")})
    assert record_id({"age": 45}) != record_id({"age": 46}) != record_id({"size": 46})


def test_ids_of_arrays_files_and_sounds():
    array = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    found = values_of([array, array.tolist(), array.T, {"path": "a.png", "bytes": None}, {"array": array}, None, []])
    ids = found.ids
    assert ids[0] == ids[1] == ids[4] and len({ids[0], ids[2], ids[3]}) == 3
    assert ids[5] == ids[6] == "" and found.records == [None] * 7


def test_not_normalised():
    model, processor = record_model(center_projections=True)
    pairs = record_pairs()
    unit, raw = (embed_pairs(model, processor, pairs, normalize=normalize) for normalize in (True, False))
    for name in unit.modalities:
        z, present = raw.embeds(name), raw.present[name]
        assert not z[~present].any()
        length = np.linalg.norm(z, axis=1)[present]
        assert np.abs(length - 1).max() > 0.01
        np.testing.assert_allclose(z[present] / length[:, None], unit.embeds(name)[present], atol=1e-5)


def test_pairs_without_the_column_are_of_two_modalities():
    model, processor = record_model()
    pairs = record_pairs().select([0, 1, 3, 4, 6, 7])
    found = embed_pairs(model, processor, pairs.remove_columns("record"))
    assert found.modalities == ("image", "text") and not found.values
    np.testing.assert_array_equal(found.image_embeds, embed_pairs(model, processor, pairs).image_embeds)


def test_where_no_further_modality_is_embedded_what_lacks_image_or_caption_is_left_out(caplog):
    pairs = record_pairs().rename_column("record", "tabular")  # the model's record is not at hand
    model, processor = record_model()
    found = embed_pairs(model, processor, pairs)
    both = [row for row, pair in enumerate(pairs) if pair["image"] is not None and pair["caption"]]
    assert both == [0, 1, 3, 4, 6, 7] and found.captions == [pairs[row]["caption"] for row in both]
    assert found.modalities == ("image", "text") and np.linalg.norm(found.image_embeds, axis=1).min() > 0.99
    assert "2 of 8 pairs lack the image or the caption" in caplog.text


def test_records_alone_and_captions():
    """A source without images."""
    model, processor = record_model()
    pairs = record_pairs().remove_columns(["image", "image_id"])
    found = embed_pairs(model, processor, pairs)
    assert not found.present["image"].any() and found.image_embeds.shape == found.text_embeds.shape
    assert found.values["record"].records[2] == {"age": 62.0, "sex": "male"} and RECORDS[7]["age"] is None


def test_parts_of_different_length_are_refused():
    found = embed_pairs(*record_model(), record_pairs())
    with pytest.raises(ValueError, match="'record': 3"):
        dataclasses.replace(found, further={"record": found.further["record"][:3]})


def record_column(rows: list) -> Dataset:
    return record_pairs().remove_columns("record").add_column("record", rows)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_fields_that_the_schema_lacks_are_not_shown(caplog, num_workers):
    model, processor = record_model()
    rows = [row and {**row, "organ": f"organ {k}"} for k, row in enumerate(RECORDS)]
    pairs = record_column(rows)
    found = embed_pairs(model, processor, pairs, batch_size=2, num_workers=num_workers, model_name="new")
    assert caplog.messages == ["new: the data's organ is not a field of its record."]
    expected = embed_pairs(model, processor, record_pairs())
    np.testing.assert_allclose(found.embeds("record"), expected.embeds("record"), atol=1e-6)
    np.testing.assert_array_equal(found.present["record"], expected.present["record"])  # the last has an organ alone
    assert found.values["record"].records[0]["organ"] == "organ 0"  # what is asked stays the same for all models
    stream = embed_pairs(model, processor, pairs.to_iterable_dataset(), batch_size=3)
    np.testing.assert_allclose(stream.embeds("record"), found.embeds("record"), atol=1e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_wrong_value_is_told_with_its_row_before_anything_is_embedded(counted, num_workers):
    model, processor, counts = counted
    rows = [row and {**row, "age": row["age"] and str(row["age"])} for row in RECORDS]
    rows[5] = {**rows[5], "age": "62 y"}
    told = r"The pairs' 'record': Record, row 5 \(from 0\), field 'age': '62 y' is no number\."
    with pytest.raises(ValueError, match=told) as caught:
        embed_pairs(model, processor, record_column(rows), batch_size=2, num_workers=num_workers)
    assert "\n" not in str(caught.value) and not any(counts.values())


def test_words_that_the_model_does_not_know_are_told(caplog):
    rows = [row and {**row, "sex": row["sex"] and row["sex"].strip()[0]} for row in RECORDS]  # f, F, m
    embed_pairs(*record_model(), record_column(rows), model_name="ours")
    assert caplog.messages == [
        "5 of 5 values of 'sex' in the pairs' 'record' are unknown to ours and count as 'unknown'. "
        "It knows female, male."
    ]


def test_fields_that_the_data_lack_are_told_once(caplog, capfd):
    pairs = record_column([{"age": k} for k in range(8)])
    found = embed_pairs(*record_model(), pairs, batch_size=2, num_workers=2, model_name="new")
    assert caplog.messages == ["new: the data's record has no sex, which counts as missing."]
    assert found.modalities == ("image", "text", "record") and "None of the" not in capfd.readouterr().err


def test_records_without_a_field_in_common_are_left_out(caplog):
    pairs = record_column([{"organ": "lung"}] * 8).select([0, 1, 3])
    found = embed_pairs(*record_model(), pairs, model_name="new")
    assert found.modalities == ("image", "text")
    assert caplog.messages == [
        "new: of the fields of its record (age, sex) the data have none (organ): 'record' is left out."
    ]


def test_names_that_do_not_meet_are_told(caplog):
    pairs = record_pairs().rename_column("record", "rec").select([0, 1])
    embed_pairs(*record_model(), pairs, model_name="new", modalities=("rec",))
    assert caplog.messages == [
        "new does not embed 'rec' (it has record): left out.",
        "The pairs have no 'record', which new embeds: left out.",
    ]


def test_what_a_date_is_relative_to_is_no_field():
    model, processor = record_model()
    birth = {"name": "birth", "kind": "date", "relative_to": "study", "mean": 50.0, "std": 20.0}
    fields = [birth, *record_processor().fields[1:]]
    processor.modality_processors["record"] = RecordProcessor(fields)
    rows = [{"birth": f"19{50 + k}-01-01", "study": "2020-01-01", "sex": "male"} for k in range(8)]
    found = embed_pairs(model, processor, record_column(rows)).values["record"]
    assert found.records[0] == {"birth": "1950-01-01", "sex": "male"} and "2020" in found.ids[0]
