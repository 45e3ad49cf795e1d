"""Tables of pairs: which files of a folder they are, of which split, and how they are read."""

import codecs
import gzip
import re
import zlib
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from datasets import Features, Value

from ..messages import shorten
from .arguments import DataArguments
from .split_column import WORDS


logger = getLogger(__name__)

SPLIT_IN_NAME = re.compile("(?<![a-z])(train|val|dev|test|eval)", re.IGNORECASE)  # not in latest or retrieval
FILE_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


class Table(NamedTuple):
    """A file, its name without the ending, and which kind of table the ending stands for: "" for none that is read."""

    file: Path
    stem: str
    kind: str


def as_table(file: Path) -> Table:
    """pairs.csv, pairs.CSV, pairs.csv.gz: all of them are the table `pairs` of kind .csv."""
    named = Path(file.stem) if file.suffix.lower() == ".gz" else file
    kind = named.suffix.lower()
    return Table(file, named.stem, kind if kind in FILE_BUILDERS else "")


def tables_of(folder: Path) -> list[Table]:
    """Without hidden files: macOS leaves a ._pairs.csv beside pairs.csv on disks of other systems."""
    return [table for table in map(as_table, sorted(folder.iterdir())) if table.kind and table.file.name[0] != "."]


def tables_of_all(folder: Path) -> list[Table]:
    """The tables of all pairs, under any name: none where one has the name of a split in its own."""
    tables = [table for table in tables_of(folder) if table.stem != "metadata"]
    return [] if any(SPLIT_IN_NAME.search(table.stem) for table in tables) else tables


def tell_of_several(tables: list[Table], read: list[Path], args: DataArguments) -> None:
    """Warns of tables of one folder, other than numbered parts of one, with those among the files that are read."""
    if len({re.sub(r"\d+", "", table.stem) for table in tables}) < 2:
        return
    names = {file.name for file in read}
    taken = [table.file.name for table in tables if table.file.name in names]
    told = f"{shorten(taken)}, as one" if taken else "none of them but the images beside them"
    logger.warning(
        f"data.source '{args.source}' has several tables ({shorten([table.file.name for table in tables])}); read is "
        f"{told}. Name the one that is meant, data.source={tables[0].file}."
    )


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of datasets has written the folder: a Dataset, or a DatasetDict of splits."""
    files = ("state.json", "dataset_info.json")
    return (folder / "dataset_dict.json").is_file() or all((folder / name).is_file() for name in files)


def files_of_splits(folder: Path, args: DataArguments) -> dict[str, Path]:
    """
    The tables of a folder that are named as a split is, or by another word for it: val.csv, dev.jsonl.

    Raises:
        ValueError: two words for one split.
    """
    tables = tables_of(folder)
    splits = {without_slice(name) for name in args.split_names()}
    files = {table.stem: table.file for table in tables if table.stem in splits}
    _tell_what_is_not_read(files, tables, args)
    standard = {"train": args.train_split, "validation": args.validation_split, "test": args.test_split}
    others: dict[str, list[Table]] = {}
    for table in tables:
        name = standard.get(WORDS.get(table.stem.lower(), ""))
        if name is not None and table.stem not in splits and without_slice(name) not in files:
            others.setdefault(without_slice(name), []).append(table)
    for name, found in others.items():
        if len({table.stem for table in found}) > 1:
            raise ValueError(
                f"data.source '{args.source}' has {' and '.join(t.file.name for t in found)} for one split, {name}: "
                "say which with data.train_split, data.validation_split or data.test_split."
            )
        files[name] = found[-1].file
    return files


def _tell_what_is_not_read(files: dict[str, Path], tables: list[Table], args: DataArguments) -> None:
    """Warns of tables that have the name of a split as another one has, in another format: one of them is read."""
    for name, file in files.items():
        others = [table.file.name for table in tables if table.stem == name and table.file != file]
        if others:
            logger.warning(
                f"data.source '{args.source}' has {' and '.join([*others, file.name])} for one split, {name}: "
                f"{file.name} is read. Delete what is not meant."
            )


def check_utf8(file: Path) -> None:
    """
    Reads a table of text once, before rows of a stream do, which would meet another encoding hours later.

    Raises:
        ValueError: it is in another encoding; with the line.
    """
    if as_table(file).kind == ".parquet":
        return
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    try:
        with gzip.open(file) if file.suffix.lower() == ".gz" else open(file, "rb") as opened:
            while block := opened.read(2**22):
                line += decoder.decode(block).count("\n")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        raise ValueError(f"'{file}' is not in UTF-8 (line {line}): save it in that encoding.") from error
    except (OSError, EOFError, zlib.error):  # a damaged file, of which reading its rows will tell
        return


def csv_options(file: Path) -> dict:
    """Options to read every cell as text: ids keep their leading zeros, and the caption "None" stays a caption."""
    separator = "\t" if as_table(file).kind == ".tsv" else ","
    try:
        names = list(pd.read_csv(file, sep=separator, nrows=0).columns)
        if other := other_separator(names):
            separator, names = other, list(pd.read_csv(file, sep=other, nrows=0).columns)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"'{file}' is no table in UTF-8 ({error}).") from error
    return {
        "sep": separator,
        "keep_default_na": False,
        "features": Features({name: Value("string") for name in names}),
    }


def other_separator(names: list[str]) -> str | None:
    """
    What separates the columns of a table that seems to have a single one: a semicolon, as Excel writes .csv where the
    comma stands in numbers, or a tab; None where its name has neither.
    """
    return next((mark for mark in ";\t" if mark in names[0]), None) if len(names) == 1 else None


def without_slice(split: str) -> str:
    """The name of a split of which a slice may be asked for: "train" for "train[:90%]"."""
    return re.split(r"[\[+]", split)[0]


__all__ = [
    "FILE_BUILDERS",
    "Table",
    "as_table",
    "check_utf8",
    "csv_options",
    "files_of_splits",
    "is_saved",
    "other_separator",
    "tables_of_all",
    "tell_of_several",
    "without_slice",
]
