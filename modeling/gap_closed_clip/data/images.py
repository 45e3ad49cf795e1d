"""From stored images to RGB pictures: decoding, the check before training, the cache, augmentation."""

import io
import math
import os
from dataclasses import dataclass
from functools import partial
from logging import getLogger
from pathlib import Path

import fsspec
import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps, ImageStat
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..model.images_gap_closed_clip import scale_to_8_bit, to_rgb
from .dicom import apply_window, decode_dicom, is_dicom


logger = getLogger(__name__)

SKIP_REMEDY = "Replace the file, or leave such images out with data.on_bad_image=skip."


def decode_image(
    image: dict | bytes | str | os.PathLike | Image.Image,
    min_size: int | None = None,
    window: tuple[float, float] | None = None,
    name: str | None = None,
) -> Image.Image:
    """Decode an image of any kind met in radiology sets to an 8-bit RGB picture, upright.

    - `to_rgb`, with 16- and 32-bit gray and float through `window`, else scaled over the image's own range
    - DICOM: `decode_dicom`; other files with several pages or frames: the first

    Args:
        image: a row's `{"bytes", "path"}`, the file's bytes, a path or URL, or a PIL image.
        min_size: a JPEG may be decoded at 1/2, 1/4 or 1/8 as long as both sides stay at least so many pixels; that
            spares most of the work for large files. Default: full size.
        window: (centre, width) for images of more than 8 bits, in their own units.
        name: what errors call the image; default its path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the image is damaged, truncated or of no known format; names it.
        ImportError: a DICOM file without pydicom.
    """
    to_8_bit = scale_to_8_bit if window is None else partial(apply_window, center=window[0], width=window[1])
    if isinstance(image, Image.Image):
        return to_rgb(image, to_8_bit)
    if isinstance(image, dict):
        path, data = image.get("path"), image.get("bytes")
    else:
        path, data = (None, image) if isinstance(image, (bytes, bytearray)) else (os.fspath(image), None)
    name = name or path or "without a name"
    data = _read(path, name) if data is None else bytes(data)
    try:
        if is_dicom(data, path or ""):
            return Image.fromarray(decode_dicom(data, window)).convert("RGB")
        picture = Image.open(io.BytesIO(data))
        if min_size is not None:
            picture.draft("RGB", (min_size, min_size))
        return to_rgb(picture, to_8_bit)
    except ImportError:
        raise
    except Exception as error:  # a damaged file makes Pillow and pydicom raise a dozen different types
        raise ValueError(
            f"The image '{name}' cannot be read ({error}): damaged, truncated or of no known format. {SKIP_REMEDY}"
        ) from error


def _read(path: str | None, name: str) -> bytes:
    if not path:
        raise ValueError(f"The image '{name}' has neither bytes nor a path. {SKIP_REMEDY}")
    try:
        if "://" in path:  # rows of a streamed Hub set
            with fsspec.open(path, "rb") as file:
                return file.read()
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The image file '{path}' does not exist. {SKIP_REMEDY}") from error


@dataclass
class Augmentation:
    """Random crop, brightness and contrast that suit radiology: a picture in, a picture out, resizing left to others.

    The crop keeps the picture's own shape up to `aspect_jitter`, so that what the processor then cuts off the longer
    side is what it cuts off at evaluation. Random numbers come from torch's global generator: DataLoader workers
    seed it, so a run can be repeated.

    Args:
        crop_scale: share of the area that the crop keeps, drawn uniformly between the two; (1, 1) for no crop.
        brightness: factor drawn from 1 - b ... 1 + b.
        contrast: factor drawn from 1 - c ... 1 + c, about the crop's mean gray.
        horizontal_flip: mirror half of the pictures.
        aspect_jitter: the crop's width to height changes by a factor up to this, or its inverse.

    Raises:
        ValueError: a value out of its range.
    """

    crop_scale: tuple[float, float] = (0.7, 1.0)
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

    def __call__(self, picture: Image.Image) -> Image.Image:
        draws = torch.rand(7).tolist()  # always as many, so that one setting does not shift the others' draws
        picture = picture.crop(self._crop_box(picture.size, *draws[:4]))
        brightness = 1 + self.brightness * (2 * draws[4] - 1)
        contrast = 1 + self.contrast * (2 * draws[5] - 1)
        if brightness != 1 or contrast != 1:
            picture = _adjust(picture, brightness, contrast)
        if self.horizontal_flip and draws[6] < 0.5:
            picture = ImageOps.mirror(picture)
        return picture

    def _crop_box(self, size: tuple[int, int], area: float, aspect: float, x: float, y: float) -> tuple[int, ...]:
        """(left, top, right, bottom) from four numbers in 0..1."""
        share = self.crop_scale[0] + (self.crop_scale[1] - self.crop_scale[0]) * area
        # Clipped to sides no longer than the picture's: near a share of 1 no change of shape fits inside.
        stretch = min(max(self.aspect_jitter ** (2 * aspect - 1), share), 1 / share)
        width = max(1, min(size[0], round(size[0] * math.sqrt(share * stretch))))
        height = max(1, min(size[1], round(size[1] * math.sqrt(share / stretch))))
        left, top = int(x * (size[0] - width + 1)), int(y * (size[1] - height + 1))
        return left, top, left + width, top + height

    def shorter_side(self, target: int) -> int:
        """Pixels of the shorter side that a picture needs for every crop to have `target` pixels left of it."""
        return math.ceil(target * math.sqrt(self.aspect_jitter / self.crop_scale[0]))


