"""Captions from the endpoint's handler, against those that the model writes by hand."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image

from gap_closed_clip import GapClosedClipForConditionalGeneration, GapClosedClipModel
from gap_closed_clip.data import decode_image

from ..conftest import load_handler
from .examples import IMAGE, IMAGES, LABELS, URL_NOT_FETCHED, b64, classified, file_bytes, save


CAPTIONS = "image-text-to-text"
NAMES = "image-text-to-text, image-to-text, image-captioning, caption, captions".split(", ")


@pytest.fixture(scope="module")
def captioner(tiny_processor) -> GapClosedClipForConditionalGeneration:
    torch.manual_seed(0)
    clip_model = GapClosedClipModel(tiny_config(center_projections=True))
    model = GapClosedClipForConditionalGeneration.from_clip(clip_model, tiny_processor.tokenizer).eval()
    # Weights as they are drawn say the same of every image.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.max_new_tokens = 12
    return model


@pytest.fixture(scope="module")
def endpoint(captioner, tiny_processor, tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("captioner"), captioner, tiny_processor)
    return load_handler(folder)[0].EndpointHandler(str(folder))


@pytest.fixture
def written(captioner, tiny_processor):
    """What the package writes, image by image: generate and decode, without pipeline and handler."""

    def write(images: list[Image.Image], prompt: str | None = None, **options) -> list[dict[str, str]]:
        captions = []
        for image in images:
            text = {} if prompt is None else {"text": [prompt]}
            inputs = tiny_processor(images=[image], **text, return_tensors="pt")
            tokens = captioner.generate(**inputs, **options)
            captions.append({"generated_text": tiny_processor.tokenizer.decode(tokens[0], skip_special_tokens=True)})
        return captions

    return write


def asked(inputs, **parameters) -> dict:
    return {"inputs": inputs, "parameters": parameters}


def test_captions_are_those_of_the_model(endpoint, written):
    expected = written(IMAGES)
    assert len({entry["generated_text"] for entry in expected}) == len(IMAGES)  # or a mix-up would not show
    for inputs in (IMAGE, {"image": IMAGE}, {"images": [IMAGE]}, [IMAGE], IMAGES[0], file_bytes(IMAGES[0])):
        for name in NAMES:
            assert endpoint(asked(inputs, task=name)) == expected[:1]
    images = [b64(image) for image in IMAGES]
    answer = endpoint(asked({"images": images}, task=CAPTIONS))
    assert answer == expected == endpoint(asked(images, task=CAPTIONS))
    json.dumps(answer)


def test_prompts_and_options_are_those_of_generate(endpoint, written):
    given = {"max_new_tokens": 5, "num_beams": 3}
    expected = written(IMAGES[:1], "Chest", **given)
    assert expected != written(IMAGES[:1], "Chest") and expected[0]["generated_text"].startswith("chest")
    assert endpoint(asked({"image": IMAGE, "text": "Chest"}, task=CAPTIONS, **given)) == expected
    assert endpoint(asked(IMAGE, prompt="Chest", **given)) == expected
    assert endpoint(asked(IMAGE, prompt="Chest", generation_parameters=given)) == expected
    assert endpoint(asked(IMAGE, prompt="", max_new_tokens=5)) == written(IMAGES[:1], max_new_tokens=5)
    # Of a prompt the rest of what the decoder takes; of 64 tokens the prompt has 61, with [CLS].
    words = " ".join(["chest"] * 60)
    assert endpoint(asked(IMAGE, prompt=words)) == written(IMAGES[:1], words, max_new_tokens=3)


def test_an_image_by_itself_is_for_a_caption_and_all_else_is_as_before(endpoint, captioner, written, tiny_processor):
    assert endpoint({"inputs": IMAGE}) == endpoint({"inputs": IMAGES[0]}) == written(IMAGES[:1])
    assert endpoint({"inputs": {"image": IMAGE, "text": "Chest"}}) == written(IMAGES[:1], "Chest")
    inputs = tiny_processor(images=IMAGES[:1], text=["Chest"], return_tensors="pt")
    with torch.no_grad():
        outputs = captioner.gap_closed_clip(**inputs)
    for request in (
        {"inputs": {"images": [IMAGE], "texts": ["Chest"]}},
        {"inputs": {"image": IMAGE, "text": "Chest"}, "parameters": {"task": "embeddings"}},
    ):
        answer = endpoint(request)
        assert answer["image_embeds"][0] == pytest.approx(outputs.image_embeds[0].tolist(), abs=1e-5)
        assert answer["text_embeds"][0] == pytest.approx(outputs.text_embeds[0].tolist(), abs=1e-5)
    assert list(endpoint({"inputs": {"image": IMAGE}})) == ["image_embeds"]
    assert {entry["label"] for entry in endpoint(classified(IMAGE))} == set(LABELS)
    assert endpoint({"inputs": {"query": "Chest", "gallery": ["Chest"]}})[0]["index"] == 0


def test_images_are_read_as_in_training(endpoint, written):
    values = np.random.default_rng(0).integers(300, 3000, (40, 36)).astype(np.uint16)
    deep = file_bytes(Image.fromarray(values))
    clear = IMAGES[1].copy()
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    for data in (deep, file_bytes(clear)):
        expected = written([Image.fromarray(np.asarray(decode_image(data)))])
        assert endpoint(asked(b64(data), task=CAPTIONS)) == expected
        assert expected != written([Image.open(io.BytesIO(data)).convert("RGB")])


LONG = " ".join(["chest"] * 64)
BAD = [
    (asked(IMAGE, task="captioning"), 400, "Unknown task 'captioning': use zero-shot-image-classification, "
     "embeddings, image-text-retrieval, image-text-to-text."),
    (asked({"text": "a"}, task=CAPTIONS), 400, 'inputs has no image to write a caption for: send {"image": image}.'),
    (asked("a.png"), 400, "inputs is not base64: send the bytes of an image file as base64. "
     "Paths are never opened."),
    (asked({"image": IMAGE, "texts": ["a"]}, task=CAPTIONS), 400, "Unknown name 'texts' in inputs of "
     "image-text-to-text: allowed are image, images, text."),
    (asked({"image": IMAGE, "text": "a"}, prompt="b"), 400, "What captions begin with is in inputs.text and in "
     "parameters.prompt: send one of them."),
    (asked(IMAGE, prompt=5), 400, "prompt is a number: send a text."),
    (asked(IMAGE, prompt="  "), 400, "prompt is an empty text."),
    (asked(IMAGE, max_new_tokens=0), 400, "max_new_tokens is 0: send a whole number, 1 or more."),
    (asked(IMAGE, max_new_tokens=257), 413, "max_new_tokens is 257: it may be 256."),
    (asked(IMAGE, num_beams=True), 400, "num_beams is True: send a whole number, 1 or more."),
    (asked(IMAGE, num_beams=9), 413, "num_beams is 9: it may be 8."),
    (asked(IMAGE, generation_parameters={"num_beams": 9}), 413, "num_beams is 9: it may be 8."),
    (asked(IMAGE, generation_parameters=[3]), 400, "generation_parameters is a list: send an object."),
    (asked(IMAGE, generation_parameters={"do_sample": True}), 400, "Unknown name 'do_sample' in "
     "generation_parameters: allowed are max_new_tokens, num_beams."),
    (asked(IMAGE, num_beams=2, generation_parameters={"num_beams": 2}), 400, "num_beams is in parameters and in "
     "generation_parameters: send one of them."),
    (asked(IMAGE, max_new_tokens=64), 413, "Of 64 tokens that the decoder takes, what the caption begins with is 1: "
     "max_new_tokens may be 63."),
    (asked(IMAGE, prompt=LONG), 413, "What the caption begins with is 65 tokens long, the decoder takes 64: "
     "shorten it."),
    (asked([IMAGE] * 17, task=CAPTIONS), 413, "17 images: a request may have 16. Send several requests."),
    (asked(IMAGE, task=CAPTIONS, top_k=3), 400, "Unknown name 'top_k' in parameters of image-text-to-text: allowed "
     "are task, prompt, max_new_tokens, num_beams, generation_parameters."),
    (asked("https://example.org/a.png", task=CAPTIONS), 400, f"inputs {URL_NOT_FETCHED}"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "status", "message"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_a_bad_request_is_answered_with_what_is_wrong(endpoint, caplog, request_, status, message):
    assert endpoint(request_) == {"error": message, "status": status}
    assert not caplog.records


@pytest.mark.parametrize("request_", [asked(IMAGE, task="image-to-text"), asked(IMAGE, max_new_tokens=4)])
def test_a_model_without_a_decoder_writes_no_captions(tiny_model, tiny_processor, tmp_path: Path, request_):
    folder = save(tmp_path, tiny_model, tiny_processor)
    message = "This model has no decoder, it writes no captions. Its tasks: "
    tasks = "zero-shot-image-classification, embeddings, image-text-retrieval."
    endpoint = load_handler(folder)[0].EndpointHandler(str(folder))
    assert endpoint(request_) == {"error": message + tasks, "status": 400}
