"""One path from any source to pairs: phantoms, ROCO's layout, files, image folders, the Hugging Face Hub."""

import dataclasses
import re
from collections import Counter
from functools import partial
from logging import getLogger
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
from datasets import Dataset, Features, IterableDataset, Value
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.packaged_modules.csv.csv import CsvConfig

from ..messages import suggest
from .arguments import DataArguments, expand_path
from .hashing import stable_hash
from .images import cache_images, check_images, decode_image
from .pairs import to_pairs, to_streamed_pairs
from .roco import is_roco, read_roco


logger = getLogger(__name__)

SPLITS = ("train", "validation", "test")
FILE_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load_pairs(args: DataArguments, split: str) -> Dataset | IterableDataset:
    """The pairs of one split, whatever the source.

    Args:
        args: the source, its columns, folds, streaming.
        split: "train", "validation" or "test"; with `args.folds` the first two are cut from the source's training
            split.

    Returns:
        Canonical pairs: `image` (undecoded: `{"bytes", "path"}`), `caption`, `image_id`, `label` if the source has
        one, the source's other scalar columns, and in validation and test `augment`, False. With `args.streaming` an
        `IterableDataset`; the training split is then shuffled through a buffer.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a column is missing, a row is wrong, an environment variable is not set.
        ConnectionError: the source is a Hub id and the Hub cannot be reached.
    """
    source_split = "train" if args.folds and split == "validation" else split
    name = args.split_name(source_split)
    if args.source == "phantoms":
        pairs = _phantoms(args, source_split)
    else:
        pairs = _from_source(args, name)
    if args.folds and split != "test":
        pairs = _take_fold(pairs, args, held_out=split == "validation")
    if args.max_pairs is not None:
        pairs = pairs.take(args.max_pairs) if isinstance(pairs, IterableDataset) else _first(pairs, args.max_pairs)
    if split != "train":
        pairs = _not_augmented(pairs)
    return _stream(pairs, args, shuffle=split == "train") if args.streaming else pairs


def load_checked_pairs(args: DataArguments, split: str, num_workers: int = 0) -> Dataset | IterableDataset:
    """`load_pairs`, and every image read once, before hours of work: kept decoded where `args.cache_images` says so.

    Args:
        num_workers: processes that help to read the images. A stream is checked as its rows pass.
    """
    pairs = load_pairs(args, split)
    if isinstance(pairs, IterableDataset):
        return pairs
    if args.cache_images is not None:
        return cache_images(pairs, args.cache_images, args.on_bad_image, args.window, num_workers)
    return check_images(pairs, args.on_bad_image, args.window, num_workers)


def _not_augmented(pairs: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Marks held-out pairs for the collator, which serves training and evaluation."""
    if isinstance(pairs, IterableDataset):
        return pairs.map(lambda row: {"augment": False})
    return pairs.add_column("augment", [False] * len(pairs))


def _first(pairs: Dataset, number: int) -> Dataset:
    return pairs.select(range(min(number, len(pairs))))


def _stream(pairs: Dataset | IterableDataset, args: DataArguments, shuffle: bool) -> IterableDataset:
    if isinstance(pairs, Dataset):  # ROCO's layout, phantoms: only paths or small images are in memory
        pairs = pairs.to_iterable_dataset(num_shards=min(64, len(pairs)))
    if shuffle and args.shuffle_buffer:
        pairs = pairs.shuffle(seed=args.shuffle_seed, buffer_size=args.shuffle_buffer)
    if args.on_bad_image == "skip":
        pairs = pairs.filter(partial(_is_readable, window=args.window))
    return pairs


def _is_readable(row: dict, window: tuple[float, float] | None) -> bool:
    try:
        decode_image(row["image"], min_size=1, window=window, name=row["image_id"])
    except (ValueError, FileNotFoundError) as error:
        logger.warning("Skipped a pair: %s", error)
        return False
    return True


def _phantoms(args: DataArguments, split: str) -> Dataset:
    from .phantoms import make_phantoms

    numbers = (args.phantom_train_pairs, args.phantom_validation_pairs, args.phantom_test_pairs)
    index = SPLITS.index(split)
    seed = int(np.random.SeedSequence([args.phantom_seed, index]).generate_state(1)[0])
    rows = make_phantoms(numbers[index], seed=seed, image_size=args.phantom_size)
    return to_pairs(rows, args, f"split '{split}' of the phantoms")


def _from_source(args: DataArguments, split: str) -> Dataset | IterableDataset:
    """ROCO's layout, a file or folder, or a Hub id."""
    source = expand_path(args.source, "source")
    path = Path(source)
    root = None if args.image_root is None else Path(expand_path(args.image_root, "image_root"))
    where = f"split '{split}' of '{args.source}'"
    if path.is_dir() and is_roco(path, [args.train_split, args.validation_split, args.test_split]):
        rows = read_roco(path, split, args.on_missing)
        names = {"image_column": "image", "caption_column": "caption", "image_id_column": "image_id"}
        return to_pairs(rows, dataclasses.replace(args, **names), where)
    if path.exists():
        rows = _load_local(path, split, args, where)
        default_root = path if path.is_dir() else path.parent
    else:
        rows = _load_hub(source, split, args, where)
        default_root = None
    convert = to_streamed_pairs if args.streaming else to_pairs
    return convert(rows, args, where, root or default_root)


def _load_local(path: Path, split: str, args: DataArguments, where: str) -> Dataset | IterableDataset:
    """A file, a folder with a file named after each split, or a folder as `datasets.load_dataset` understands it."""
    if path.is_file():
        return _load_files({"train": path}, split, args, where)
    splits = {_base(name) for name in (args.train_split, args.validation_split, args.test_split)}
    files = {
        file.stem: file for file in sorted(path.iterdir()) if file.stem in splits and file.suffix in FILE_BUILDERS
    }
    if files:  # tables beside a folder of images: load_dataset would see the images alone
        return _load_files(files, split, args, where)
    try:
        config = datasets.load_dataset_builder(str(path)).config
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data.source '{args.source}' holds no pairs. A folder has ROCO's layout ({split}/radiology/images beside "
            f"captions.txt), a file for each split ({split}.csv, .tsv, .jsonl or .parquet), or images with a "
            "metadata.csv or metadata.jsonl."
        ) from error
    options = {}
    if isinstance(config, CsvConfig):
        options = _csv_options(Path(next(iter(config.data_files.values()))[0]))
    return _load(str(path), split, args, where, **options)


