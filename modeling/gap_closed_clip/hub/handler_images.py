"""
The images of a request to the endpoint: from base64 to an upright RGB image, within limits.

`handler.py` imports it from the model folder, where the package is not installed. The conversion to RGB is that of the
code beside the weights.
"""

import base64
import binascii
import threading
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from images_gap_closed_clip import FORMATS, MAX_PIXELS, check_size, open_image, to_rgb


MAX_IMAGE_BYTES = 20 * 2**20
MAX_REQUEST_PIXELS = 4 * MAX_PIXELS  # of all images of a request
# Not JPEG 2000, of which 40 kB can be written so that decoding them takes any amount of memory and minutes.
READ_FORMATS = tuple(name for name in FORMATS if name != "JPEG2000")
LARGE = 16_000_000  # pixels; images of more are halved before they are converted

# Of large images one at a time is in memory, however many threads answer requests.
_one_large_image = threading.Lock()


class RequestError(Exception):
    """What is wrong with a request, for whoever sent it."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class PixelBudget:
    """What is left of the pixels that the images of a request may have together."""

    def __init__(self) -> None:
        self.left = MAX_REQUEST_PIXELS

    def take(self, image: Image.Image, field: str) -> None:
        """
        Raises:
            RequestError: this image is too large or too thin, or the images up to this one have too many pixels.
        """
        try:
            check_size(*image.size)
        except ValueError as error:
            raise RequestError(f"{field} can't be used: {error}.", 413) from None
        self.left -= image.width * image.height
        if self.left < 0:
            wrong = f"The images up to {field} have more than {MAX_REQUEST_PIXELS:,} pixels: send several requests."
            raise RequestError(wrong, 413)


def read_image(value: Any, field: str, budget: PixelBudget | None = None) -> Image.Image:
    """
    An upright RGB image, halved where it is large. Nothing is fetched and no file is opened.

    Args:
        value: base64 of an image file, the file's bytes or a PIL image.
        field: the field of the request that holds it, for messages, e.g. "inputs.gallery[3]".
        budget: of the request, from which the image's pixels are taken before it is decoded.

    Raises:
        RequestError: it is none of these, too large, damaged, or in a format that is not read here.
    """
    if isinstance(value, str):
        value = _from_base64(value, field)
    if isinstance(value, bytes | bytearray):
        image = _open(bytes(value), field)
    elif isinstance(value, Image.Image):
        image = value
    else:
        raise RequestError(f"{field} is {kind_of(value)}: send an image as base64.")
    (budget or PixelBudget()).take(image, field)
    try:
        if image.width * image.height <= LARGE:
            return to_rgb(image)
        with _one_large_image:
            return to_rgb(_halved(image))
    except Exception:  # a damaged file makes Pillow raise a dozen different types
        raise RequestError(f"{field} is damaged or cut off: its pixels can't be read.") from None


def _halved(image: Image.Image) -> Image.Image:
    """An image of half its width and height, upright, every pixel the mean of four, in a mode that `to_rgb` takes."""
    image.load()
    # Of more than 8 bits, `to_rgb` turns over what a file's tags say, which the half has no more.
    zero_is_white = getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # which Pillow does not reduce
        values = np.asarray(image)[: image.height // 2 * 2, : image.width // 2 * 2]
        total = np.zeros((values.shape[0] // 2, values.shape[1] // 2), np.uint32)
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            total += values[row::2, column::2]
        return Image.fromarray(((total.max() - total if zero_is_white else total) // 4).astype(np.uint16))
    if image.mode == "1":
        image = image.convert("L")
    elif "transparency" in image.info or image.mode == "PA":
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    half = image.reduce(2)
    if zero_is_white and half.mode[0] in "IF":
        half = Image.fromarray(np.nanmax(np.asarray(half)) - np.asarray(half))
    return half


def kind_of(value: Any) -> str:
    """What a value of a request is, for messages."""
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _from_base64(value: str, field: str) -> bytes:
    if value[:8].lower().startswith(("http://", "https://")):
        raise RequestError(f"{field} is a URL, and URLs are not fetched: send the bytes of the image file as base64.")
    if len(value) > MAX_IMAGE_BYTES * 1.4 + 1000:  # base64 is 4/3 of the bytes, and has line breaks
        raise _too_large(field)
    header, comma, rest = value.partition(",")
    if comma and header.lower().startswith("data:") and header.lower().endswith(";base64"):
        value = rest
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            f"{field} is not base64: send the bytes of an image file as base64. Paths are never opened."
        ) from None


def _open(data: bytes, field: str) -> Image.Image:
    if len(data) > MAX_IMAGE_BYTES:
        raise _too_large(field)
    if data[128:132] == b"DICM":
        raise RequestError(f"{field} is a DICOM file: send it windowed, as PNG or JPEG.")
    try:
        return open_image(data, READ_FORMATS)
    except ValueError as error:
        # `open_image` says itself when there are too many pixels or scans; the format is the handler's to name.
        if "pixels" in str(error) or "scans" in str(error):
            raise RequestError(f"{field} can't be used: {error}.", 413) from None
        raise RequestError(f"{field} is no image file of a known format: {', '.join(READ_FORMATS)}.") from None
    except Exception:
        raise RequestError(f"{field} is no image file of a known format: {', '.join(READ_FORMATS)}.") from None


def _too_large(field: str) -> RequestError:
    return RequestError(f"{field} is too large: an image file may have {MAX_IMAGE_BYTES // 2**20} MiB.", 413)
