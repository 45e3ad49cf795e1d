"""What the endpoint answers to bad requests, and what it keeps to itself."""

import base64
import logging
import sys
import types
import zlib

import numpy as np
import pytest
from conftest import jpeg_of_scans
from PIL import Image

from .examples import IMAGE, LABELS, RETRIEVAL, URL_NOT_FETCHED, ZERO_SHOT, b64, classified, file_bytes, noise, search


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
NO_IMAGE = "is no image file of a known format: PNG, JPEG, TIFF, BMP, DIB, GIF, WEBP, PPM."
BRACES = "hypothesis_template holds {} once, where the label goes, and no other braces."
TASKS = f"{ZERO_SHOT}, embeddings, {RETRIEVAL}"
TOO_MANY = "it has 9000 x 9000 pixels, more than 50,000,000: make it smaller first"
BOMB = "has too many pixels, more than 50,000,000"
NO_DIRECTION = "has no direction: it is all zeros, or NaN or infinite."
BAD = [
    ([1], 400, 'The request is a list: send an object, {"inputs": ..., "parameters": ...}.'),
    (None, 400, 'The request is null: send an object, {"inputs": ..., "parameters": ...}.'),
    ({}, 400, 'The request has no inputs: send {"inputs": ..., "parameters": ...}.'),
    ({"inputs": ""}, 400, 'The request has no inputs: send {"inputs": ..., "parameters": ...}.'),
    ({"input": IMAGE}, 400, "Unknown name 'input' in the request: allowed are inputs, parameters, options."),
    ({"inputs": IMAGE, "parameters": "x"}, 400, "parameters is a text: send an object."),
    ({"inputs": IMAGE}, 400, f"What is asked for? Give candidate_labels, or set parameters.task: {TASKS}."),
    ({"inputs": IMAGE, "parameters": {"task": "captioning"}}, 400, f"Unknown task 'captioning': use {TASKS}."),
    ({"inputs": IMAGE, "parameters": {"task": []}}, 400, f"Unknown task []: use {TASKS}."),
    (
        {"inputs": IMAGE, "parameters": {"candidate_label": LABELS}},
        400,
        "Unknown name 'candidate_label' in parameters: allowed are task, candidate_labels, hypothesis_template, "
        "top_k, prompt, max_new_tokens, num_beams, generation_parameters.",
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
    (classified("an image!"), 400, f"inputs {NOT_BASE64}"),
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
    (classified(b64(_png_header(9000, 9000))), 413, f"inputs can't be used: {TOO_MANY}."),
    (classified(b64(_png_header(60000, 60000))), 413, f"inputs can't be used: it {BOMB}."),
    (
        classified(b64(_png_header(1, 30_000))),
        413,
        "inputs can't be used: it has 1 x 30000 pixels, one side more than 50 times the other: cut out what matters.",
    ),
    (classified(b64(file_bytes(noise(0), "JPEG2000"))), 400, f"inputs {NO_IMAGE}"),
    (
        classified(b64(jpeg_of_scans(51))),
        413,
        "inputs can't be used: it has 51 scans, more than 50: save it anew as a JPEG.",
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
    (classified("https://example.org/a.png"), 400, f"inputs {URL_NOT_FETCHED}"),
    (classified([IMAGE, "HTTP://127.0.0.1/a.png"]), 400, f"inputs[1] {URL_NOT_FETCHED}"),
    (search("a", [{"image": "http://[::1/"}]), 400, f"inputs.gallery[0].image {URL_NOT_FETCHED}"),
]


@pytest.mark.parametrize(("request_", "status", "message"), BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_a_bad_request_is_answered_with_what_is_wrong(endpoint, caplog, request_, status, message):
    answer = endpoint(request_)
    assert answer == {"error": message, "status": status}
    assert not caplog.records


def test_an_internal_error_stays_inside(endpoint, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("secret of the server")

    monkeypatch.setattr(endpoint.model, "forward", broken)
    request = {"inputs": {"text": "a"}}
    with caplog.at_level(logging.ERROR):
        answer = endpoint(request)
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
