"""DICOM files, against pydicom's own rendering."""

import io
import sys

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from gap_closed_clip.data import decode_image

from .conftest import pixels, three


def dicom(
    values: np.ndarray, photometric="MONOCHROME2", bits=12, syntax=ExplicitVRLittleEndian, **tags
) -> tuple[FileDataset, bytes]:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
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


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_dicom_without_window_uses_the_range_of_what_is_not_padding(ramp12, photometric, syntax):
    # As a scanner's circle in a square: what lies outside is far below all that was measured.
    inner = ramp12.astype(np.int16) - 1024
    padded = np.pad(inner, 20, constant_values=-2000)
    _, data = dicom(padded, photometric, 16, syntax, PixelPaddingValue=-2000, RescaleSlope=1, RescaleIntercept=-24)
    expected = np.pad(pixels(dicom(inner, bits=16)[1])[..., 0], 20)
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    np.testing.assert_array_equal(pixels(data), three(expected))


@pytest.mark.parametrize("ends", [(-2000, -1500), (-1500, -2000)])
def test_dicom_padding_may_be_a_range_of_values(ramp12, ends):
    inner = ramp12.astype(np.int16) - 1024
    padded = np.pad(inner, ((0, 0), (9, 11)), constant_values=((0, 0), (-2000, -1700)))
    _, data = dicom(padded, bits=16, PixelPaddingValue=ends[0], PixelPaddingRangeLimit=ends[1])
    expected = np.pad(pixels(dicom(inner, bits=16)[1])[..., 0], ((0, 0), (9, 11)))
    np.testing.assert_array_equal(pixels(data), three(expected))


def test_dicom_padding_with_an_unsigned_tag_is_known(ramp12):
    padded = np.pad(ramp12.astype(np.int16) - 1024, 20, constant_values=-2000)
    dataset, data = dicom(padded, bits=16, PixelPaddingValue=-2000)
    dataset["PixelPaddingValue"] = pydicom.DataElement("PixelPaddingValue", "US", 65536 - 2000)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    assert pydicom.dcmread(io.BytesIO(buffer.getvalue())).PixelPaddingValue == 63536
    np.testing.assert_array_equal(pixels(buffer.getvalue()), pixels(data))


def test_dicom_of_nothing_but_padding_is_black():
    _, data = dicom(np.full((8, 8), -2000, np.int16), bits=16, PixelPaddingValue=-2000)
    assert not pixels(data).any()


def test_dicom_voi_table(ramp12):
    table = pydicom.Dataset()
    table.LUTDescriptor = [4096, 0, 16]
    table.add_new("LUTData", "OW", (65535 - np.arange(4096) * 16).astype("<u2").tobytes())
    dataset, data = dicom(ramp12, VOILUTSequence=[table], WindowCenter=0, WindowWidth=10)
    np.testing.assert_allclose(pixels(data), three(pydicom_windowed(dataset, 0, 65535)), atol=1)


def test_dicom_8_bit_gray_is_kept(noise):
    np.testing.assert_array_equal(pixels(dicom(noise[:12, :16].copy(), bits=8)[1]), three(noise[:12, :16]))


@pytest.mark.parametrize(("bits", "top"), [(1, 1), (4, 15), (7, 127)])
def test_dicom_of_fewer_bits_spans_them(bits, top):
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) % (top + 1)
    _, data = dicom(values, bits=bits)
    np.testing.assert_allclose(pixels(data), three(values / top * 255), atol=1)


def test_dicom_8_bits_that_a_rescale_takes_elsewhere_use_their_range(noise):
    values = (noise[..., 0] if noise.ndim == 3 else noise).astype(np.uint8)
    _, data = dicom(values, bits=8, RescaleSlope=1, RescaleIntercept=-1000)
    low, high = int(values.min()), int(values.max())
    np.testing.assert_allclose(pixels(data), three((values - float(low)) / (high - low) * 255), atol=1)


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": None, "WindowWidth": None},
        {"WindowCenter": "", "WindowWidth": ""},
        {"WindowCenter": 40, "WindowWidth": None},
        {"VOILUTSequence": []},
        {"RescaleSlope": None, "RescaleIntercept": None},
        {"ModalityLUTSequence": []},
        {"VOILUTFunction": ""},
        {"PixelPaddingValue": None},
        {"PixelPaddingValue": 4000, "PixelPaddingRangeLimit": None},
    ],
)
def test_dicom_an_empty_tag_is_as_good_as_none(ramp12, tags):
    _, data = dicom(ramp12, **tags)
    _, without = dicom(ramp12)
    assert np.array_equal(pixels(data), pixels(without))


def test_dicom_multi_frame_gives_the_middle_one(noise):
    frames = np.stack([noise[:12, :16] // (i + 1) for i in range(5)])
    np.testing.assert_array_equal(pixels(dicom(frames, bits=8)[1]), three(frames[2]))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", [None, (40, 400)])
def test_an_enhanced_file_has_the_transform_and_window_of_its_frame(ramp12, shared, window):
    def item(**tags) -> pydicom.Dataset:
        made = pydicom.Dataset()
        for name, value in tags.items():
            setattr(made, name, value)
        return made

    own = {"RescaleSlope": 0.5, "RescaleIntercept": -1024}, {"WindowCenter": [300, 40], "WindowWidth": [1500, 400]}
    others = {"RescaleSlope": 3, "RescaleIntercept": 5}, {"WindowCenter": 9, "WindowWidth": 10}
    groups = [
        item(PixelValueTransformationSequence=[item(**transform)], FrameVOILUTSequence=[item(**voi)])
        for transform, voi in (others, own, others)
    ]
    tags = {"PerFrameFunctionalGroupsSequence": groups}
    if shared:
        tags = {"SharedFunctionalGroupsSequence": groups[1:2]}
    _, enhanced = dicom(np.stack([np.zeros_like(ramp12), ramp12, np.zeros_like(ramp12)]), **tags)
    dataset, single = dicom(ramp12, **own[0], **own[1])
    np.testing.assert_array_equal(pixels(enhanced, window=window), pixels(single, window=window))
    if window is None:
        expected = pydicom_windowed(dataset, -1024, 0.5 * 4095 - 1024)
        np.testing.assert_allclose(pixels(enhanced), three(expected), atol=1)


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
