"""Embeds a data set of pairs once: every distinct image and every distinct caption goes through its tower one time."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.utils import tqdm
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin

from ..data import PairCollator, normalize_caption
from ..data.image_ids import check_columns, image_id_of, image_ids_of
from .by_source import rows_by_source
from .fast_tower import channels_last


@dataclass
class PairEmbeddings:
    """Both modalities of N pairs, row i of each belonging together.

    Args:
        image_embeds: (N, D) float32 unit vectors; rows of one image are equal.
        text_embeds: (N, D) float32 unit vectors; rows of one caption are equal.
        image_ids: N ids of the images.
        captions: N captions.
        labels: N labels, "" where there is none.
        sources: N names of the pairs' sources; by default all "", the one and only source.

    Raises:
        ValueError: the parts differ in length.
    """

    image_embeds: np.ndarray
    text_embeds: np.ndarray
    image_ids: list[str]
    captions: list[str]
    labels: list[str]
    sources: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.sources = self.sources or [""] * len(self.image_ids)
        lengths = {name: len(part) for name, part in vars(self).items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"PairEmbeddings: the parts must have one row a pair each, got {lengths}.")

    def __len__(self) -> int:
        return len(self.image_ids)

    def by_image(self) -> dict[str, np.ndarray]:
        """The image embeddings (D,) by image id."""
        return dict(zip(self.image_ids, self.image_embeds, strict=True))

    def by_source(self) -> dict[str, "PairEmbeddings"]:
        """Those of each named source's pairs, by its name."""
        return {name: self._select(rows) for name, rows in rows_by_source(self.sources).items()}

    def _select(self, rows: np.ndarray) -> "PairEmbeddings":
        lists = (self.image_ids, self.captions, self.labels, self.sources)
        columns = ([values[row] for row in rows] for values in lists)
        return PairEmbeddings(self.image_embeds[rows], self.text_embeds[rows], *columns)

    @property
    def caption_ids(self) -> list[str]:
        """Captions that differ in white space or case only are one caption, as they are in training."""
        return [normalize_caption(caption) for caption in self.captions]


def embed_pairs(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Dataset | IterableDataset,
    batch_size: int = 64,
    num_workers: int = 0,
    autocast_dtype: torch.dtype | None = None,
    max_length: int | None = None,
    window: tuple[float, float] | None = None,
    normalize: bool = True,
) -> PairEmbeddings:
    """Embeds every pair with the model in evaluation mode, on the device where it is; its modes are restored after.

    Args:
        model: maps `pixel_values` alone to `.image_embeds` (B, D), and tokens alone to `.text_embeds` (B, D).
        processor: a `GapClosedClipProcessor`.
        pairs: rows of `image`, `caption` and, if there are any, `image_id`, `label` and `source`. Of a streaming set
            every image is decoded, as it comes, but only new ones are embedded.
        batch_size: images, or captions, at once.
        num_workers: processes that decode the images.
        autocast_dtype: e.g. `torch.bfloat16` to compute in it where that is safe; default: the model's own dtype.
        max_length: tokens a caption keeps; default: the tokenizer's own limit.
        window: (centre, width) for DICOM, 16-bit and float images, as in training.
        normalize: without it, what `get_image_features` and `get_text_features` give, before it is normalised: what
            post-hoc centering needs.

    Raises:
        ValueError: there is no pair, or an image is unreadable; it is named.
    """
    if isinstance(pairs, IterableDataset):
        columns, once = None, pairs
    else:
        columns = columns_of(pairs)
        once = pairs.select(list(first_rows(columns.image_ids)))
    collator = PairCollator(processor, max_length=max_length, window=window)
    loader = DataLoader(
        once,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=partial(collate, collator=collator),
        pin_memory=model.device.type == "cuda",
    )
    autocast = torch.autocast(model.device.type, autocast_dtype, enabled=autocast_dtype is not None)
    with evaluation_mode(model), channels_last(model), autocast:
        image_embeds, seen = _embed_images(model, loader, normalize)
        columns = columns or seen
        if not columns.captions:
            raise ValueError("There is no pair to embed: the data set or split is empty.")
        text_embeds = embed_captions(model, collator, columns.captions, batch_size, normalize)
    return PairEmbeddings(
        image_embeds=np.stack([image_embeds[image_id] for image_id in columns.image_ids]),
        text_embeds=np.stack([text_embeds[caption] for caption in columns.captions]),
        **columns._asdict(),
    )


