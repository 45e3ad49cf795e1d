"""Which columns of a source hold what, and how their values are read."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Features, Image, LargeList, List, Value

from ..messages import suggest
from .addresses import check_address, is_address
from .arguments import DataArguments
from .modalities import ModalityColumn, as_on_disk, find_modalities


CANONICAL_COLUMNS = ("image", "caption", "image_id", "label")
# Columns that `sources.py` and `features.py` add: a source's own of these names are not kept.
ADDED_COLUMNS = ("augment", "source", "window", "pooled_image", "pooled_text", "encoded_image", "group_ids", "present")


@dataclass
class Columns:
    """Which columns of a source hold what, and how their values are read.

    Args:
        image, caption: names of these columns.
        image_id: name of the column that identifies an image; None if there is none.
        labels: names of the columns that make up the label.
        extras: names of the scalar columns that are kept as they are.
        class_names: for each label column the names of its classes, if it holds their numbers; else None.
        modalities: the columns of further modalities.
        root: folder that relative image paths start from.
        source_name: what error messages call the source.
        allow_urls: whether addresses of images are opened.
    """

    image: str | None
    caption: str | None
    image_id: str | None
    labels: list[str]
    extras: list[str]
    class_names: list[list[str] | None]
    modalities: list[ModalityColumn]
    root: Path | None
    source_name: str
    allow_urls: bool = False

    def caption_of(self, value: Any) -> str:
        """The caption without white space around it; "" if there is none."""
        return "" if value is None else str(value).strip()

    def path_of(self, value: str | None) -> str | None:
        """
        The full path of an image file, or its address; None if the source gives none.

        Raises:
            ValueError: an address that is not to be opened.
        """
        if not value or is_address(value) or self.root is None:
            check_address(value, self.allow_urls)
            return value or None
        return as_on_disk(self.root, value)

    def id_of(self, path: str) -> str:
        """The image's path relative to `root`, which is the same on every machine."""
        if self.root is not None and Path(path).is_relative_to(self.root):
            return Path(path).relative_to(self.root).as_posix()
        return path

    def label_of(self, values: Iterable[Any]) -> str:
        """The values of one row's label columns joined by " / "; "" if one of them is missing."""
        parts = []
        for value, names in zip(values, self.class_names, strict=True):
            if is_missing(value) or (names is not None and value < 0):  # -1: a ClassLabel not given
                return ""
            if names is not None:
                value = names[value]
            parts.append(", ".join(map(text_of, value)) if isinstance(value, list) else text_of(value).strip())
        return " / ".join(parts)


def find_columns(features: Features, args: DataArguments, source_name: str, root: Path | None) -> Columns:
    """Find the columns that the arguments name among those that the source has.

    Raises:
        ValueError: a column does not exist (the message names the nearest and all there are), or it holds neither
            text nor images.
    """
    image_id = args.image_id_column or ("image_id" if "image_id" in features else None)
    labels = args.label_columns or (["label"] if "label" in features else [])
    if not args.modalities and None in (args.image_column, args.caption_column):
        raise ValueError(
            f"{source_name} has no images or no captions (data.image_column and data.caption_column are "
            f"{args.image_column} and {args.caption_column}): then data.modalities must name something beside."
        )
    wanted: list[tuple[str, str | None]] = [
        ("image_column", args.image_column),
        ("caption_column", args.caption_column),
        ("image_id_column", image_id),
        *(("label_columns", name) for name in labels),
        ("fold_column", args.fold_column if args.folds else None),
    ]
    for argument, name in wanted:
        if name is not None and name not in features:
            hint = suggest(name, list(features), "columns")
            if argument in ("image_id_column", "label_columns", "fold_column"):  # perhaps another source's
                hint += f" If there is none, data.{argument}=null."
            raise ValueError(f"{source_name} has no column '{name}' (data.{argument}). {hint}")
    _check_kinds(features, dict(wanted), source_name)
    _check_fold_column(dict(wanted), labels, source_name)
    added = {name for name in ADDED_COLUMNS if not (args.folds and name == args.fold_column)}  # until folds are cut
    modalities = find_modalities(features, args.modalities, source_name, root, args.allow_urls)
    taken = {args.image_column, args.caption_column, *CANONICAL_COLUMNS, *added, *(args.modalities or ())}
    extras = [n for n, feature in features.items() if n not in taken and isinstance(feature, (Value, ClassLabel))]
    class_names = [features[n].names if isinstance(features[n], ClassLabel) else None for n in labels]
    return Columns(
        image=args.image_column,
        caption=args.caption_column,
        image_id=image_id,
        labels=labels,
        extras=extras,
        class_names=class_names,
        modalities=modalities,
        root=root,
        source_name=source_name,
        allow_urls=args.allow_urls,
    )


def _check_kinds(features: Features, wanted: dict[str, str | None], source_name: str) -> None:
    """
    Checks that columns hold what they are named for.

    Args:
        wanted: {argument: name} of columns that are there.

    Raises:
        ValueError: a column holds what its argument has no use for.
    """
    caption, image = wanted["caption_column"], wanted["image_column"]
    if caption is not None and not is_text(features[caption]):
        remedy = "data.caption_column must name a column of captions."
        if isinstance(features[caption], List | LargeList):
            remedy = (
                f"of several captions of an image each has a row of its own (`table.explode('{caption}')` of pandas "
                "makes them)."
            )
        raise ValueError(f"The column '{caption}' of {source_name} holds {features[caption]}, not text; {remedy}")
    if image is not None and not _holds_images(features[image]):
        raise ValueError(
            f"The column '{image}' of {source_name} holds {features[image]}; "
            "data.image_column must name a column of images, image bytes or file paths."
        )
    for argument in ("image_id_column", "fold_column"):
        name = wanted[argument]
        if name is not None and not isinstance(features[name], Value | ClassLabel):
            raise ValueError(
                f"The column '{name}' of {source_name} holds {features[name]}; data.{argument} must name a column "
                "with one text or one number in each row."
            )


def _check_fold_column(wanted: dict[str, str | None], labels: list[str], source_name: str) -> None:
    """
    Raises:
        ValueError: another column has the place that the fold column's name has among the pairs: folds, which are cut
            from these, would be cut by that one.
    """
    name = wanted["fold_column"]
    places = {place: [wanted[f"{place}_column"]] for place in ("image", "caption", "image_id")} | {"label": labels}
    if name not in places or places[name] == [name]:
        return
    argument = "label_columns" if name == "label" else f"{name}_column"
    raise ValueError(
        f"{source_name} has a column '{name}' that data.fold_column names, but data.{argument} names another one, "
        f"which is '{name}' among the pairs. Rename the column of cases."
    )


def is_missing(value: Any) -> bool:
    """Whether a cell has no value: None, no text but white space, or a NaN, as tables of numbers have there."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def text_of(value: Any) -> str:
    """An id or a label as text; of a whole number without `.0`, which a column of numbers with gaps has everywhere."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def is_text(feature: Any) -> bool:
    """Whether a column holds text. An empty column, whose type is "null", counts as one."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view", "null")


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, dict):
        return bool({"bytes", "path"} & set(feature))
    return (
        isinstance(feature, Image) or is_text(feature) or getattr(feature, "dtype", "") in ("binary", "large_binary")
    )


__all__ = ["ADDED_COLUMNS", "Columns", "find_columns", "is_missing", "is_text", "text_of"]
