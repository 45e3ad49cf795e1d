"""Images of a request: seen as in training, whatever their pixels; none is fetched, and no file is opened."""

import io
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gap_closed_clip.data import decode_image

from .examples import IMAGES, b64, classified, file_bytes, noise, search


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
    seen = handler_images.read_image(data, "inputs")
    assert seen.mode == "RGB"
    assert np.array_equal(np.asarray(seen), np.asarray(decode_image(data)))
    assert len(endpoint({"inputs": {"image": b64(data)}})["image_embeds"]) == 1


def test_the_conversion_is_that_of_the_folder(handler_images, folder):
    assert handler_images.to_rgb.__globals__["__file__"] == str(folder / "images_gap_closed_clip.py")


def test_an_image_that_lies_on_its_side_is_turned(handler_images):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees
    data = file_bytes(noise(0), "JPEG", exif=exif)
    upright = handler_images.read_image(data, "inputs")
    assert Image.open(io.BytesIO(data)).size == (36, 40) and upright.size == (40, 36)
    assert np.array_equal(np.asarray(upright), np.asarray(decode_image(data)))


def test_an_image_in_a_rare_format_is_not_decoded(handler, endpoint):
    """EPS would start Ghostscript."""
    answer = endpoint({"inputs": {"image": b64(file_bytes(noise(0), "EPS"))}})
    assert answer["status"] == 400 and "no image file of a known format" in answer["error"]


# What the interpreter is asked for while a list is here: an audit hook can't be taken off again.
CALLS: list[tuple[str, str]] | None = None


def _note_call(event: str, arguments: tuple) -> None:
    if CALLS is not None and (event == "open" or event.startswith("socket.")):
        CALLS.append((event, str(arguments[0])))


def test_no_file_is_opened_and_nothing_is_fetched(endpoint, folder, tmp_path, monkeypatch):
    """Asked of the interpreter itself, which audits every opening and every connection."""
    path = tmp_path / "abcd"
    file = tmp_path / "image.png"
    for location in (path, file):
        IMAGES[0].save(location, "PNG")
    names = [str(path), str(file), file.name, f"~/{file.name}", "../model/config.json", "config.json"]
    urls = [f"file://{file}", "http://127.0.0.1:9/image.png", "HTTPS://localhost/image.png", "ftp://localhost/a.png"]
    monkeypatch.chdir(tmp_path)
    sys.addaudithook(_note_call)
    monkeypatch.setattr(sys.modules[__name__], "CALLS", [])
    with socket.socket() as connection:
        assert len(file.read_bytes()) and connection.connect_ex(("127.0.0.1", 9)) != 0
    # The hook sees what it should.
    assert ("open", str(file)) in CALLS and "socket.connect" in [event for event, _ in CALLS]
    CALLS.clear()
    for name in names + urls:
        for request in (classified(name), classified({"image": name}), {"inputs": {"images": [name]}}):
            assert endpoint(request)["status"] == 400
        assert endpoint(search("a", [{"image": name}]))["status"] == 400
        assert endpoint({"inputs": Path(name), "parameters": {"task": "embeddings"}})["status"] == 400
        assert len(endpoint(search(name, [name]))) == 1  # a text
    assert CALLS == []
