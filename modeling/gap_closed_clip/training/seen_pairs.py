"""Which of the pairs that a model is evaluated on it was trained on, as far as its folder tells."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import Dataset, IterableDataset

from ..checkpoint import CONFIG_FILE
from ..data import DataArguments, load_pairs
from ..data.arguments import expand_path
from .config import load_config


# Fields by which two sections name the same images by the same ids, and those that cut the same pairs from them.
IDS = ("subset", "image_column", "image_id_column", "image_root")
CUT = (
    *("train_split", "validation_split", "test_split", "split_column"),
    *("folds", "fold", "fold_column", "max_pairs", "on_missing", "on_bad_image"),
)


def count_seen(pairs: Dataset | IterableDataset | None, data: DataArguments, split: str, model: str | Path) -> int:
    """
    How many of the pairs have an image (or, where there is none, a caption) that a model was trained on, or the model
    that its training started from, and so on. A model's folder tells by its train_config.yaml, and the data have to be
    there; where either is not, and of streams and phantoms, nothing is known, and counted.

    Args:
        pairs: of the data's split.
        split: that of "train" is what models are trained on; its pairs are not counted.
        model: folder or Hub id.
    """
    if split == "train" or not isinstance(pairs, Dataset):
        return 0
    seen: set[int] = set()
    for trained in _trained_on(Path(model)):
        for name, own in data.sources().items():
            keys = _keys(pairs, None if isinstance(data.source, str) else name)
            for other in trained.sources().values():
                if _of_one_place(own, other) and not _agree(own, other, CUT):  # one cut keeps its splits apart
                    known = _training_keys(other)
                    seen |= {row for row, key in keys.items() if key in known}
    return len(seen)


def told_seen(number: int, title: str, name: str) -> str:
    """The sentence that says so, of the pairs with that title."""
    return (
        f"{number} of these pairs of {title} are pairs that {name} was trained on, so its figures are not those of "
        "held-out pairs. Use the data section that it was trained with (data.folds, data.fold, data.fold_column, "
        "the splits)."
    )


def _of_one_place(one: DataArguments, other: DataArguments) -> bool:
    """Whether two plain sources are the same, with the same ids. Splits of phantoms have none in common."""
    try:
        places = {Path(expand_path(str(each.source), "source")).resolve() for each in (one, other)}
    except ValueError:  # an environment variable is not set
        return False
    return len(places) == 1 and one.source != "phantoms" and _agree(one, other, IDS)


def _agree(one: DataArguments, other: DataArguments, fields: Iterable[str]) -> bool:
    return all(getattr(one, field) == getattr(other, field) for field in fields)


def _trained_on(folder: Path) -> Iterator[DataArguments]:
    """The data sections of a folder, of the one that its training started from, and so on."""
    known: set[Path] = set()
    while (folder / CONFIG_FILE).is_file() and folder.resolve() not in known:
        known.add(folder.resolve())
        try:
            config = load_config([folder / CONFIG_FILE])
        except (OSError, ValueError):  # of another version, or an environment variable is not set
            return
        yield config.data
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


def _training_keys(data: DataArguments) -> set[str]:
    try:
        pairs = load_pairs(data, "train")
    except (OSError, ValueError):  # no longer there, or no longer as it was
        return set()
    return set(_keys(pairs, None).values()) if isinstance(pairs, Dataset) else set()


__all__ = ["count_seen", "told_seen"]