def _adjust(picture: Image.Image, brightness: float, contrast: float) -> Image.Image:
    """Multiply an RGB picture by `brightness`, then stretch it about its mean gray by `contrast`.

    One table for both: four times as fast as one pass over the picture for each, and no rounding in between.
    """
    mean = brightness * ImageStat.Stat(picture.convert("L")).mean[0] if contrast != 1 else 0.0
    bright = np.clip(brightness * np.arange(256.0), 0, 255)
    table = np.clip(mean + contrast * (bright - mean) + 0.5, 0, 255).astype(np.uint8)
    return picture.point(table.tolist() * 3)


def check_images(
    pairs: Dataset, on_bad_image: str = "error", window: tuple[float, float] | None = None, num_workers: int = 0
) -> Dataset:
    """Decode every image once, before training, to find the damaged ones.

    Args:
        pairs: canonical pairs.
        on_bad_image: "error" stops and names up to five of them; "skip" drops their rows and logs how many.
        window: as for `decode_image`.
        num_workers: processes that help.

    Returns:
        The pairs, less the skipped ones.

    Raises:
        ValueError: with "error", unreadable images; in any case, when none is readable.
    """
    return _decode_all(pairs, None, on_bad_image, window, num_workers)[0]


def cache_images(
    pairs: Dataset,
    shorter_side: int,
    on_bad_image: str = "error",
    window: tuple[float, float] | None = None,
    num_workers: int = 0,
) -> Dataset:
    """`check_images`, and keep what was decoded: the pairs with uncompressed pictures of `shorter_side` pixels.

    Larger pictures are reduced, smaller ones stay. The pixels are in memory, 3 bytes each, and forked DataLoader
    workers share them. Decoding a row afterwards only copies.
    """
    pairs, pictures = _decode_all(pairs, shorter_side, on_bad_image, window, num_workers)
    feature = pairs.features["image"]
    structs = [{"bytes": picture, "path": None} for picture in pictures]
    return pairs.remove_columns("image").add_column("image", structs, feature=feature)


def _decode_all(pairs, shorter_side, on_bad_image, window, num_workers) -> tuple[Dataset, list[bytes | None]]:
    loader = DataLoader(
        pairs.select_columns(["image", "image_id"]),
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
    return pairs, [picture for picture, error in results if not error]


def _try_decode(rows: list[dict], shorter_side: int | None, window) -> list[tuple[bytes | None, str | None]]:
    """(uncompressed picture or None, error or None) of each row."""
    results = []
    for row in rows:
        try:
            # 1: every byte of a JPEG is still read and decoded, only its pixels are not computed.
            picture = decode_image(row["image"], shorter_side or 1, window, name=_name_of(row))
        except (ValueError, FileNotFoundError) as error:
            results.append((None, str(error)))
            continue
        results.append((None if shorter_side is None else _uncompressed(picture, shorter_side), None))
    return results


def _name_of(row: dict) -> str:
    return row["image"].get("path") or row["image_id"]


def _uncompressed(picture: Image.Image, shorter_side: int) -> bytes:
    scale = shorter_side / min(picture.size)
    if scale < 1:
        size = tuple(max(shorter_side, round(side * scale)) for side in picture.size)
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "PPM")
    return buffer.getvalue()
