"""Reads the folder layout of the original ROCO: `{split}/radiology/images/*` beside `captions.txt`.

Each line of `captions.txt` is `ID<TAB>caption` (real files have a space after the tab); the ID is the image's file
name without its ending. A `metadata.jsonl` beside it may give further columns: one JSON object in each line, with the
`id` or the `file_name` of the image.
"""

import gzip
import json
from logging import getLogger
from pathlib import Path

from datasets import Dataset

from ..messages import shorten, suggest
from .pairs import MissingSplitError, report_half_pairs


logger = getLogger(__name__)

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".dcm", ".dicom")


def is_roco(folder: Path, splits: list[str]) -> bool:
    """Whether at least one of the splits has this layout in the folder."""
    return any((folder / split / "radiology").is_dir() for split in splits)


def read_roco(folder: Path, split: str, on_missing: str = "error", may_lack: bool = False) -> Dataset:
    """Read one split: a row for each line of its captions, in their order.

    An ID may have several lines: that is one image with several captions.

    Args:
        folder: root of the data set.
        split: name of the split's folder.
        on_missing: what to do with captions without image, images without caption and empty captions: "error" stops,
            "skip" leaves them out and logs their number.
        may_lack: there are further modalities, of which a half may have one: such rows are kept, with "" for what they
            lack.

    Returns:
        Rows of `image` (a file path), `caption`, `image_id` and the scalar columns of `metadata.jsonl`.

    Raises:
        FileNotFoundError: the split's folder, its images or its captions are missing.
        ValueError: a line has no tab, a line is repeated, two image files have one ID, or there is half a pair.
    """
    root = folder / split / "radiology"
    if not root.is_dir():
        splits = sorted(path.name for path in folder.iterdir() if (path / "radiology").is_dir())
        raise MissingSplitError(
            f"'{root}' does not exist. {suggest(split, splits, 'splits')} data.train_split, "
            "data.validation_split and data.test_split name them."
        )
    file = _captions_file(root)
    images = _list_images(root / "images")
    captions = read_captions(file)
    rows = [(image_id, text) for _, image_id, text in captions if may_lack or (image_id in images and text)]
    if may_lack:
        captioned = {image_id for image_id, _ in rows}
        rows += [(image_id, "") for image_id in images if image_id not in captioned]
    else:
        report_half_pairs(_find_halves(captions, images), str(file), on_missing)
    if not rows:
        raise ValueError(f"'{root}' holds no pair of an image and a caption.")
    columns = {
        "image": [str(images.get(image_id, "")) for image_id, _ in rows],
        "caption": [text for _, text in rows],
        "image_id": [image_id for image_id, _ in rows],
    }
    metadata = root / "metadata.jsonl"
    if metadata.is_file():
        columns |= _metadata_columns(metadata, columns["image_id"])
    return Dataset.from_dict(columns)


def read_captions(file: Path) -> list[tuple[int, str, str]]:
    """Read `captions.txt` or `captions.txt.gz`: line number, ID and caption of every line that is not blank.

    Raises:
        ValueError: the file is not UTF-8, or a line has no tab, has no ID or repeats another; the message names the
            file and the line.
    """
    opener = gzip.open if file.suffix == ".gz" else open
    rows = []
    first_seen: dict[tuple[str, str], int] = {}
    try:
        with opener(file, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                image_id, tab, caption = line.rstrip("\r\n").partition("\t")
                row = (image_id.strip(), caption.strip())
                if not tab or not row[0]:
                    problem = "no tab" if not tab else "no ID before the tab"
                    raise ValueError(
                        f"{file}, line {number}: {problem} in '{line.strip()[:60]}'. Each line must be ID<TAB>caption."
                    )
                if row in first_seen:
                    raise ValueError(
                        f"{file}, line {number}: repeats line {first_seen[row]} (ID '{row[0]}' with the same "
                        "caption). Remove one of them."
                    )
                first_seen[row] = number
                rows.append((number, *row))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}). Convert it, for example with iconv.") from error
    return rows


def _captions_file(root: Path) -> Path:
    for name in ("captions.txt", "captions.txt.gz"):
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(
        f"'{root / 'captions.txt'}' does not exist (nor captions.txt.gz). It must hold one ID<TAB>caption a line."
    )


def _list_images(folder: Path) -> dict[str, Path]:
    """The image file of each ID in a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"'{folder}' does not exist. It must hold the images, named after their IDs.")
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_ENDINGS or path.name.startswith("."):
            continue
        if path.stem in images:
            raise ValueError(
                f"'{folder}' has two images of the ID '{path.stem}': {images[path.stem].name} and {path.name}. "
                "Remove one of them."
            )
        images[path.stem] = path
    return images


def _find_halves(captions: list[tuple[int, str, str]], images: dict[str, Path]) -> dict[str, list[str]]:
    """Empty captions, captions without an image and images without a caption, described by line number or ID."""
    captioned = {image_id for _, image_id, _ in captions}
    return {
        "empty captions": [f"line {number}: {image_id}" for number, image_id, text in captions if not text],
        "captions without an image file": [image_id for _, image_id, _ in captions if image_id not in images],
        "images without a caption": [image_id for image_id in images if image_id not in captioned],
    }


def _tell_what_does_not_match(file: Path, told: list[str], image_ids: list[str]) -> None:
    """Warns of lines of no image if there are images without a line: an id 0012 may have become 12 in the metadata."""
    strange, lacking = sorted(set(told) - set(image_ids)), sorted(set(image_ids) - set(told))
    if strange and lacking:
        logger.warning(
            f"{file} tells nothing of {len(lacking)} of {len(image_ids)} images ({shorten(lacking)}), and "
            f"{len(strange)} of its lines are of no image with a caption ({shorten(strange)}). An id is the image's "
            "file name without its ending, as text."
        )


def _metadata_columns(file: Path, image_ids: list[str]) -> dict[str, list]:
    """The scalar columns of `metadata.jsonl` in the order of `image_ids`, with None for what is missing.

    A column whose values are of different types becomes text; columns of lists or objects are left out.

    Raises:
        ValueError: a line is not a JSON object that names its image.
    """
    records = {}
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                key = record["id"] if "id" in record else Path(record["file_name"]).stem
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}, line {number}: not a JSON object with an 'id' or a 'file_name' ({error})."
                ) from error
            records[str(key)] = record
    _tell_what_does_not_match(file, list(records), list(dict.fromkeys(image_ids)))
    names = dict.fromkeys(name for record in records.values() for name in record)
    columns = {}
    for name in names:
        if name in ("image", "caption", "image_id", "id", "file_name"):
            continue
        values = [records.get(image_id, {}).get(name) for image_id in image_ids]
        kinds = {type(value) for value in values if value is not None}
        if kinds & {list, dict}:
            continue
        columns[name] = values if len(kinds) == 1 else [None if value is None else str(value) for value in values]
    return columns
