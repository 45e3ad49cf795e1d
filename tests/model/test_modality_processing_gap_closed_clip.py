"""A processor of more than images and texts: its batches, its folder, and the names that modalities can have."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import Wav2Vec2FeatureExtractor

from gap_closed_clip import GapClosedClipProcessor
from gap_closed_clip.model.image_processing_gap_closed_clip import GapClosedClipImageProcessor
from gap_closed_clip.model.modalities_gap_closed_clip import check_modality_names
from gap_closed_clip.model.modality_processing_gap_closed_clip import check_fit
from gap_closed_clip.model.record_processing_gap_closed_clip import ArrayProcessor, RecordProcessor
from gap_closed_clip.model.record_tower_gap_closed_clip import GapClosedClipRecordConfig


FIELDS = [
    {"name": "sex", "kind": "category", "categories": ["male", "female"]},
    {"name": "age", "kind": "number", "mean": 50.0, "std": 10.0},
]
SIDE = {"height": 8, "width": 8}
GRAY = Image.new("RGB", (8, 8), (51, 51, 51))  # 0.2
VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def processor(tiny_processor) -> GapClosedClipProcessor:
    lateral = GapClosedClipImageProcessor(
        size={"shortest_edge": 8}, crop_size=SIDE, image_mean=[0.0] * 3, image_std=[0.5] * 3
    )
    further = {
        "record": RecordProcessor(FIELDS),
        "lateral": lateral,
        "audio": Wav2Vec2FeatureExtractor(sampling_rate=4, do_normalize=False, return_attention_mask=True),
        "array": ArrayProcessor("input_values", [2, 3]),
    }
    return GapClosedClipProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, further)


def test_batch_is_as_written_out(processor):
    image = Image.new("RGB", (28, 28), "white")
    batch = processor(
        images=[None, image],
        text=["a chest radiograph", None],
        record=[{"age": 70, "sex": "Female"}, {"age": None, "sex": ""}],
        lateral=[GRAY, None],
        audio=[[1.0, 2.0, 3.0], None],
        array=[None, VALUES],
        padding=True,
    )
    plain = processor(images=image, text=["a chest radiograph", ""], padding=True, return_tensors="pt")
    assert torch.equal(batch["pixel_values"][1], plain["pixel_values"][0]) and not batch["pixel_values"][0].any()
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert batch["record_numbers"].tolist() == [[2.0], [0.0]]
    assert batch["record_numbers_mask"].tolist() == [[True], [False]]
    assert batch["record_categories"].tolist() == [[3], [0]]
    torch.testing.assert_close(
        batch["lateral_pixel_values"], torch.tensor([0.4, 0.0])[:, None, None, None].expand(2, 3, 8, 8)
    )
    assert batch["audio_input_values"].tolist() == [[1, 2, 3], [0, 0, 0]]
    assert batch["audio_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]  # attention to nothing is not a number
    assert batch["array_input_values"].tolist() == [np.zeros((2, 3)).tolist(), VALUES.tolist()]
    # image, text, record, lateral, audio, array; a record without any value is none
    assert batch["modality_mask"].tolist() == [
        [False, True, True, True, True, False],
        [True, False, False, False, False, True],
    ]
    assert batch["modality_mask"].dtype == torch.bool


def test_what_is_not_given_is_not_there(processor):
    batch = processor(record=pd.DataFrame({"age": [50, 60, 40], "sex": ["male"] * 3}))
    assert set(batch) == {"record_numbers", "record_numbers_mask", "record_categories"}
    assert batch["record_numbers"].tolist() == [[0], [1], [-1]]
    both = processor(text=["a", "b"], record=[{"age": 50}, None], padding=True)
    assert both["modality_mask"].tolist() == [[False, True, True, *[False] * 3], [False, True, *[False] * 4]]
    assert "pixel_values" not in both
    everything_lacking = processor(lateral=[None, None], audio=[None, None])
    assert everything_lacking["lateral_pixel_values"].shape == (2, 3, 8, 8)
    assert not everything_lacking["modality_mask"].any() and not everything_lacking["audio_input_values"].any()


@pytest.mark.parametrize("array", [VALUES, VALUES.tolist(), torch.tensor(VALUES), VALUES[None]])
def test_one_sample_alone(processor, array):
    assert processor(array=array)["array_input_values"].tolist() == [VALUES.tolist()]
    assert processor(record={"age": 60})["record_numbers"].tolist() == [[1.0]]
    assert processor(audio=[1.0, 2.0])["audio_input_values"].tolist() == [[1.0, 2.0]]
    assert processor(audio={"array": [1.0], "sampling_rate": 4})["audio_input_values"].tolist() == [[1.0]]
    assert processor(lateral=GRAY)["lateral_pixel_values"].shape == (1, 3, 8, 8)


def test_images_and_texts_alone_are_as_ever(processor, tiny_processor):
    options = {"images": GRAY, "text": ["a", "b"], "padding": True, "return_tensors": "pt"}
    batch, expected = processor(**options), tiny_processor(**options)
    assert list(batch) == list(expected) and all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"record": [{"age": "x"}]}, "The modality 'record': Record, row 0 .* 'x' is no number"),
        ({"array": [np.ones(3)]}, r"The modality 'array': input_values\[0\] has the shape \(3,\)"),
        (
            {"audio": {"array": [1.0], "sampling_rate": 8}},
            "The modality 'audio': .*8 samples a second; resample it to 4",
        ),
        ({"lateral": ["/not/there.png"]}, "not/there.png"),
        ({"record": [{}, {"age": 1}], "text": ["a", "b", "c"]}, r"numbers of samples \(record: 2, text: 3\)"),
        ({"text": [None, "a"], "record": [{"age": 1}]}, r"numbers of samples \(record: 1, text: 2\)"),
    ],
)
def test_bad_samples_are_told(processor, given, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        processor(**given)


def test_a_folder_is_read_back(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())["modality_processors"]
    assert list(saved) == ["record", "lateral", "audio", "array"]  # in order, which the mask has
    assert saved["record"] == {"modality_processor_type": "RecordProcessor", "fields": FIELDS}
    assert list(saved["record"]["fields"][1]) == ["name", "kind", "mean", "std"]
    assert saved["array"] == {
        "modality_processor_type": "ArrayProcessor",
        "input_name": "input_values",
        "shape": [2, 3],
    }
    loaded = GapClosedClipProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict() | {"image_processor": loaded.to_dict()["image_processor"]}
    assert isinstance(loaded.modality_processors["lateral"], GapClosedClipImageProcessor)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "processor_config.json").read_text() == (
        tmp_path / "processor_config.json"
    ).read_text()
    given = {"lateral": [None, GRAY], "record": [{"age": 20}, None], "audio": [None, [1.0]]}
    for name, values in processor(**given).items():
        assert torch.equal(loaded(**given)[name], values)


def test_an_edited_schema_holds(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(file.read_text().replace('"mean": 50.0', '"mean": 40.0'))
    assert GapClosedClipProcessor.from_pretrained(tmp_path)(record={"age": 60})["record_numbers"].tolist() == [[2.0]]
    file.write_text(file.read_text().replace('"RecordProcessor"', '"Pipeline"'))
    with pytest.raises(ValueError, match="The processor of the modality 'record' is of type 'Pipeline'; known are"):
        GapClosedClipProcessor.from_pretrained(tmp_path)


def test_without_further_modalities_a_folder_is_as_ever(tiny_processor, tmp_path):
    """Against what transformers itself writes for such a processor."""
    tiny_processor.save_pretrained(tmp_path)
    text = (tmp_path / "processor_config.json").read_text()
    described = json.loads(text)
    assert set(described) == {"auto_map", "image_processor", "processor_class"}
    assert text == json.dumps(described, indent=2, sort_keys=True) + "\n"


def test_what_is_no_processor(tiny_processor):
    with pytest.raises(TypeError, match="The processor of the modality 'record' is a list, which is none"):
        GapClosedClipProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, {"record": [1]})
    with pytest.raises(ValueError, match="The processor of the modality 'record': A RecordProcessor is described by"):
        further = {"record": {"modality_processor_type": "RecordProcessor"}}
        GapClosedClipProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, further)


@pytest.mark.parametrize(
    "name",
    ["image", "text", "images", "caption", "label", "source", "window", "pixel", "pixel_map", "input", "pooled_x"]
    + [
        "group",
        "modality",
        "token",
        "attention",
        "output",
        "mean",
        "keys",
        "training",
        "truncation",
        "padding",
        "self",
        "class",
        "Record",
        "a-b",
        "a.b",
        "2",
        "",
    ],
)
def test_names_that_mean_something_else(name):
    with pytest.raises(ValueError, match="A modality cannot be called"):
        check_modality_names([name])


def test_names_whose_inputs_would_begin_alike():
    check_modality_names(["record", "audio", "lateral_view", "records", "ecg2"])
    with pytest.raises(ValueError, match="cannot be called 'view': the inputs of 'view_b' would begin alike"):
        check_modality_names(["view", "view_b"])


WORDS = {"name": "organ", "kind": "category", "categories": ["lung", "heart"]}
SCHEMA = [*FIELDS, {"name": "size", "kind": "number", "mean": 3.0, "std": 2.0}, WORDS]


def fit_of(trained, edited, schema=True):
    processor = RecordProcessor(trained)
    tower = GapClosedClipRecordConfig(num_numbers=processor.num_numbers, categories=processor.category_sizes)
    tower.schema = processor.digest if schema else None
    check_fit({"record": {"tower": tower}}, {"record": RecordProcessor(edited)})


@pytest.mark.parametrize(
    "edited",
    [
        [SCHEMA[0], SCHEMA[2], SCHEMA[1], SCHEMA[3]],  # two numbers swapped
        [SCHEMA[3], SCHEMA[1], SCHEMA[2], SCHEMA[0]],  # two categories of as many words
        [*SCHEMA[:3], {**WORDS, "categories": ["heart", "lung"]}],
        [*SCHEMA[:3], {**WORDS, "categories": ["lung", "liver"]}],
        [*SCHEMA[:3], {**WORDS, "name": "place"}],
    ],
)
def test_a_schema_that_the_tower_was_not_trained_with(edited):
    with pytest.raises(ValueError, match="order, names, kinds or words were edited.* Only mean, std and allow_later"):
        fit_of(SCHEMA, edited)
    fit_of(SCHEMA, edited, schema=False)  # of an older model nothing is known


def test_edits_of_a_schema_that_change_no_meaning():
    other = {**SCHEMA[1], "mean": 1.0, "std": 3.0}
    fit_of(SCHEMA, [SCHEMA[0], SCHEMA[3], other, SCHEMA[2]])  # numbers and categories keep their order
    fit_of(SCHEMA, [*SCHEMA[:3], {**WORDS, "categories": ["Lung", "HEART"]}])
    assert len(RecordProcessor(SCHEMA).digest) == 16


def test_modalities_in_another_order(processor):
    names = ["record", "audio"]
    tower = {"tower": GapClosedClipRecordConfig(num_numbers=1, categories=[4])}
    processors = {name: processor.modality_processors[name] for name in names}
    check_fit(dict.fromkeys(names, tower), processors)
    check_fit(None, processors)
    with pytest.raises(ValueError, match="are audio, record .* has them as record, audio"):
        check_fit(dict.fromkeys(names[::-1], tower), processors)


@pytest.mark.parametrize(
    "described", [None, [], {"array": {"modality_processor_type": "ArrayProcessor", "input_name": "x", "shape": [2]}}]
)
def test_a_modality_that_the_processor_does_not_know(tiny_processor, tmp_path, described):
    tiny_processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modality_processors": described}))
    processor = GapClosedClipProcessor.from_pretrained(tmp_path)
    known = "image, text, array" if described else "image, text"
    for others in ({}, {"images": [GRAY, GRAY]}, {"text": "a", "padding": True}):
        with pytest.raises(ValueError, match=f"knows no modality 'record'; it knows {known} "):
            processor(record=[{"age": 3}, None], return_tensors="pt", **others)
    with pytest.raises(ValueError, match="knows no modality 'audio'"):
        processor(audio=np.ones(3, np.float32))
    assert "pixel_values" in processor(images=GRAY, size={"shortest_edge": 28}, images_kwargs={"do_rescale": True})


def test_modality_processors_that_are_no_mapping(tiny_processor):
    with pytest.raises(ValueError, match="is a mapping of names to processors"):
        GapClosedClipProcessor(tiny_processor.image_processor, tiny_processor.tokenizer, ["record"])
