"""The folder layout of the original ROCO: `{split}/radiology/images/*` beside `captions.txt`.

Each line of `captions.txt` is `ID<TAB>caption` (real files have a space after the tab), ID being the image's file name
without its ending. A `metadata.jsonl` beside it may give further columns: one JSON object a line, with the `id` or the
`file_name` of the image.
"""

import gzip
import json
from logging import getLogger
from pathlib import Path

from datasets import Dataset

from ..messages import shorten, suggest


logger = getLogger(__name__)

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".dcm", ".dicom")


def is_roco(folder: Path, splits: list[str]) -> bool:
    """Whether a folder has this layout, in any of the splits."""
    return any((folder / split / "radiology").is_dir() for split in splits)


def read_roco(folder: Path, split: str, on_missing: str = "error") -> Dataset:
    """Rows `image` (file path), `caption`, `image_id` and the columns of `metadata.jsonl`, in the captions' order.

    An ID may have several lines with different captions: one image, several captions.

    Args:
        folder: the set's root.
        split: name of the split's folder.
        on_missing: what to do with captions without image, images without caption and empty captions: "error" or
            "skip" (logged with their number).

    Raises:
        FileNotFoundError: the split's folder, its images or its captions are missing.
        ValueError: a line without a tab, a repeated line, two image files of one ID, half a pair.
    """
    root = folder / split / "radiology"
    if not root.is_dir():
        splits = sorted(path.name for path in folder.iterdir() if (path / "radiology").is_dir())
        raise FileNotFoundError(
            f"'{root}' does not exist. {suggest(split, splits, 'splits')} data.train_split, "
            "data.validation_split and data.test_split name them."
        )
    file = _captions_file(root)
    images = _list_images(root / "images")
    captions = read_captions(file)
    _report_halves(captions, images, file, on_missing)
    rows = [(image_id, text) for _, image_id, text in captions if image_id in images and text]
    if not rows:
        raise ValueError(f"'{root}' holds no pair of an image and a caption.")
    columns = {
        "image": [str(images[image_id]) for image_id, _ in rows],
        "caption": [text for _, text in rows],
        "image_id": [image_id for image_id, _ in rows],
    }
    metadata = root / "metadata.jsonl"
    if metadata.is_file():
        columns |= _metadata_columns(metadata, columns["image_id"])
    return Dataset.from_dict(columns)


def read_captions(file: Path) -> list[tuple[int, str, str]]:
    """(line number, ID, caption) of every line of `captions.txt` or `captions.txt.gz`; blank lines are passed over.

    Raises:
        ValueError: not UTF-8, a line without a tab or without an ID, a line that repeats another; names file and line.
    """
    opener = gzip.open if file.suffix == ".gz" else open
    rows, first_seen = [], {}
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
                        f"{file}, line {number}: repeats line {first_seen[row]} (ID '{row[0]}' with the "
                        "same caption). Remove one of them."
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
    """Image file of each ID."""
    if not folder.is_dir():
        raise FileNotFoundError(f"'{folder}' does not exist. It must hold the images, named after their IDs.")
    images = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_ENDINGS or path.name.startswith("."):
            continue
        if path.stem in images:
            raise ValueError(
                f"'{folder}' has two images of the ID '{path.stem}': {images[path.stem].name} and "
                f"{path.name}. Remove one of them."
            )
        images[path.stem] = path
    return images


def _report_halves(captions: list[tuple[int, str, str]], images: dict[str, Path], file: Path, on_missing: str) -> None:
    """Raise or log empty captions, captions without an image and images without a caption."""
    captioned = {image_id for _, image_id, _ in captions}
    halves = {
        "empty captions": [f"line {number}: {image_id}" for number, image_id, text in captions if not text],
        "captions without an image file": [image_id for _, image_id, _ in captions if image_id not in images],
        "images without a caption": [image_id for image_id in images if image_id not in captioned],
    }
    problems = "; ".join(f"{what}: {len(which)} ({shorten(which)})" for what, which in halves.items() if which)
    if problems and on_missing == "error":
        raise ValueError(
            f"{file} has half pairs: {problems}. Complete the pairs, or leave such halves out with "
            "data.on_missing=skip."
        )
    if problems:
        logger.warning("%s: skipped %s", file, problems)


def _metadata_columns(file: Path, image_ids: list[str]) -> dict[str, list]:
    """The scalar columns of `metadata.jsonl`, as text or numbers in the order of `image_ids`, None where missing."""
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
