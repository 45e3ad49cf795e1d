"""Captions of a data set's images, written or found, and how they compare with the true ones."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, ProcessorMixin
from transformers.utils import logging

from ..data import PairCollator
from ..metrics._caption_tokens import tokenize
from .by_source import flat_metrics, measure_sources, rows_by_source
from .embed import (
    Columns,
    PairEmbeddings,
    collate,
    columns_of,
    each_image,
    embed_captions,
    embed_pairs,
    evaluation_mode,
    first_rows,
    no_columns,
)
from .evaluate_pairs import load_metric


logger = logging.get_logger(__name__)

TEXT_METRICS = ("caption_bleu", "caption_rouge_l", "caption_cider")


@dataclass
class Captions:
    """
    A caption for each of N distinct images.

    Args:
        image_ids: N ids.
        captions: N captions, written or found.
        references: N lists of the image's own captions.
        sources: N names of the images' sources; by default all "", the one and only source.
    """

    image_ids: list[str]
    captions: list[str]
    references: list[list[str]]
    sources: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.sources = self.sources or [""] * len(self.image_ids)

    def __len__(self) -> int:
        return len(self.image_ids)

    def by_source(self) -> dict[str, "Captions"]:
        """Those of each named source's images, by its name."""
        return {
            name: Captions(*([values[row] for row in rows] for values in vars(self).values()))
            for name, rows in rows_by_source(self.sources).items()
        }


def sources_of(columns: Columns) -> dict[str, str]:
    """The source of each image by its id."""
    return dict(zip(columns.image_ids, columns.sources, strict=True))


def references_of(columns: Columns) -> dict[str, list[str]]:
    """The distinct captions of each image by its id, in the order of the pairs."""
    references: dict[str, list[str]] = {}
    for image_id, caption in zip(columns.image_ids, columns.captions, strict=True):
        captions = references.setdefault(image_id, [])
        if caption not in captions:
            captions.append(caption)
    return references


def check_references(pairs: Dataset, split: str) -> None:
    """
    Checks that every image has a caption which written ones can be compared with.

    Raises:
        ValueError: an image has no caption with a word in it; with its id.
    """
    for image_id, captions in references_of(columns_of(pairs)).items():
        if not any(tokenize(caption) for caption in captions):
            raise ValueError(
                f"Split '{split}': the caption of image '{image_id}' is {captions[0]!r}, without a word, so that no "
                "caption can be compared with it. Leave the pair out."
            )


def generate_captions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Dataset | IterableDataset,
    batch_size: int = 32,
    num_workers: int = 0,
    autocast_dtype: torch.dtype | None = None,
    window: tuple[float, float] | None = None,
    **generate_kwargs,
) -> Captions:
    """
    Writes a caption for every distinct image, with the model in evaluation mode, on the device where it is.

    Args:
        model: a [`GapClosedClipForConditionalGeneration`].
        processor: its [`GapClosedClipProcessor`].
        pairs: rows of `image`, `caption` and `image_id`.
        batch_size: images at once.
        num_workers: processes that decode the images.
        autocast_dtype: as in `embed_pairs`.
        window: (centre, width) for DICOM, 16-bit and float images, as in training.
        generate_kwargs: of `generate`, e.g. num_beams; by default what the model's generation config says. An image
            has one caption, the best, where several are asked for.

    Raises:
        ValueError: there is no pair, or an image is unreadable; it is named.
    """
    columns = None if isinstance(pairs, IterableDataset) else columns_of(pairs)
    generate_kwargs |= {"num_return_sequences": 1, "return_dict_in_generate": False}
    once = pairs if columns is None else pairs.select(list(first_rows(columns.image_ids)))
    loader = DataLoader(
        once,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=partial(collate, collator=PairCollator(processor, window=window)),
        pin_memory=model.device.type == "cuda",
    )
    autocast = torch.autocast(model.device.type, autocast_dtype, enabled=autocast_dtype is not None)
    written: dict[str, str] = {}
    seen = no_columns()
    with evaluation_mode(model), autocast:
        for ids, pixel_values in each_image(loader, seen, model.device, "Writing captions"):
            tokens = model.generate(pixel_values, **generate_kwargs)
            written.update(zip(ids, processor.batch_decode(tokens, skip_special_tokens=True), strict=True))
    references, sources = references_of(columns or seen), sources_of(columns or seen)
    if not written:
        raise ValueError("There is no pair to write a caption for: the data set or split is empty.")
    return Captions(
        list(written),
        list(written.values()),
        [references[image_id] for image_id in written],
        [sources[image_id] for image_id in written],
    )


def nearest_captions(embeddings: PairEmbeddings, train: PairEmbeddings, shift: np.ndarray | None = None) -> Captions:
    """
    Finds for each image the training caption whose embedding is nearest to the image's: what any decoder must beat.

    Args:
        embeddings: of the pairs to find captions for; those that lack the image or the caption are left out.
        train: of the training pairs; those that lack the caption are left out.
        shift: (D,), added to image embeddings before: mean text minus mean image embedding of the training pairs.
    """
    embeddings, train = embeddings.having("image", "text"), train.having("text")
    rows = list(first_rows(embeddings.image_ids))
    images = embeddings.image_embeds[rows]
    if shift is not None:
        images = images + shift
        images /= np.linalg.norm(images, axis=1, keepdims=True)
    nearest = (images @ train.text_embeds.T).argmax(axis=1)
    columns = Columns(embeddings.image_ids, embeddings.captions, embeddings.labels, embeddings.sources)
    references = references_of(columns)
    ids = [embeddings.image_ids[row] for row in rows]
    return Captions(
        ids,
        [train.captions[row] for row in nearest],
        [references[image_id] for image_id in ids],
        [embeddings.sources[row] for row in rows],
    )


