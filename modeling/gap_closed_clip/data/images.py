"""From stored images to 8-bit RGB: decoding, the check before training, the cache, augmentation."""

import io
import math
import os
from dataclasses import dataclass
from functools import partial
from logging import getLogger
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from datasets.utils import tqdm
from PIL import Image, ImageOps, ImageStat
from torch.utils.data import DataLoader

from ..model.images_gap_closed_clip import to_rgb
from ..model.load_images_gap_closed_clip import array_to_rgb, decode_file, to_8_bit_by
from .addresses import is_address, read_address
from .modalities import has_image, has_modality, read_array


logger = getLogger(__name__)

NUMPY = b"\x93NUMPY"  # what a .npy file begins with
SKIP_REMEDY = "Replace the file, or leave such images out with data.on_bad_image=skip."


def decode_image(
    image: dict | bytes | str | os.PathLike | Image.Image | np.ndarray | torch.Tensor,
    min_size: int | None = None,
    window: tuple[float, float] | None = None,
    name: str | None = None,
) -> Image.Image:
    """Decode an image of any kind that occurs in radiology data sets to upright 8-bit RGB.

    DICOM files are rendered by `decode_dicom`, all others by `to_rgb`: 16- and 32-bit gray and float go through
    `window`, or else are scaled over the image's own range. A file with several pages gives its first one, a DICOM
    file with several frames its middle one.

    Args:
        image: a row's `{"bytes", "path"}`, the file's bytes, a path or URL, a PIL image, or an array or tensor as
            `load_image` takes them.
        min_size: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep this many pixels,
            which saves most of the work on large files. Default: full size.
        window: centre and width of the intensity window for images of more than 8 bits, in their own units.
        name: what error messages call the image. Default: its path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the image is damaged, truncated or of no known format, or nothing at all; the message names it.
        ImportError: it is a DICOM file, and pydicom is not installed.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image, to_8_bit_by(window))
    if isinstance(image, np.ndarray | torch.Tensor):
        return _array_to_rgb(image, window, name or "without a name")
    if isinstance(image, dict):
        path, data = image.get("path"), image.get("bytes")
    else:
        if not isinstance(image, bytes | bytearray | str | os.PathLike):
            raise ValueError(
                f"The image '{name or 'without a name'}' is {image!r:.80}: give a path, the bytes of a file, a Pillow "
                "image or an array, and leave out rows that have none."
            )
        path, data = (None, image) if isinstance(image, bytes | bytearray) else (os.fspath(image), None)
    name = name or path or "without a name"
    data = _read(path, name) if data is None else bytes(data)
    try:
        return decode_file(data, path or "", window, min_size)
    except ImportError:
        raise
    except Exception as error:  # a damaged file makes Pillow and pydicom raise a dozen different types
        raise ValueError(
            f"The image '{name}' cannot be read ({error}): damaged, truncated or of no known format. {SKIP_REMEDY}"
        ) from error


def _array_to_rgb(values: np.ndarray | torch.Tensor, window: tuple[float, float] | None, name: str) -> Image.Image:
    try:
        return array_to_rgb(values, window)
    except ValueError as error:
        raise ValueError(f"The image '{name}' cannot be read ({error}). {SKIP_REMEDY}") from error


def stored_bytes(image: dict) -> bytes:
    """The file of a row's `{"bytes", "path"}` as it is, undecoded.

    Raises:
        FileNotFoundError: there is no such file.
    """
    return image["bytes"] if image.get("bytes") is not None else _read(image.get("path"), image.get("path") or "")


def open_file(value: dict, name: str, window: tuple[float, float] | None = None) -> Image.Image | np.ndarray:
    """The image, or the array, that is in the file `{"bytes", "path"}` of a further modality.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `decode_image` and `read_array`.
    """
    data = value.get("bytes")
    is_array = str(value.get("path")).endswith(".npy") if data is None else data.startswith(NUMPY)
    return read_array(value, name) if is_array else decode_image(value, window=window, name=name)


def check_further_files(row: dict, window: tuple[float, float] | None) -> None:
    """
    Opens the files that a row has beside its image.

    Raises:
        ValueError, FileNotFoundError: one cannot be read; with its path.
    """
    for name, value in row.items():
        is_file = name != "image" and isinstance(value, dict) and set(value) <= {"bytes", "path"}
        if is_file and has_modality(row, name):
            open_file(value, value.get("path") or f"{name} of {row.get('image_id') or 'a row'}", window)


def name_of(row: dict) -> str:
    """What error messages call the image of a row: its path if it has one, else its id."""
    image = row["image"]
    path = image.get("path") if isinstance(image, dict) else image
    return path if isinstance(path, str) and path else str(row.get("image_id") or "without a name")


def window_of(row: dict, window: tuple[float, float] | None) -> tuple[float, float] | None:
    """The intensity window of a row's image: its source's own where sources have different ones, else `window`."""
    own = row.get("window")
    return window if own is None else tuple(own) or None


def _read(path: str | None, name: str) -> bytes:
    """The bytes of a file or URL; `name` is what error messages call the image."""
    if not path:
        raise ValueError(f"The image '{name}' has neither bytes nor a path. {SKIP_REMEDY}")
    try:
        return read_address(path) if is_address(path) else Path(path).read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The image file '{path:.200}' does not exist. {SKIP_REMEDY}") from error
    except (OSError, ValueError) as error:  # a folder, a name that is too long or holds a zero, an address
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise ValueError(f"The image file '{path:.200}' cannot be read ({reason}). {SKIP_REMEDY}") from error


@dataclass
class Augmentation:
    """Random crop, brightness and contrast that suit radiology. Calling it with an RGB image gives the varied image.

    The crop keeps the image's aspect ratio up to `aspect_jitter`, so that the processor, which resizes it afterwards,
    cuts as much off the longer side as it does at evaluation. Random numbers come from torch's global generator, or
    from one that is handed over, so a seed repeats them.

    Args:
        crop_scale: smallest and largest share of the area that the crop keeps, drawn uniformly; (1, 1) for no crop.
        brightness: b; the image is multiplied by a factor drawn from 1 - b to 1 + b.
        contrast: c; the image is stretched about its mean gray by a factor drawn from 1 - c to 1 + c.
        horizontal_flip: mirror half of the images.
        aspect_jitter: the crop's ratio of width to height changes by at most this factor, or its inverse.

    Raises:
        ValueError: a value is out of its range.
    """

    crop_scale: tuple[float, ...] = (0.7, 1.0)
    brightness: float = 0.2
    contrast: float = 0.2
    horizontal_flip: bool = False
    aspect_jitter: float = 1.1

    def __post_init__(self):
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}; it must be two shares with 0 < from <= to <= 1.")
        for name in ("brightness", "contrast"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1.")
        if self.aspect_jitter < 1:
            raise ValueError(f"aspect_jitter is {self.aspect_jitter}; it must be at least 1.")

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Image.Image:
        # Always as many draws, so that one setting does not shift the others'.
        draws = torch.rand(7, generator=generator).tolist()
        image = image.crop(self._crop_box(image.size, *draws[:4]))
        brightness = 1 + self.brightness * (2 * draws[4] - 1)
        contrast = 1 + self.contrast * (2 * draws[5] - 1)
        if brightness != 1 or contrast != 1:
            image = _adjust(image, brightness, contrast)
        if self.horizontal_flip and draws[6] < 0.5:
            image = ImageOps.mirror(image)
        return image

    def _crop_box(
        self, size: tuple[int, int], area: float, aspect: float, x: float, y: float
    ) -> tuple[int, int, int, int]:
        """The crop's left, top, right and bottom pixel, from the image's size and four random numbers in 0..1."""
        share = self.crop_scale[0] + (self.crop_scale[1] - self.crop_scale[0]) * area
        # Limited to sides no longer than the image's: near a share of 1 no change of shape fits inside.
        stretch = min(max(self.aspect_jitter ** (2 * aspect - 1), share), 1 / share)
        width = max(1, min(size[0], round(size[0] * math.sqrt(share * stretch))))
        height = max(1, min(size[1], round(size[1] * math.sqrt(share / stretch))))
        left, top = int(x * (size[0] - width + 1)), int(y * (size[1] - height + 1))
        return left, top, left + width, top + height

    def shorter_side(self, target: int) -> int:
        """Pixels that an image's shorter side needs for every crop's shorter side to have `target` pixels."""
        return math.ceil(target * math.sqrt(self.aspect_jitter / self.crop_scale[0]))


def _adjust(image: Image.Image, brightness: float, contrast: float) -> Image.Image:
    """Multiply an RGB image by `brightness`, then stretch it about its mean gray by `contrast`.

    One table for both is four times as fast as a pass over the image for each, and rounds only once.
    """
    mean = brightness * ImageStat.Stat(image.convert("L")).mean[0] if contrast != 1 else 0.0
    bright = np.clip(brightness * np.arange(256.0), 0, 255)
    table = np.clip(mean + contrast * (bright - mean) + 0.5, 0, 255).astype(np.uint8)
    return image.point(table.tolist() * 3)


def check_images(
    pairs: Dataset, on_bad_image: str = "error", window: tuple[float, float] | None = None, num_workers: int = 0
) -> Dataset:
    """Decode every image once, before training, to find the damaged ones; those of further modalities, and files of
    arrays, too.

    Args:
        pairs: canonical pairs, as `load_pairs` gives them.
        on_bad_image: "error" stops and names the first five damaged images; "skip" drops their rows and logs how many.
        window: as for `decode_image`.
        num_workers: processes that help to decode.

    Returns:
        The pairs without the skipped ones.

    Raises:
        ValueError: an image is unreadable and `on_bad_image` is "error", or no image is readable at all.
    """
    return _decode_all(pairs, None, on_bad_image, window, num_workers)[0]


def cache_images(
    pairs: Dataset,
    shorter_side: int,
    on_bad_image: str = "error",
    window: tuple[float, float] | None = None,
    num_workers: int = 0,
) -> Dataset:
    """As `check_images`, and keep what was decoded, so that decoding a row afterwards only copies its pixels.

    The pixels are in memory, 3 bytes each, and forked DataLoader workers share them.

    Args:
        pairs: canonical pairs, as `load_pairs` gives them.
        shorter_side: pixels that the shorter side of a larger image is reduced to; smaller images stay as they are.
        on_bad_image, window, num_workers: as for `check_images`.

    Returns:
        The pairs without the skipped ones, their images uncompressed.

    Raises:
        ValueError: as `check_images`.
    """
    pairs, uncompressed = _decode_all(pairs, shorter_side, on_bad_image, window, num_workers)
    feature = pairs.features["image"]
    structs = [{"bytes": data, "path": None} for data in uncompressed]
    return pairs.remove_columns("image").add_column("image", structs, feature=feature)


def _decode_all(
    pairs: Dataset,
    shorter_side: int | None,
    on_bad_image: str,
    window: tuple[float, float] | None,
    num_workers: int,
) -> tuple[Dataset, list[bytes | None]]:
    """The readable pairs, and the uncompressed image of each; None in its place if `shorter_side` is None."""
    files = [name for name, feature in pairs.features.items() if isinstance(feature, ImageFeature) and name != "image"]
    loader = DataLoader(
        pairs.select_columns(["image", "image_id", *files]),
        batch_size=64,
        collate_fn=partial(_try_decode, shorter_side=shorter_side, window=window),
        num_workers=num_workers,
    )
    results = []
    with tqdm(total=len(pairs), desc="Checking images", unit=" images") as progress:
        for batch in loader:
            results += batch
            progress.update(len(batch))
    bad = [error for _, error in results if error]
    if bad and (on_bad_image == "error" or len(bad) == len(results)):
        listed = "\n  ".join(bad[:5])
        raise ValueError(f"{len(bad)} of {len(results)} images cannot be read, the first:\n  {listed}")
    if bad:
        logger.warning("Skipped %d of %d pairs with an unreadable image, the first: %s", len(bad), len(pairs), bad[0])
        pairs = pairs.select([index for index, (_, error) in enumerate(results) if not error])
    return pairs, [data for data, error in results if not error]


def _try_decode(
    rows: list[dict], shorter_side: int | None, window: tuple[float, float] | None
) -> list[tuple[bytes | None, str | None]]:
    """The uncompressed image (None if `shorter_side` is None) and the error message (None if readable) of each row."""
    results: list[tuple[bytes | None, str | None]] = []
    for row in rows:
        try:
            check_further_files(row, window)
            if not has_image(row):  # with further modalities a sample may lack it
                results.append((None, None))
                continue
            # With a size of 1 every byte of a JPEG is still decoded, but most of its pixels are not computed.
            image = decode_image(row["image"], shorter_side or 1, window, name=name_of(row))
        except (ValueError, FileNotFoundError) as error:
            results.append((None, str(error)))
            continue
        results.append((None if shorter_side is None else _uncompressed(image, shorter_side), None))
    return results


def _uncompressed(image: Image.Image, shorter_side: int) -> bytes:
    """A PPM file of the image, reduced if its shorter side has more than `shorter_side` pixels."""
    scale = shorter_side / min(image.size)
    if scale < 1:
        width, height = (max(shorter_side, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PPM")
    return buffer.getvalue()
