"""
Images as people have them to upright 8-bit RGB: files (DICOM too), their bytes, URLs, Pillow images, arrays, tensors.

Training, the processor and the pipelines read images here.
"""

import base64
import binascii
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .dicom_gap_closed_clip import apply_window, decode_dicom, is_dicom
from .fetch_gap_closed_clip import fetch
from .images_gap_closed_clip import check_size, open_image, scale_to_8_bit, to_rgb


Window = tuple[float, float]
# Where a resize (bicubic, Lanczos) may take floats that were 0 to 1. Those of 0 to 255 reach further.
AROUND_0_TO_1 = (-0.25, 2)


def load_image(image: Any, window: Window | None = None, name: str = "The image") -> Image.Image:
    """
    An upright 8-bit RGB image, as training makes it: 16-bit, float and DICOM images show what a viewer shows, where
    transformers' own `load_image` clips them to white.

    Args:
        image: a path, a URL (`http`, `https`, `data`), base64 of a file, a file's bytes, a row's `{"bytes", "path"}`,
            a Pillow image, or an array or tensor: gray (H, W), (1, H, W) or (H, W, 1), or colour (3, H, W) or
            (H, W, 3), with transparency (4, H, W) or (H, W, 4).
        window: centre and width of the intensity window for images of more than 8 bits, in their units. Default: a
            DICOM file's own, else the image's own range.
        name: what error messages call the image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image, or it is damaged or of no known format; the message names it.
        ImportError: it is a DICOM file, and pydicom is not installed.
    """
    if isinstance(image, dict) and set(image) <= {"bytes", "path"}:  # a row of a data set
        path, data = image.get("path"), image.get("bytes")
        image = path if data is None else data
    else:
        path = image if isinstance(image, str | os.PathLike) else None
    path = None if path is None else os.fspath(path)
    if path is not None:
        name = f"{name}, {path:.200},"
    elif not isinstance(image, bytes | bytearray | Image.Image | np.ndarray | torch.Tensor):
        raise ValueError(
            f"{name} is {image!r:.80}: give a path, a URL, the bytes of a file, a Pillow image, or an array or tensor."
        )
    try:
        if isinstance(image, Image.Image):
            return to_rgb(image, to_8_bit_by(window))
        if isinstance(image, np.ndarray | torch.Tensor):
            return array_to_rgb(image, window)
        data = bytes(image) if isinstance(image, bytes | bytearray) else read_file(path or "")
        return decode_file(data, path or "", window)
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # a damaged file makes Pillow and pydicom raise a dozen different types
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise ValueError(f"{name} can't be read as an image: {reason}.") from error


def decode_file(data: bytes, name: str, window: Window | None = None, min_size: int | None = None) -> Image.Image:
    """
    An image file to upright 8-bit RGB. Of several pages or frames it is the first, of DICOM the middle one.

    Args:
        data: the file's bytes.
        name: its path or name, by which DICOM without a preamble is known.
        window: as for `load_image`.
        min_size: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep this many pixels.

    Raises:
        ImportError: it is a DICOM file, and pydicom is not installed.
        What Pillow and pydicom raise, of many types, where the file is damaged.
    """
    if is_dicom(data, name):
        return Image.fromarray(decode_dicom(data, window)).convert("RGB")
    opened = open_image(data)
    if min_size is not None:
        opened.draft("RGB", (min_size, min_size))
    return to_rgb(opened, to_8_bit_by(window))


def to_8_bit_by(window: Window | None) -> Callable[[np.ndarray], np.ndarray]:
    """How values of unknown range become 8 bits: through the window, or else over the image's own range."""
    return scale_to_8_bit if window is None else partial(apply_window, center=window[0], width=window[1])


def is_url(value: str) -> bool:
    """Whether a text is a URL that images are read from, and no path."""
    return value[:11].lower().startswith(("http://", "https://", "data:image/"))


