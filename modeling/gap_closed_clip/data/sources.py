"""Loads pairs from any source: phantoms, ROCO's layout, files, folders, the Hugging Face Hub."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import partial
from logging import getLogger
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.packaged_modules.csv.csv import CsvConfig

from .arguments import DataArguments, expand_path
from .columns import ADDED_COLUMNS
from .folds import take_fold
from .images import cache_images, check_further_files, check_images, decode_image
from .join import error_of_source, join_pairs, join_streams, name_source
from .modalities import has_image
from .pairs import to_pairs, to_streamed_pairs
from .roco import is_roco, read_roco
from .split_column import find_split_column, missing_split, rows_of_split
from .tables import (
    FILE_BUILDERS,
    as_table,
    check_utf8,
    csv_options,
    files_of_splits,
    is_saved,
    tables_of_all,
    tell_of_several,
    without_slice,
)


logger = getLogger(__name__)

SPLITS = ("train", "validation", "test")
Check = Callable[[Dataset, DataArguments], Dataset]


def load_pairs(args: DataArguments, split: str) -> Dataset | IterableDataset:
    """Load the pairs of one split from whatever source, or sources, the arguments name.

    Args:
        args: the sources, their columns, their folds, and whether they are streamed.
        split: "train", "validation" or "test". With `args.folds` the first two are cut from each source's training
            split.

    Returns:
        Canonical pairs: `image` (undecoded: `{"bytes", "path"}`), `caption`, `image_id`, `label` if a source has one,
        the sources' other scalar columns, and in validation and test `augment`, which is False. With a list of sources
        also `source`, the name, which stands before the `image_id` as well (`name/id`), and `window` where the sources
        have different ones; they come one after the other. With `args.streaming` it is an `IterableDataset`, the
        training split is shuffled through a buffer, and of several sources a row of each comes in turn, without other
        columns.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a column or a split is missing, a row is wrong, or an environment variable is not set.
        ConnectionError: a source is a Hub id and the Hub cannot be reached.
    """
    return _load_all(args, split, check=lambda pairs, own: pairs)


def load_checked_pairs(args: DataArguments, split: str, num_workers: int = 0) -> Dataset | IterableDataset:
    """As `load_pairs`, with every image decoded once, so that a damaged one is found before hours of work; and every
    file of a further modality.

    With `args.cache_images` the decoded images are kept. A stream is not decoded now; its rows are checked when they
    pass.

    Args:
        args, split: as for `load_pairs`.
        num_workers: processes that help to decode the images.

    Raises:
        ValueError: an image is unreadable and `args.on_bad_image` is "error", or no image is readable at all.
        FileNotFoundError, ConnectionError: as `load_pairs`.
    """

    def check(pairs: Dataset, own: DataArguments) -> Dataset:
        if own.cache_images is not None:
            return cache_images(pairs, own.cache_images, own.on_bad_image, own.window, num_workers)
        return check_images(pairs, own.on_bad_image, own.window, num_workers)

    return _load_all(args, split, check)


def _load_all(args: DataArguments, split: str, check: Check) -> Dataset | IterableDataset:
    """The pairs of the source, or of all in a list that have the split."""
    if isinstance(args.source, str):
        return _finish(_load_one(args, split), args, split, check)
    sources = args.sources()
    windows_differ = any(own.window != args.window for own in sources.values())
    parts = []
    for name, own in sources.items():
        if not own.has_split(split):
            continue
        try:
            window = list(own.window or ()) if windows_differ else None
            pairs = name_source(_load_one(own, split), name, window, own.streaming, args.all_modalities)
            parts.append(_finish(pairs, own, split, check))
        except (OSError, ValueError) as error:
            raise error_of_source(error, name, split) from error
    if not parts:
        raise ValueError(f"None of the sources {args.title} has a {split} split: data.{split}_split is null for each.")
    return join_streams(parts) if args.streaming else join_pairs(parts)


def _load_one(args: DataArguments, split: str) -> Dataset | IterableDataset:
    """Canonical pairs of a plain source."""
    source_split = "train" if args.folds and split == "validation" else split
    split_name = args.split_name(source_split)
    pairs = _draw_phantoms(args, source_split) if args.source == "phantoms" else _read_source(args, split_name)
    if args.folds and split != "test":
        pairs = take_fold(pairs, args, held_out=split == "validation")
    if args.folds and args.fold_column in ADDED_COLUMNS:
        pairs = pairs.remove_columns(args.fold_column)
    if args.max_pairs is not None:
        pairs = pairs.take(args.max_pairs) if isinstance(pairs, IterableDataset) else _first(pairs, args.max_pairs)
    return pairs


def _finish(
    pairs: Dataset | IterableDataset, args: DataArguments, split: str, check: Check
) -> Dataset | IterableDataset:
    """Mark what is held out, then stream the pairs or check them."""
    if split != "train":
        pairs = _mark_as_not_augmented(pairs)
    if args.streaming:
        return _stream(pairs, args, shuffle=split == "train")
    assert isinstance(pairs, Dataset)  # nothing else is read without streaming
    return check(pairs, args)


def _mark_as_not_augmented(pairs: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Mark held-out pairs for the collator, since a Trainer has one for training and evaluation."""
    if isinstance(pairs, IterableDataset):
        features = pairs.features and Features(pairs.features | {"augment": Value("bool")})
        return pairs.map(lambda row: {"augment": False}, features=features)
    return pairs.add_column("augment", [False] * len(pairs))


