"""The image-text-retrieval pipeline: cosines, every kind of gallery, and one line for what can't be searched."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, dicom_file
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from gap_closed_clip.data import decode_image
from gap_closed_clip.model.images_gap_closed_clip import to_rgb


TEXTS = CAPTIONS[1:3]


def noise(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def refused(message: str, call, *args, **kwargs) -> None:
    """With a ValueError of one line."""
    with pytest.raises(ValueError, match=message) as raised:
        call(*args, **kwargs)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.fixture
def seen(pipe, monkeypatch) -> list[np.ndarray]:
    """The pixels that the processor is given."""
    pixels, preprocess = [], pipe.preprocess

    def noted(inputs):
        assert all(image.mode == "RGB" for image in inputs.get("images", []))
        pixels.extend(np.asarray(image) for image in inputs.get("images", []))
        return preprocess(inputs)

    monkeypatch.setattr(pipe, "preprocess", noted)
    return pixels


def test_images_and_texts_are_ranked_by_their_cosines(pipe, tiny_model, tiny_processor):
    images = [noise(i) for i in range(3)]
    gallery = [images[0], TEXTS[0], images[1], {"text": TEXTS[1]}, {"image": images[2]}]
    with torch.no_grad():
        outputs = tiny_model(**tiny_processor(images=images, text=TEXTS, return_tensors="pt", padding=True))
    image, text = outputs.image_embeds, outputs.text_embeds
    embeds = torch.stack([image[0], text[0], image[1], text[1], image[2]])
    torch.testing.assert_close(pipe.embed(gallery, batch_size=2), embeds, rtol=1e-5, atol=1e-5)
    order = (embeds @ text[1]).argsort(descending=True).tolist()
    hits = pipe([TEXTS[1], images[2]], gallery, top_k=4)
    assert [hit["index"] for hit in hits[0]] == order[:4] and order[0] == 3
    assert [hit["item"] for hit in hits[0]] == [gallery[index] for index in order[:4]]
    assert hits[0][0]["score"] == pytest.approx(1, abs=1e-5)
    assert pipe(TEXTS[1], embeds, top_k=9) == [
        {"score": pytest.approx((embeds @ text[1])[index].item(), abs=1e-5), "index": index} for index in order
    ]


@pytest.mark.parametrize("number", [7, 400])
def test_hits_of_equal_scores_are_in_the_gallerys_order(pipe, number):
    """An axis of the space has exactly the query's own coordinate as its cosine, however often it is there."""
    axes = np.random.default_rng(0).integers(0, 3, number)
    query = pipe.embed([TEXTS[0]])[0].tolist()
    expected = sorted(range(number), key=lambda index: (-query[axes[index]], index))
    for top_k in (1, 3, number // 2, number, number + 1):
        hits = pipe(TEXTS[0], torch.eye(len(query))[axes], top_k=top_k)
        assert [hit["index"] for hit in hits] == expected[:top_k]
        assert [hit["score"] for hit in hits] == [query[axes[index]] for index in expected[:top_k]]


# --- embeddings as the gallery


@pytest.mark.parametrize(
    "given",
    [
        lambda embeds: 3 * embeds,
        lambda embeds: embeds * torch.tensor([[0.1], [5.0], [100.0], [1.0]]),
        lambda embeds: embeds.double(),
        lambda embeds: embeds.requires_grad_(),
        lambda embeds: embeds.numpy(),
        lambda embeds: 7 * embeds.numpy().astype(np.float64),
        lambda embeds: np.asfortranarray(embeds.numpy()),
        lambda embeds: embeds.numpy()[::-1].copy()[::-1],
        lambda embeds: embeds.numpy().astype(">f4"),
    ],
    ids=[
        "scaled",
        "each scaled",
        "float64",
        "gradient",
        "array",
        "float64 array",
        "columns",
        "reversed",
        "big-endian",
    ],
)
def test_scores_are_cosines_of_whatever_embeddings(pipe, given):
    gallery = [noise(0), *TEXTS, noise(1)]
    expected = [{"index": hit["index"], "score": pytest.approx(hit["score"], abs=1e-5)} for hit in pipe("CT", gallery)]
    assert pipe("CT", given(pipe.embed(gallery))) == expected


def test_half_precision_embeddings(pipe):
    embeds = pipe.embed([noise(0), *TEXTS])
    expected = [pytest.approx(hit["score"], abs=0.01) for hit in pipe("CT", embeds)]
    assert [hit["score"] for hit in pipe("CT", embeds.bfloat16())] == expected


@pytest.mark.filterwarnings("error")
def test_an_array_that_is_only_read(pipe, tmp_path):
    embeds = pipe.embed(TEXTS)
    np.save(tmp_path / "embeds.npy", embeds.numpy())
    assert pipe("CT", np.load(tmp_path / "embeds.npy", mmap_mode="r")) == pipe("CT", embeds)


def test_a_model_in_half_precision_gives_float32_unit_vectors(pipe):
    pipe.model.bfloat16()
    embeds = pipe.embed([noise(0), *TEXTS])
    assert embeds.dtype == torch.float32
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3), rtol=0, atol=1e-6)


