"""Items of several modalities in the pipeline: their embeddings by hand, and what is said of what is none."""

import io
import re

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, noise_image
from hub.modality_models import RECORDS, WEIGHTS, embeds_of, model_of_four, processor_of_four, spectrogram
from PIL import Image

from gap_closed_clip.model.items_gap_closed_clip import together
from gap_closed_clip.model.pipeline_gap_closed_clip import ImageTextRetrievalPipeline


IMAGES = [noise_image(80), noise_image(40, seed=1)]


@pytest.fixture(scope="module")
def processor(tiny_processor):
    return processor_of_four(tiny_processor)


@pytest.fixture(scope="module")
def search(processor) -> ImageTextRetrievalPipeline:
    return ImageTextRetrievalPipeline(model_of_four(), processor=processor, device="cpu")


@pytest.fixture(scope="module")
def single(search, processor) -> dict[str, torch.Tensor]:
    sounds = [spectrogram(0), spectrogram(1)]
    return embeds_of(search.model, processor, image=IMAGES, text=CAPTIONS[:2], record=RECORDS, audio=sounds)


def test_a_gallery_of_every_modality(search, single):
    items = [{"record": RECORDS[0]}, IMAGES[1], CAPTIONS[0], {"audio": spectrogram(1)}, {"record": RECORDS[1]}]
    items += [{"audio": spectrogram(0).tolist()}, {"image": IMAGES[0]}]
    expected = [single["record"][0], single["image"][1], single["text"][0], single["audio"][1], single["record"][1]]
    expected = torch.stack([*expected, single["audio"][0], single["image"][0]])
    for batch_size in (2, 32):
        torch.testing.assert_close(search.embed(items, batch_size), expected, atol=1e-5, rtol=0)
    hits = search([{"record": RECORDS[1]}], items, top_k=7)[0]
    order = (expected @ single["record"][1]).argsort(descending=True).tolist()
    assert [hit["index"] for hit in hits] == order and order[0] == 4 and hits[0]["item"] == items[4]


@pytest.mark.parametrize("weights", [None, WEIGHTS, {"image": 1.0, "text": 2.0}, {**WEIGHTS, "record": 0.0}])
def test_items_of_several_modalities_are_weighted_sums(search, single, monkeypatch, weights):
    """Where not all have a weight, they weigh alike; and alone, a modality of weight 0 is what it is."""
    monkeypatch.setattr(search.model.config, "fusion_weights", weights)
    items = [{"image": IMAGES[0], "record": RECORDS[1]}, {"record": RECORDS[0], "text": CAPTIONS[1]}]
    items += [{"text": CAPTIONS[0], "image": IMAGES[1]}, {"record": RECORDS[0]}]
    found = search.embed(items)
    all_known = weights is not None and "record" in weights
    w = weights if all_known else dict.fromkeys(WEIGHTS, 1.0)
    of_two = weights or dict.fromkeys(WEIGHTS, 1.0)
    expected = [
        w["image"] * single["image"][0] + w["record"] * single["record"][1],
        w["text"] * single["text"][1] + w["record"] * single["record"][0],
        of_two["text"] * single["text"][0] + of_two["image"] * single["image"][1],
        single["record"][0],
    ]
    expected = torch.stack([vector / vector.double().norm() for vector in expected]).float()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


NO_RECORD = "gallery[0], record: there is no value: give one of sex, age, birth, study, ward, or leave record out."


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"record": {"age": "old"}}, "gallery[0], record: field 'age': 'old' is no number."),
        ({"record": {"agee": 3}}, "gallery[0], record: field 'agee' with the value 3: the schema has no such field."),
        (
            {"record": {"birth": "yesterday"}, "image": IMAGES[0]},
            "gallery[0], record: field 'birth': 'yesterday' is no",
        ),
        ({"record": {}}, NO_RECORD),
        ({"record": {"age": None, "sex": " "}}, NO_RECORD),
        ({"record": None}, "gallery[0], record: None is no record: give a mapping of fields to values."),
        ({"record": [RECORDS[0]]}, "is no record: give a mapping"),
        ({"audio": np.zeros((16, 24))}, "gallery[0], audio: input_values[0] has the shape (16, 24), not (24, 16)"),
        ({"audio": None}, "gallery[0], audio: there is no value"),
        ({"audio": [[1.0, "x"]]}, "gallery[0], audio: input_values[0] is no array"),
        ({"image": None, "record": RECORDS[0]}, "gallery[0], image: there is no value: give one, or leave image out."),
        (
            {"caption": "a", "record": RECORDS[0]},
            "its key 'caption' is no modality; there are image, text, record, audio.",
        ),
        ({"age": 62}, "It is a field of record: {'record': {'age': ...}}. Several can be combined"),
        ({"video": 3}, "is neither image nor text: its key 'video' is no modality"),
        ({"image": 3, "record": RECORDS[0]}, "is neither image nor text: give a str"),
        (3, "{'record': ...}, {'audio': ...}, or {'text': ...}."),
    ],
)
def test_what_is_no_item(search, item, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        search("Chest CT.", gallery=[item, "fine"])
    assert "\n" not in str(raised.value)


def test_a_modality_without_processor_is_none(tiny_processor):
    search = ImageTextRetrievalPipeline(model_of_four(), processor=tiny_processor, device="cpu")
    assert search.embed(["Chest CT.", IMAGES[0]]).shape == (2, 32)
    with pytest.raises(ValueError, match="is neither image nor text"):
        search.embed([{"record": RECORDS[0]}])


def test_an_item_whose_modalities_all_weigh_nothing_is_their_mean():
    embeds = {"image": torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "record": torch.tensor([[0.0, 1.0], [0.0, -1.0]])}
    found = together(embeds, {"image": 2.0, "record": 0.0})
    assert torch.equal(found, torch.tensor([[1.0, 0.0], [0.0, -1.0]]))


def test_an_item_weighs_the_same_beside_whatever_items():
    """The audio, which has no weight, is of the second item alone."""
    image, record = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    audio = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    found = together({"image": image, "record": record, "audio": audio}, {"image": 3.0, "record": 4.0})
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.5**0.5, 0.5**0.5]]))


@pytest.mark.parametrize("several", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_one_array_is_one_image_and_four_axes_are_several(search, several):
    pixels = [np.asarray(image.resize((40, 36))) for image in IMAGES]
    expected = search(Image.fromarray(pixels[0]), CAPTIONS)
    for image in (pixels[0], pixels[0].transpose(2, 0, 1)):
        assert search(several(image.copy()), CAPTIONS) == expected
    gray = pixels[0][..., 0]
    assert search(several(gray.copy()), CAPTIONS) == search(Image.fromarray(gray), CAPTIONS)
    for batch in (np.stack(pixels), np.stack(pixels).transpose(0, 3, 1, 2)):
        assert search(several(batch.copy()), CAPTIONS) == search(
            [Image.fromarray(image) for image in pixels], CAPTIONS
        )
        hits = search(Image.fromarray(pixels[1]), several(batch.copy()))
        assert hits[0]["index"] == 1 and tuple(hits[0]["item"].shape) == batch.shape[1:]
        torch.testing.assert_close(search.embed(several(batch.copy())), search.embed(list(batch)))


def test_plain_bytes_are_an_image(search):
    buffer = io.BytesIO()
    IMAGES[0].save(buffer, "PNG")
    expected = search(IMAGES[0], CAPTIONS)
    assert search(buffer.getvalue(), CAPTIONS) == search([bytearray(buffer.getvalue())], CAPTIONS)[0] == expected