def _first(pairs: Dataset, number: int) -> Dataset:
    return pairs.select(range(min(number, len(pairs))))


def _stream(pairs: Dataset | IterableDataset, args: DataArguments, shuffle: bool) -> IterableDataset:
    """The pairs as a stream, shuffled and freed of unreadable images as the arguments say."""
    if isinstance(pairs, Dataset):  # ROCO's layout and phantoms: only paths or small images are in memory
        pairs = pairs.to_iterable_dataset(num_shards=min(64, len(pairs)))
    if shuffle and args.shuffle_buffer:
        pairs = pairs.shuffle(seed=args.shuffle_seed, buffer_size=args.shuffle_buffer)
    if args.on_bad_image == "skip":
        pairs = pairs.filter(partial(_is_readable, window=args.window))
    return pairs


def _is_readable(row: dict, window: tuple[float, float] | None) -> bool:
    """Whether the row's image, and the files of its further modalities, can be read; if not, that is logged."""
    try:
        check_further_files(row, window)
        if not has_image(row):
            return True
        decode_image(row["image"], min_size=1, window=window, name=row["image_id"])
    except (ValueError, FileNotFoundError) as error:
        logger.warning("Skipped a pair: %s", error)
        return False
    return True


def _draw_phantoms(args: DataArguments, split: str) -> Dataset:
    """Phantoms of one split, drawn from a seed that no other split has."""
    from .phantoms import make_phantoms

    numbers = (args.phantom_train_pairs, args.phantom_validation_pairs, args.phantom_test_pairs)
    index = SPLITS.index(split)
    seed = int(np.random.SeedSequence([args.phantom_seed, index]).generate_state(1)[0])
    rows = make_phantoms(numbers[index], seed=seed, image_size=args.phantom_size)
    return to_pairs(rows, args, f"split '{split}' of the phantoms")


def _read_source(args: DataArguments, split: str) -> Dataset | IterableDataset:
    """Canonical pairs of a folder in ROCO's layout, another file or folder, or a Hub id; `split` is its own name."""
    assert isinstance(args.source, str)  # one source
    source = expand_path(args.source, "data.source")
    path = Path(source)
    if args.subset is not None and path.exists():
        raise ValueError(
            f"data.subset is '{args.subset}', a configuration of a Hub data set, and data.source '{args.source}' is a "
            "file or folder here, which has none: leave it out (data.subset=null), or name its files."
        )
    root = None if args.image_root is None else Path(expand_path(args.image_root, "data.image_root"))
    source_name = f"split '{split}' of '{args.source}'"
    if path.is_dir() and is_roco(path, args.split_names()):
        rows = read_roco(path, split, args.on_missing, bool(args.modalities))
        args = dataclasses.replace(args, image_column="image", caption_column="caption", image_id_column="image_id")
        return to_pairs(rows, args, source_name)
    if path.exists():
        rows = _load_local(path, split, args, source_name)
        default_root = path if path.is_dir() else path.parent
    else:
        rows = _load_from_hub(source, split, args, source_name)
        default_root = None
    convert = to_streamed_pairs if args.streaming else to_pairs
    return convert(rows, args, source_name, root or default_root)


def _load_local(path: Path, split: str, args: DataArguments, source_name: str) -> Dataset | IterableDataset:
    """Rows of a file, of a folder with a file for each split, or of any folder that `datasets.load_dataset` reads."""
    if path.is_file():
        return _load_files({"train": path}, split, args, source_name)
    if is_saved(path):
        return _load_saved(path, split, args, source_name)
    named = files_of_splits(path, args)
    if named:  # there may be images beside the tables, and load_dataset would see nothing but them
        return _load_files(named, split, args, source_name)
    tables = tables_of_all(path)
    if len(tables) == 1:
        return _load_files({"train": tables[0].file}, split, args, source_name)
    try:
        config = datasets.load_dataset_builder(str(path)).config
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data.source '{args.source}' holds no pairs. A folder has ROCO's layout ({split}/radiology/images beside "
            f"captions.txt), a file for each split ({split}.csv, .tsv, .jsonl or .parquet), or images with a "
            "metadata.csv or metadata.jsonl."
        ) from error
    files = [Path(file) for of_split in config.data_files.values() for file in of_split]
    tell_of_several(tables, files, args)
    options = csv_options(files[0]) if isinstance(config, CsvConfig) else {}
    return _load(str(path), split, args, source_name, **options)