class Columns(NamedTuple):
    """What is known of N pairs besides their images; a missing label, or source, is ""."""

    image_ids: list[str]
    captions: list[str]
    labels: list[str]
    sources: list[str]


def no_columns() -> Columns:
    """Those of no pairs, to be filled."""
    return Columns([], [], [], [])


def columns_of(pairs: Iterable[dict]) -> Columns:
    """Collects the columns of rows in their order. Of a `Dataset` with `image_id` no image is read.

    Raises:
        ValueError: there are no captions, or neither images nor ids of them.
    """
    columns = no_columns()
    if isinstance(pairs, Dataset):
        check_columns(pairs.column_names, ("caption",))
        columns.image_ids.extend(image_ids_of(pairs))
        pairs = pairs.select_columns([name for name in ("caption", "label", "source") if name in pairs.column_names])
    known = bool(columns.image_ids)
    for row in pairs:
        if not known:
            columns.image_ids.append(image_id_of(row))
        columns.captions.append(row["caption"])
        label = row.get("label")
        columns.labels.append("" if label is None else str(label))
        columns.sources.append(row.get("source") or "")
    return columns


def first_rows(ids: list[str]) -> Iterable[int]:
    """The row in which each distinct id comes first, in order."""
    rows: dict[str, int] = {}
    for row, identifier in enumerate(ids):
        rows.setdefault(identifier, row)
    return rows.values()


def collate(rows: list[dict], collator: PairCollator) -> tuple[Columns, torch.Tensor]:
    """Decodes the images in the loader's worker: the columns of the rows, and pixels (B, 3, height, width)."""
    return columns_of(rows), collator(rows)["pixel_values"]


def each_image(
    loader: DataLoader, seen: Columns, device: torch.device, description: str
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """
    Yields, a batch at a time, ids and pixels (new, 3, height, width) of the images not met before, on the device.

    Args:
        loader: of batches from `collate`.
        seen: gets the columns of all rows on the way.
        description: of the progress bar.
    """
    known: set[str] = set()
    for columns, pixel_values in tqdm(loader, desc=description, leave=False):
        for all_values, values in zip(seen, columns, strict=True):
            all_values.extend(values)
        new = [row for row in first_rows(columns.image_ids) if columns.image_ids[row] not in known]
        if new:
            ids = [columns.image_ids[row] for row in new]
            known.update(ids)
            yield ids, pixel_values[new].to(device, non_blocking=True)


def _embed_images(
    model: PreTrainedModel, loader: DataLoader, normalize: bool
) -> tuple[dict[str, np.ndarray], Columns]:
    """The embeddings (D,) float32 by image id, and the columns of the rows met on the way."""
    embeds: dict[str, np.ndarray] = {}
    seen = no_columns()
    for ids, pixel_values in each_image(loader, seen, model.device, "Embedding images"):
        if normalize:
            batch = model(pixel_values=pixel_values).image_embeds
        else:
            batch = model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output
        embeds.update(zip(ids, batch.float().cpu().numpy(), strict=True))  # (B, D)
    return embeds, seen


def embed_captions(
    model: PreTrainedModel, collator: PairCollator, captions: Iterable[str], batch_size: int, normalize: bool = True
) -> dict[str, np.ndarray]:
    """Embeds every distinct caption once: (D,) float32 by caption, unit vectors unless `normalize` is off."""
    embeds: dict[str, np.ndarray] = {}
    batches = collator.distinct_caption_batches(captions, batch_size, model.device, "Embedding captions")
    for batch, tokens in batches:
        if normalize:
            found = model(**tokens).text_embeds
        else:
            found = model.get_text_features(**tokens, return_dict=True).pooler_output
        embeds.update(zip(batch, found.float().cpu().numpy(), strict=True))  # (B, D)
    return embeds


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Without gradients and dropout inside; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