def test_a_model_that_embeds_as_nan_is_to_blame(pipe):
    gallery = pipe.embed(TEXTS)
    with torch.no_grad():
        pipe.model.text_projection.weight[-1] = float("nan")
    for query, searched in (("CT", gallery), ("CT", [noise(0)]), (noise(1), TEXTS)):
        with pytest.raises(ValueError, match="The model's embedding of a text is NaN or infinite: its weights are"):
            pipe(query, searched)
    assert len(pipe(noise(1), gallery)) == len(TEXTS)  # by the tower that is sound


def _changed(row: int, value: float) -> np.ndarray:
    embeds = np.ones((3, 32), np.float32)
    embeds[row] = value
    return embeds


@pytest.mark.parametrize(
    ("gallery", "message"),
    [
        (np.ones((3, 31)), r"gallery has the shape \(3, 31\): embeddings of this model are \(N, 32\)\."),
        (torch.ones(3, 31), r"gallery has the shape \(3, 31\): embeddings of this model are \(N, 32\)\."),
        (torch.ones(32), r"gallery has the shape \(32,\): embeddings of this model are \(N, 32\)\."),
        (torch.ones(1, 3, 32), r"gallery has the shape \(1, 3, 32\): .*\(N, 32\)\."),
        (torch.ones(0, 32), "needs a gallery to search"),
        (_changed(1, np.nan), r"gallery\[1\] has no direction: it is all zeros, or NaN or infinite\."),
        (torch.tensor(_changed(2, np.inf)), r"gallery\[2\] has no direction"),
        (_changed(0, 0), r"gallery\[0\] has no direction"),
    ],
)
def test_embeddings_that_cannot_be_searched(pipe, gallery, message):
    refused(message, pipe, "text", gallery)


# --- lists and what is none


def test_a_column_of_a_data_set_is_decoded_once(pipe, monkeypatch):
    images = [noise(i) for i in range(5)]
    files = [{"bytes": png(image), "path": None} for image in images]
    pairs = Dataset.from_dict({"image": files, "caption": CAPTIONS[:5]})
    pairs = pairs.cast(Features({**pairs.features, "image": ImageFeature()}))
    expected = pipe("CT", images, batch_size=2)
    hits = pipe("CT", pairs["image"], batch_size=2)
    assert [(hit["index"], hit["score"]) for hit in hits] == [(hit["index"], hit["score"]) for hit in expected]
    assert all(np.array_equal(hit["item"], images[hit["index"]]) for hit in hits)
    assert pipe("CT", pairs["caption"]) == pipe("CT", CAPTIONS[:5])
    assert pipe(pairs["caption"], CAPTIONS, top_k=1) == pipe(CAPTIONS[:5], CAPTIONS, top_k=1)
    decoded, decode = [], ImageFeature.decode_example
    monkeypatch.setattr(ImageFeature, "decode_example", lambda *a, **k: decoded.append(None) or decode(*a, **k))
    pipe.embed(pairs["image"], batch_size=2)
    assert len(decoded) == 5


@pytest.mark.parametrize(
    "several",
    [tuple, iter, lambda items: (item for item in items), lambda items: dict(enumerate(items)).values(), np.array],
    ids=["tuple", "iterator", "generator", "values", "array of strings"],
)
def test_what_has_an_order_is_a_list(pipe, several):
    expected = pipe(TEXTS, CAPTIONS)
    assert pipe(TEXTS, several(CAPTIONS)) == expected
    assert pipe(several(TEXTS), CAPTIONS) == expected
    assert torch.equal(pipe.embed(several(CAPTIONS)), pipe.embed(CAPTIONS))


def test_a_query_by_itself_gets_its_hits_and_a_list_of_one_a_list_of_them(pipe):
    hits = pipe(TEXTS[0], CAPTIONS)
    assert hits[0]["item"] == TEXTS[0] and pipe([TEXTS[0]], CAPTIONS) == [hits]
    assert pipe({"text": TEXTS[0]}, CAPTIONS) == hits
    assert pipe(noise(0), [noise(0), noise(1)])[0]["index"] == 0
    assert len(pipe(TEXTS[0], CAPTIONS, top_k=np.int64(2), batch_size=np.int64(4))) == 2


