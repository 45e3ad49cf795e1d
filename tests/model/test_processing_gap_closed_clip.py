"""
Images of every kind as training sees them; and tokens put together again: as people write, not with a space beside
every mark.
"""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, ViTConfig, ViTModel, pipeline

from gap_closed_clip import GapClosedClipProcessor
from gap_closed_clip.data import PairCollator, decode_image
from gap_closed_clip.model.processing_gap_closed_clip import image_processor_for, join_words
from gap_closed_clip.training.encoder import train_tokenizer


TEXTS = ["right-sided (arrow)", "c/d"]


@pytest.fixture
def processor(tiny_processor):
    """Its tokenizer knows the texts' marks."""
    return GapClosedClipProcessor(tiny_processor.image_processor, train_tokenizer(TEXTS, 100))


@pytest.mark.parametrize(
    ("apart", "text"),
    [
        ("a 63 - year - old man", "a 63-year-old man"),
        ("t2 - weighted mr at c5 / c6, h & e stain", "t2-weighted mr at c5/c6, h&e stain"),
        ("a mass of 2. 5 x 1, 000 mm. 3 slices", "a mass of 2.5 x 1,000 mm. 3 slices"),
        ("a nodule ( white arrow ) ; see [ 3 ]", "a nodule (white arrow); see [3]"),
        ("findings : 30 % at 3 o ' clock", "findings: 30% at 3 o'clock"),
        ("chest radiograph. no fracture, no effusion.", "chest radiograph. no fracture, no effusion."),
        ("", ""),
    ],
)
def test_marks_are_written_as_people_do(apart, text):
    assert join_words(apart) == text
    assert join_words(text) == text