def evaluate_captions(captions: Captions) -> dict[str, float]:
    """
    Measures texts alone: flat metrics, with `num_images`, `caption_words` (the mean) and `distinct_captions` (a
    fraction: a decoder that has learned one sentence scores, too).

    METEOR only where its resources are installed.
    """
    return measure_texts(captions.captions, captions.references) | {"num_images": float(len(captions))}


def measure_texts(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """Measures N captions, each with one or more references; returns flat metrics."""
    texts = {"predictions": predictions, "references": references}
    result: dict[str, float] = {}
    for name in TEXT_METRICS:
        # Most BERTs write lower case alone, captions that were found don't.
        options = {"lowercase": True} if name == "caption_bleu" else {}
        result |= load_metric(name, keep_in_memory=True).compute(**texts, **options)
    meteor = load_metric("caption_meteor", keep_in_memory=True)
    if (missing := meteor.missing()) is None:
        result |= meteor.compute(**texts)
    else:
        logger.info(missing)
    words = [len(caption.split()) for caption in predictions]
    return result | {
        "caption_words": float(np.mean(words)),
        "distinct_captions": len(set(predictions)) / len(predictions),
    }


def score_captions(
    scorer: PreTrainedModel,
    processor: ProcessorMixin,
    captions: Captions,
    image_embeds: dict[str, np.ndarray],
    batch_size: int = 64,
    max_length: int | None = None,
) -> dict[str, float]:
    """
    Measures CLIPScore and RefCLIPScore by a dual encoder. Scores of different encoders can't be compared.

    Args:
        scorer: a [`GapClosedClipModel`].
        image_embeds: {image id: (D,)} by the scorer.
    """
    collator = PairCollator(processor, max_length=max_length)
    texts = {*captions.captions, *(text for texts in captions.references for text in texts)}
    with evaluation_mode(scorer):
        embeds = embed_captions(scorer, collator, texts, batch_size)
    return load_metric("clip_score", keep_in_memory=True).compute(
        image_embeds=[image_embeds[image_id] for image_id in captions.image_ids],
        caption_embeds=[embeds[caption] for caption in captions.captions],
        reference_embeds=[[embeds[text] for text in own] for own in captions.references],
    )


def evaluate_captioner(
    model: PreTrainedModel, processor: ProcessorMixin, pairs: Dataset | IterableDataset, **settings
) -> tuple[dict[str, float], Captions]:
    """
    Writes a caption for every image, and measures them: the metrics of texts and, with `score`, CLIPScore by the
    captioner's own encoder, to be compared with other captioners on the same encoder only.

    Args:
        settings: of `captions_and_measure`.
    """
    captions, measure = captions_and_measure(model, processor, pairs, **settings)
    return measure(captions), captions


def captions_and_measure(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Dataset | IterableDataset,
    batch_size: int = 32,
    num_workers: int = 0,
    autocast_dtype: torch.dtype | None = None,
    max_length: int | None = None,
    window: tuple[float, float] | None = None,
    score: bool = True,
    **generate_kwargs,
) -> tuple[Captions, Callable[[Captions], dict[str, float]]]:
    """
    Writes a caption for every image; returns them, and what gives the metrics of any of them.

    Args:
        max_length: tokens that the encoder takes of a caption; default: the tokenizer's own limit.
        score: measure the CLIPScore by the captioner's own encoder, too.
        other arguments: of `generate_captions`.
    """
    settings: dict[str, Any] = {"num_workers": num_workers, "autocast_dtype": autocast_dtype, "window": window}
    captions = generate_captions(model, processor, pairs, batch_size, **settings, **generate_kwargs)
    if not score:
        return captions, evaluate_captions
    encoder = model.gap_closed_clip
    images = embed_pairs(encoder, processor, pairs, batch_size, max_length=max_length, **settings).by_image()

    def measure(some: Captions) -> dict[str, float]:
        return evaluate_captions(some) | score_captions(encoder, processor, some, images, max_length=max_length)

    return captions, measure


def build_caption_metrics(
    pairs: Iterable[dict], processor: ProcessorMixin
) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    Makes the `compute_metrics` of a `Seq2SeqTrainer` with `predict_with_generate` that evaluates on these pairs, in
    their order. Of several sources it gives each one's metrics, too, as `build_compute_metrics` does.

    Args:
        pairs: rows of `image_id`, `caption` and, with several sources, `source`.
        processor: a [`GapClosedClipProcessor`], which puts tokens together.

    Raises (when it is called):
        ValueError: the predictions are not one row a pair.
    """
    columns = columns_of(pairs)
    references = references_of(columns)
    rows = list(first_rows(columns.image_ids))  # an image counts once, however many captions it has
    image_ids = [columns.image_ids[row] for row in rows]
    sources = [columns.sources[row] for row in rows]

    def measure(captions: Captions) -> dict[str, float]:
        return measure_texts(captions.captions, captions.references)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        tokens = prediction.predictions
        if len(tokens) != len(columns.image_ids):
            raise ValueError(
                f"compute_metrics was built for {len(columns.image_ids)} pairs but got {len(tokens)} predictions: "
                "build it with the very data set that the Trainer evaluates."
            )
        # the Trainer pads batches of different length
        tokens = np.where(tokens < 0, processor.tokenizer.pad_token_id, tokens)[rows]
        written = processor.batch_decode(tokens, skip_special_tokens=True)
        captions = Captions(image_ids, written, [references[image_id] for image_id in image_ids], sources)
        metrics = measure(captions)
        return flat_metrics(metrics, measure_sources(captions, metrics, measure))

    return compute_metrics
