"""Which of the pairs that a model is evaluated on it was trained or fitted on, as far as its folder tells."""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, IterableDataset

from ..checkpoint import CONFIG_FILE, FITTED_FILE
from ..data import DataArguments, load_pairs
from ..data.arguments import expand_path
from ..data.columns import CANONICAL_COLUMNS, is_missing, text_of
from .config import RunConfig, load_config
from .yaml_files import read_yaml


# Fields by which two sections name the same images by the same ids, and those that cut the same pairs from them.
IDS = ("subset", "image_column", "image_id_column", "image_root")
CUT = (
    *("train_split", "validation_split", "test_split", "split_column"),
    *("folds", "fold", "fold_column", "max_pairs", "on_missing", "on_bad_image"),
)
PHANTOMS = [field.name for field in fields(DataArguments) if field.name.startswith("phantom_")]


def note_fitted(folder: Path, config: RunConfig, split: str, origin: str | Path | None = None) -> None:
    """
    Writes into a model's folder by which pairs its gap was closed: figures on them are not of held-out pairs.

    Args:
        origin: the model whose embeddings were mapped, if what that one was fitted on still counts.
    """
    data = {name: value for name, value in config.to_dict()["data"].items() if name != "feature_cache"}
    note: dict[str, Any] = {"split": split, "data": data}
    if origin is not None and (Path(origin) / FITTED_FILE).is_file():
        note["before"] = read_yaml(Path(origin) / FITTED_FILE)
    text = yaml.safe_dump(note, sort_keys=False, allow_unicode=True)
    (folder / FITTED_FILE).write_text(text, encoding="utf-8")


def count_seen(pairs: Dataset | IterableDataset | None, data: DataArguments, split: str, model: str | Path) -> int:
    """How many of the pairs `seen_rows` finds."""
    return len(seen_rows(pairs, data, split, model))


def seen_rows(pairs: Dataset | IterableDataset | None, data: DataArguments, split: str, model: str | Path) -> set[int]:
    """
    The rows that have an image (or, where there is none, a caption) that a model was trained on, or its gap closed by,
    or the model that its training started from, and so on. A model's folder tells by its train_config.yaml and its
    fitted_on.yaml, and the data have to be there; where either is not, and of streams, nothing is known, and found.

    Args:
        pairs: of the data's split.
        split: that of "train" is what models are trained on; its pairs are not counted.
        model: folder or Hub id.
    """
    seen: set[int] = set()
    if split == "train" or not isinstance(pairs, Dataset):
        return seen
    for trained, trained_split in _trained_on(Path(model)):
        for name, own in data.sources().items():
            keys = _keys(pairs, None if isinstance(data.source, str) else name)
            for other in trained.sources().values():
                if known := _known_keys(own, split, other, trained_split):
                    seen |= {row for row, key in keys.items() if key in known}
    return seen


def shared_rows(pairs: Dataset, train_pairs: Dataset) -> set[int]:
    """
    The rows whose image is among the training pairs, too, as it may be where a table says which split a row belongs
    to. In another split one id may stand for another image.

    Args:
        pairs, train_pairs: with images as `load_pairs` gives them.
    """
    first: dict[str, int] = {}
    for row, image_id in enumerate(train_pairs["image_id"]):
        first.setdefault(image_id, row)
    images, train_images = (each.select_columns("image") for each in (pairs, train_pairs))
    known: dict[str, bool] = {"": False}
    rows = set()
    for row, image_id in enumerate(pairs["image_id"]):
        if image_id not in known:
            known[image_id] = image_id in first and images[row] == train_images[first[image_id]]
        if known[image_id]:
            rows.add(row)
    return rows


def shared_cases(pairs: Dataset, train_pairs: Dataset, data: DataArguments) -> set[int]:
    """
    The rows of a case (`data.fold_column`, a patient) that training pairs are of, too: another image of one patient
    is no new patient. In several sources the same name is another case.
    """
    rows: set[int] = set()
    for name, own in data.sources().items():
        source = None if isinstance(data.source, str) else name
        known = set(_cases(train_pairs, own.fold_column, source).values())
        rows |= {row for row, case in _cases(pairs, own.fold_column, source).items() if case in known}
    return rows


def _cases(pairs: Dataset, column: str | None, source: str | None) -> dict[int, str]:
    """{row: its case}, of the rows of one source that name one in a column of its own."""
    if column is None or column in CANONICAL_COLUMNS or column not in pairs.column_names:
        return {}
    names = [None] * len(pairs) if source is None else pairs["source"]
    values = zip(pairs[column], names, strict=True)
    found = {row: case for row, (case, name) in enumerate(values) if name == source and not is_missing(case)}
    return {row: text_of(case).strip() for row, case in found.items()}  # as folds know them


