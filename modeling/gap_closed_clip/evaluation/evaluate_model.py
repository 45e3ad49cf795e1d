"""One model on one set of pairs: an encoder by its embeddings, a captioner by the captions it writes."""

from dataclasses import dataclass

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, ProcessorMixin

from .captions import Captions, evaluate_captioner
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
    """

    metrics: dict[str, float]
    embeddings: PairEmbeddings | None = None
    captions: Captions | None = None

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
        metrics, captions = evaluate_captioner(model, processor, pairs, **settings)
        return Evaluation(metrics, captions=captions)
    embeddings = embed_pairs(model, processor, pairs, **settings)
    return Evaluation(evaluate_embeddings(embeddings), embeddings)


__all__ = ["Evaluation", "evaluate_model"]
