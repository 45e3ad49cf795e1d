"""Further columns of a source as modalities beyond image and text: which are meant, and which samples have which."""

import io
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Image, LargeList, List, Value
from datasets.features.features import _ArrayXD

from ..messages import suggest
from ..model.modalities_gap_closed_clip import check_modality_names
from ..model.record_values_gap_closed_clip import is_missing
from .addresses import check_address, is_address


RAW_IMAGE = Image(decode=False)
FILE_KEYS = ("path", "bytes", "array")  # of a mapping that is a file or a sound, not a record
Modalities = dict[str, Any]  # by name a list of columns (a record) or one column (files or arrays)


def check_modalities(modalities: Any) -> None:
    """
    Checks the value of `data.modalities`.

    Raises:
        ValueError: it is no mapping of names to columns, or a name means something else.
    """
    if not isinstance(modalities, dict) or not modalities:
        raise ValueError(
            f"data.modalities is {modalities!r}; it must be a mapping of names to columns, such as "
            "{record: [age, sex], audio: spectrogram}."
        )
    try:
        check_modality_names(list(modalities))
    except ValueError as error:
        raise ValueError(f"data.modalities: {error}") from error
    for name, columns in modalities.items():
        listed = isinstance(columns, list) and columns and all(isinstance(one, str) and one for one in columns)
        if not listed and not (isinstance(columns, str) and columns):
            raise ValueError(
                f"data.modalities.{name} is {columns!r}; it must be a list of columns, which make a record, or the "
                "name of one column of arrays or images."
            )
        if listed and (taken := [one for one in columns if one in FILE_KEYS]):
            raise ValueError(
                f"data.modalities.{name} has the column '{taken[0]}': a record cannot, since {', '.join(FILE_KEYS)} "
                "are how a file or a sound is known. Rename the column."
            )
        if listed and len(set(columns)) < len(columns):
            raise ValueError(f"data.modalities.{name} names a column twice: {', '.join(columns)}.")


def join_modalities(parts: dict[str, Modalities]) -> Modalities:
    """
    The modalities of several sources in the order in which they come; a record has the columns of all.

    Args:
        parts: of each source by its name.

    Raises:
        ValueError: a name stands for a record in one source and for one column in another.
    """
    joined: Modalities = {}
    for source, modalities in parts.items():
        for name, columns in modalities.items():
            known = joined.setdefault(name, columns)
            if isinstance(known, list) != isinstance(columns, list):
                raise ValueError(
                    f"data.source, '{source}': the modality '{name}' is a record (a list of columns) in one source "
                    "and one column in another: give them different names."
                )
            if isinstance(known, list):
                joined[name] = list(dict.fromkeys([*known, *columns]))
    return joined


@dataclass
class ModalityColumn:
    """
    What a source's columns hold of one modality.

    Args:
        name: of the modality, and of the column that pairs have.
        columns: of the source.
        kind: "record", "files" or "arrays".
        feature: of the column that pairs have.
        class_names: by a record's column the names of its classes, if it holds their numbers.
        root: folder that relative paths of files start from.
        allow_urls: whether addresses of files are opened.
    """

    name: str
    columns: list[str]
    kind: str
    feature: Any
    class_names: dict[str, list[str]]
    root: Path | None
    allow_urls: bool = False

    def value_of(self, row: dict[str, Any]) -> Any:
        """
        What a row has: a mapping of fields to values; {"bytes", "path"}; an array as nested lists. None: it lacks it.

        Raises:
            FileNotFoundError: the file is not there.
            ValueError: an address that is not to be opened.
        """
        if self.kind == "record":
            values = {column: self._field(column, row[column]) for column in self.columns}
            return None if all(map(is_missing, values.values())) else values
        value = row[self.columns[0]]
        if self.kind == "arrays":
            return None if value is None or len(value) == 0 else value
        return self._file(value)

    def _field(self, column: str, value: Any) -> Any:
        if column not in self.class_names:
            return None if is_missing(value) else value
        return None if value is None or value < 0 else self.class_names[column][value]

    def _file(self, value: Any) -> dict[str, Any] | None:
        if isinstance(value, bytes | bytearray):
            value = {"bytes": bytes(value), "path": None}
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
        if data is not None:
            return {"bytes": data, "path": path}
        if not path:
            return None
        check_address(path, self.allow_urls)
        if not is_address(path) and self.root is not None:
            path = as_on_disk(self.root, path)
        if not is_address(path) and not is_file(path):
            raise FileNotFoundError(f"the file '{path}' of '{self.name}' does not exist")
        return {"bytes": None, "path": path}


def find_modalities(
    features: Features,
    modalities: Modalities | None,
    source_name: str,
    root: Path | None,
    allow_urls: bool = False,
) -> list[ModalityColumn]:
    """
    The columns of each modality among those that a source has.

    Raises:
        ValueError: a column does not exist, or holds what it can't.
    """
    found = []
    for name, columns in (modalities or {}).items():
        listed = columns if isinstance(columns, list) else [columns]
        for column in listed:
            if column not in features:
                raise ValueError(
                    f"{source_name} has no column '{column}' (data.modalities.{name}). "
                    f"{suggest(column, list(features), 'columns')} A source that lacks it says so in its own entry of "
                    "data.source, with modalities that leave it out."
                )
        kind, feature = _kind(name, columns, features, source_name)
        classes = {each: features[each].names for each in listed if isinstance(features[each], ClassLabel)}
        found.append(ModalityColumn(name, listed, kind, feature, classes, root, allow_urls))
    return found