def read_file(path: str) -> bytes:
    """
    The bytes of a file, of a URL, or of base64, which transformers' processors take as well.

    Pillow is given a file's bytes and not its name, because by the name Pillow 13 maps a raw TIFF into memory and
    scrambles one that lies on its side.

    Raises:
        FileNotFoundError: it is none of these.
    """
    if is_url(path):
        return read_data_url(path) if path[:5].lower() == "data:" else fetch(path)
    if os.path.isfile(path):
        return Path(path).read_bytes()
    try:
        data = base64.b64decode("".join(path.split()), validate=True)
        open_image(data)  # letters of a name may be base64 by chance, an image file is not
    except (binascii.Error, ValueError):
        raise FileNotFoundError(f"There is no file {path:.200}.") from None
    return data


def read_data_url(url: str) -> bytes:
    """
    The bytes in a `data:` URL.

    Raises:
        ValueError: they are not base64.
    """
    header, _, value = url.partition(",")
    if not header.lower().endswith(";base64"):
        raise ValueError("its data: URL holds no base64")
    return base64.b64decode("".join(value.split()), validate=True)


def array_to_rgb(values: np.ndarray | torch.Tensor, window: Window | None = None) -> Image.Image:
    """
    An array or tensor to 8-bit RGB.

    - gray of 8 bits: as it is; of more, or float: through the window, or over its own range, as files are
    - colour of 8 bits, in whatever type, or float from 0 to 1 or from 0 to 255: as it is; unsigned 16 bits keep the
      high byte, as in files; floats of no more than 2 are 0 to 1, and what a resize has taken beyond, down to -0.25,
      is clipped

    Args:
        values: (H, W), (1, H, W), (H, W, 1), or with 3 or 4 channels first or last.
        window: centre and width, for gray of more than 8 bits.

    Raises:
        ValueError: another shape, or colour values out of range.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    channels, axis = find_channels(values.shape)
    height, width = (size for place, size in enumerate(values.shape) if values.ndim == 2 or place != axis % 3)
    check_size(width, height)
    if channels > 1:
        colour = np.ascontiguousarray(_colour_to_8_bit(np.moveaxis(values, axis, -1)))
        return to_rgb(Image.fromarray(colour))
    gray = values if values.ndim == 2 else values.squeeze(axis)
    if gray.dtype != np.uint8:
        gray = to_8_bit_by(window)(gray)
    return Image.fromarray(np.ascontiguousarray(gray)).convert("RGB")


def find_channels(shape: tuple[int, ...]) -> tuple[int, int]:
    """
    The number of channels of an array's shape, and their axis (0 or -1).

    Raises:
        ValueError: the shape is none of an image.
    """
    if len(shape) == 2 and 0 not in shape:
        return 1, -1
    if len(shape) == 3 and 0 not in shape:
        for channels in (3, 1, 4):
            for axis in (0, -1):
                if shape[axis] == channels:
                    return channels, axis
    raise ValueError(
        f"its shape is {tuple(shape)}; an image is (H, W), or has its 1, 3 or 4 channels first or last. Give several "
        "images as a list"
    )


def _colour_to_8_bit(values: np.ndarray) -> np.ndarray:
    """Colour values of any type and channels as uint8."""
    if values.dtype == np.uint8:
        return values
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and AROUND_0_TO_1[0] <= low and high <= AROUND_0_TO_1[1]:
        return (values.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    if values.dtype == np.uint16 and high > 255:
        return (values >> 8).astype(np.uint8)
    if not (low >= 0 and high <= 255):  # NaN is neither
        raise ValueError(f"its colour values go from {low} to {high}; give 0 to 255, or floats from 0 to 1")
    return (values + 0.5 if values.dtype.kind == "f" else values).astype(np.uint8)


__all__ = [
    "AROUND_0_TO_1",
    "array_to_rgb",
    "decode_file",
    "find_channels",
    "is_url",
    "load_image",
    "read_file",
    "to_8_bit_by",
]
