"""A list of sources in the section `data`: their names, and what each may set for itself."""

import re
from collections.abc import Collection
from typing import Any

from ..messages import did_you_mean


# What an entry of a list of sources may set for itself; where it does not, the section's value holds.
SOURCE_FIELDS = (
    "source",
    "license",
    "subset",
    "train_split",
    "validation_split",
    "test_split",
    "split_column",
    "image_column",
    "caption_column",
    "image_id_column",
    "label_columns",
    "modalities",
    "image_root",
    "max_pairs",
    "on_missing",
    "on_bad_image",
    "fold_column",
    "phantom_train_pairs",
    "phantom_validation_pairs",
    "phantom_test_pairs",
    "phantom_size",
    "phantom_seed",
    "window_center",
    "window_width",
)


def last_part(source: str) -> str:
    """The name of a source: the last part of its path or id, without the ending of a table."""
    name = re.split(r"[/\\]", source.rstrip("/\\"))[-1]
    return re.sub(r"(?<=.)\.(csv|tsv|json|jsonl|parquet)(\.gz)?$", "", name)


def name_sources(entries: Any, known: Collection[str]) -> list[dict[str, Any]]:
    """The entries of a list of sources, each with its name; a plain text stands for a source alone.

    Args:
        entries: the value of `data.source`.
        known: the fields of the section `data`.

    Raises:
        ValueError: there is none, one is no mapping with a source, has an unknown field or a name that cannot be used,
            or two have the same name.
    """
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"data.source is {entries!r}; it must be a source, or a list of at least one: [{{source: a.csv}}, ...]."
        )
    named: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(entries):
        entry = {"source": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
            raise ValueError(
                f"data.source[{number}] is {entry!r}; it must be a mapping, e.g. {{source: a.csv, name: ours}}."
            )
        name = entry.get("name", last_part(entry["source"]))
        _check_name(name, number)
        if name in named:
            raise ValueError(f"data.source has two sources of the name '{name}': give each a name of its own.")
        _check_keys(entry, name, known)
        named[name] = {"name": name, **entry}
    return list(named.values())


def _check_name(name: Any, number: int) -> None:
    # A name stands before ids, as `name/id`, and before metrics, as `name_margin`; `mean_margin` is that of all.
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name) or name == "mean":
        raise ValueError(
            f"data.source[{number}].name is {name!r}; it must be of letters, digits, '_', '-' and '.', and not 'mean'."
        )


def _check_keys(entry: dict[str, Any], name: str, known: Collection[str]) -> None:
    for key in entry:
        if key in ("name", *SOURCE_FIELDS):
            continue
        if key in known:
            raise ValueError(f"data.source, '{name}': {key} is one for all sources: set data.{key}.")
        raise ValueError(f"data.source, '{name}': unknown key {key!r}{did_you_mean(key, ('name', *SOURCE_FIELDS))}")


__all__ = ["SOURCE_FIELDS", "last_part", "name_sources"]
