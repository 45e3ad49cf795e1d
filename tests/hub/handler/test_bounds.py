"""What a request may hold: depth, values, characters, entries, pixels; and how long an answer may be."""

import json
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from gap_closed_clip.data import decode_image

from .examples import IMAGE, LABELS, classified, file_bytes, search


VECTOR = [0.1] * 32


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth - 1):
        value = [value]
    return value


def deep_json(depth: int) -> dict:
    """As it comes from the network: Python's own parser takes it."""
    return json.loads('{"inputs": ' + "[" * depth + "]" * depth + "}")


TOO_DEEP = "The request is nested too deep: lists and objects may be 16 deep in one another."
TOO_MANY = [
    (deep_json(900), 400, TOO_DEEP),
    ({"inputs": nested(50_000)}, 400, TOO_DEEP),
    ({"inputs": IMAGE, "parameters": {"task": nested(50_000)}}, 400, TOO_DEEP),
    ({"inputs": IMAGE, "options": {"a": nested(16)}}, 400, TOO_DEEP),
    (search("a", [nested(50_000)]), 400, TOO_DEEP),
    ({"inputs": [[0] * 4_000_000] * 7}, 413, "The request has more than 24,000,000 values: send several requests."),
    (
        {"inputs": {"images": ["A" * 2**21] * 65}},
        413,
        "The request has more than 134,217,728 characters: send several requests.",
    ),
    ({"A" * 2**27 + "A": 1}, 413, "The request has more than 134,217,728 characters: send several requests."),
    (
        search("a", ["b"] * 2049),
        413,
        "inputs.gallery has 2049 entries: it may have 2048. Send several requests.",
    ),
    (
        {"inputs": {"texts": [0] * 10**6}},
        413,
        "inputs.texts has 1000000 entries: it may have 2048. Send several requests.",
    ),
    (classified(IMAGE, "," * 10**6), 413, "1000001 candidate_labels: a request may have 256."),
    (
        search(["a"] * 11, [VECTOR] * 10_000, top_k=10_000),
        413,
        "11 queries with 10000 hits each: an answer may have 100,000 hits. Lower top_k, or send several requests.",
    ),
    (search("a" * 11_000, ["b"]), 413, None),
    (search(" " * 3000 + "a" * 11_000, ["b"]), 413, "inputs.query has 14000 characters: a text may have 10000."),
    (search("a", ["b"], top_k=-(10**5000)), 400, None),
]


@pytest.mark.parametrize(("request_", "status", "message"), TOO_MANY, ids=[f"{i}" for i in range(len(TOO_MANY))])
def test_too_much_is_refused_in_a_short_sentence(endpoint, caplog, request_, status, message):
    answer = endpoint(request_)
    assert answer["status"] == status and len(answer["error"]) < 250
    assert message is None or answer["error"] == message
    assert not caplog.records


def test_what_is_at_the_limits_is_answered(endpoint):
    options = {"inputs": {"text": "a"}, "options": {"a": nested(14)}}
    assert len(endpoint(options)["text_embeds"]) == 1
    assert len(endpoint(search(["a"] * 10, [VECTOR] * 10_000, top_k=10_000))) == 10
    assert len(endpoint(classified(IMAGE, ",".join(LABELS)))) == 3


def test_a_bad_name_is_shown_short(endpoint):
    answer = endpoint({"inputs": IMAGE, "x" * 10**6: 1})
    assert answer["status"] == 400 and len(answer["error"]) < 150


def test_pixels_of_all_images_are_bounded(endpoint, handler_images, monkeypatch):
    monkeypatch.setattr(handler_images, "MAX_REQUEST_PIXELS", 3 * 40 * 36)
    assert len(endpoint({"inputs": {"images": [IMAGE] * 3}})["image_embeds"]) == 3
    wrong = "The images up to {} have more than 4,320 pixels: send several requests."
    answer = endpoint({"inputs": {"images": [IMAGE] * 4}})
    assert answer == {"error": wrong.format("inputs.images[3]"), "status": 413}
    answer = endpoint(search({"image": IMAGE}, [{"image": IMAGE}] * 3))
    assert answer == {"error": wrong.format("inputs.gallery[2].image"), "status": 413}


def _large(mode: str) -> Image.Image:
    """41 x 36 pixels of blocks of 2 x 2, so that the mean of four is each of them; the last row has no partner."""
    values = np.random.default_rng(3).integers(0, 200, (20, 18), dtype=np.uint8)
    values = np.pad(values.repeat(2, 0).repeat(2, 1), ((0, 1), (0, 0)), mode="edge")
    if mode == "I;16":
        return Image.fromarray(values.astype(np.uint16) * 20)
    image = Image.fromarray(values)
    if mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(Image.new("L", image.size, 255))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16", "F"])
def test_a_large_image_is_halved_before_it_is_converted(handler_images, monkeypatch, mode):
    data = file_bytes(_large(mode), "TIFF" if mode == "F" else "PNG")
    whole = np.asarray(decode_image(data))
    assert whole.shape == (41, 36, 3)
    monkeypatch.setattr(handler_images, "LARGE", 40 * 36)
    halved = np.asarray(handler_images.read_image(data, "inputs"))[:20]
    assert np.abs(halved.astype(int) - whole[:40:2, ::2]).max() <= 1


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_a_large_image_whose_zero_is_white_is_turned_over(handler_images, monkeypatch, mode):
    data = file_bytes(_large(mode), "TIFF", tiffinfo={262: 0})
    whole = np.asarray(decode_image(data))
    monkeypatch.setattr(handler_images, "LARGE", 100)
    halved = np.asarray(handler_images.read_image(data, "inputs"))[:20]
    assert np.abs(halved.astype(int) - whole[:40:2, ::2]).max() <= 1


def test_a_large_image_that_lies_on_its_side_is_turned(handler_images, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_bytes(_large("RGB").crop((0, 0, 36, 40)), "TIFF", exif=exif)
    monkeypatch.setattr(handler_images, "LARGE", 100)
    seen = np.asarray(handler_images.read_image(data, "inputs"))
    assert seen.shape[:2] == (18, 20)
    assert np.abs(seen.astype(int) - np.asarray(decode_image(data))[::2, ::2]).max() <= 1


def test_large_images_are_decoded_one_at_a_time(endpoint, handler_images, monkeypatch):
    monkeypatch.setattr(handler_images, "LARGE", 100)
    halve, running, most = handler_images._halved, [], []

    def watched(image):
        running.append(None)
        most.append(len(running))
        threading.Event().wait(0.01)
        running.pop()
        return halve(image)

    monkeypatch.setattr(handler_images, "_halved", watched)
    threads = [threading.Thread(target=endpoint, args=({"inputs": {"images": [IMAGE] * 3}},)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 12


def test_a_request_deeper_than_python_recurses_raises_nothing(endpoint):
    assert sys.getrecursionlimit() < 50_000
    answer = endpoint({"inputs": {"query": nested(49_000), "gallery": ["a"]}})
    assert answer["status"] == 400
