"""
The images of a request to the endpoint: from base64 to an upright RGB image, within limits.

`handler.py` imports it from the model folder, where the package is not installed. The conversion to RGB is that of the
code beside the weights.
"""

import base64
import binascii
import io
from typing import Any

from PIL import Image

from images_gap_closed_clip import to_rgb


MAX_IMAGE_BYTES = 20 * 2**20
MAX_PIXELS = 50_000_000
MAX_ASPECT = 20  # long side to short side: the short one is resized to the tower's, the long one follows
# No more than these: Pillow runs Ghostscript for EPS, and rare decoders are where the holes are found.
FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "GIF", "WEBP", "PPM")


class RequestError(Exception):
    """What is wrong with a request, for whoever sent it."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


def read_image(value: Any, field: str) -> Image.Image:
    """
    An upright RGB image. Nothing is fetched and no file is opened.

    Args:
        value: base64 of an image file, the file's bytes or a PIL image.
        field: the field of the request that holds it, for messages, e.g. "inputs.gallery[3]".

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
    _check_size(image, field)
    try:
        return to_rgb(image)
    except Exception:  # a damaged file makes Pillow raise a dozen different types
        raise RequestError(f"{field} is damaged or cut off: its pixels can't be read.") from None


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
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise RequestError(f"{field} has too many pixels: an image may have {MAX_PIXELS}.", 413) from None
    except Exception:
        raise RequestError(f"{field} is no image file of a known format: {', '.join(FORMATS)}.") from None


def _check_size(image: Image.Image, field: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise RequestError(f"{field} has {width} x {height} pixels: an image may have {MAX_PIXELS}.", 413)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise RequestError(f"{field} has {width} x {height} pixels: one side may be {MAX_ASPECT} times the other.")


def _too_large(field: str) -> RequestError:
    return RequestError(f"{field} is too large: an image file may have {MAX_IMAGE_BYTES // 2**20} MiB.", 413)
