"""DICOM to 8 bits. pydicom is optional (the extra `dicom`) and imported when the first DICOM file is met."""

import io

import numpy as np

from ..model.images_gap_closed_clip import scale_to_8_bit


def is_dicom(data: bytes, name: str) -> bool:
    """Whether these bytes are a DICOM file: by its mark behind the preamble, or by the name (old files lack it)."""
    return data[128:132] == b"DICM" or name.lower().endswith((".dcm", ".dicom"))


def decode_dicom(data: bytes, window: tuple[float, float] | None = None) -> np.ndarray:
    """Render one DICOM image as a viewer shows it.

    Stored values -> modality transform (slope and intercept, or its table) -> window -> 0..255, and MONOCHROME1
    (where high means dark) inverted. Of a multi-frame file the middle frame, of a file with several windows the first.

    Args:
        data: the file.
        window: (centre, width) in units after the modality transform, Hounsfield for CT. Default: the file's own
            table or window; without one the image's own range, or the values themselves where 8 bits are stored.

    Returns:
        uint8, (H, W) or (H, W, 3).

    Raises:
        ImportError: pydicom is not installed.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
    except ImportError as error:
        raise ImportError(
            "Reading DICOM images needs pydicom 3 or later: pip install 'gap-closed-clip[dicom]'"
        ) from error
    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    middle = int(dataset.get("NumberOfFrames") or 1) // 2
    pixels = pixel_array(dataset, index=middle)  # YBR becomes RGB here
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        return pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 3:
        return (pixels >> max(0, dataset.BitsStored - 8)).astype(np.uint8)
    values = apply_modality_lut(pixels, dataset).astype(np.float64)
    gray = _apply_voi(values, dataset, window)
    return 255 - gray if dataset.PhotometricInterpretation == "MONOCHROME1" else gray


def _apply_voi(values: np.ndarray, dataset, window: tuple[float, float] | None) -> np.ndarray:
    """(H, W) modality values -> uint8 through the given window, the file's table or window, or the range."""
    if window is not None:
        return apply_window(values, *window)
    if "VOILUTSequence" in dataset:
        from pydicom.pixels import apply_voi

        bits = dataset.VOILUTSequence[0].LUTDescriptor[2]
        table_output = apply_voi(values.astype(np.int64), dataset)
        return np.clip(table_output * (255 / (2**bits - 1)) + 0.5, 0, 255).astype(np.uint8)
    if "WindowCenter" in dataset and "WindowWidth" in dataset:
        center, width = (np.atleast_1d(dataset[key].value)[0] for key in ("WindowCenter", "WindowWidth"))
        return apply_window(values, float(center), float(width), dataset.get("VOILUTFunction") or "LINEAR")
    if dataset.BitsStored <= 8:
        return np.clip(values, 0, 255).astype(np.uint8)
    return scale_to_8_bit(values)


def apply_window(values: np.ndarray, center: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """Values -> uint8 through a window; DICOM PS3.3 C.11.2.1.2 (linear) and C.11.2.1.3 (linear exact, sigmoid)."""
    if function == "SIGMOID":
        share = 1 / (1 + np.exp(-4 * (values - center) / width))
    elif function == "LINEAR_EXACT":
        share = (values - center) / width + 0.5
    elif width <= 1:  # the linear form divides by width - 1: a threshold
        share = (values > center - 0.5).astype(np.float64)
    else:
        share = (values - (center - 0.5)) / (width - 1) + 0.5
    return (np.clip(share, 0, 1) * 255 + 0.5).astype(np.uint8)
