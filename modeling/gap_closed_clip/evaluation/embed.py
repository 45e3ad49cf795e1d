"""Embeds a data set of pairs once: every distinct image and every distinct caption goes through its tower one time."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.utils import tqdm
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin

from ..data import PairCollator
from ..data.modalities import has_image, has_modality
from .fast_tower import channels_last
from .pair_embeddings import Columns, PairEmbeddings, columns_of, first_rows, first_rows_of_those_given, no_columns
from .what_is_embedded import (
    check_records,
    fields_of_records,
    further_modalities,
    with_image_and_caption,
    with_own_fields,
    without_reference_dates,
)


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
    model_name: str = "",
    modalities: Collection[str] = (),
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
        model_name, modalities: as of `further_modalities`, which says what is left out. A record's fields that the
            model does not have are not shown to it; who has none of those that it has lacks the record.

    Raises:
        ValueError: there is no pair, the pairs are no data set, or an image is unreadable; it is named.
    """
    if not isinstance(pairs, Dataset | IterableDataset):
        raise ValueError(
            f"pairs are a {type(pairs).__name__}: give a datasets.Dataset with the columns image and caption, such as "
            "Dataset.from_list([{'image': path, 'caption': text}, ...])."
        )
    further = further_modalities(model, processor, pairs, model_name, modalities)
    if not further:
        pairs = with_image_and_caption(pairs)
    check_records(pairs, processor, further, model_name)
    collator = PairCollator(processor, max_length=max_length, window=window)
    settings: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
    settings["pin_memory"] = model.device.type == "cuda"
    columns, parts = _parts(pairs, further, fields_of_records(processor, further))
    autocast = torch.autocast(model.device.type, autocast_dtype, enabled=autocast_dtype is not None)
    embeds: dict[str, dict[str, np.ndarray]] = {name: {} for name in ("image", *further)}
    with evaluation_mode(model), channels_last(model), autocast:
        for names, part in parts.items():
            seen = no_columns([name for name in names if name != "image"])
            gather = partial(collate, collator=collator, modalities=names)
            loader: DataLoader = DataLoader(part, collate_fn=gather, **settings)  # type: ignore[arg-type]
            what = "Embedding images" if "image" in names else f"Embedding {names[0]}"
            for name, ids, inputs in each_new(loader, seen, model.device, what):
                found = _embed(model, name, inputs, normalize)
                embeds[name].update(zip(ids, found.float().cpu().numpy(), strict=True))  # (B, D)
        columns = columns or seen
        if not columns.captions:
            raise ValueError("There is no pair to embed: the data set or split is empty.")
        captions = filter(None, columns.captions) if further else columns.captions
        embeds["text"] = embed_captions(model, collator, captions, batch_size, normalize)
    columns = columns._replace(values=without_reference_dates(processor, columns.values))
    return _together(columns, embeds, further)


def _parts(
    pairs: Dataset | IterableDataset, further: Sequence[str], fields: Mapping[str, Sequence[str]]
) -> tuple[Columns | None, dict[tuple[str, ...], Dataset | IterableDataset]]:
    """The columns of all rows, if they are known beforehand, and by modalities the rows that have to be read for them:
    of a stream all, otherwise those in which a distinct value comes first.
    """
    if isinstance(pairs, IterableDataset):
        return None, {("image", *further): pairs}
    columns = columns_of(pairs, further, fields)
    first = first_rows_of_those_given if further else first_rows
    parts: dict[tuple[str, ...], Dataset | IterableDataset] = {
        ("image",): pairs.select(list(first(columns.image_ids)))
    }
    for name in further:
        kept = [each for each in (name, "window", "image_id", "caption") if each in pairs.column_names]
        rows = first_rows_of_those_given(columns.values[name].ids)
        parts[(name,)] = pairs.select_columns(kept).select(rows)
    return columns, parts


