"""Several models on the same pairs, one after the other, with what they are compared with: one table, one report."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from ..checkpoint import is_captioner, is_local, load_captioner, load_checkpoint
from ..data import DataArguments, load_checked_pairs
from ..model.captioning_gap_closed_clip import GapClosedClipForConditionalGeneration
from ..model.modeling_gap_closed_clip import GapClosedClipModel
from ..model.processing_gap_closed_clip import GapClosedClipProcessor
from .arrays import ArrayFiles, columns_of_rows, load_arrays
from .captions import Captions, check_references, evaluate_captions, nearest_captions, score_captions
from .embed import PairEmbeddings, columns_of, embed_pairs
from .evaluate_model import Evaluation, evaluate_model
from .evaluate_pairs import evaluate_embeddings
from .post_hoc import fit_pairs
from .precision import autocast_dtype
from .report import write_report
from .what_is_embedded import with_image_and_caption


@dataclass
class ComparisonSettings:
    """
    How models are evaluated side by side.

    Args:
        split: "train", "validation" or "test".
        output: folder of the report.
        batch_size: images or captions at once.
        num_workers: processes that decode the images.
        bf16: compute in bfloat16 where that is safe.
        centering: add each encoder with its modalities centered by their training means.
        nearest_caption: add, for each model, the training caption nearest to each image.
        num_beams: beams of a caption; 0 for what the captioner was trained with.
        scorer: folder or Hub id of the model that gives all captions their CLIPScore; empty for each captioner's own.
        allow_pickle: read pickled weights of a CLIP of another library, by torch.load's weights_only.
        image_ids, caption_ids, labels: of embeddings without a data set, as of `columns_of_rows`.

    Raises:
        ValueError: a number out of its range.
    """

    split: str = ""
    output: str = "outputs/eval"
    batch_size: int = 64
    num_workers: int = 2
    bf16: bool = False
    centering: bool = False
    nearest_caption: bool = False
    num_beams: int = 0
    scorer: str = ""
    allow_pickle: bool = False
    image_ids: str = ""
    caption_ids: str = ""
    labels: str = ""

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("num_workers", 0), ("num_beams", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


class Comparison:
    """
    Evaluates models, and embeddings that others have computed, on the same pairs.

    Args:
        models: {name in the table: folder or Hub id}.
        settings: what is measured, and what is added to compare with.
        data: where the pairs come from; not looked at where there is no model.
        arrays: {name in the table: files with embeddings of the pairs, in their order}.

    Raises:
        ValueError, OSError: as `load_checked_pairs` and `load_arrays`.
    """

    def __init__(
        self,
        models: dict[str, str],
        settings: ComparisonSettings,
        data: DataArguments,
        arrays: dict[str, ArrayFiles] | None = None,
    ):
        self.models, self.settings, self.data = models, settings, data
        self.pairs: Dataset | IterableDataset | None = None
        if models:
            self.pairs = load_checked_pairs(data, settings.split, settings.num_workers)
        self.arrays = self._load_arrays(arrays or {})
        self.train_pairs: Dataset | IterableDataset | None = None
        if settings.centering or settings.nearest_caption:
            self.train_pairs = load_checked_pairs(data, "train", settings.num_workers)
        self.device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.embedding_settings: dict[str, Any] = {
            "batch_size": settings.batch_size,
            "num_workers": settings.num_workers,
            "autocast_dtype": autocast_dtype(settings.bf16, self.device),
            "max_length": data.max_caption_tokens,
            "window": data.window,
        }
        self.evaluations: dict[str, Evaluation] = {}

    def run(self, described_data: dict[str, Any], found: dict[str, Any] | None = None) -> str:
        """
        Evaluates all models and writes the report; returns the table.

        Args:
            described_data: what the report says of the pairs.
            found: what metrics.json is to tell among the evaluation's settings, beside them.
        """
        for name, path in self.models.items():
            with _naming(path):
                self._add(name, path)
        for name, embeddings in self.arrays.items():
            self.evaluations[name] = Evaluation.of(embeddings, evaluate_embeddings)
        writes_captions = any(evaluation.captions is not None for evaluation in self.evaluations.values())
        if self.settings.scorer and writes_captions:
            self._score_all()
        caption_settings = {name: value for name in ("num_beams", "scorer") if (value := getattr(self.settings, name))}
        return write_report(
            self.settings.output,
            self.evaluations,
            described_data,
            self.settings.split,
            folders={name: path for name, path in self.models.items() if is_local(path)},
            pairs=self.pairs,
            settings={**(caption_settings if writes_captions else {}), **(found or {})},
        )

    def _load_arrays(self, arrays: dict[str, ArrayFiles]) -> dict[str, PairEmbeddings]:
        # Pairs that lack the image or the caption have no row: they are no pairs to measure a model on, either.
        columns = None if self.pairs is None or not arrays else columns_of(with_image_and_caption(self.pairs))
        found = {name: load_arrays(files, columns) for name, files in arrays.items()}
        lengths = {name: len(embeddings) for name, embeddings in found.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"The embeddings are of different numbers of pairs, {lengths}: compare the same pairs.")
        if columns is None and found:
            settings = self.settings
            ids = (settings.image_ids, settings.caption_ids, settings.labels)
            columns = columns_of_rows(next(iter(lengths.values())), *ids)
            found = {name: replace(embeddings, **columns._asdict()) for name, embeddings in found.items()}
        return found

    def _add(self, name: str, path: str) -> None:
        if is_captioner(path):
            if isinstance(self.pairs, Dataset):
                check_references(self.pairs, self.settings.split)
            self._add_captioner(name, *load_captioner(path))
        else:
            self._add_encoder(name, *load_checkpoint(path, allow_pickle=self.settings.allow_pickle))

    def _add_encoder(self, name: str, model: GapClosedClipModel, processor: GapClosedClipProcessor) -> None:
        model.to(self.device)
        settings = self.embedding_settings | {"model_name": name, "modalities": tuple(self.data.all_modalities)}
        evaluation = self.evaluations[name] = evaluate_model(model, processor, self.pairs, **settings)
        if self.train_pairs is None or evaluation.embeddings is None:
            return
        train = embed_pairs(model, processor, self.train_pairs, **self.embedding_settings)
        if self.settings.centering:
            centered = fit_pairs("centering", train).apply(evaluation.embeddings)
            measure = partial(evaluate_embeddings, fusion_weights=model.config.fusion_weights)
            self.evaluations[f"{name}, centered"] = Evaluation.of(centered, measure)
        if self.settings.nearest_caption:
            self._add_nearest(name, model, processor, evaluation.embeddings, train)

    def _add_captioner(
        self, name: str, model: GapClosedClipForConditionalGeneration, processor: GapClosedClipProcessor
    ) -> None:
        model.to(self.device)
        settings = self.embedding_settings | {"score": not self.settings.scorer}
        if self.settings.num_beams:
            settings["num_beams"] = self.settings.num_beams
        self.evaluations[name] = evaluate_model(model, processor, self.pairs, **settings)
        if self.settings.nearest_caption:
            encoder = model.gap_closed_clip
            embeddings, train = (
                embed_pairs(encoder, processor, pairs, **self.embedding_settings)
                for pairs in (self.pairs, self.train_pairs)
            )
            self._add_nearest(name, encoder, processor, embeddings, train)

    def _add_nearest(
        self,
        name: str,
        encoder: GapClosedClipModel,
        processor: GapClosedClipProcessor,
        embeddings: PairEmbeddings,
        train: PairEmbeddings,
    ) -> None:
        images, limit = embeddings.by_image(), self.data.max_caption_tokens

        def measure(captions: Captions) -> dict[str, float]:
            metrics = evaluate_captions(captions)
            if self.settings.scorer:
                return metrics
            return metrics | score_captions(encoder, processor, captions, images, max_length=limit)

        self.evaluations[f"{name}, nearest caption"] = Evaluation.of(nearest_captions(embeddings, train), measure)

    def _score_all(self) -> None:
        """Adds the CLIPScore of all captions by one model."""
        scorer, processor = load_checkpoint(self.settings.scorer, allow_pickle=self.settings.allow_pickle)
        images = embed_pairs(scorer.to(self.device), processor, self.pairs, **self.embedding_settings).by_image()
        limit = self.data.max_caption_tokens
        for evaluation in self.evaluations.values():
            if evaluation.captions is None:
                continue
            evaluation.metrics |= score_captions(scorer, processor, evaluation.captions, images, max_length=limit)
            for name, captions in evaluation.captions.by_source().items():
                evaluation.by_source[name] |= score_captions(scorer, processor, captions, images, max_length=limit)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Embeddings without a direction are told with the model that gave them."""
    try:
        yield
    except ValueError as error:
        if "is a zero vector" not in str(error):
            raise
        raise ValueError(
            f"{path}: its weights (*.safetensors) are damaged, or its space has collapsed: {error}"
        ) from error


__all__ = ["Comparison", "ComparisonSettings"]
