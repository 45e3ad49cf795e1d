"""
The endpoint's handler, loaded from a model folder as Hugging Face's toolkit loads it.

`pytest -s tests/hub/test_handler.py -k answered` prints the table of requests and answers.
"""

import base64
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from transformers import AutoModelForZeroShotImageClassification, ZeroShotImageClassificationPipeline

from gap_closed_clip import GapClosedClipModel
from gap_closed_clip.data import decode_image
from gap_closed_clip.hub.reload import HUB
from gap_closed_clip.model.pipeline_gap_closed_clip import ImageTextRetrievalPipeline

from .conftest import HANDLER, load_handler


LABELS = ["pleural effusion", "pneumothorax", "a normal chest"]
TEXTS = ["Chest radiograph with left pleural effusion.", "Sagittal T2 weighted MR image of the brain."]
ZERO_SHOT, RETRIEVAL = "zero-shot-image-classification", "image-text-retrieval"
BLOCK = """
import json, sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gap_closed_clip":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
sys.path.insert(0, sys.argv[1])
from handler import EndpointHandler

endpoint = EndpointHandler(sys.argv[1])
print(json.dumps([endpoint(request) for request in json.load(sys.stdin)]))
"""


def noise(seed: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (40, 36, len(mode)), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode)


def file_bytes(image: Image.Image, kind: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def b64(data: bytes | Image.Image) -> str:
    return base64.b64encode(data if isinstance(data, bytes) else file_bytes(data)).decode()


IMAGES = [noise(seed) for seed in range(3)]
IMAGE = b64(IMAGES[0])


def save(folder: Path, model: GapClosedClipModel, processor) -> Path:
    """A folder as it is published."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in HANDLER:
        shutil.copy(HUB / name, folder)
    return folder


@pytest.fixture(scope="module")
def model() -> GapClosedClipModel:
    torch.manual_seed(0)
    model = GapClosedClipModel(tiny_config(center_projections=True)).eval()
    # Weights as they are drawn give embeddings so alike that a mistake would not show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.logit_scale.fill_(3.0)
    return model


@pytest.fixture(scope="module")
def folder(model, tiny_processor, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("model"), model, tiny_processor)


@pytest.fixture(scope="module")
def modules(folder) -> tuple[types.ModuleType, types.ModuleType]:
    return load_handler(folder)


@pytest.fixture(scope="module")
def handler(modules) -> types.ModuleType:
    return modules[0]


@pytest.fixture(scope="module")
def handler_images(modules) -> types.ModuleType:
    return modules[1]


@pytest.fixture(scope="module")
def endpoint(handler, folder):
    return handler.EndpointHandler(str(folder))


@pytest.fixture(scope="module")
def embeds(model, tiny_processor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of IMAGES and TEXTS, by hand: (3, D) and (2, D)."""
    inputs = tiny_processor(images=IMAGES, text=TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        outputs = model(**inputs)
    return outputs.image_embeds, outputs.text_embeds


@pytest.fixture(scope="module")
def classify(folder, tiny_processor) -> ZeroShotImageClassificationPipeline:
    model = AutoModelForZeroShotImageClassification.from_pretrained(folder, trust_remote_code=True)
    parts = {"image_processor": tiny_processor.image_processor, "tokenizer": tiny_processor.tokenizer}
    return ZeroShotImageClassificationPipeline(model=model.eval(), device="cpu", **parts)


@pytest.fixture(scope="module")
def table():
    """Prints what was asked and answered, once all of it was."""
    rows = []
    yield rows
    print("\n| request | answer |\n| --- | --- |")
    for request, answer in rows:
        print(f"| {_shown(request)} | {_shown(answer)} |")


def _shown(value) -> str:
    def short(value):
        if isinstance(value, str):
            return value[:24] + "..." if len(value) > 200 or value[:6] in ("iVBORw", "/9j/4A") else value
        if isinstance(value, bytes | Image.Image):
            return f"<{type(value).__name__}>"
        if isinstance(value, float):
            return round(value, 4)
        if isinstance(value, list):
            return [short(entry) for entry in value[:3]] + ["..."] * (len(value) > 3)
        return {key: short(entry) for key, entry in value.items()} if isinstance(value, dict) else value

    return f"`{json.dumps(short(value), ensure_ascii=True)}`"


def near(expected) -> list | dict:
    """The same with every number approximate."""
    if isinstance(expected, list):
        return [near(entry) for entry in expected]
    if isinstance(expected, dict):
        return {key: near(entry) for key, entry in expected.items()}
    return pytest.approx(expected, abs=1e-5) if isinstance(expected, float) else expected


def classified(image, labels=LABELS, template="Medical image of {}.") -> dict:
    return {"inputs": image, "parameters": {"candidate_labels": labels, "hypothesis_template": template}}


def search(query, gallery, **parameters) -> dict:
    return {"inputs": {"query": query, "gallery": gallery}, "parameters": parameters}


@pytest.mark.parametrize("template", [None, "An image of {} in it"])
@pytest.mark.parametrize("inputs", [IMAGE, {"image": IMAGE}])
def test_zero_shot_is_answered_as_by_the_pipeline(endpoint, classify, table, inputs, template):
    request = {"inputs": inputs, "parameters": {"candidate_labels": LABELS}}
    if template:
        request["parameters"]["hypothesis_template"] = template
    answer = endpoint(request)
    table.append((request, answer))
    template = template or "Medical image of {}."
    assert answer == near(classify(IMAGES[0], candidate_labels=LABELS, hypothesis_template=template))
    assert answer[0]["score"] > answer[-1]["score"] + 0.01
    json.dumps(answer)


def test_zero_shot_of_several_images(endpoint, classify):
    expected = classify(IMAGES, candidate_labels=LABELS, hypothesis_template="Medical image of {}.")
    images = [b64(image) for image in IMAGES]
    assert endpoint(classified(images)) == endpoint(classified({"images": images})) == near(expected)
    assert endpoint(classified(images[:1])) == near(expected[:1])


def test_the_scale_is_capped_as_in_the_model(endpoint, classify):
    capped = torch.full((1,), 6.0)  # a scale of 403, above the cap of 100
    with torch.no_grad():
        before = endpoint.model.logit_scale.clone()
        for model in (endpoint.model, classify.model):
            model.logit_scale.copy_(capped)
    try:
        expected = classify(IMAGES[0], candidate_labels=LABELS, hypothesis_template="Medical image of {}.")
        assert endpoint(classified(IMAGE)) == near(expected)
    finally:
        with torch.no_grad():
            for model in (endpoint.model, classify.model):
                model.logit_scale.copy_(before)


def test_an_image_in_any_form_is_the_same(endpoint):
    expected = endpoint(classified(IMAGE))
    wrapped = base64.encodebytes(file_bytes(IMAGES[0])).decode()
    assert "\n" in wrapped.strip()
    for image in (f"data:image/png;base64,{IMAGE}", wrapped, file_bytes(IMAGES[0]), IMAGES[0]):
        assert endpoint(classified(image)) == expected
        assert endpoint(classified({"image": image})) == expected
    # An image body, with labels in the query string
    for labels in (",".join(LABELS), ", ".join(LABELS), f" {' , '.join(LABELS)}\n"):
        assert endpoint({"inputs": IMAGES[0], "parameters": {"candidate_labels": labels}}) == expected
    assert endpoint({**classified(IMAGE), "options": {"wait_for_model": True}}) == expected


@pytest.mark.parametrize("batch_size", [2, 16])
def test_embeddings_are_answered_as_by_the_model(endpoint, handler, embeds, table, monkeypatch, batch_size):
    monkeypatch.setattr(handler, "BATCH_SIZE", batch_size)
    request = {"inputs": {"images": [b64(image) for image in IMAGES], "texts": TEXTS}}
    answer = endpoint(request)
    table.append((request, answer))
    assert answer == near({"image_embeds": embeds[0].tolist(), "text_embeds": embeds[1].tolist()})
    assert torch.tensor(answer["image_embeds"]).norm(dim=-1).tolist() == pytest.approx([1, 1, 1])
    image = {"image_embeds": near(embeds[0][:1].tolist())}
    for inputs in ({"image": IMAGE}, IMAGE, [IMAGE], IMAGES[0]):
        assert endpoint({"inputs": inputs, "parameters": {"task": "embeddings"}}) == image
    assert endpoint({"inputs": file_bytes(IMAGES[0])}) == image
    assert endpoint({"inputs": {"text": TEXTS[1]}}) == {"text_embeds": near(embeds[1][1:].tolist())}


def test_retrieval_is_answered_as_by_the_pipeline(endpoint, model, tiny_processor, embeds, table):
    pipe = ImageTextRetrievalPipeline(model, processor=tiny_processor, device="cpu")
    sent = [TEXTS[0], {"image": b64(IMAGES[0])}, {"text": TEXTS[1]}, {"image": b64(IMAGES[1])}, IMAGES[2]]
    gallery = [TEXTS[0], IMAGES[0], {"text": TEXTS[1]}, IMAGES[1], IMAGES[2]]

    def expected(query, top_k):
        hits = pipe(query, gallery, top_k=top_k)
        return [{"index": hit["index"], "score": pytest.approx(hit["score"], abs=1e-5)} for hit in hits]

    for query, image in ((TEXTS[1], TEXTS[1]), ({"image": b64(IMAGES[2])}, IMAGES[2])):
        request = search(query, sent, top_k=3)
        answer = endpoint(request)
        table.append((request, answer))
        assert answer == expected(image, 3) and answer[0]["score"] == pytest.approx(1, abs=1e-5)
    assert endpoint(search([TEXTS[0], IMAGES[2]], sent)) == [expected(TEXTS[0], 5), expected(IMAGES[2], 5)]
    rows = torch.cat([embeds[0], 3 * embeds[1]])  # not unit vectors: the cosine is the same
    request = search(TEXTS[0], rows.tolist(), top_k=2)
    answer = endpoint(request)
    table.append((request, answer))
    cosines = embeds[1][0] @ torch.cat(embeds).T
    best = cosines.topk(2)
    assert answer == [
        {"index": index, "score": pytest.approx(score, abs=1e-5)}
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def test_a_long_text_is_cut_off(endpoint, model, tiny_processor):
    text = "chest radiograph " * 100
    inputs = tiny_processor(text=[text], return_tensors="pt", truncation=True, max_length=64)
    assert inputs["input_ids"].shape == (1, 64)
    with torch.no_grad():
        expected = model(**inputs).text_embeds.tolist()
    assert endpoint({"inputs": {"texts": [text]}}) == {"text_embeds": near(expected)}


def test_a_long_text_is_cut_off_where_positions_start_behind_the_padding(handler, tiny_processor, tmp_path):
    text_config = {**tiny_config().text_config.to_dict(), "model_type": "roberta", "pad_token_id": 0}
    model = GapClosedClipModel(tiny_config(text_config=text_config)).eval()
    assert model.max_text_length == 63 and tiny_processor.tokenizer.model_max_length == 64
    text = "chest radiograph " * 100
    inputs = tiny_processor(text=[text], return_tensors="pt", truncation=True, max_length=63)
    with torch.no_grad():
        expected = model(**inputs).text_embeds.tolist()
    endpoint = handler.EndpointHandler(str(save(tmp_path / "roberta", model, tiny_processor)))
    assert endpoint({"inputs": {"texts": [text]}}) == {"text_embeds": near(expected)}
    pipe = ImageTextRetrievalPipeline(model, processor=tiny_processor, device="cpu")
    assert pipe.embed([text]).tolist() == near(expected)


def _deep(kind: str) -> Image.Image:
    values = np.random.default_rng(0).normal(900, 60, (40, 36)).clip(0, 4095)
    values[:2] = 65535
    if kind == "flat":
        values = np.full((40, 36), 700.0)
        values[0, 0] = 900
    return Image.fromarray(values.astype(np.float32 if kind == "F" else np.uint16))


@pytest.mark.parametrize(
    "image",
    [
        _deep("I;16"),
        _deep("F"),
        _deep("flat"),
        Image.new("I;16", (30, 30), 0),
        noise(1, "RGBA"),
        noise(1, "L"),
        noise(1, "RGB").quantize(16),
        Image.new("P", (30, 30), 3),
    ],
    ids=["16 bits", "float", "nearly flat", "black", "transparent", "gray", "palette", "one colour"],
)
def test_every_kind_of_pixel_is_seen_as_in_training(endpoint, handler_images, image):
    data = file_bytes(image, "TIFF" if image.mode == "F" else "PNG")
    picture = handler_images._picture(data, "inputs")
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), np.asarray(decode_image(data)))
    assert len(endpoint({"inputs": {"image": b64(data)}})["image_embeds"]) == 1


def test_the_conversion_is_that_of_the_folder(handler_images, folder):
    assert handler_images.to_rgb.__globals__["__file__"] == str(folder / "images_gap_closed_clip.py")


def test_an_image_that_lies_on_its_side_is_turned(handler_images):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    data = file_bytes(noise(0), "JPEG", exif=exif)
    assert Image.open(io.BytesIO(data)).size == (36, 40) and handler_images._picture(data, "inputs").size == (40, 36)
    assert np.array_equal(np.asarray(handler_images._picture(data, "")), np.asarray(decode_image(data)))


def test_an_image_in_a_rare_format_is_not_decoded(handler, endpoint):
    """EPS would start Ghostscript."""
    answer = endpoint({"inputs": {"image": b64(file_bytes(noise(0), "EPS"))}})
    assert answer["status"] == 400 and "no image file of a known format" in answer["error"]


def _jpeg() -> bytes:
    return file_bytes(noise(0), "JPEG")


def _png_header(width: int, height: int) -> bytes:
    """The first bytes of a PNG that claims to have so many pixels."""
    data = bytearray(file_bytes(Image.new("L", (1, 1))))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


LARGE = b64(np.random.default_rng(0).bytes(12_288))
WRAPPED = base64.encodebytes(np.random.default_rng(0).bytes(12_288)).decode()
LOOKS_LIKE_BASE64 = (
    'has 16384 characters: a text may have 10000. It looks like base64: an image goes into {"image": ...}.'
)
NOT_BASE64 = "is not base64: send the bytes of an image file as base64. Paths are never opened."
NO_IMAGE = "is no image file of a known format: PNG, JPEG, JPEG2000, TIFF, BMP, GIF, WEBP, PPM."
BRACES = "hypothesis_template holds {} once, where the label goes, and no other braces."
TASKS = f"{ZERO_SHOT}, embeddings, {RETRIEVAL}"
NO_DIRECTION = "has no direction: it is all zeros, or NaN or infinite."
URL_OFF = (
    "inputs is a URL, and this endpoint fetches none: send the image itself as base64, or set "
    "GAP_CLOSED_CLIP_ALLOW_URLS=1 on the endpoint."
)
BAD = [
    ([1], 400, 'The request is a list: send an object, {"inputs": ..., "parameters": ...}.'),
    (None, 400, 'The request is null: send an object, {"inputs": ..., "parameters": ...}.'),
    ({}, 400, 'The request has no inputs: send {"inputs": ..., "parameters": ...}.'),
    ({"inputs": ""}, 400, 'The request has no inputs: send {"inputs": ..., "parameters": ...}.'),
    ({"input": IMAGE}, 400, "Unknown name 'input' in the request: did you mean 'inputs'?"),
    ({"inputs": IMAGE, "parameters": "x"}, 400, "parameters is a text: send an object."),
    ({"inputs": IMAGE}, 400, f"What is asked for? Give candidate_labels, or set parameters.task: {TASKS}."),
    ({"inputs": IMAGE, "parameters": {"task": "captioning"}}, 400, f"Unknown task 'captioning': use {TASKS}."),
    ({"inputs": IMAGE, "parameters": {"task": []}}, 400, f"Unknown task []: use {TASKS}."),
    (
        {"inputs": IMAGE, "parameters": {"candidate_label": LABELS}},
        400,
        "Unknown name 'candidate_label' in parameters: did you mean 'candidate_labels'?",
    ),
    (
        {"inputs": IMAGE, "parameters": {"candidate_labels": LABELS, "top_k": 2}},
        400,
        f"Unknown name 'top_k' in parameters of {ZERO_SHOT}: allowed are task, candidate_labels, hypothesis_template.",
    ),
    (
        {"inputs": {"images": [IMAGE], "captions": []}},
        400,
        "Unknown name 'captions' in inputs of embeddings: allowed are image, images, text, texts.",
    ),
    (classified(IMAGE, []), 400, "candidate_labels is a list of labels, and not empty."),
    (classified(IMAGE, {"a": 1}), 400, "candidate_labels is a list of labels, and not empty."),
    (classified(IMAGE, ["a", 3]), 400, "candidate_labels[1] is a number: send a text."),
    (classified(IMAGE, ["a", " "]), 400, "candidate_labels[1] is an empty text."),
    (classified(IMAGE, "a, ,b"), 400, "candidate_labels[1] is an empty text."),
    (classified(IMAGE, ["a"] * 257), 413, "257 candidate_labels: a request may have 256."),
    (classified(IMAGE, template="An image."), 400, BRACES),
    (classified(IMAGE, template="{:>999999999}"), 400, BRACES),
    (classified(IMAGE, template="{} {0.__class__}"), 400, BRACES),
    (classified("a picture!"), 400, f"inputs {NOT_BASE64}"),
    (classified("/etc/passwd"), 400, f"inputs {NOT_BASE64}"),
    (classified("file:///etc/passwd"), 400, f"inputs {NOT_BASE64}"),
    (classified(b64(b"not an image")), 400, f"inputs {NO_IMAGE}"),
    (classified(_jpeg()[:-200]), 400, "inputs is damaged or cut off: its pixels can't be read."),
    (
        classified([IMAGE, b64(file_bytes(noise(0))[:-500])]),
        400,
        "inputs[1] is damaged or cut off: its pixels can't be read.",
    ),
    (
        classified(b64(bytes(128) + b"DICM" + bytes(99))),
        400,
        "inputs is a DICOM file: send it windowed, as PNG or JPEG.",
    ),
    (classified(b64(bytes(20 * 2**20 + 1))), 413, "inputs is too large: an image file may have 20 MiB."),
    (classified("A" * 40_000_000), 413, "inputs is too large: an image file may have 20 MiB."),
    (classified(b64(_png_header(9000, 9000))), 413, "inputs has 9000 x 9000 pixels: an image may have 50000000."),
    (classified(b64(_png_header(60000, 60000))), 413, "inputs has too many pixels: an image may have 50000000."),
    (
        classified(b64(_png_header(1, 30_000))),
        400,
        "inputs has 1 x 30000 pixels: one side may be 20 times the other.",
    ),
    (classified(5), 400, "inputs is a number: send an image as base64."),
    (classified([]), 400, 'The request has no inputs: send {"inputs": ..., "parameters": ...}.'),
    (classified({"images": []}), 400, "inputs.images is an empty list."),
    (classified({"image": IMAGE, "images": []}), 400, "inputs has both image and images: send one of them."),
    (classified({"text": "a"}), 400, "Unknown name 'text' in inputs: allowed are image, images."),
    ({"inputs": {"texts": ["a", None]}}, 400, "inputs.texts[1] is null: send a text."),
    (
        {"inputs": {"texts": ["half \ud83d"]}},
        400,
        "inputs.texts[0] is not valid Unicode: it has half of a surrogate pair.",
    ),
    ({"inputs": {"text": "a" * 10_001}}, 413, "inputs.text has 10001 characters: a text may have 10000."),
    ({"inputs": {"texts": ["a"] * 513}}, 413, "513 texts: a request may have 512. Send several requests."),
    ({"inputs": {"images": [IMAGE] * 65}}, 413, "65 images: a request may have 64. Send several requests."),
    ({"inputs": {"query": "a"}}, 400, f'{RETRIEVAL} takes inputs {{"query": ..., "gallery": [...]}}.'),
    (search("a", []), 400, "inputs.gallery is a list of texts and images, or of embeddings, and not empty."),
    (search("a", ["b"], top_k="3"), 400, "top_k is '3': send a whole number, 1 or more."),
    (search("a", ["b"], top_k=True), 400, "top_k is True: send a whole number, 1 or more."),
    (search("a", ["b"], top_k=0), 400, "top_k is 0: send a whole number, 1 or more."),
    (search([], ["b"]), 400, "inputs.query is an empty list."),
    (search("a", ["b", 3]), 400, 'inputs.gallery[1] is a number: send a text, {"text": text} or {"image": base64}.'),
    (search("a", ["b", {"image": "c.png"}]), 400, f"inputs.gallery[1].image {NOT_BASE64}"),
    (
        search(f"data:image/png;base64,{IMAGE}", ["b"]),
        400,
        'inputs.query is an image where a text is expected: an image goes into {"image": ...}.',
    ),
    (search(LARGE, ["b"]), 413, f"inputs.query {LOOKS_LIKE_BASE64}"),
    (search("a", ["b", WRAPPED]), 413, f"inputs.gallery[1] {LOOKS_LIKE_BASE64.replace('16384', '16600')}"),
    (search("a", ["b", "Chest CT 3 " * 1000]), 413, "inputs.gallery[1] has 11000 characters: a text may have 10000."),
    (search("x" * 10_001, ["b"]), 413, "inputs.query has 10001 characters: a text may have 10000."),
    (search("a", [[0.1] * 32, [0.1] * 31]), 400, "inputs.gallery[1] has 31 numbers: this model's embeddings have 32."),
    (search("a", [[0.1] * 32, "b"]), 400, "inputs.gallery[1] is a text: this model's embeddings have 32."),
    (search("a", [[0.1] * 32, [float("nan")] * 32]), 400, f"inputs.gallery[1] {NO_DIRECTION}"),
    (search("a", [[0.1] * 31 + [float("inf")]]), 400, f"inputs.gallery[0] {NO_DIRECTION}"),
    (search("a", [[0] * 32]), 400, f"inputs.gallery[0] {NO_DIRECTION}"),
    (search("a", [["x"] * 32]), 400, "inputs.gallery holds something that is not a number."),
    (search("a", [[10**400] * 32]), 400, "inputs.gallery holds something that is not a number."),
    (
        search("a", [[[1.0]] * 32]),
        400,
        "inputs.gallery is nested too deep: embeddings are a list of lists of numbers.",
    ),
    (search("a", [[0.1] * 32] * 20_001), 413, "20001 embeddings: a gallery may have 20000."),
    (classified("https://example.org/a.png"), 403, URL_OFF),
    (classified("HTTP://127.0.0.1/a.png"), 403, URL_OFF),
]


@pytest.mark.parametrize(("request_", "status", "message"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_a_bad_request_is_answered_with_what_is_wrong(endpoint, table, caplog, request_, status, message):
    answer = endpoint(request_)
    table.append((request_, answer))
    assert answer == {"error": message, "status": status}
    assert not caplog.records


def test_an_internal_error_stays_inside(endpoint, table, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("secret of the server")

    monkeypatch.setattr(endpoint.model, "forward", broken)
    request = {"inputs": {"text": "a"}}
    with caplog.at_level(logging.ERROR):
        answer = endpoint(request)
    table.append((request, answer))
    number = answer["error"].split()[2].rstrip(":")
    assert answer == {
        "error": f"Internal error {number}: the endpoint's log has it under this number.",
        "status": 500,
    }
    assert number in caplog.text and "secret of the server" in caplog.text and "Traceback" in caplog.text


def test_under_the_toolkit_a_bad_request_is_raised(endpoint, handler, monkeypatch):
    """It makes HTTP 400 and `{"error": str(exception)}` of it, and HTTP 200 of what is returned."""
    monkeypatch.setitem(
        sys.modules, "huggingface_inference_toolkit", types.ModuleType("huggingface_inference_toolkit")
    )
    with pytest.raises(handler.RequestError) as raised:
        endpoint({})
    assert str(raised.value) == 'The request has no inputs: send {"inputs": ..., "parameters": ...}.'
    monkeypatch.setattr(endpoint.model, "forward", lambda **kwargs: 1 / 0)
    with pytest.raises(handler.RequestError, match="Internal error") as raised:
        endpoint({"inputs": {"text": "a"}})
    assert raised.value.status == 500 and raised.value.__context__ is None


OPENED: list[str] | None = None


def _note_opened(event: str, arguments: tuple) -> None:
    if event == "open" and OPENED is not None:
        OPENED.append(str(arguments[0]))


def test_no_file_is_opened(endpoint, folder, tmp_path, monkeypatch):
    """Asked of the interpreter itself, which audits every opening."""
    path = tmp_path / "abcd"
    file = tmp_path / "picture.png"
    for place in (path, file):
        IMAGES[0].save(place, "PNG")
    names = [
        str(path),
        str(file),
        file.name,
        f"file://{file}",
        f"~/{file.name}",
        "../model/config.json",
        "config.json",
    ]
    monkeypatch.chdir(tmp_path)
    sys.addaudithook(_note_opened)
    monkeypatch.setattr(sys.modules[__name__], "OPENED", [])
    assert len(file.read_bytes()) and [str(file)] == OPENED  # the hook sees what it should
    OPENED.clear()
    for name in names:
        for request in (classified(name), classified({"image": name}), {"inputs": {"images": [name]}}):
            assert endpoint(request)["status"] == 400
        assert endpoint(search("a", [{"image": name}]))["status"] == 400
        assert endpoint({"inputs": Path(name), "parameters": {"task": "embeddings"}})["status"] == 400
        assert len(endpoint(search(name, [name]))) == 1  # a text
    assert OPENED == []


def test_threads_do_not_disturb_one_another(endpoint):
    requests = [{"inputs": {"texts": [text * (i + 1) for text in TEXTS], "image": IMAGE}} for i in range(8)]
    expected = [endpoint(request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(endpoint, requests * 3)) == expected * 3


def test_one_forward_pass_at_a_time(endpoint, monkeypatch):
    forward, running, together = endpoint.model.forward, [], []

    def watched(*args, **kwargs):
        running.append(None)
        time.sleep(0.01)
        together.append(len(running))
        running.pop()
        return forward(*args, **kwargs)

    monkeypatch.setattr(endpoint.model, "forward", watched)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(endpoint, [{"inputs": {"text": text}} for text in TEXTS * 4]))
    assert together == [1] * 8


def test_a_folder_serves_without_the_package(endpoint, folder, tmp_path):
    requests = [
        classified(IMAGE),
        {"inputs": {"images": [IMAGE], "texts": TEXTS}},
        search(TEXTS[0], [TEXTS[1], {"image": IMAGE}]),
        classified("/etc/passwd"),
    ]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BLOCK, str(folder)]
    run = subprocess.run(
        command, env=environment, cwd=tmp_path, input=json.dumps(requests), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [near(endpoint(request)) for request in requests]


def test_urls_are_fetched_where_switched_on(endpoint, handler, handler_images, folder, monkeypatch):
    assert not endpoint.allow_urls
    monkeypatch.setenv("GAP_CLOSED_CLIP_ALLOW_URLS", "1")
    allowing = handler.EndpointHandler(str(folder))
    monkeypatch.setattr(handler_images, "_get", lambda url: (200, None, file_bytes(IMAGES[0])))
    assert allowing(classified("https://example.org/a.png")) == endpoint(classified(IMAGE))
    answer = allowing({"inputs": {"images": ["https://example.org/a.png"] * 9}})
    assert answer == {"error": "9 URLs: a request may have 8. Send several requests.", "status": 413}
