"""Decoding, augmentation, the check before training. Expected pixels are computed here by hand or by pydicom."""

import io
import logging
import pickle
import sys

import numpy as np
import pydicom
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from torchvision.transforms.v2 import functional as tv

from gap_closed_clip.data import Augmentation, cache_images, check_images, decode_image


def encode(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data, **options) -> np.ndarray:
    picture = decode_image(data, **options)
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def three(gray: np.ndarray) -> np.ndarray:
    return np.stack([gray] * 3, axis=-1)


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (13, 17), dtype=np.uint8)


@pytest.fixture
def ramp12() -> np.ndarray:
    """12-bit values 0..4095 as they lie in 16-bit files."""
    return np.linspace(0, 4095, 64 * 80).round().astype(np.uint16).reshape(64, 80)


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
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette([10, 20, 30, 200, 100, 50, 255, 255, 255])
    expected = [[[10, 20, 30], [200, 100, 50], [255, 255, 255]]]
    np.testing.assert_array_equal(pixels(encode(picture, "PNG")), expected)
    expected[0][2] = [0, 0, 0]  # entry 2 is transparent
    np.testing.assert_array_equal(pixels(encode(picture, "PNG", transparency=2)), expected)


def test_cmyk():
    cmyk = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255], [100, 50, 0, 20]]], np.uint8)
    expected = (255.0 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255
    np.testing.assert_allclose(pixels(encode(Image.fromarray(cmyk, "CMYK"), "TIFF")), expected, atol=2)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF big-endian", "32-bit TIFF", "float TIFF"])
def test_high_bit_depths_fill_the_range(ramp12, kind):
    if kind == "TIFF big-endian":
        picture = Image.frombytes("I;16B", ramp12.shape[::-1], ramp12.astype(">u2").tobytes())
    elif kind == "32-bit TIFF":
        picture = Image.fromarray(ramp12.astype(np.int32))
    elif kind == "float TIFF":
        picture = Image.fromarray(ramp12.astype(np.float32) - 1024)
    else:
        picture = Image.fromarray(ramp12)
    decoded = pixels(encode(picture, kind.split()[-1] if kind == "PNG" else "TIFF"))
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
    picture = Image.fromarray(np.zeros((512, 640), np.uint8))
    jpeg, png = encode(picture, "JPEG"), encode(picture, "PNG")
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


def test_missing_file_and_empty_struct(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg' does not exist"):
        decode_image({"bytes": None, "path": str(tmp_path / "gone.jpg")})
    with pytest.raises(ValueError, match="'scan 7' has neither bytes nor a path"):
        decode_image({"bytes": None, "path": None}, name="scan 7")


# DICOM


def dicom(values: np.ndarray, photometric="MONOCHROME2", bits=12, preamble=True, **tags) -> tuple[FileDataset, bytes]:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    color = photometric in ("RGB", "YBR_FULL")
    frames = 1 if values.ndim == 2 or color else len(values)
    dataset.Rows, dataset.Columns = values.shape[:2] if frames == 1 else values.shape[1:]
    dataset.SamplesPerPixel = 3 if color else 1
    if color:
        dataset.PlanarConfiguration = 0
    if frames > 1:
        dataset.NumberOfFrames = frames
    dataset.PhotometricInterpretation = photometric
    dataset.BitsAllocated = values.dtype.itemsize * 8
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    dataset.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    return pydicom.dcmread(io.BytesIO(data)), data


def pydicom_windowed(dataset, low: float, high: float) -> np.ndarray:
    """pydicom's own rendering; its output spans low..high."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    shown = apply_voi_lut(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    return (shown - low) / (high - low) * 255


@pytest.mark.parametrize("width", [1500, 12])
@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_dicom_rescale_and_window(ramp12, function, width):
    tags = {"RescaleSlope": 0.5, "RescaleIntercept": -1024, "WindowCenter": [300, 40], "WindowWidth": [width, 400]}
    tags |= {"VOILUTFunction": function} if function else {}
    dataset, data = dicom(ramp12, **tags)
    expected = pydicom_windowed(dataset, -1024, 0.5 * 4095 - 1024)
    np.testing.assert_allclose(pixels(data), three(expected), atol=1)


def test_dicom_given_window_replaces_the_files(ramp12):
    _, data = dicom(ramp12, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=0, WindowWidth=10)
    dataset, _ = dicom(ramp12, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=500, WindowWidth=2000)
    np.testing.assert_allclose(pixels(data, window=(500, 2000)), three(pydicom_windowed(dataset, -1024, 3071)), atol=1)


def test_dicom_signed_values(ramp12):
    dataset, data = dicom(ramp12.astype(np.int16) - 2048, WindowCenter=0, WindowWidth=3000)
    np.testing.assert_allclose(pixels(data), three(pydicom_windowed(dataset, -2048, 2047)), atol=1)


def test_dicom_monochrome1_is_inverted(ramp12):
    tags = {"WindowCenter": 2048, "WindowWidth": 4096}
    bright = pixels(dicom(ramp12, **tags)[1])
    np.testing.assert_array_equal(pixels(dicom(ramp12, "MONOCHROME1", **tags)[1]), 255 - bright)


def test_dicom_without_window_uses_its_range(ramp12):
    np.testing.assert_allclose(pixels(dicom(ramp12 // 4)[1]), three(ramp12 / 4095 * 255), atol=2)


def test_dicom_voi_table(ramp12):
    table = pydicom.Dataset()
    table.LUTDescriptor = [4096, 0, 16]
    table.add_new("LUTData", "OW", (65535 - np.arange(4096) * 16).astype("<u2").tobytes())
    dataset, data = dicom(ramp12, VOILUTSequence=[table], WindowCenter=0, WindowWidth=10)
    np.testing.assert_allclose(pixels(data), three(pydicom_windowed(dataset, 0, 65535)), atol=1)


def test_dicom_8_bit_gray_is_kept(noise):
    np.testing.assert_array_equal(pixels(dicom(noise[:12, :16].copy(), bits=8)[1]), three(noise[:12, :16]))


def test_dicom_multi_frame_gives_the_middle_one(noise):
    frames = np.stack([noise[:12, :16] // (i + 1) for i in range(5)])
    np.testing.assert_array_equal(pixels(dicom(frames, bits=8)[1]), three(frames[2]))


def test_dicom_color(noise):
    rgb = np.stack([noise, noise[::-1], 255 - noise], axis=-1)[:12, :16].copy()
    np.testing.assert_array_equal(pixels(dicom(rgb, "RGB", bits=8)[1]), rgb)
    ycbcr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    np.testing.assert_allclose(pixels(dicom(ycbcr.copy(), "YBR_FULL", bits=8)[1]), rgb, atol=3)


def test_dicom_without_preamble_is_known_by_its_name(noise, tmp_path):
    data = dicom(noise[:12, :16].copy(), bits=8)[1]
    (tmp_path / "a.dcm").write_bytes(data[132:])
    np.testing.assert_array_equal(pixels(tmp_path / "a.dcm"), three(noise[:12, :16]))


def test_truncated_dicom_is_named(ramp12):
    data = dicom(ramp12)[1]
    with pytest.raises(ValueError, match="image 'scan 7' cannot be read"):
        decode_image(data[: len(data) // 2], name="scan 7")


def test_dicom_without_pydicom_names_the_extra(ramp12, monkeypatch):
    data = dicom(ramp12)[1]
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r"pip install 'gap-closed-clip\[dicom\]'"):
        decode_image(data)


# Augmentation


@pytest.fixture
def picture() -> Image.Image:
    """Dark on the left, bright on the right."""
    gray = np.tile(np.linspace(60, 180, 120).round().astype(np.uint8), (90, 1))
    return Image.fromarray(three(gray))


def test_crops_keep_their_share_and_shape(picture):
    torch.manual_seed(0)
    sizes = np.array([Augmentation(brightness=0, contrast=0)(picture).size for _ in range(500)], float)
    shares = sizes.prod(axis=1) / (120 * 90)
    assert 0.68 < shares.min() < 0.72 and 0.98 < shares.max() <= 1
    shapes = sizes[:, 0] / sizes[:, 1] / (120 / 90)
    assert 1 / 1.13 < shapes.min() < 0.95 and 1.05 < shapes.max() < 1.13  # 1.1, and whole pixels


def test_crops_are_pieces_of_the_picture():
    numbered = np.arange(90 * 120).reshape(90, 120)
    rgb = np.stack([numbered // 256, numbered % 256, numbered * 0], axis=-1).astype(np.uint8)
    corners = set()
    for seed in range(50):
        torch.manual_seed(seed)
        crop = np.asarray(Augmentation(brightness=0, contrast=0)(Image.fromarray(rgb))).astype(int)
        value = crop[..., 0] * 256 + crop[..., 1]
        top, left = divmod(int(value[0, 0]), 120)
        np.testing.assert_array_equal(value, numbered[top : top + len(value), left : left + value.shape[1]])
        corners.add((top, left))
    assert len(corners) > 30


def test_nothing_to_vary_changes_nothing(picture):
    same = Augmentation(crop_scale=(1, 1), brightness=0, contrast=0)(picture)
    np.testing.assert_array_equal(np.asarray(same), np.asarray(picture))


def test_brightness_and_contrast_as_torchvision(picture):
    torch.manual_seed(3)
    draws = torch.rand(7)
    torch.manual_seed(3)
    varied = Augmentation(crop_scale=(1, 1), brightness=0.4, contrast=0.6)(picture)
    expected = tv.adjust_brightness(picture, 1 + 0.4 * (2 * draws[4].item() - 1))
    expected = tv.adjust_contrast(expected, 1 + 0.6 * (2 * draws[5].item() - 1))
    np.testing.assert_allclose(np.asarray(varied, int), np.asarray(expected, int), atol=2)
    assert np.abs(np.asarray(varied, int) - np.asarray(picture, int)).max() > 20


def test_no_mirroring_by_default(picture):
    def mirrored(augmentation):
        return sum(np.diff(np.asarray(augmentation(picture))[0, [0, -1], 0].astype(int))[0] < 0 for _ in range(200))

    torch.manual_seed(0)
    assert mirrored(Augmentation()) == 0
    assert 70 < mirrored(Augmentation(horizontal_flip=True)) < 130


def test_augmentation_repeats_with_torchs_seed_and_pickles(picture):
    augmentation = pickle.loads(pickle.dumps(Augmentation()))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(np.asarray(augmentation(picture)))
    np.testing.assert_array_equal(results[0], results[1])
    assert results[0].shape != results[2].shape or (results[0] != results[2]).any()


def test_shorter_side_leaves_enough_for_every_crop():
    augmentation = Augmentation(brightness=0, contrast=0)
    side = augmentation.shorter_side(96)
    assert side < 96 * 1.3
    torch.manual_seed(0)
    square = Image.new("RGB", (side, side))
    assert min(min(augmentation(square).size) for _ in range(500)) >= 96


@pytest.mark.parametrize(
    "field, value", [("crop_scale", (0, 1)), ("crop_scale", (0.9, 0.8)), ("crop_scale", (0.5, 1.2)),
                     ("brightness", -0.1), ("contrast", 1.0), ("aspect_jitter", 0.9)]
)  # fmt: skip
def test_augmentation_out_of_range(field, value):
    with pytest.raises(ValueError, match=field):
        Augmentation(**{field: value})


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
