"""One model on one set of pairs: an encoder by its embeddings, a captioner by the captions it writes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, ProcessorMixin

from .by_source import mean_over_sources, measure_sources
from .captions import Captions, captions_and_measure
from .embed import PairEmbeddings, embed_pairs
from .evaluate_pairs import evaluate_embeddings


@dataclass
class Evaluation:
    """
    What was found of one model.

    Args:
        metrics: flat, by name.
        embeddings: an encoder's, of the pairs.
        captions: a captioner's, or others that were measured, one for each distinct image.
        by_source: {source: metrics of its own pairs, in a gallery of their own}; empty without named sources.
    """

    metrics: dict[str, float]
    embeddings: PairEmbeddings | None = None
    captions: Captions | None = None
    by_source: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, found: PairEmbeddings | Captions, measure: Callable[[Any], dict[str, float]]) -> "Evaluation":
        """Measures embeddings or captions, together and each source's apart."""
        metrics = measure(found)
        by_source = measure_sources(found, metrics, measure)
        if isinstance(found, Captions):
            return cls(metrics, captions=found, by_source=by_source)
        return cls(metrics, embeddings=found, by_source=by_source)

    @property
    def means(self) -> dict[str, float]:
        """The plain mean over the sources of a few metrics."""
        return mean_over_sources(self.metrics, self.by_source)

    @property
    def size(self) -> str:
        """What was measured, as "512 pairs" or "64 images"."""
        if self.embeddings is not None:
            return f"{len(self.embeddings)} pairs"
        return f"{len(self.captions or ())} images"


def evaluate_model(
    model: PreTrainedModel, processor: ProcessorMixin, pairs: Dataset | IterableDataset, **settings
) -> Evaluation:
    """
    Embeds the pairs and measures the embeddings; with a captioner, writes a caption for each image and measures those.

    Args:
        model: a [`GapClosedClipModel`], or a [`GapClosedClipForConditionalGeneration`].
        processor: its [`GapClosedClipProcessor`].
        pairs: as of `embed_pairs`.
        settings: of `embed_pairs` or, with a captioner, of `evaluate_captioner`, e.g. batch_size and num_workers.

    Raises:
        ValueError: there is no pair, or an image is unreadable; it is named.
    """
    if model.can_generate():
        return Evaluation.of(*captions_and_measure(model, processor, pairs, **settings))
    weights = getattr(model.config, "fusion_weights", None)
    measure = partial(evaluate_embeddings, fusion_weights=weights)
    return Evaluation.of(embed_pairs(model, processor, pairs, **settings), measure)


__all__ = ["Evaluation", "evaluate_model"]