def _kind(name: str, columns: Any, features: Features, source_name: str) -> tuple[str, Any]:
    """What a modality's columns hold, and the feature of the column that pairs have."""
    if isinstance(columns, list):
        for column in columns:
            if not isinstance(features[column], Value | ClassLabel):
                raise ValueError(
                    f"The column '{column}' of {source_name} holds {features[column]}; a record (data.modalities."
                    f"{name}) takes columns of single values."
                )
        named = {
            each: Value("string") if isinstance(features[each], ClassLabel) else features[each] for each in columns
        }
        return "record", named
    feature = features[columns]
    if isinstance(feature, _ArrayXD | List | LargeList):
        return "arrays", feature
    is_file = isinstance(feature, dict) and bool({"bytes", "path"} & set(feature))
    if is_file or isinstance(feature, Image) or getattr(feature, "dtype", "") in ("string", "large_string", "binary"):
        return "files", RAW_IMAGE
    raise ValueError(
        f"The column '{columns}' of {source_name} holds {feature}; data.modalities.{name} must name a column of "
        f"arrays, of images or of files. For a record write a list: {name}: [{columns}]."
    )


def read_modality(modality: ModalityColumn, rows: Dataset) -> tuple[Dataset, list[bool]]:
    """
    A data set of the one column that pairs have, and which rows have a value there. Arrays and stored files, which may
    be large, are not copied.

    Raises:
        FileNotFoundError: a file is not there; with its row.
    """
    column = modality.columns[0]
    if modality.kind == "arrays":
        kept = rows.select_columns(column)
        values = kept.with_format("arrow")[:].column(0)
        present = pc.is_valid(values).to_pylist()
        if not isinstance(modality.feature, _ArrayXD):
            present = [bool(length) for length in pc.list_value_length(values).to_pylist()]
        return _renamed(kept, column, modality.name), present
    if modality.kind == "files":
        kept = rows.select_columns(column).cast_column(column, RAW_IMAGE)
        stored = pc.is_valid(pc.struct_field(kept.with_format("arrow")[:].column(0), "bytes")).to_pylist()
        if any(stored):
            values = [modality.value_of(row) is not None for row in kept]
            return _renamed(kept, column, modality.name), values
        rows = kept
    selected = rows.select_columns(modality.columns)
    found = []
    for index, row in enumerate(selected):
        try:
            found.append(modality.value_of(row))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"Row {index} (from 0): {error}. Relative paths start from data.image_root; a sample that lacks it "
                "has an empty cell."
            ) from error
        except ValueError as error:
            raise ValueError(f"Row {index} (from 0), '{modality.name}': {error}.") from error
    features = Features({modality.name: modality.feature})
    return Dataset.from_dict({modality.name: found}, features=features), [value is not None for value in found]


def _renamed(kept: Dataset, column: str, name: str) -> Dataset:
    return kept if column == name else kept.rename_column(column, name)


def is_file(path: str) -> bool:
    """Whether there is a file of this name; a name that no file can have is none, whatever Python makes of it."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def as_on_disk(root: Path, path: str) -> str:
    """
    The full path of a file that a table names: as it stands there, or where no file is called so as Windows or macOS
    write the same, with a backslash between folders, or an umlaut as two characters of Unicode (or as one).
    """
    whole = str(root / path)
    if (path.isascii() and "\\" not in path) or is_file(whole):
        return whole
    slashes = path.replace("\\", "/")
    forms = (slashes, unicodedata.normalize("NFC", slashes), unicodedata.normalize("NFD", slashes))
    return next((str(root / form) for form in forms if is_file(str(root / form))), whole)


def has_image(row: dict[str, Any]) -> bool:
    """Whether a row has an image: one that is not None, and not an undecoded one without bytes and path."""
    image = row.get("image")
    return image is not None and not (isinstance(image, dict) and image.get("bytes") is None and not image.get("path"))


def has_caption(row: dict[str, Any]) -> bool:
    """Whether a row has a caption: one that is neither None nor blank."""
    caption = row.get("caption")
    return caption is not None and not (isinstance(caption, str) and not caption.strip())


def has_modality(row: dict[str, Any], name: str) -> bool:
    """Whether a row has a further modality: a value that is not None; of a record, a field that is given."""
    value = row.get(name)
    if isinstance(value, dict):
        if set(value) <= {"bytes", "path"}:
            return value.get("bytes") is not None or bool(value.get("path"))
        return not all(map(is_missing, value.values()))
    return value is not None and not (hasattr(value, "__len__") and len(value) == 0)


def read_array(value: Any, name: str) -> Any:
    """
    An array as it is, or that of a file of numpy's kind (.npy).

    Args:
        value: an array, nested lists, or `{"bytes", "path"}` of a file.
        name: what error messages call it.

    Raises:
        ValueError: the file holds no array, or cannot be read.
    """
    if not isinstance(value, dict):
        return value
    data, path = value.get("bytes"), value.get("path")
    try:
        return np.load(str(path) if data is None else io.BytesIO(data), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"The array '{path or name}' cannot be read ({error}): a column of files of arrays names .npy files."
        ) from error


__all__ = [
    "RAW_IMAGE",
    "ModalityColumn",
    "Modalities",
    "as_on_disk",
    "check_modalities",
    "find_modalities",
    "has_caption",
    "has_image",
    "has_modality",
    "is_file",
    "join_modalities",
    "read_array",
    "read_modality",
]
