"""A table whose column says which split a row belongs to: `train`, `val`, `test`."""

from collections.abc import Callable
from functools import partial
from logging import getLogger
from typing import Any

from datasets import ClassLabel, Dataset, IterableDataset

from ..messages import shorten, suggest
from .arguments import DataArguments
from .columns import text_of
from .pairs import MissingSplitError


logger = getLogger(__name__)

LOOKED_AT = 100  # rows of a stream, to see whether its column names splits
# What words of a column stand for, regardless of case; and beside them the source's own names of its splits.
WORDS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
}
REMEDY = (
    f"Understood are {', '.join(WORDS)}, and what data.train_split, data.validation_split and data.test_split say."
)


def missing_split(args: DataArguments, split: str, known: list[str]) -> MissingSplitError:
    """The error that a source has no such split, with the splits that it has."""
    return MissingSplitError(
        f"'{args.source}' has no split '{split}'. {suggest(split, known, 'splits')} Name it with data.train_split, "
        "data.validation_split or data.test_split, or cut one from the training split with data.folds."
    )


def find_split_column(rows: Dataset | IterableDataset, args: DataArguments, source_name: str) -> str | None:
    """The column of the arguments, if the rows have it and it names splits. Of a stream the first 100 rows are
    looked at.

    Args:
        rows: all rows of a table.
        args: names the column. The default, `split`, is also a column `Split` or `SPLIT`; it is passed over where
            there is none or where it says other things.
        source_name: what error messages call the table.

    Raises:
        ValueError: the column is named by the arguments and not there, or it holds words that are not understood.
    """
    name, is_default = args.split_column, args.split_column == DataArguments.split_column
    if name is None:
        return None
    features = rows.features or Dataset.from_list(list(rows.take(1))).features
    if is_default and name not in features:
        name = next((other for other in features if other.strip().casefold() == name), None)
        if name is None:
            return None
    if name not in features:
        hint = suggest(name, list(features), "columns")
        raise ValueError(f"{source_name} has no column '{name}' (data.split_column). {hint}")
    values = _distinct(rows.take(LOOKED_AT) if isinstance(rows, IterableDataset) else rows, name)
    strange = [value for value in values if not _is_understood(value, args)]
    if is_default and len(strange) == len(values):
        words = shorten([str(word) for word in strange])
        logger.warning(
            f"{source_name} has a column '{name}' that names no split ({words}): all of its rows are one split. "
            f"{REMEDY} data.split_column=null passes it over without a word."
        )
        return None
    if strange:
        raise _not_understood(strange, name, source_name)
    return name


def rows_of_split(
    rows: Dataset | IterableDataset, column: str, split: str, args: DataArguments, source_name: str
) -> Dataset | IterableDataset:
    """The rows that belong to a split, by what the column says.

    Args:
        rows: all rows of a table.
        column: from `find_split_column`.
        split: the source's name of the split, or any of the words that stand for it.

    Raises:
        MissingSplitError: no row belongs to it.
        ValueError: `split` asks for a slice; in a stream, while iterating: a word is not understood.
    """
    if "[" in split or "+" in split:
        raise ValueError(
            f"The column '{column}' of {source_name} says which split a row belongs to, and '{split}' asks for a part "
            "of the whole table. Leave the parts out, or the column: data.split_column=null."
        )
    belongs = partial(_belongs, split=split, args=args, column=column, source_name=source_name)
    if isinstance(rows, IterableDataset):
        rows = rows.decode(False) if rows.features else rows  # else the filter hands on images as Pillow's
        feature = rows.features[column] if rows.features else None
        in_split = partial(_row_belongs, column=column, feature=feature, belongs=belongs)
        if next(iter(rows.select_columns(column).filter(in_split)), None) is None:
            raise missing_split(args, split, _distinct(rows, column))
        return rows.filter(in_split)
    chosen = [index for index, word in enumerate(_words(rows, column)) if belongs(word)]
    if not chosen:
        raise missing_split(args, split, _distinct(rows, column))
    return rows.select(chosen)


def _row_belongs(row: dict, column: str, feature: Any, belongs: Callable[[Any], bool]) -> bool:
    return belongs(_word(row[column], feature))


def _belongs(word: Any, split: str, args: DataArguments, column: str, source_name: str) -> bool:
    if not _is_understood(word, args):
        raise _not_understood([word], column, source_name)
    return _meaning(word) == _meaning(split)


def _meaning(word: Any) -> str:
    word = text_of(word).strip().casefold()
    return WORDS.get(word, word)


def _is_understood(word: Any, args: DataArguments) -> bool:
    return word is not None and _meaning(word) in {*WORDS.values(), *map(_meaning, args.split_names())}


def _word(value: Any, feature: Any) -> Any:
    """What a cell says: the name of a class for its number."""
    if isinstance(feature, ClassLabel):
        return None if value is None or value < 0 else feature.names[value]
    return value


def _words(rows: Dataset | IterableDataset, column: str) -> list[Any]:
    feature = rows.features[column] if rows.features else None
    values = rows[column] if isinstance(rows, Dataset) else (row[column] for row in rows.select_columns(column))
    return [_word(value, feature) for value in values]


def _distinct(rows: Dataset | IterableDataset, column: str) -> list[Any]:
    return list(dict.fromkeys(_words(rows, column)))


def _not_understood(words: list[Any], column: str, source_name: str) -> ValueError:
    shown = shorten(["an empty cell" if word is None or word == "" else repr(word) for word in words])
    return ValueError(
        f"The column '{column}' of {source_name} holds {shown}, which is the name of no split. {REMEDY} "
        "Rename them, or leave the column out: data.split_column=null."
    )


__all__ = ["find_split_column", "missing_split", "rows_of_split"]