def test_decode_of_one_text_and_of_several(processor):
    tokens = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"]
    assert processor.decode(tokens[0], skip_special_tokens=True) == TEXTS[0]
    for decode in (processor.decode, processor.batch_decode, processor.post_process_image_text_to_text):
        assert decode(tokens, skip_special_tokens=True) == TEXTS
        assert decode(tokens.tolist(), skip_special_tokens=True) == TEXTS
    plain = processor.decode(tokens[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert plain == "right - sided ( arrow )"
    assert processor.decode(tokens[1]).startswith("[CLS] c/d [SEP]")


def test_a_reloaded_processor_decodes_alike(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    tokens = torch.tensor(processor.tokenizer(TEXTS[0])["input_ids"])
    reloaded = GapClosedClipProcessor.from_pretrained(tmp_path)
    assert reloaded.decode(tokens, skip_special_tokens=True) == TEXTS[0]


@pytest.mark.parametrize("limit", [8, 24])
def test_texts_are_cut_at_the_tokenizers_limit_whatever_it_was_saved_with(processor, tmp_path, limit):
    processor.tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"max_length": 16, "model_max_length": limit}  # as tokenizers of sentence-transformers have it
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = GapClosedClipProcessor(processor.image_processor, AutoTokenizer.from_pretrained(tmp_path))
    loaded.save_pretrained(tmp_path / "again")
    for each in (loaded, GapClosedClipProcessor.from_pretrained(tmp_path / "again")):
        assert len(each(text="arrow " * 30, truncation=True)["input_ids"]) == limit
        assert len(each(text="arrow", padding="max_length")["input_ids"]) == limit
        assert len(each(text="arrow " * 30, truncation=True, max_length=5)["input_ids"]) == 5


# --- images

DEEP = np.random.default_rng(0).integers(1000, 5000, (28, 28)).astype(np.uint16)
COLOUR = np.random.default_rng(1).integers(0, 256, (28, 28, 3), dtype=np.uint8)


def normalized(rgb: np.ndarray, processor) -> np.ndarray:
    """(3, 28, 28) of 8-bit RGB (28, 28, 3), by hand: it needs no resizing."""
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    return ((rgb / 255 - mean) / std).transpose(2, 0, 1)


def deep_files(folder) -> dict:
    """The same 16-bit image in the forms that people have."""
    image, buffer = Image.fromarray(DEEP), io.BytesIO()
    image.save(buffer, "PNG")
    image.save(folder / "a.tiff")
    data = buffer.getvalue()
    forms = {"mode I;16": image, "uint16": DEEP, "int32": DEEP.astype(np.int32), "float": DEEP / 70000}
    forms |= {"(1, H, W)": DEEP[None], "tensor": torch.tensor(DEEP.astype(np.float32)), "bytes": data}
    return forms | {"path": folder / "a.tiff", "path as text": str(folder / "a.tiff"), "row": {"bytes": data}}


def test_a_deep_image_of_any_form_is_as_training_sees_it(tiny_processor, tmp_path):
    row = {"image": DEEP, "caption": "a", "image_id": "1"}
    expected = PairCollator(tiny_processor)([row])["pixel_values"]
    reference = normalized(np.asarray(decode_image(Image.fromarray(DEEP))), tiny_processor)
    np.testing.assert_allclose(expected[0].numpy(), reference, atol=1e-5)
    assert reference.std() > 0.9  # not nearly constant
    forms = deep_files(tmp_path)
    for name, form in forms.items():
        for images in (form, [form]):
            pixel_values = tiny_processor(images=images, return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(pixel_values, expected, rtol=0, atol=1e-5, msg=name)
    together = tiny_processor(images=list(forms.values()), text=TEXTS, padding=True, return_tensors="pt")
    torch.testing.assert_close(together["pixel_values"], expected.expand(len(forms), -1, -1, -1), rtol=0, atol=1e-5)
    assert together["input_ids"].shape[0] == 2


def test_a_deep_tiff_whose_zero_is_white(tmp_path):
    Image.fromarray(DEEP).save(tmp_path / "a.tiff", tiffinfo={262: 0})  # PhotometricInterpretation: WhiteIsZero
    expected = np.asarray(decode_image(Image.fromarray(65535 - DEEP)))
    np.testing.assert_allclose(np.asarray(decode_image(tmp_path / "a.tiff")).astype(int), expected, atol=1)


@pytest.mark.parametrize("name", ["images", "text"])
def test_an_empty_list(tiny_processor, name):
    with pytest.raises(ValueError, match=f"{name} is an empty list: give one or more, or leave {name} out"):
        tiny_processor(**{name: []})


@pytest.mark.parametrize("batch", [torch.tensor(DEEP.astype(np.int32))[None, None], DEEP[None, ..., None]])
def test_a_batch_of_gray_images(tiny_processor, batch):
    expected = tiny_processor(images=DEEP, return_tensors="pt")["pixel_values"]
    assert torch.equal(tiny_processor(images=batch, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize(
    "images",
    [
        COLOUR,
        COLOUR.transpose(2, 0, 1),
        torch.tensor(COLOUR).permute(2, 0, 1)[None],
        COLOUR.astype(np.float64),
        (COLOUR / 255).astype(np.float32),
        torch.tensor(COLOUR / 255).permute(2, 0, 1)[None],
        COLOUR.astype(np.uint16) * 257,
        [Image.fromarray(COLOUR)],
    ],
    ids=["last", "first", "batch", "float", "0 to 1", "batch 0 to 1", "16 bits", "Pillow"],
)
def test_colour_values(tiny_processor, images):
    pixel_values = tiny_processor(images=images, return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(pixel_values[0].numpy(), normalized(COLOUR, tiny_processor), atol=1e-4)


@pytest.mark.parametrize("beyond", [(0, 1.08), (-0.1, 1.08), (-0.1, 1), (0, 2)])
def test_floats_that_a_resize_took_beyond_0_to_1_are_clipped(tiny_processor, beyond):
    values = (COLOUR / 255).astype(np.float32)
    expected = tiny_processor(images=values, return_tensors="pt")["pixel_values"]
    values[values == values.min()], values[values == values.max()] = beyond
    tensor = torch.tensor(values)
    batches = [np.stack([values] * 2), torch.stack([tensor] * 2).permute(0, 3, 1, 2)]
    for images in (values, values.transpose(2, 0, 1), tensor, tensor.permute(2, 0, 1).double(), *batches, [values]):
        found = tiny_processor(images=images, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, expected.expand_as(found))
    integers = np.minimum(COLOUR, 2)
    found = tiny_processor(images=integers, return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(found.numpy(), normalized(integers, tiny_processor), atol=1e-4)


def test_without_rescaling_values_stay_as_they_are(tiny_processor):
    gray = np.random.default_rng(2).random((28, 28)).astype(np.float32) * 0.3
    mean, std = tiny_processor.image_processor.image_mean, tiny_processor.image_processor.image_std
    expected = ((gray[..., None] - mean) / std).transpose(2, 0, 1)
    tensor = torch.tensor(gray)
    for image in (gray, gray[None], gray[..., None], tensor, tensor[None], tensor[None, None]):
        for options in ({"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}):
            pixel_values = tiny_processor(images=image, return_tensors="pt", **options)["pixel_values"]
            np.testing.assert_allclose(pixel_values[0].numpy(), expected, atol=1e-5)
    three = np.stack([gray] * 3)
    pixel_values = tiny_processor(images=three, return_tensors="pt", do_rescale=False)["pixel_values"]
    np.testing.assert_allclose(pixel_values[0].numpy(), expected, atol=1e-5)


def test_an_image_that_lies_on_its_side_is_turned(tiny_processor):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(COLOUR).save(buffer, "PNG", exif=exif)
    pixel_values = tiny_processor(images=Image.open(buffer), return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(pixel_values[0], normalized(np.rot90(COLOUR, -1), tiny_processor), atol=1e-4)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((5, 28, 28)), r"^images is no image: its shape is \(5, 28, 28\).*\(B, 3, H, W\)"),
        ([COLOUR, np.zeros(4)], r"^images\[1\] is no image: its shape is \(4,\)"),
        ([COLOUR, 3], r"^images\[1\] is 3: give a path"),
        (COLOUR.astype(np.float32) - 200, "its colour values go from -"),
        (torch.randn(2, 3, 28, 28), r"images\[0\] .*its colour values go from -.* floats from 0 to 1"),
    ],
)
def test_images_that_are_none(tiny_processor, images, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor(images=images, return_tensors="pt")


def test_files_that_are_not_there(tiny_processor):
    with pytest.raises(FileNotFoundError, match="There is no file nowhere.dcm"):
        tiny_processor(images=["nowhere.dcm"])


def test_loaded_for_transformers_own_pipelines(tiny_model, tiny_processor, tmp_path):
    """Their loader would make it white."""
    path, white = tmp_path / "a.png", np.full((28, 28, 3), 255, np.uint8)
    Image.fromarray(DEEP).save(path)
    parts = {"image_processor": tiny_processor.image_processor, "tokenizer": tiny_processor.tokenizer}
    extract = pipeline("image-feature-extraction", model=tiny_model.eval(), **parts, device="cpu")

    def expected(rgb: np.ndarray) -> torch.Tensor:
        pixel_values = torch.tensor(normalized(rgb, tiny_processor), dtype=torch.float32)[None]
        with torch.no_grad():
            return tiny_model(pixel_values=pixel_values).image_embeds[0]

    torch.testing.assert_close(torch.tensor(extract(str(path)))[0], expected(white), rtol=0, atol=1e-5)
    loaded = tiny_processor.load_image(path)
    right = expected(np.asarray(decode_image(path)))
    torch.testing.assert_close(torch.tensor(extract(loaded))[0], right, rtol=0, atol=1e-5)


def test_transformers_own_pipeline_cuts_texts_with_truncation(tiny_model, tiny_processor, tmp_path):
    """Only then is a text beyond the tokenizer's limit what the processor makes of it."""
    tiny_processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, model_max_length=16)
    extract = pipeline("feature-extraction", model=tiny_model.eval(), tokenizer=tokenizer, device="cpu")
    processor = GapClosedClipProcessor(tiny_processor.image_processor, tokenizer)
    text = "arrow chest " * 15  # longer than the tokenizer's limit
    assert 16 < len(tokenizer(text)["input_ids"]) <= tiny_model.max_text_length
    with torch.no_grad():
        expected = tiny_model(**processor(text=text, truncation=True, return_tensors="pt")).text_embeds
    cut = torch.tensor(extract(text, truncation=True))
    torch.testing.assert_close(cut, expected, rtol=0, atol=1e-5)
    assert (torch.tensor(extract(text)) - expected).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"tokenize with truncation=True \(a pipeline takes it, too\)"):
        extract([text, 9 * text])
    assert len(extract([text, 9 * text], truncation=True)) == 2


def test_saving_a_processor_leaves_it_as_it_was(tiny_processor, tmp_path):
    tiny_processor.save_pretrained(tmp_path)
    loaded = type(tiny_processor).from_pretrained(tmp_path)
    before = loaded.to_dict()
    loaded.save_pretrained(tmp_path / "again")
    assert loaded.to_dict() == before == type(tiny_processor).from_pretrained(tmp_path / "again").to_dict()


@pytest.mark.parametrize("kind", [None, "np", "pt"])
def test_samples_that_lack_something_are_tensors_whatever_is_asked_for(tiny_processor, kind):
    image = Image.fromarray(COLOUR)
    expected = tiny_processor(images=[image, None], text=TEXTS[:2], padding=True)
    assert not expected["pixel_values"][1].any() and expected["modality_mask"].tolist() == [
        [True, True],
        [False, True],
    ]
    found = tiny_processor(images=[image, None], text=TEXTS[:2], padding=True, return_tensors=kind)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, msg=name)


def test_an_image_processor_for_a_tower_of_transformers():
    tower = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(ValueError, match="this is a ViTModel: take its own, AutoImageProcessor.from_pretrained"):
        image_processor_for(tower)