def told_cases(number: int, total: int, split: str, data: DataArguments) -> str:
    """The sentence that says so, of the pairs of a split."""
    return (
        f"{number} of the {total} pairs of split '{split}' of {data.title} are of a case (data.fold_column) that "
        "training pairs are of, too, so figures on them are not those of new cases. Give all rows of a case the same "
        "split."
    )


def told_shared(number: int, total: int, split: str, title: str) -> str:
    """The sentence that says so, of the pairs of a split of the data with that title."""
    return (
        f"{number} of the {total} pairs of split '{split}' of {title} have an image that is among the training pairs, "
        "too, so figures on them are not those of held-out pairs. Give all rows of an image the same split."
    )


def told_seen(number: int, title: str, name: str) -> str:
    """The sentence that says so, of the pairs with that title."""
    return (
        f"{number} of these pairs of {title} are pairs that {name} was trained on (or fitted on, by `center`), so its "
        "figures are not those of held-out pairs. Use the data section that it was trained with (data.folds, "
        "data.fold, data.fold_column, the splits), another split than that of `center`, and give all rows of an image "
        "the same split."
    )


def _known_keys(own: DataArguments, split: str, trained: DataArguments, trained_split: str) -> set[str]:
    """The keys of a plain source that a training on (a split of) another one has seen."""
    try:
        place, other = (Path(expand_path(str(each.source), "data.source")).resolve() for each in (own, trained))
    except ValueError:  # an environment variable is not set
        return set()
    if not _agree(own, trained, IDS):
        return set()
    if own.source == "phantoms":  # splits of phantoms have no image in common
        same = trained.source == "phantoms" and split == trained_split and _agree(own, trained, PHANTOMS)
        return _keys_of(trained, trained_split) if same else set()
    if place != other:  # tables of one folder, and the folder itself, may hold the same images
        beside = place.exists() and other.exists() and _folder_of(place) == _folder_of(other)
        return _shared_keys(own, split, trained, trained_split) if beside else set()
    if split == trained_split or not _agree(own, trained, CUT):
        return _keys_of(trained, trained_split)
    # One cut keeps folds apart. All images of a data set of the Hub would be read to see whether its splits are.
    apart = (own.folds and {split, trained_split} == {"train", "validation"}) or not place.exists()
    return set() if apart else _shared_keys(own, split, trained, trained_split)


def _folder_of(place: Path) -> Path:
    return place if place.is_dir() else place.parent


def _agree(one: DataArguments, other: DataArguments, fields: Iterable[str]) -> bool:
    return all(getattr(one, field) == getattr(other, field) for field in fields)


def _trained_on(folder: Path) -> Iterator[tuple[DataArguments, str]]:
    """The data sections and splits of a folder, of the one that its training started from, and so on."""
    known: set[Path] = set()
    while folder.resolve() not in known:
        known.add(folder.resolve())
        try:
            fitted = []
            note = read_yaml(folder / FITTED_FILE) if (folder / FITTED_FILE).is_file() else None
            while note:
                fitted.append((DataArguments(**note["data"]), note["split"]))
                yield fitted[-1]
                note = note.get("before")
            if not (folder / CONFIG_FILE).is_file():
                return
            config = load_config([folder / CONFIG_FILE])
        except (OSError, ValueError, TypeError, KeyError):  # of another version, or a variable is not set
            return
        if (config.data, "train") not in fitted:
            yield config.data, "train"
        if config.model.checkpoint is None:
            return
        folder = Path(config.model.checkpoint)


def _keys(pairs: Dataset, source: str | None) -> dict[int, str]:
    """{row: its image's id, or its caption}, of the rows of one source."""
    images, captions = pairs["image_id"], pairs["caption"]
    if source is None:
        return {row: image or captions[row] for row, image in enumerate(images)}
    rows = [row for row, name in enumerate(pairs["source"]) if name == source]
    return {row: images[row].removeprefix(f"{source}/") or captions[row] for row in rows}


def _shared_keys(data: DataArguments, split: str, trained: DataArguments, trained_split: str) -> set[str]:
    """The keys of a split whose images are among those of the other section's split."""
    try:
        pairs, train_pairs = load_pairs(data, split), load_pairs(trained, trained_split)
    except (OSError, ValueError):  # no longer there, or no longer as it was
        return set()
    if not (isinstance(pairs, Dataset) and isinstance(train_pairs, Dataset)):
        return set()
    keys = _keys(pairs, None)
    return {keys[row] for row in shared_rows(pairs, train_pairs)}


def _keys_of(data: DataArguments, split: str) -> set[str]:
    try:
        pairs = load_pairs(data, split)
    except (OSError, ValueError):  # no longer there, or no longer as it was
        return set()
    return set(_keys(pairs, None).values()) if isinstance(pairs, Dataset) else set()


__all__ = [
    *("count_seen", "note_fitted", "seen_rows", "shared_cases", "shared_rows"),
    *("told_cases", "told_seen", "told_shared"),
]
