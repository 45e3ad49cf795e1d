"""Search and zero-shot classification against the plain formulas; every wrong input says what to change."""

import json

import numpy as np
import pytest
import torch
from conftest import (
    CAPTIONS,
    jpeg_of_scans,  # noqa: I001
)
from PIL import ExifTags, Image

from gap_closed_clip import GapClosedClipModel, GapClosedClipProcessor
from gap_closed_clip.model.images_gap_closed_clip import FORMATS, MAX_ASPECT, MAX_SCANS
from gap_closed_clip.model.load_images_gap_closed_clip import load_image

from .conftest import PAIRS, SPACE, write_gallery


search = pytest.importorskip("search", reason=f"{SPACE} is missing")


@pytest.fixture(scope="session")
def expected(model_folder, engines) -> dict[str, np.ndarray]:
    """Embeddings of the gallery in float64 by the model itself, without the pipeline."""
    model = GapClosedClipModel.from_pretrained(model_folder).eval()
    processor = GapClosedClipProcessor.from_pretrained(model_folder)
    images = [Image.open(file).convert("RGB") for file in engines[0].gallery.images]
    with torch.no_grad():
        outputs = model(**processor(images=images, text=CAPTIONS[:5], return_tensors="pt", padding=True))
    return {"image": outputs.image_embeds.double().numpy(), "text": outputs.text_embeds.double().numpy()}


def test_gallery_holds_each_image_and_caption_once(gallery_folder):
    gallery = search.Gallery.load(gallery_folder)
    assert len(gallery.images) == 6 and gallery.captions == CAPTIONS[:5]
    assert gallery.pairs.tolist() == [list(pair) for pair in PAIRS]
    assert gallery.drawn and gallery.caption_of(4) == CAPTIONS[1]
    assert gallery.find(f" {CAPTIONS[3].upper()}") == 3 and gallery.find("another") is None
    assert gallery.find(search.open_image(gallery.images[5])) == 5
    assert all(uri.startswith("data:image/png;base64,") for uri in gallery.thumbnails)
    assert gallery.spread(3) == [0, 2, 5] and gallery.spread(99) == list(range(6))


@pytest.mark.parametrize("kinds", [("image",), ("text",), ("image", "text")])
def test_ranking_is_the_order_of_the_cosines(engines, expected, kinds):
    engine = engines[0]
    query = "Sagittal MR image."
    (vector,) = engine.embed([query])
    cosines = {
        (kind, row): float(expected[kind][row] @ vector) for kind in kinds for row in range(len(expected[kind]))
    }
    hits = engine.search(query, kinds)
    assert [hit[:2] for hit in hits] == sorted(cosines, key=cosines.get, reverse=True)
    assert [hit.score for hit in hits] == pytest.approx([cosines[hit[:2]] for hit in hits], abs=1e-5)


def test_the_query_itself_is_left_out(engines):
    engine = engines[0]
    assert ("text", 2) not in [hit[:2] for hit in engine.search(CAPTIONS[2].upper())]
    hits = engine.search(search.open_image(engine.gallery.images[1]))
    assert ("image", 1) not in [hit[:2] for hit in hits] and len(hits) == 10


def test_mixing_is_the_mean_share_of_the_other_kind(engines, expected):
    embeds, kinds = np.concatenate([expected["image"], expected["text"]]), [0] * 6 + [1] * 5
    shares = []
    for row, vector in enumerate(embeds):
        order = [other for other in np.argsort(-(embeds @ vector), kind="stable") if other != row][:3]
        shares.append(np.mean([kinds[other] != kinds[row] for other in order]))
    assert engines[0].mixing(3) == pytest.approx(np.mean(shares))


def test_classification_is_the_softmax_of_the_models_logits(engines, model_folder):
    labels, image = ["chest CT", "brain MR", "mammogram"], search.open_image(engines[0].gallery.images[0])
    model = GapClosedClipModel.from_pretrained(model_folder).eval()
    texts = [f"An image of {label}." for label in labels]
    processor = GapClosedClipProcessor.from_pretrained(model_folder)
    with torch.no_grad():
        logits = model(**processor(images=[image], text=texts, return_tensors="pt", padding=True)).logits_per_image
    scores = engines[0].classify(image, labels, "An image of {}.")
    assert list(scores) == labels
    assert list(scores.values()) == pytest.approx(logits[0].softmax(-1).tolist(), abs=1e-5)
    assert engines[0].template == model.config.hypothesis_template


def test_labels():
    assert search.parse_labels("chest CT, brain  MR\n\n Chest ct ,mammogram,") == ["chest CT", "brain MR", "mammogram"]
    assert search.check_template(" Image: {}. ") == "Image: {}."
    assert search.check_query("  nodule ") == "nodule"


