"""Requests to the endpoint: bodies of every task, of which a thing or two is spoilt, or nothing of the kind."""

import base64
import functools
import io
import json
import math
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import jpeg_of_scans, make_tiny_processor, tiny_config
from hub.conftest import load_handler
from hub.handler.examples import save
from hub.modality_models import RECORDS, model_of_four, processor_of_four, spectrogram
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from gap_closed_clip import GapClosedClipForConditionalGeneration, GapClosedClipModel

from .base import Base, image_file
from .values import JUNK, damaged


NAMED = (
    r"inputs|parameters|[Tt]he request|candidate_labels|hypothesis_template|top_k|max_new_tokens|num_beams|prompt|task"
    r"|embeddings|images|texts|records|audios|hits|caption|asked for"
)
MOST_LETTERS = 500  # of a message
MODELS = ("encoder", "captioner")  # image and text alone; records, arrays and captions as well
DIM = 32  # of both
SIDE = 7070  # of the largest square image


@functools.cache
def endpoint(name: str) -> Callable[[Any], Any]:
    """The handler of a folder as it is published, of a tiny model."""
    processor = make_tiny_processor()
    model: Any = GapClosedClipModel(tiny_config())
    if name == "captioner":
        model = GapClosedClipForConditionalGeneration.from_clip(model_of_four(), processor.tokenizer)
        processor = processor_of_four(processor)
    folder = Path(tempfile.mkdtemp(prefix="fuzz_endpoint_"))
    try:
        return load_handler(save(folder, model, processor))[0].EndpointHandler(str(folder))
    finally:
        shutil.rmtree(folder)


def prepare(value: tuple[str, Any], folder: Path, base: Base) -> tuple[str, list[str]]:
    """Writes the body as JSON, with NaN and infinities as Python has them, and loads the handler before the fork."""
    name, body = value
    endpoint(name)
    (folder / "body.json").write_text(json.dumps(body), encoding="utf-8")
    return "request", [name, "body.json"]


def main(command: str, words: list[str]) -> int:
    """Has a request answered; 1 for one that is refused, its message printed as the command prints its own."""
    name, path = words
    answer = endpoint(name)(json.loads(Path(path).read_text(encoding="utf-8")))
    json.dumps(answer, allow_nan=False)
    if not (isinstance(answer, dict) and "error" in answer):
        return 0
    if answer["status"] not in (400, 413) or len(answer["error"]) > MOST_LETTERS:
        raise AssertionError(answer)
    print(f"gap-closed-clip {command}: {answer['error']}", file=sys.stderr)
    return 1


# --- images


def _in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@functools.cache
def _large_image(mode: str, kind: str, width: int, height: int) -> str:
    """A small file of many pixels, all of them black."""
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, kind)
    return _in_base64(buffer.getvalue())


def _chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


@functools.cache
def _with_chunk(kind: bytes) -> str:
    """A PNG with 100 MB of text, profile or other words in a chunk that is small as long as it is packed."""
    good = image_file()
    body = b"name\0\0" + zlib.compress(bytes(100 * 2**20), 9)
    return _in_base64(good[:33] + _chunk(kind, body) + good[33:])


@functools.cache
def _with_exif(orientation: int) -> str:
    exif, info = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("L", (9, 8)).save(buffer, "PNG", exif=exif, pnginfo=info)
    return _in_base64(buffer.getvalue())


