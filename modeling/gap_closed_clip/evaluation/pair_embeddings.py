"""[`PairEmbeddings`]: the embeddings of pairs, or of samples of more modalities, and what is known of each of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset

from ..data import normalize_caption
from ..data.columns import is_missing, text_of
from ..data.image_ids import check_columns, image_id_of, image_ids_of
from ..data.modalities import has_caption, has_image
from ..metrics._embeddings import families_of, numbered
from .by_source import rows_by_source
from .modality_values import ModalityValues, values_of


class Columns(NamedTuple):
    """
    What is known of N pairs besides their images.

    Args:
        image_ids, captions: "" where further modalities let a pair lack one.
        labels, sources: "" where there is none.
        values: by the names of further modalities, what the pairs have of each.
    """

    image_ids: list[str]
    captions: list[str]
    labels: list[str]
    sources: list[str]
    values: Mapping[str, ModalityValues] = {}

    def extend(self, others: "Columns") -> None:
        """Adds the columns of further pairs."""
        for mine, added in zip(self[:4], others[:4], strict=True):
            mine.extend(added)
        for name, values in self.values.items():
            values.ids.extend(others.values[name].ids)
            values.records.extend(others.values[name].records)


def no_columns(modalities: Sequence[str] = ()) -> Columns:
    """Those of no pairs, to be filled."""
    return Columns([], [], [], [], {name: ModalityValues([], []) for name in modalities})


def columns_of(
    pairs: Iterable[dict], modalities: Sequence[str] = (), fields: Mapping[str, Sequence[str]] | None = None
) -> Columns:
    """
    Collects the columns of rows in their order. Of a `Dataset`, no image is read of rows that have an `image_id`.

    Args:
        modalities: names of further ones; with them, pairs may lack the image or the caption.
        fields: by the names of records the fields of which one at least must be given; default: any.

    Raises:
        ValueError: there are no captions, or neither images nor ids of them.
    """
    columns = no_columns(modalities)
    has_classes = isinstance(pairs, Dataset) and isinstance(pairs.features.get("label"), ClassLabel)
    if isinstance(pairs, Dataset):
        names = pairs.column_names
        if not modalities or "caption" in names:
            check_columns(names, ("caption",))
        if not modalities or "image" in names:
            columns.image_ids.extend(image_ids_of(pairs))
        elif "image_id" in names:
            columns.image_ids.extend("" if value is None else text_of(value) for value in pairs["image_id"])
        kept = ("caption", "label", "source", *modalities)
        pairs = pairs.select_columns([name for name in kept if name in names])
    known = bool(columns.image_ids)
    for row in pairs:
        if not known:
            columns.image_ids.append(image_id_of(row) if not modalities or has_image(row) else "")
        columns.captions.append("" if modalities and not has_caption(row) else row["caption"])
        label = row.get("label")
        given = label is not None and not is_missing(label) and not (has_classes and label < 0)  # -1: no class
        columns.labels.append(text_of(label) if given else "")
        columns.sources.append(row.get("source") or "")
        for name, values in columns.values.items():
            values.add(row.get(name), (fields or {}).get(name))
    return columns


def first_rows(ids: list[str]) -> Iterable[int]:
    """The row in which each distinct id comes first, in order."""
    rows: dict[str, int] = {}
    for row, identifier in enumerate(ids):
        rows.setdefault(identifier, row)
    return rows.values()


def first_rows_of_those_given(ids: list[str]) -> list[int]:
    """The same as a list, without those that have none, ""."""
    return [row for row in first_rows(ids) if ids[row] != ""]


@dataclass
class PairEmbeddings:
    """All modalities of N pairs, row i of each belonging together.

    Args:
        image_embeds: (N, D) float32 unit vectors; rows of one image are equal.
        text_embeds: (N, D) float32 unit vectors; rows of one caption are equal.
        image_ids: N ids of the images.
        captions: N captions.
        labels: N labels, "" where there is none.
        sources: N names of the pairs' sources; by default all "", the one and only source.
        values: by the names of further modalities, what the pairs have of each; default: ids of their own.
        further: by the names of further modalities (N, D) float32 unit vectors, rows of zeros where a pair lacks it.
        present: by the names of modalities (N,) booleans, which pairs have it; by default all of them.

    Raises:
        ValueError: the parts differ in length.
    """

    image_embeds: np.ndarray
    text_embeds: np.ndarray
    image_ids: list[str]
    captions: list[str]
    labels: list[str]
    sources: list[str] = field(default_factory=list)
    values: Mapping[str, ModalityValues] = field(default_factory=dict)
    further: dict[str, np.ndarray] = field(default_factory=dict)
    present: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        self.sources = self.sources or [""] * len(self.image_ids)
        self.present = {name: self.present.get(name, np.ones(len(self), bool)) for name in self.modalities}
        self.values = {name: self.values.get(name) or values_of([""] * len(self)) for name in self.further}
        parts = {name: part for name, part in vars(self).items() if not isinstance(part, dict)}
        parts |= self.further
        parts |= {f"present {name}": part for name, part in self.present.items() if self.further}
        parts |= {f"ids of {name}": values.ids for name, values in self.values.items()}
        lengths = {name: len(part) for name, part in parts.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"PairEmbeddings: the parts must have one row a pair each, got {lengths}.")

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of all modalities, image and text first."""
        return ("image", "text", *self.further)

    def embeds(self, modality: str) -> np.ndarray:
        """The embeddings (N, D) of a modality."""
        return {"image": self.image_embeds, "text": self.text_embeds, **self.further}[modality]

    def ids(self, modality: str) -> list[str]:
        """Equal ids where two pairs have the same image, caption, record, ..."""
        if modality in self.further:
            return self.values[modality].ids
        return self.image_ids if modality == "image" else self.caption_ids

    def by_image(self) -> dict[str, np.ndarray]:
        """The image embeddings (D,) by image id."""
        return dict(zip(self.image_ids, self.image_embeds, strict=True))

    def by_source(self) -> dict[str, "PairEmbeddings"]:
        """Those of each named source's pairs, by its name."""
        return {name: self.select(rows) for name, rows in rows_by_source(self.sources).items()}

    def having(self, *modalities: str) -> "PairEmbeddings":
        """Those of the pairs that have all of these modalities."""
        rows = np.flatnonzero(np.logical_and.reduce([self.present[name] for name in modalities]))
        return self if len(rows) == len(self) else self.select(rows)

    def select(self, rows: np.ndarray) -> "PairEmbeddings":
        """Those of some pairs, by their rows."""
        lists = (self.image_ids, self.captions, self.labels, self.sources)
        image_ids, captions, labels, sources = ([values[row] for row in rows] for values in lists)
        return PairEmbeddings(
            self.image_embeds[rows],
            self.text_embeds[rows],
            image_ids,
            captions,
            labels,
            sources,
            values={name: values.select(rows) for name, values in self.values.items()},
            further={name: embeds[rows] for name, embeds in self.further.items()},
            present={name: present[rows] for name, present in self.present.items()},
        )

    def with_embeds(self, embeds: Mapping[str, np.ndarray]) -> "PairEmbeddings":
        """The same pairs with other embeddings of some modalities, by name; what a pair lacks becomes zeros."""
        found = {name: self.embeds(name) for name in self.modalities} | dict(embeds)
        if self.further:
            for name, present in self.present.items():
                found[name] = np.where(present[:, None], found[name], np.zeros((), found[name].dtype))
        further = {name: found[name] for name in self.further}
        return replace(self, image_embeds=found["image"], text_embeds=found["text"], further=further)

    @property
    def caption_ids(self) -> list[str]:
        """Captions that differ in white space or case only are one caption, as they are in training."""
        return [normalize_caption(caption) for caption in self.captions]

    def families(self) -> np.ndarray:
        """(N,) numbers: pairs that share an image or a caption, directly or through others, have the same."""
        own = (
            [identifier or f"row {row} has none" for row, identifier in enumerate(ids)]
            for ids in (self.image_ids, self.caption_ids)
        )
        return families_of(*(numbered(ids) for ids in own))


def record_modalities(embeddings: PairEmbeddings) -> dict[str, list[dict[str, Any] | None]]:
    """The rows of those further modalities that are records, by name."""
    found = {name: values.records for name, values in embeddings.values.items()}
    return {name: rows for name, rows in found.items() if any(row is not None for row in rows)}


__all__ = [
    "Columns",
    "PairEmbeddings",
    "columns_of",
    "first_rows",
    "first_rows_of_those_given",
    "no_columns",
    "record_modalities",
]