@pytest.mark.parametrize(
    ("gallery", "message"),
    [
        (None, "needs a gallery"),
        ([], "needs a gallery"),
        (iter(()), "needs a gallery"),
        ([3], r"gallery\[0\]: 3 is neither image nor text"),
        (["a", None], r"gallery\[1\]: None is neither image nor text"),
        ([b"\x89PNG"], r"gallery\[0\] can't be read as an image: "),
        (bytearray(b"bytes"), "gallery is one item, bytearray"),
        ([{"image": "a.png", "caption": "a"}], r"gallery\[0\]: .* is neither image nor text"),
        ([{"text": Path("a.png")}], r"gallery\[0\]: .* is neither image nor text"),
        ([[0.1, 0.2]], r"gallery\[0\]: \[0.1, 0.2\] is neither image nor text"),
        ("a text", r"gallery is one item, 'a text': give a list, \[item\]\."),
        (b"bytes", "gallery is one item, b'bytes': give a list"),
        (Path("a.png"), r"gallery is one item, .*Path\('a.png'\): give a list"),
        (noise(0), "gallery is one item, <PIL.Image.Image .*: give a list"),
        ({"image": "a.png"}, "gallery is one item, {'image': 'a.png'}: give a list"),
        ({"a", "b"}, "gallery is a set, which has no order .*: give a list"),
        (frozenset("ab"), "gallery is a set"),
        (5, "gallery is 5: give a list of images and texts"),
    ],
)
def test_a_gallery_that_cannot_be_searched(pipe, gallery, message):
    refused(message, pipe, "text", gallery)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([], "queries is empty"),
        ({"a", "b"}, "queries is a set"),
        (None, "queries is None: give a list"),
        (["a", 3], r"queries\[1\]: 3 is neither"),
        ("", r"^queries\[0\] is an empty text\. Say what to search for\.$"),
        (["a", " \n\t"], r"^queries\[1\] is an empty text\."),
        (np.array(["a", ""]), r"^queries\[1\] is an empty text\."),
        ({"text": "\u00a0"}, r"^queries\[0\] is an empty text\."),
        ([{"image": noise(0), "text": ""}], r"^queries\[0\] is an empty text\."),
        (Path("nowhere.png"), r"There is no file nowhere.png \(queries\[0\]\)\."),
        (b"bytes", r"queries\[0\] can't be read as an image: "),
        (np.ones(4), r"queries\[0\]: ndarray of the shape \(4,\) is neither"),
        (np.ones((5, 40, 36)), r"queries\[0\] can't be read as an image: its shape is \(5, 40, 36\)"),
        (np.eye(3, 32), "queries are embeddings: give the images and texts"),
    ],
)
def test_queries_that_are_none(pipe, queries, message):
    refused(message, pipe, queries, ["a"])


def test_nothing_to_embed(pipe):
    refused("items is empty: give images and texts", pipe.embed, [])
    refused("items is one item, 'text': give a list", pipe.embed, "text")
    refused(r"items is one array of the shape \(3, 40, 36\): give a list", pipe.embed, torch.ones(3, 40, 36))


@pytest.mark.parametrize("value", [0, -1, 2.0, "3", None, True])
@pytest.mark.parametrize("name", ["top_k", "batch_size"])
def test_numbers_that_are_none(pipe, name, value):
    refused(f"{name} is {value!r}: give a whole number, 1 or more", pipe, "a", ["b"], **{name: value})
    if name == "batch_size":
        refused("batch_size is", pipe.embed, ["b"], batch_size=value)


def test_a_list_is_looked_through_before_anything_is_encoded(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "forward", lambda inputs: pytest.fail("encoded"))
    refused(r"items\[3\]: 3 is neither", pipe.embed, ["a", "b", "c", 3], batch_size=1)
    refused(r"There is no file nowhere.png \(items\[1\]\)", pipe.embed, ["a", Path("nowhere.png")], batch_size=1)


# --- images


def test_images_are_files_only_where_said(pipe, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (30, 30), "gray").save(path)
    from_path, from_dict, also, as_text = pipe.embed([path, {"image": str(path)}, {"image": path}, str(path)])
    assert torch.equal(from_path, from_dict) and torch.equal(from_path, also)
    assert not torch.allclose(from_path, as_text)


def _deep(dtype) -> Image.Image:
    """Gray values far above 255, all of which convert("RGB") makes white."""
    return Image.fromarray(np.linspace(1000, 5000, 40 * 36).reshape(40, 36).astype(dtype))