LARGE = (
    *(("L", "PNG", SIDE, SIDE), ("RGBA", "PNG", SIDE, SIDE), ("I;16", "PNG", SIDE, SIDE), ("1", "PNG", SIDE, SIDE)),
    *(("CMYK", "JPEG", SIDE, SIDE), ("P", "GIF", SIDE, SIDE), ("L", "PNG", 49_000, 1000), ("L", "PNG", 4000, 4001)),
    *(("RGB", "JPEG2000", 3000, 3000), ("RGB", "WEBP", 8000, 6000), ("F", "TIFF", 1000, 1000), ("L", "PNG", 50, 1)),
)
good_images = st.sampled_from([_in_base64(image_file(seed, kind)) for seed, kind in enumerate(("PNG", "JPEG", "BMP"))])
bad_images = st.one_of(
    st.sampled_from(("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "JPEG2000", "PPM"))
    .flatmap(lambda kind: damaged(image_file(1, kind)))
    .map(_in_base64),
    st.binary(max_size=40).map(_in_base64),
    st.sampled_from((b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"IDAT", b"acTL")).map(_with_chunk),
    st.integers(0, 300).map(_with_exif),
    st.sampled_from((50, 51, 20_000)).map(jpeg_of_scans).map(_in_base64),
    good_images.flatmap(lambda good: st.sampled_from((f"data:image/png;base64,{good}", f"data:,{good}", good[:-3],
        f"{good}=", f"\n{good} ", good.replace("A", "-"), f"{good}é", f"{good}\x00", ","))),
)  # fmt: skip
large_images = st.sampled_from(LARGE).map(lambda size: _large_image(*size))


# --- everything else

STRANGE: list[Any] = [
    *JUNK,
    *("https://example.org/a.png", "file:///etc/passwd", "/etc/passwd", "data:image/png;base64,", "=", "A" * 9999),
    *("\ud83d", "\x00", "{}" * 3, "{0}", "{:>999999999}", "{} {}", "," * 300, "a," * 200, "\u202e\u0301" * 500),
    *(" " * 10**5, [[0] * DIM] * 20_001, {"birth": "0000-00-00"}),
    *("word " * 2000, "a" * 10_001, "image-to-text", "embeddings", "image-text-retrieval", "[CLS] [SEP] [MASK]"),
    *(10**400, -(10**400), 2**63, -0.0, 5e-324, 3.5e38, 17, 64, 65, 256, 257, 10_000, 1.0),
    *([0.1] * DIM, [[0.1] * DIM], [[0.1] * DIM, [0.1]], [[math.nan] * DIM], [[1e308] * DIM], [[True] * DIM], [[]]),
    *([[[0.1]] * DIM], [["0.1"] * DIM], ["a"] * 513, ["a", ["b"]], [{"text": "a"}] * 600, [{}] * 3),
    *({"text": "a"}, {"image": "a"}, {"text": {"text": "a"}}, {"image": None, "text": None}, {"record": {}}),
    *({"image": "a", "record": RECORDS[0]}, {str(number): number for number in range(3000)}, {"a" * 10**5: 1}),
    *(spectrogram().tolist(), [spectrogram().tolist()] * 17, {"age": 1e308}, {"age": "1" * 5000}),
]  # fmt: skip
strange = st.sampled_from(STRANGE)
NAMES = (
    *("image", "images", "text", "texts", "record", "records", "audios", "query", "gallery", "inputs", "parameters"),
    *("task", "top_k", "prompt", "candidate_labels", "num_beams", "age", "options", "é", "", "__class__", "x" * 300),
)


def _bodies(image: Any) -> list[dict[str, Any]]:
    """Good requests of every task, with every field that there is."""
    vectors, sound = [[0.1] * DIM, [-0.2] * DIM], spectrogram().tolist()
    labels = {"candidate_labels": ["effusion", "normal"], "hypothesis_template": "Image of {}."}
    caption = {"max_new_tokens": 4, "num_beams": 2, "prompt": "Chest"}
    return [
        {"inputs": image, "parameters": labels},
        {"inputs": [image, image], "parameters": {**labels, "task": "zero-shot-image-classification"}},
        {"inputs": {"images": [image], "texts": ["Chest CT.", "MR"]}, "options": {"wait_for_model": True}},
        {"inputs": image, "parameters": {"task": "embeddings"}},
        {
            "inputs": {"query": "Chest", "gallery": ["CT", {"image": image}, {"text": "MR"}]},
            "parameters": {"top_k": 2},
        },
        {"inputs": {"query": [{"image": image, "text": "CT"}], "gallery": vectors}},
        {"inputs": {"image": image, "text": "Chest"}, "parameters": {"task": "image-text-to-text"}},
        {"inputs": [image], "parameters": caption},
        {"inputs": image, "parameters": {"task": "caption", "generation_parameters": {"num_beams": 3}}},
        {"inputs": {"records": RECORDS, "audio": sound}},
        {"inputs": {"query": {"record": RECORDS[0], "image": image}, "gallery": [{"audio": sound}, "CT"]}},
    ]


def _places(value: Any) -> list[tuple]:
    """Where anything is in a body: the keys and indices that lead there; of long lists the first four."""
    if not isinstance(value, dict | list):
        return [()]
    entries = value.items() if isinstance(value, dict) else list(enumerate(value))[:4]
    return [(), *((key, *place) for key, inner in entries for place in _places(inner))]


def _changed(value: Any, place: tuple, change: Callable[[Any], Any]) -> Any:
    """The body with what is in a place changed."""
    if not place:
        return change(value)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = _changed(copy[place[0]], place[1:], change)
    return copy


@st.composite
def _spoilt(draw: st.DrawFn, value: Any) -> Any:
    """A body with something in it, however deep inside, replaced, left out, renamed, added, many times or nested."""
    place = draw(st.sampled_from(_places(value)[1:] or [()]))
    how = draw(st.sampled_from(["replaced"] * 8 + ["deeper", "many", "as text", "renamed", "added", "gone"]))
    if how == "replaced":
        new = draw(strange)
        return _changed(value, place, lambda old: new)
    if how == "deeper":
        times = draw(st.sampled_from([1, 2, 16, 900]))
        return _changed(value, place, lambda old: functools.reduce(lambda inner, _: [inner], range(times), old))
    if how == "many":
        times = draw(st.sampled_from([0, 1, 2, 17, 65]))
        return _changed(value, place, lambda old: [old] * times)
    if how == "as text" or not place:
        return _changed(value, place, lambda old: json.dumps(old)[:1000])
    name = draw(st.sampled_from(NAMES))

    def of_its_holder(holder: Any) -> Any:
        if isinstance(holder, list):
            return [*holder, holder[place[-1]]] if how != "gone" else holder[: place[-1]]
        kept = {key: inner for key, inner in holder.items() if how == "added" or key != place[-1]}
        return kept if how == "gone" else {**kept, name: holder[place[-1]]}

    return _changed(value, place[:-1], of_its_holder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | strange,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[str, Any]:
    """A model, and a body for it."""
    name = draw(st.sampled_from(MODELS))
    kind = draw(st.integers(0, 39))
    if kind < 3:
        return name, draw(json_values)
    if kind < 5:
        return name, {"inputs": draw(json_values), "parameters": draw(json_values)}
    image = draw(good_images if kind < 24 else bad_images if kind < 38 else large_images)
    body = draw(st.sampled_from(_bodies(image)))
    for _ in range(draw(st.integers(1, 2)) if kind < 24 else draw(st.integers(0, 1))):
        body = draw(_spoilt(body))
    return name, body