def _load_files(files: dict[str, Path], split: str, args: DataArguments, where: str) -> Dataset | IterableDataset:
    file = files.get(_base(split), next(iter(files.values())))
    files = {name: str(other) for name, other in files.items() if other.suffix == file.suffix}
    ending = file.suffixes[-2] if file.suffix == ".gz" and len(file.suffixes) > 1 else file.suffix
    if ending not in FILE_BUILDERS:
        raise ValueError(
            f"data.source '{file}' is of no known kind; it must be one of {', '.join(FILE_BUILDERS)}, or a folder."
        )
    options = _csv_options(file) if FILE_BUILDERS[ending] == "csv" else {}
    return _load(FILE_BUILDERS[ending], split, args, where, data_files=files, **options)


def _csv_options(file: Path) -> dict:
    """Read every cell as text: ids keep their zeros in front, and a caption "None" is not a missing one."""
    separator = "\t" if ".tsv" in file.suffixes else ","
    try:
        names = pd.read_csv(file, sep=separator, nrows=0).columns
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' is no table in UTF-8 ({error}).") from error
    return {
        "sep": separator,
        "keep_default_na": False,
        "features": Features({name: Value("string") for name in names}),
    }


def _base(split: str) -> str:
    """ "train" of "train[:90%]"."""
    return re.split(r"[\[+]", split)[0]


def _load_hub(source: str, split: str, args: DataArguments, where: str) -> Dataset | IterableDataset:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise FileNotFoundError(
            f"data.source '{args.source}': there is no file or folder '{Path(source).absolute()}', and it is no Hub "
            "id (owner/name) and not 'phantoms'."
        )
    try:
        return _load(source, split, args, where, name=args.subset)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"data.source '{source}' is no file or folder here, and the Hub has no such data set for you. Check the "
            "name; for a private or gated one log in first (hf auth login)."
        ) from error
    except ConnectionError as error:
        raise ConnectionError(
            f"data.source '{source}' is no file or folder here, and the Hugging Face Hub cannot be reached ({error}). "
            "Connect to the network (and unset HF_HUB_OFFLINE), or download the set once where there is one and point "
            "data.source to the folder."
        ) from error


def _load(loader: str, split: str, args: DataArguments, where: str, **options) -> Dataset | IterableDataset:
    """`datasets.load_dataset` with errors that name the source.

    Raises:
        ValueError: the source has no such split, or a file cannot be parsed.
    """
    try:
        loaded = datasets.load_dataset(loader, streaming=args.streaming, **options)
    except DatasetGenerationError as error:
        raise ValueError(f"{where} cannot be read: {error.__cause__ or error}") from error
    if _base(split) not in loaded:
        raise ValueError(
            f"'{args.source}' has no split '{split}'. {suggest(split, list(loaded), 'splits')} Name it with "
            "data.train_split, data.validation_split or data.test_split, or cut one from the training split with "
            "data.folds."
        )
    if _base(split) == split:
        return loaded[split]
    return datasets.load_dataset(loader, split=split, streaming=args.streaming, **options)


def _take_fold(pairs: Dataset | IterableDataset, args: DataArguments, held_out: bool) -> Dataset | IterableDataset:
    """The held-out fold, or the others. In a stream folds are drawn by hash and only roughly of one size."""
    column = args.fold_column or "image_id"
    if isinstance(pairs, IterableDataset):
        return pairs.filter(partial(_in_fold, column=column, args=args, held_out=held_out))
    groups = [_group(*row) for row in zip(pairs[column], pairs["image_id"], strict=True)]
    folds = assign_folds(groups, args.folds)
    return pairs.select([index for index, fold in enumerate(folds) if (fold == args.fold) == held_out])


def _group(value: str | int | None, image_id: str) -> str:
    """A row without a case is a case of its own."""
    return str(value) if value not in (None, "") else f"image {image_id}"


def _in_fold(row: dict, column: str, args: DataArguments, held_out: bool) -> bool:
    fold = stable_hash(_group(row[column], row["image_id"])) % args.folds
    return (fold == args.fold) == held_out


def assign_folds(groups: list[str], folds: int) -> list[int]:
    """A fold for each row: rows of one group share it, folds are of nearly one size, and it is always the same.

    The largest group first, each goes to the fold that has the fewest rows; groups of one size in the order of their
    hashes, so that neighbouring cases spread.

    Raises:
        ValueError: fewer groups than folds.
    """
    sizes = Counter(groups)
    if len(sizes) < folds:
        raise ValueError(f"data.folds is {folds}, but the training split has only {len(sizes)} groups (cases).")
    filled = [0] * folds
    fold_of = {}
    for group in sorted(sizes, key=lambda group: (-sizes[group], stable_hash(group))):
        fold_of[group] = filled.index(min(filled))
        filled[fold_of[group]] += sizes[group]
    return [fold_of[group] for group in groups]