def _together(columns: Columns, embeds: dict[str, dict[str, np.ndarray]], further: Sequence[str]) -> PairEmbeddings:
    """The embeddings by row; zeros where further modalities let a pair lack one.

    Args:
        embeds: by the name of a modality, what was found by the ids of its values, a caption being its own.
    """
    ids = {"image": columns.image_ids, "text": columns.captions}
    ids |= {name: values.ids for name, values in columns.values.items()}
    some = next(found for found in embeds.values() if found)
    nothing = {"": np.zeros_like(next(iter(some.values())))} if further else {}
    known = {name: nothing | found for name, found in embeds.items()}
    rows = {name: np.stack([known[name][each] for each in ids[name]]) for name in ids}
    present = {name: np.array([each != "" for each in found]) for name, found in ids.items()} if further else {}
    return PairEmbeddings(
        rows["image"],
        rows["text"],
        **columns._asdict(),
        further={name: rows[name] for name in further},
        present=present,
    )


def collate(
    rows: list[dict], collator: PairCollator, modalities: Sequence[str] = ("image",)
) -> tuple[Columns, dict[str, dict[str, Tensor]]]:
    """
    Decodes what the rows have of some modalities, in the loader's worker.

    Returns:
        The columns of the rows; where "image" is not asked for, only the values of the one modality that is. And by
        its name the inputs of its tower, for those rows alone that have it.
    """
    further = [name for name in modalities if name != "image"]
    fields = fields_of_records(collator.processor, further)
    if "image" in modalities:
        columns = columns_of(rows, further, fields)
    else:
        columns = no_columns(further)
        for row in rows:
            for name in further:
                columns.values[name].add(row[name], fields.get(name))
    inputs = {}
    for name in further:
        shown = (with_own_fields(row, name, collator.further[name]) for row in rows)
        given = [row for row in shown if has_modality(row, name)]
        if given:
            encoded = collator.modality(given, name)
            inputs[name] = {key.removeprefix(f"{name}_"): values for key, values in encoded.items()}
    if "image" in modalities:
        if collator.further:  # then a pair may lack the image
            rows = [row for row in rows if has_image(row)]
        if rows:
            inputs["image"] = {"pixel_values": collator.images(rows)["pixel_values"]}
    return columns, inputs


def each_new(
    loader: DataLoader, seen: Columns, device: torch.device, description: str
) -> Iterator[tuple[str, list[str], dict[str, Tensor]]]:
    """
    Yields, a batch and a modality at a time, the modality's name, and ids and inputs (new, ...) of those of its values
    that were not met before, on the device.

    Args:
        loader: of batches from `collate`.
        seen: gets the columns of all rows on the way.
        description: of the progress bar.
    """
    known: dict[str, set[str]] = {}
    for columns, inputs in tqdm(loader, desc=description, leave=False):
        seen.extend(columns)
        for name, tensors in inputs.items():
            ids = columns.image_ids if name == "image" else columns.values[name].ids
            ids = [identifier for identifier in ids if identifier != ""] if columns.values else ids
            known_ids = known.setdefault(name, set())
            new = [row for row in first_rows(ids) if ids[row] not in known_ids]
            if new:
                new_ids = [ids[row] for row in new]
                known_ids.update(new_ids)
                yield name, new_ids, {key: value[new].to(device, non_blocking=True) for key, value in tensors.items()}


def each_image(
    loader: DataLoader, seen: Columns, device: torch.device, description: str
) -> Iterator[tuple[list[str], Tensor]]:
    """As `each_new`, of images alone: ids and pixels (new, 3, height, width)."""
    for _, ids, inputs in each_new(loader, seen, device, description):
        yield ids, inputs["pixel_values"]


def _embed(model: PreTrainedModel, name: str, inputs: dict[str, Tensor], normalize: bool) -> Tensor:
    """The embeddings (B, D) of one modality; what its features are before they are normalised, where that is off."""
    if not normalize:
        if name == "image":
            return model.get_image_features(**inputs, return_dict=True).pooler_output
        return model.get_features(name, **inputs, return_dict=True).pooler_output
    if name == "image":
        return model(**inputs).image_embeds
    return model(**{f"{name}_{key}": value for key, value in inputs.items()}).further_embeds[name]


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