def _see_through() -> Image.Image:
    image = noise(0)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (_deep(np.uint16), "PNG"),
        (_deep(np.uint16), "TIFF"),
        (_deep(np.int32), "TIFF"),
        (_deep(np.float32), "TIFF"),
        (_see_through(), "PNG"),
        (noise(0).convert("L"), "PNG"),
        (noise(0).quantize(16), "PNG"),
        (noise(0).convert("CMYK"), "TIFF"),
        (noise(0), "JPEG"),
    ],
    ids=["16 bits", "16-bit TIFF", "32 bits", "float", "transparent", "gray", "palette", "CMYK", "JPEG"],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_images_are_seen_as_in_training(pipe, seen, tmp_path, image, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind.lower()}"
    image.save(path, kind, exif=exif)
    pipe.embed([path, {"image": str(path)}, Image.open(io.BytesIO(path.read_bytes()))])
    expected = np.asarray(decode_image(path))
    assert expected.shape == ((40, 36, 3) if orientation == 1 else (36, 40, 3)) and expected.std() > 20
    assert len(seen) == 3 and all(np.array_equal(pixels, expected) for pixels in seen)


def test_arrays_bytes_and_dicom(pipe, seen, tmp_path):
    deep = np.asarray(_deep(np.uint16))
    path = tmp_path / "a.dcm"
    path.write_bytes(dicom_file(deep))
    data = png(_deep(np.uint16))
    pipe.embed([deep, torch.tensor(deep.astype(np.int32))[None], {"image": deep}, {"image": data}, path])
    assert len(seen) == 5 and all(np.array_equal(pixels, decode_image(data)) for pixels in seen[:4])
    assert np.array_equal(seen[4], decode_image(path)) and seen[4].std() > 20
    assert pipe("CT", [deep])[0]["item"] is deep
    refused(r"gallery\[0\]: ndarray of the shape \(4,\) is neither image", pipe, "a", [np.ones(4)])
    refused(r"gallery\[0\] can't be read as an image: its shape is \(5, 40, 36\)", pipe, "a", [np.ones((5, 40, 36))])


def test_the_users_image_stays_as_it_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = Image.open(io.BytesIO(png(noise(0), exif=exif)))
    assert to_rgb(sideways).size == (40, 36) and sideways.size == (36, 40)
    upright = noise(0)
    assert to_rgb(upright) is upright


def test_files_that_are_no_images(pipe, tmp_path):
    refused(r"There is no file .*nowhere.png \(gallery\[0\]\)\.", pipe, "a", [tmp_path / "nowhere.png"])
    refused(r"There is no file .*nowhere.png \(gallery\[0\]\)\.", pipe, "a", [{"image": f"{tmp_path}/nowhere.png"}])
    refused("There is no file", pipe, "a", [tmp_path])
    refused("There is no file AAAA", pipe, "a", [{"image": "A" * 10_000}])
    broken, text = tmp_path / "broken.png", tmp_path / "text.png"
    broken.write_bytes(png(noise(0))[:-500])
    text.write_text("no image")
    refused(r"items\[1\], .*broken.png, can't be read as an image: ", pipe.embed, ["a", broken])
    refused(r"gallery\[0\], .*text.png, can't be read as an image: .*DICOM", pipe, "a", [text])
    refused(r"gallery\[1\] can't be read as an image: ", pipe, "a", ["b", Image.open(broken)])
    pairs = Dataset.from_dict({"image": [{"bytes": png(noise(0))[:-500], "path": None}]})
    column = pairs.cast(Features({"image": ImageFeature()}))["image"]
    with pytest.raises(OSError):  # the library's own: it decodes, not the pipeline
        pipe.embed(column)


class _Images(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.agents.append(self.headers["User-Agent"])
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/a.png")
        else:
            self.send_response(200 if self.path == "/a.png" else 404)
        self.end_headers()
        self.wfile.write(png(_deep(np.uint16)))

    def log_message(self, *args):
        pass


def test_urls(pipe, seen):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Images)
    server.agents = []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address, data = f"http://127.0.0.1:{server.server_port}", png(_deep(np.uint16))
    try:
        inline = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        pipe.embed([{"image": f"{address}/a.png"}, {"image": f"{address}/moved"}, {"image": inline}])
        refused(rf"{address}/b.png, can't be read as an image: .*404", pipe, "a", [{"image": f"{address}/b.png"}])
    finally:
        server.shutdown()
        server.server_close()
    assert len(seen) == 3 and all(np.array_equal(pixels, decode_image(data)) for pixels in seen)
    assert not any("urllib" in agent for agent in server.agents)
    json.dumps(pipe("a", pipe.embed(["a"])))
