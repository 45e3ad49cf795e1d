"""Images of every kind that people have, against values worked out by hand and against what training sees."""

import base64
import io
import sys

import numpy as np
import pydicom
import pytest
import torch
from conftest import dicom_file
from PIL import Image
from transformers.dynamic_module_utils import get_imports

from gap_closed_clip.data import decode_image
from gap_closed_clip.model import dicom_gap_closed_clip
from gap_closed_clip.model.load_images_gap_closed_clip import load_image


# Four rows: 1000, 2000, 3000 and 4000, which are 0, 85, 170 and 255 over the image's own range.
DEEP = np.repeat(np.array([1000, 2000, 3000, 4000], np.uint16), 60).reshape(4, 60)
SHOWN = np.repeat(np.array([0, 85, 170, 255], np.uint8), 60).reshape(4, 60)
COLOUR = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def shown(image, **options) -> np.ndarray:
    loaded = load_image(image, **options)
    assert isinstance(loaded, Image.Image) and loaded.mode == "RGB"
    return np.asarray(loaded)


def test_files_in_every_form(tmp_path):
    for name, data in (("a.png", file_of(Image.fromarray(DEEP))), ("a.dcm", dicom_file(DEEP))):
        path = tmp_path / name
        path.write_bytes(data)
        forms = [path, str(path), data, bytearray(data), {"bytes": data, "path": None}, {"path": str(path)}]
        forms += [base64.b64encode(data).decode(), f"data:image/png;base64,{base64.b64encode(data).decode()}"]
        for form in forms if name == "a.png" else forms[:-2]:
            np.testing.assert_array_equal(shown(form), np.stack([SHOWN] * 3, -1))
        for form in forms[:-2]:  # as training sees them
            np.testing.assert_array_equal(np.asarray(decode_image(form)), np.stack([SHOWN] * 3, -1))


@pytest.mark.parametrize("shape", [(4, 60), (1, 4, 60), (4, 60, 1)])
@pytest.mark.parametrize(
    "convert",
    [
        lambda values: values,
        lambda values: values.astype(np.int64) - 5000,
        lambda values: values / 1e5,
        lambda values: torch.tensor(values / 7),
        lambda values: torch.tensor(values.astype(np.float32)).bfloat16(),
        lambda values: values.astype(">u2"),
    ],
    ids=["uint16", "negative", "float", "tensor", "bfloat16", "big-endian"],
)
def test_deep_gray_arrays_are_scaled_to_their_own_range(shape, convert):
    np.testing.assert_allclose(shown(convert(DEEP.reshape(shape))).astype(int), np.stack([SHOWN] * 3, -1), atol=1)


def test_an_array_is_as_the_file_of_its_values():
    noise = np.random.default_rng(1).integers(0, 4096, (30, 40)).astype(np.uint16)
    np.testing.assert_array_equal(shown(noise), shown(file_of(Image.fromarray(noise))))
    np.testing.assert_array_equal(
        shown(noise, window=(2000, 900)), np.asarray(decode_image(noise, window=(2000, 900)))
    )
    with_window = np.asarray(decode_image(file_of(Image.fromarray(noise)), window=(2000, 900)))
    np.testing.assert_array_equal(shown(noise, window=(2000, 900)), with_window)
    assert (with_window != shown(noise)).any()


def test_gray_of_8_bits_is_kept_and_booleans_are_black_and_white():
    gray = COLOUR[..., 0] // 2 + 20
    np.testing.assert_array_equal(shown(gray), np.stack([gray] * 3, -1))
    np.testing.assert_array_equal(shown(torch.tensor(gray)[None]), np.stack([gray] * 3, -1))
    np.testing.assert_array_equal(shown(gray > 60), np.stack([(gray > 60) * 255] * 3, -1))


@pytest.mark.parametrize(
    "colour",
    [
        COLOUR,
        COLOUR.transpose(2, 0, 1),
        torch.tensor(COLOUR).permute(2, 0, 1),
        COLOUR.astype(np.int64),
        COLOUR.astype(np.float32),
        COLOUR / 255,
        COLOUR.astype(np.uint16) * 256 + 200,
        np.concatenate([COLOUR, np.full((5, 7, 1), 255, np.uint8)], -1),
        np.concatenate([COLOUR, np.full((5, 7, 1), 255, np.uint8)], -1).transpose(2, 0, 1),
    ],
    ids=["last", "first", "tensor", "int64", "float", "0 to 1", "16 bits", "opaque", "opaque first"],
)
def test_colour_arrays(colour):
    np.testing.assert_array_equal(shown(colour), COLOUR)


def test_what_is_transparent_is_black():
    assert not shown(np.concatenate([COLOUR, np.zeros((5, 7, 1), np.uint8)], -1)).any()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 8, 9)), r"^images\[3\] .*its shape is \(2, 8, 9\); an image is \(H, W\), or has its 1, 3 or 4"),
        (np.zeros((2, 3, 8, 9)), r"its shape is \(2, 3, 8, 9\).*as a list"),
        (np.zeros(9), r"its shape is \(9,\)"),
        (np.zeros((0, 9)), r"its shape is \(0, 9\)"),
        (COLOUR.astype(np.float32) - 300, r"colour values go from -[23].* to -.*; give 0 to 255, or floats from 0"),
        (COLOUR.astype(np.int32) * 9, "its colour values go from 0 to "),
        (COLOUR * np.nan, "its colour values go from nan"),
        (3, r"images\[3\] is 3: give a path, a URL, the bytes of a file"),
        (None, "is None: give a path"),
        ({"image": "a.png"}, "is {'image': 'a.png'}: give a path"),
        (b"no image", r"images\[3\] can't be read as an image: it is neither DICOM nor of a format that is read here"),
        (dicom_file(DEEP)[:600], r"images\[3\] can't be read as an image: "),
    ],
)
def test_what_is_no_image(image, message):
    with pytest.raises(ValueError, match=message):
        load_image(image, name="images[3]")


@pytest.mark.parametrize("name", ["nowhere.png", "AAAA", "A" * 10_000, ""])
def test_files_that_are_not_there(name):
    with pytest.raises(FileNotFoundError, match=f"There is no file {name[:200]}"):
        load_image(name)


def test_dicom_without_pydicom(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r"pip install 'gap-closed-clip\[dicom\]'.*pip install 'pydicom>=3'"):
        load_image(dicom_file(DEEP))


def test_a_model_folder_loads_without_pydicom():
    """transformers refuses a repository whose code imports, outside a try, what is not installed."""
    assert set(get_imports(dicom_gap_closed_clip.__file__)) == {"collections", "io", "numpy"}


def test_dicom_is_what_pydicom_shows():
    values = np.random.default_rng(2).integers(0, 4096, (20, 30)).astype(np.uint16)
    dataset = pydicom.dcmread(io.BytesIO(dicom_file(values)))
    expected = pydicom.pixels.apply_voi_lut(dataset.pixel_array, dataset) / 4095 * 255
    np.testing.assert_allclose(shown(dicom_file(values))[..., 1], expected, atol=1)