def _load_files(
    files: dict[str, Path], split: str, args: DataArguments, source_name: str
) -> Dataset | IterableDataset:
    """Rows of tables; `files` has one for each split, or a single one under any name."""
    file = files.get(without_slice(split), next(iter(files.values())))
    kind = as_table(file).kind
    if not kind:
        raise ValueError(
            f"data.source '{file}' is of no known kind; it must be one of {', '.join(FILE_BUILDERS)}, or a folder."
        )
    data_files = {name: str(other) for name, other in files.items() if as_table(other).kind == kind}
    names = list(data_files)
    if without_slice(split) == split:  # alone, since other splits may have other columns
        data_files = {name: other for name, other in data_files.items() if other == str(file)}
    for other in data_files.values():
        check_utf8(Path(other))
    options = csv_options(file) if FILE_BUILDERS[kind] == "csv" else {}
    return _load(FILE_BUILDERS[kind], split, args, source_name, names, data_files=data_files, **options)


def _load_saved(path: Path, split: str, args: DataArguments, source_name: str) -> Dataset | IterableDataset:
    """Rows of what `save_to_disk` has written: splits, or one table."""
    if without_slice(split) != split:
        raise ValueError(
            f"'{split}' asks for a part of a split, and '{args.source}' was written by save_to_disk, of which whole "
            "splits are read: name the split alone, and cut it with data.max_pairs or data.folds."
        )
    try:
        saved = datasets.load_from_disk(str(path))
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:  # a damaged or missing file
        raise ValueError(f"{source_name} cannot be read: {type(error).__name__}: {error}") from error
    loaded = {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    if args.streaming:
        loaded = {name: rows.to_iterable_dataset(max(1, min(64, len(rows)))) for name, rows in loaded.items()}
    return _rows_of(loaded, split, args, source_name)


def _load_from_hub(source: str, split: str, args: DataArguments, source_name: str) -> Dataset | IterableDataset:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise FileNotFoundError(
            f"data.source '{args.source}': there is no file or folder '{Path(source).absolute()}', and it is neither "
            "a Hub id (owner/name) nor 'phantoms'."
        )
    try:
        return _load(source, split, args, source_name, name=args.subset)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"data.source '{source}' is no file or folder here, and the Hub has no such data set for you. Check the "
            "name; for a private or gated data set log in first (hf auth login)."
        ) from error
    except ConnectionError as error:
        raise ConnectionError(
            f"data.source '{source}' is no file or folder here, and the Hugging Face Hub cannot be reached ({error}). "
            "Connect to the network (and unset HF_HUB_OFFLINE), or download the data set where there is a network and "
            "point data.source to its folder."
        ) from error


def _load(
    loader: str, split: str, args: DataArguments, source_name: str, names: Sequence[str] = (), **options
) -> Dataset | IterableDataset:
    """Call `datasets.load_dataset` and turn its errors into messages that name the source.

    Args:
        loader: a builder of `datasets`, a folder, or a Hub id.
        split: the source's name of the split, which may ask for a slice: "train[:90%]".
        args: whether to stream.
        source_name: what error messages call the source.
        names: of all splits that the source has, where fewer are loaded.
        options: for `load_dataset`.

    Raises:
        ValueError: the source has no such split, its column of splits is wrong, or a file cannot be parsed.
    """
    try:
        loaded = datasets.load_dataset(loader, streaming=args.streaming, **options)
    except DatasetGenerationError as error:
        cause = str(error.__cause__ or error)
        if "BatchSize must be greater than 0" in cause:  # of a parquet file without rows
            raise ValueError(f"{source_name} holds no rows.") from error
        raise ValueError(f"{source_name} cannot be read: {cause}") from error
    except (FileNotFoundError, ConnectionError, ImportError):
        raise
    except StopIteration as error:  # of a file without a line
        raise ValueError(f"{source_name} holds no rows.") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:  # a damaged file
        if "corresponds to no data" in str(error):
            raise ValueError(f"{source_name} holds no rows.") from error
        raise ValueError(f"{source_name} cannot be read: {type(error).__name__}: {error}") from error
    rows = _rows_of(loaded, split, args, source_name, names)  # of a slice the whole; a column of splits has refused it
    if without_slice(split) != split:
        return datasets.load_dataset(loader, split=split, streaming=args.streaming, **options)
    return rows


def _rows_of(
    loaded: dict[str, Dataset | IterableDataset],
    split: str,
    args: DataArguments,
    source_name: str,
    names: Sequence[str] = (),
) -> Dataset | IterableDataset:
    """Those of a split, by a column or by the name; of a slice the whole split. `names` are those of all splits."""
    names = names or list(loaded)
    if list(names) == ["train"]:
        column = find_split_column(loaded["train"], args, source_name)
        if column is not None:
            return rows_of_split(loaded["train"], column, split, args, source_name)
    elif args.split_column not in (None, DataArguments.split_column):
        raise ValueError(f"data.split_column: {args.title} has splits of its own ({', '.join(names)}). Leave it out.")
    if without_slice(split) not in loaded:
        raise missing_split(args, split, list(names))
    return loaded[without_slice(split)]
