"""Decoding, and the check of all images before training. Expected pixels are computed here by hand."""

import logging

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from gap_closed_clip.data import cache_images, check_images, decode_image

from .conftest import encode, pixels, three


def test_gray_in_every_wrapping(noise, tmp_path):
    data = encode(Image.fromarray(noise), "PNG")
    (tmp_path / "a.png").write_bytes(data)
    path = str(tmp_path / "a.png")
    for image in (data, path, tmp_path / "a.png", {"bytes": data, "path": None}, {"bytes": None, "path": path},
                  Image.fromarray(noise)):  # fmt: skip
        np.testing.assert_array_equal(pixels(image), three(noise))


def test_rgb_keeps_its_channels(noise):
    rgb = np.stack([noise, noise[::-1], 255 - noise], axis=-1)
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(rgb), "PNG")), rgb)


def test_one_bit(noise):
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(noise > 99), "PNG")), three(255 * (noise > 99)))


def test_rgba_is_composited_on_black(noise):
    rgba = np.stack([noise, noise[::-1], noise.T.ravel()[: noise.size].reshape(noise.shape), noise[:, ::-1]], axis=-1)
    expected = rgba[..., :3] * (rgba[..., 3:] / 255)
    np.testing.assert_allclose(pixels(encode(Image.fromarray(rgba), "PNG")), expected, atol=1)


def test_gray_with_alpha_is_composited_on_black(noise):
    la = Image.merge("LA", (Image.fromarray(noise), Image.fromarray(noise[::-1].copy())))
    expected = three(noise * (noise[::-1] / 255))
    np.testing.assert_allclose(pixels(encode(la, "PNG")), expected, atol=1)


def test_palette_with_transparency():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50, 255, 255, 255])
    expected = [[[10, 20, 30], [200, 100, 50], [255, 255, 255]]]
    np.testing.assert_array_equal(pixels(encode(image, "PNG")), expected)
    expected[0][2] = [0, 0, 0]  # entry 2 is transparent
    np.testing.assert_array_equal(pixels(encode(image, "PNG", transparency=2)), expected)


def test_cmyk():
    cmyk = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255], [100, 50, 0, 20]]], np.uint8)
    expected = (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255
    np.testing.assert_allclose(pixels(encode(Image.fromarray(cmyk, "CMYK"), "TIFF")), expected, atol=2)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF big-endian", "32-bit TIFF", "float TIFF"])
def test_high_bit_depths_fill_the_range(ramp12, kind):
    if kind == "TIFF big-endian":
        image = Image.frombytes("I;16B", ramp12.shape[::-1], ramp12.astype(">u2").tobytes())
    elif kind == "32-bit TIFF":
        image = Image.fromarray(ramp12.astype(np.int32))
    elif kind == "float TIFF":
        image = Image.fromarray(ramp12.astype(np.float32) - 1024)
    else:
        image = Image.fromarray(ramp12)
    decoded = pixels(encode(image, kind.split()[-1] if kind == "PNG" else "TIFF"))
    np.testing.assert_allclose(decoded, three(ramp12 / 4095 * 255), atol=1.5)  # 1.5: 0.1% cut off at each end


def test_full_16_bit_range(ramp12):
    values = (ramp12.astype(int) * 16).astype(np.uint16)
    np.testing.assert_allclose(pixels(encode(Image.fromarray(values), "PNG")), three(values / 65520 * 255), atol=1.5)


def test_one_hot_pixel_does_not_turn_16_bits_black(ramp12):
    ramp12[0, 0] = 65535
    assert abs(np.median(pixels(encode(Image.fromarray(ramp12), "PNG"))) - 127.5) < 2


def test_nearly_constant_and_constant_16_bit():
    values = np.full((100, 100), 7, np.uint16)
    assert set(np.unique(pixels(encode(Image.fromarray(values), "PNG")))) == {255}
    assert set(np.unique(pixels(encode(Image.fromarray(values * 0), "PNG")))) == {0}
    values[50, 50] = 9  # less than 0.1% of the pixels, yet all there is to see
    decoded = pixels(encode(Image.fromarray(values), "PNG"))
    assert decoded[50, 50, 0] == 255
    assert decoded.sum() == 3 * 255


def test_float_with_nan_and_infinities():
    values = np.linspace(-1, 1, 10_000, dtype=np.float32).reshape(100, 100)
    values[0, :3] = [np.nan, np.inf, -np.inf]
    decoded = pixels(encode(Image.fromarray(values), "TIFF"))
    assert decoded[0, :3, 0].tolist() == [0, 255, 0]
    np.testing.assert_allclose(decoded[1:], three((values[1:] + 1) / 2 * 255), atol=1.5)


def test_given_window_on_float():
    hounsfield = np.linspace(-1000, 1000, 500, dtype=np.float32).reshape(20, 25)
    decoded = pixels(encode(Image.fromarray(hounsfield), "TIFF"), window=(40, 400))
    expected = np.clip((hounsfield - 39.5) / 399 + 0.5, 0, 1) * 255  # DICOM PS3.3 C.11.2.1.2
    np.testing.assert_allclose(decoded, three(expected), atol=1)


def test_exif_orientation_is_applied(noise):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    expected = three(np.rot90(noise, -1))
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(noise), "PNG", exif=exif)), expected)