@pytest.mark.parametrize(
    ("check", "text", "message"),
    [
        ("parse_labels", "chest CT", "at least two"),
        ("parse_labels", "CT, ct", "at least two"),
        ("parse_labels", None, "at least two"),
        ("parse_labels", ",".join(map(str, range(99))), "These are 99 labels"),
        ("parse_labels", "a," + 1001 * "b", "shorter"),
        ("check_template", "Radiology image.", "with {} in it once"),
        ("check_template", "{} or {}", "with {} in it once"),
        ("check_query", " \n", "Type what to search for"),
        ("check_query", 1001 * "a", "1001 characters"),
    ],
)
def test_wrong_words(check, text, message):
    with pytest.raises(search.InputError, match=message):
        getattr(search, check)(text)


def test_images_of_any_depth(tmp_path):
    values = np.linspace(1000, 3000, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    deep = np.asarray(search.open_image(tmp_path / "deep.png"))
    assert deep.shape == (8, 8, 3) and deep.min() == 0 and deep.max() == 255
    Image.new("RGBA", (8, 8), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    assert np.asarray(search.open_image(tmp_path / "clear.png")).max() == 0


def test_images_are_seen_as_in_training(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (30, 40)).astype(np.uint16)
    holes = np.where(values < 100, np.nan, values).astype(np.float32)
    infinite = np.where(values < 100, -np.inf, values).astype(np.float32)
    one = np.full_like(values, 700)
    one[3, 4] = 900
    images = {"deep": values, "holes": holes, "infinite": infinite, "one": one, "flat": np.full_like(values, 700)}
    images |= {"signed": values.astype(np.int32) - 2048}
    for name, pixels in images.items():
        # 0 is white, 0 is black; of the former Pillow reads no signed ones.
        for photometric in (0, 1)[name == "signed" :]:
            path = tmp_path / f"{name}{photometric}.tif"
            Image.fromarray(pixels).save(path, tiffinfo={ExifTags.Base.PhotometricInterpretation: photometric})
            assert np.array_equal(search.open_image(path), load_image(path)), path.name
    path = tmp_path / "on its side.tif"
    Image.fromarray(values).save(path, tiffinfo={ExifTags.Base.Orientation: 6})
    assert search.open_image(path).size == (30, 40) and np.array_equal(search.open_image(path), load_image(path))


def test_images_that_cannot_be_opened(tmp_path, monkeypatch):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    with pytest.raises(search.InputError, match="cannot be read as an image"):
        search.open_image(tmp_path / "broken.png")
    with pytest.raises(search.InputError, match="no longer kept"):
        search.open_image(tmp_path / "gone.png")
    with pytest.raises(search.InputError, match="Upload an image"):
        search.open_image(None)
    Image.new("RGB", (8, 8)).save(tmp_path / "drawing.png", format="EPS")
    with pytest.raises(search.InputError, match="cannot be read as an image"):
        search.open_image(tmp_path / "drawing.png")
    Image.new("L", (51, 1)).save(tmp_path / "long.png")
    with pytest.raises(search.InputError, match=r"too long \(51 x 1\)"):
        search.open_image(tmp_path / "long.png")
    Image.new("L", (50, 1)).save(tmp_path / "long.png")
    assert search.open_image(tmp_path / "long.png").size == (50, 1)
    (tmp_path / "scans.jpg").write_bytes(jpeg_of_scans(51))
    with pytest.raises(search.InputError, match="too many scans"):
        search.open_image(tmp_path / "scans.jpg")
    (tmp_path / "scans.jpg").write_bytes(jpeg_of_scans(50))
    assert search.open_image(tmp_path / "scans.jpg").size == (40, 36)
    assert search.FORMATS == tuple(name for name in FORMATS if name != "JPEG2000")
    assert (search.MAX_ASPECT, search.MAX_SCANS) == (MAX_ASPECT, MAX_SCANS)
    monkeypatch.setattr(search, "MAX_PIXELS", 10)
    Image.new("L", (8, 8)).save(tmp_path / "large.png")
    with pytest.raises(search.InputError, match="too large"):
        search.open_image(tmp_path / "large.png")


def test_setup_errors_say_what_to_do(gallery_folder, tmp_path):
    gallery = search.Gallery.load(gallery_folder)
    with pytest.raises(search.SetupError, match="Set the variable MODEL_ID"):
        search.load_engines({"CLIP_MODEL_ID": "x"}, gallery)
    with pytest.raises(
        search.SetupError, match="'no-such/model' at revision 'v1' that MODEL_ID names cannot be loaded"
    ):
        search.load_engines({"MODEL_ID": "no-such/model", "MODEL_REVISION": "v1"}, gallery)
    with pytest.raises(search.SetupError, match="python space/build_gallery.py"):
        search.Gallery.load(tmp_path / "nowhere")
    (gallery_folder / "3.png").unlink()
    with pytest.raises(search.SetupError, match="3.png is missing"):
        search.Gallery.load(gallery_folder)
    (gallery_folder / "captions.jsonl").write_text("{}\n")
    with pytest.raises(search.SetupError, match="build it again"):
        search.Gallery.load(gallery_folder)


def test_a_gallery_reads_nothing_outside_its_folder(tmp_path):
    folder = write_gallery(tmp_path / "gallery")
    rows = [{"image": f"../../{number}.png", "caption": CAPTIONS[number]} for number in range(2)]
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert [file.parent for file in search.Gallery.load(folder).images] == [folder, folder]
