"""Renders DICOM files in 8 bits. pydicom is optional (the extra `dicom`) and imported with the first DICOM file."""

import io
from collections.abc import Callable

import numpy as np

from .images_gap_closed_clip import by_value, check_size, scale_to_8_bit


# What a file may lack. Some anonymisers leave such a tag without a value.
OPTIONAL_TAGS = (
    *("PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
)
# Where enhanced files, which have many frames, keep them: in an item for each frame, or in one for all.
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
TRANSFORMS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")


def is_dicom(data: bytes, name: str) -> bool:
    """Whether a file is DICOM: it says "DICM" behind the preamble, or, as old files lack that, its name ends so.

    Args:
        data: the file's bytes.
        name: its path or name.
    """
    return data[128:132] == b"DICM" or name.lower().endswith((".dcm", ".dicom"))


def decode_dicom(data: bytes, window: tuple[float, float] | None = None) -> np.ndarray:
    """Render one DICOM image as a viewer shows it.

    The stored values go through the modality transform (slope and intercept, or a table), then through the intensity
    window to 0..255; MONOCHROME1, in which high values are dark, is inverted. A file with several frames gives its
    middle one, by its own transform and window; of several windows the first is taken.

    Args:
        data: the file's bytes.
        window: centre and width in the units after the modality transform, Hounsfield for CT. Default: the file's own
            table or window; without one the range of the stored bits, if they are 8 or fewer and the modality
            transform leaves the values in it, else that of the image without its padding. A tag without a value counts
            as none.

    Returns:
        (H, W) gray or (H, W, 3) RGB, uint8.

    Raises:
        ImportError: pydicom is not installed.
    """
    # In a try, because transformers would refuse to load a model whose code imports what is not installed.
    try:
        import pydicom
        from pydicom import pixels as transforms
    except ImportError as error:
        raise ImportError(
            "Reading DICOM images needs pydicom 3 or later: pip install 'gap-closed-clip[dicom]', or, where only the "
            "model folder is there, pip install 'pydicom>=3'."
        ) from error
    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    middle = int(dataset.get("NumberOfFrames") or 1) // 2
    _take_from_groups(dataset, middle)
    for tag in OPTIONAL_TAGS:
        if tag in dataset and (dataset[tag].is_empty or dataset[tag].value == []):  # the latter of a sequence
            del dataset[tag]
    check_size(int(dataset.get("Columns") or 1), int(dataset.get("Rows") or 1))
    pixels = transforms.pixel_array(dataset, index=middle)  # YBR becomes RGB here
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = transforms.apply_color_lut(pixels, dataset)
        return pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 3:
        return (pixels >> max(0, dataset.BitsStored - 8)).astype(np.uint8)
    values = transforms.apply_modality_lut(pixels, dataset).astype(np.float64)
    gray = _apply_voi(values, _without_padding(values, pixels, dataset), dataset, window, transforms.apply_voi)
    return 255 - gray if dataset.PhotometricInterpretation == "MONOCHROME1" else gray


def _take_from_groups(dataset, frame: int) -> None:
    """Puts a frame's own transform and window, in an enhanced file, where other files have them."""
    for groups, place in zip(GROUPS, (0, frame), strict=True):
        for group in list(dataset.get(groups) or [])[place : place + 1]:
            items = [item for sequence in TRANSFORMS for item in list(group.get(sequence) or [])[:1]]
            for item in items:
                for tag in OPTIONAL_TAGS:
                    if tag in item:
                        dataset[tag] = item[tag]


def _without_padding(values: np.ndarray, pixels: np.ndarray, dataset) -> np.ndarray:
    """
    The values whose stored ones, `pixels`, are not what the file says it fills up with around the image, often far
    below all that was measured: PixelPaddingValue, or all from it to PixelPaddingRangeLimit (PS3.3 C.7.5.1.1.2).
    """
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return values
    # Signed pixels may have an unsigned tag (63536 for -2000), so that both are taken as the pixels' type.
    ends = [np.int64(end).astype(pixels.dtype) for end in (value, dataset.get("PixelPaddingRangeLimit", value))]
    return values[(pixels < min(ends)) | (pixels > max(ends))]


def _apply_voi(
    values: np.ndarray, shown: np.ndarray, dataset, window: tuple[float, float] | None, apply_table: Callable
) -> np.ndarray:
    """Map (H, W) values after the modality transform to uint8 by the value-of-interest (VOI) transform.

    That is, in this order, the given window, the file's table (by pydicom's `apply_voi`, `apply_table`), the file's
    window, or the range of `shown`, the values without padding.
    """
    if window is not None:
        return apply_window(values, *window)
    if "VOILUTSequence" in dataset:
        bits = dataset.VOILUTSequence[0].LUTDescriptor[2]
        table_output = apply_table(values.astype(np.int64), dataset)
        return np.clip(table_output * (255 / (2**bits - 1)) + 0.5, 0, 255).astype(np.uint8)
    if "WindowCenter" in dataset and "WindowWidth" in dataset:
        center, width = (np.atleast_1d(dataset[key].value)[0] for key in ("WindowCenter", "WindowWidth"))
        return apply_window(values, float(center), float(width), dataset.get("VOILUTFunction") or "LINEAR")
    top = 2**dataset.BitsStored - 1
    if top <= 255 and values.min() >= 0 and values.max() <= top:
        return (values * (255 / top) + 0.5).astype(np.uint8)
    return scale_to_8_bit(values, shown)


def apply_window(values: np.ndarray, center: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """Map values of any type and shape to uint8 through an intensity window.

    Args:
        values: in the units of the window.
        center, width: of the window.
        function: "LINEAR" (DICOM PS3.3 C.11.2.1.2), "LINEAR_EXACT" or "SIGMOID" (C.11.2.1.3).
    """

    def apply(values: np.ndarray) -> np.ndarray:
        if function == "SIGMOID":
            share = 1 / (1 + np.exp(-4 * (values - center) / width))
        elif function == "LINEAR_EXACT":
            share = (values - center) / width + 0.5
        elif width <= 1:  # a threshold; the linear form would divide by width - 1
            share = (values > center - 0.5).astype(np.float64)
        else:
            share = (values - (center - 0.5)) / (width - 1) + 0.5
        return (np.clip(share, 0, 1) * 255 + 0.5).astype(np.uint8)

    return by_value(apply, values)


__all__ = ["apply_window", "decode_dicom", "is_dicom"]