def test_min_size_reduces_jpeg_only_as_far_as_allowed():
    image = Image.fromarray(np.zeros((512, 640), np.uint8))
    jpeg, png = encode(image, "JPEG"), encode(image, "PNG")
    assert decode_image(jpeg).size == (640, 512)
    assert decode_image(jpeg, min_size=100).size == (160, 128)
    assert decode_image(jpeg, min_size=300).size == (640, 512)
    assert decode_image(png, min_size=100).size == (640, 512)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF"])
@pytest.mark.parametrize("min_size", [None, 1])
def test_truncated_image_is_named(kind, min_size):
    shape = (64, 64) if kind == "GIF" else (64, 64, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    decode_image(data, min_size)
    with pytest.raises(ValueError, match=r"image 'scan 7' cannot be read .* data\.on_bad_image=skip"):
        decode_image({"bytes": data[: len(data) // 2], "path": None}, min_size, name="scan 7")


@pytest.mark.parametrize("data", [b"", b"<html>404 not found</html>"])
def test_no_image_at_all(data, tmp_path):
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.jpg' cannot be read"):
        decode_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("nothing", [None, 3, float("nan")])
def test_what_is_no_image_is_told(nothing):
    with pytest.raises(ValueError, match="The image 'scan 7' is .*: give a path, .* leave out rows that have none"):
        decode_image(nothing, name="scan 7")


def test_missing_file_and_empty_struct(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg' does not exist"):
        decode_image({"bytes": None, "path": str(tmp_path / "gone.jpg")})
    with pytest.raises(ValueError, match="'scan 7' has neither bytes nor a path"):
        decode_image({"bytes": None, "path": None}, name="scan 7")


# Check and cache


@pytest.fixture
def pairs(tmp_path):
    """Four images, the second truncated, the fourth no image."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)
    good = encode(Image.fromarray(noise), "JPEG")
    rows = []
    for index, data in enumerate((good, good[: len(good) // 2], good, b"text")):
        path = tmp_path / f"{index}.jpg"
        path.write_bytes(data)
        rows.append({"image": {"bytes": None, "path": str(path)}, "caption": "x", "image_id": str(index)})
    image = ImageFeature(decode=False)
    return Dataset.from_list(rows, Features(image=image, caption=Value("string"), image_id=Value("string")))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_check_names_the_bad_images(pairs, num_workers):
    with pytest.raises(ValueError, match=r"2 of 4 images cannot be read(.|\n)*1\.jpg(.|\n)*3\.jpg(.|\n)*skip"):
        check_images(pairs, num_workers=num_workers)


def test_check_skips_and_counts(pairs, caplog):
    with caplog.at_level(logging.WARNING):
        kept = check_images(pairs, on_bad_image="skip")
    assert kept["image_id"] == ["0", "2"]
    assert "Skipped 2 of 4 pairs" in caplog.text and "1.jpg" in caplog.text
    with pytest.raises(ValueError, match="2 of 2 images cannot be read"):
        check_images(pairs.select([1, 3]), on_bad_image="skip")


def test_cache_holds_reduced_pixels(pairs):
    cached = cache_images(pairs, 20, on_bad_image="skip")
    assert cached["image_id"] == ["0", "2"] and cached["caption"] == ["x", "x"]
    row = cached[0]["image"]
    assert row["path"] is None
    expected = decode_image(pairs[0]["image"], min_size=20).resize((30, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels(row), np.asarray(expected))
    unreduced = cache_images(pairs.select([0]), 100)
    np.testing.assert_array_equal(pixels(unreduced[0]["image"]), pixels(pairs[0]["image"]))
