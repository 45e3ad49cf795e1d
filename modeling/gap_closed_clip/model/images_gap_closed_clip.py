"""
The one way from a decoded image to what the image tower is given: upright, 8 bits, RGB.

Training, the pipeline and the endpoint's handler all go through here. The handler imports this file by its bare name
from the model folder, where the package is not installed.
"""

from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, ImageOps


def scale_to_8_bit(values: np.ndarray) -> np.ndarray:
    """
    Values of unknown range -> uint8 over the image's own range.

    The range is that between the 0.1th and 99.9th percentile, so that 12 bits stored in 16 use all of 0..255, and a
    few hot pixels or a burned-in mark at the container's maximum do not turn the rest black. NaN and -inf become 0.
    """
    values = values.astype(np.float64, copy=False)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return np.zeros(values.shape, np.uint8)
    low, high = np.percentile(finite, (0.1, 99.9))
    if high <= low:  # nearly all pixels are equal: what differs is all there is to see
        low, high = finite.min(), finite.max()
    if high <= low:
        low, high = 0.0, max(high, 1.0)
    share = np.nan_to_num((values - low) / (high - low), nan=0.0, posinf=1.0, neginf=0.0)
    return (np.clip(share, 0, 1) * 255 + 0.5).astype(np.uint8)


def to_rgb(image: Image.Image, to_8_bit: Callable[[np.ndarray], np.ndarray] = scale_to_8_bit) -> Image.Image:
    """
    An upright 8-bit RGB image; `image` itself where it is one already.

    - gray, 1-bit, palette, CMYK: converted; transparency: composited on black
    - 16- and 32-bit gray, float, which `convert("RGB")` would clip to white: through `to_8_bit`; 16-bit colour keeps
      the high byte
    - EXIF orientation: applied

    Args:
        image: of any mode; its pixels may still be in the file.
        to_8_bit: float64 values (H, W) to uint8.

    Raises:
        OSError, and what else Pillow raises: the file is damaged or truncated.
    """
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else exif_transpose would copy the image
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":  # I, I;16, I;16B, I;16L, F
        return Image.fromarray(to_8_bit(np.asarray(image).astype(np.float64))).convert("RGB")
    if image.mode.lower() in ("rgba", "la", "pa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return image.convert("RGB")


__all__ = ["scale_to_8_bit", "to_rgb"]
