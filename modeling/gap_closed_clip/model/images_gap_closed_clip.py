"""
The one way from a decoded image to what the image tower is given: upright, 8 bits, RGB.

Training, the pipeline and the endpoint's handler all go through here. The handler imports this file by its bare name
from the model folder, where the package is not installed.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


MAX_PIXELS = 50_000_000
MAX_SCANS = 50  # of a JPEG, each of which goes over all of its pixels; encoders write up to about 15
MAX_ASPECT = 50  # long side to short side: the short one is resized to the tower's, the long one follows
# No more than these: Pillow runs Ghostscript for EPS, and rare decoders are where the holes are found.
FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "BMP", "DIB", "GIF", "WEBP", "PPM")


def open_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """
    An image file, opened but not decoded.

    Args:
        formats: those that are read, in Pillow's words.

    Raises:
        ValueError: it is in none of these formats, or has too many pixels or scans.
        What Pillow raises, of many types, where the file is damaged.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise ValueError(f"it is neither DICOM nor of a format that is read here ({', '.join(formats)})") from None
    except Image.DecompressionBombError:
        raise ValueError(f"it has too many pixels, more than {MAX_PIXELS:,}") from None
    check_size(*image.size)
    # In the data of a scan no 0xFF stands before 0xDA.
    if data[:2] == b"\xff\xd8" and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise ValueError(f"it has {scans} scans, more than {MAX_SCANS}: save it anew as a JPEG")
    return image


def check_size(width: int, height: int) -> None:
    """
    Raises:
        ValueError: an image of so many pixels takes too much memory, or would once its short side is resized; or it
            has none.
    """
    if not width * height:
        raise ValueError(f"it has {width} x {height} pixels: none")
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, more than {MAX_PIXELS:,}: make it smaller first")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"it has {width} x {height} pixels, one side more than {MAX_ASPECT} times the other: cut out what matters"
        )


def scale_to_8_bit(values: np.ndarray, shown: np.ndarray | None = None) -> np.ndarray:
    """
    Values of unknown range -> uint8 over the image's own range, or over that of `shown`, those of them that count.

    The range is that between the 0.1th and 99.9th percentile, so that 12 bits stored in 16 use all of 0..255, and a
    few hot pixels or a burned-in mark at the container's maximum do not turn the rest black. NaN and -inf become 0.
    """
    finite = values if shown is None else shown
    finite = finite if finite.dtype.kind in "iu" else finite[np.isfinite(finite)]
    if not finite.size:
        return np.zeros(values.shape, np.uint8)
    low, high = np.percentile(finite, (0.1, 99.9))
    if high <= low:  # nearly all pixels are equal: what differs is all there is to see
        low, high = finite.min(), finite.max()
    if high <= low:
        low, high = 0.0, max(high, 1.0)

    def scale(values: np.ndarray) -> np.ndarray:
        share = np.nan_to_num((values - low) / (high - low), nan=0.0, posinf=1.0, neginf=0.0)
        return (np.clip(share, 0, 1) * 255 + 0.5).astype(np.uint8)

    return by_value(scale, values)


def by_value(function: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """
    What a function of each value by itself makes of an array; it is given float64. Of 16-bit integers every value is
    looked up, which takes an eighth of the memory.
    """
    if values.dtype not in (np.uint16, np.int16) or values.size < 2**16:
        return function(values.astype(np.float64))
    table = function(np.arange(2**16, dtype=np.uint16).view(values.dtype).astype(np.float64))
    return table[values.view(np.uint16)]


def to_rgb(image: Image.Image, to_8_bit: Callable[[np.ndarray], np.ndarray] = scale_to_8_bit) -> Image.Image:
    """
    An upright 8-bit RGB image; `image` itself where it is one already.

    - gray, 1-bit, palette, CMYK: converted; transparency: composited on black
    - 16- and 32-bit gray, float, which `convert("RGB")` would clip to white: through `to_8_bit`, turned over if it is
      a TIFF whose zero is white; 16-bit colour keeps the high byte
    - EXIF orientation: applied

    Args:
        image: of any mode; its pixels may still be in the file.
        to_8_bit: values (H, W), integers or floats, to uint8.

    Raises:
        ValueError: it has too many pixels, see `check_size`.
        OSError, and what else Pillow raises: the file is damaged or truncated.
    """
    check_size(*image.size)
    image.load()
    zero_is_white = getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else exif_transpose would copy the image
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":  # I, I;16, I;16B, I;16L, F
        values = np.asarray(image)
        values = values.astype(values.dtype.newbyteorder("="))
        if zero_is_white:  # Pillow turns over 8 bits alone
            values = np.nanmax(values) - values
        return Image.fromarray(to_8_bit(values)).convert("RGB")
    if image.mode.lower() in ("rgba", "la", "pa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return image.convert("RGB")


__all__ = [
    *("FORMATS", "MAX_ASPECT", "MAX_PIXELS", "MAX_SCANS"),
    *("by_value", "check_size", "open_image", "scale_to_8_bit", "to_rgb"),
]
