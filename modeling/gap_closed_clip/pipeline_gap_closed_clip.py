"""The `image-text-retrieval` pipeline: images or texts against a gallery of either kind, or of both."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import Pipeline
from transformers.image_utils import load_image


class ImageTextRetrievalPipeline(Pipeline):
    """
    Ranks a gallery of images, texts, or both by their cosine with a query, an image or a text.

    A gallery of both kinds needs a space without a modality gap: with one, every text is closer to any text than to
    any image.

    A `str` is a text. An image is a `PIL.Image`, a `pathlib.Path`, or `{"image": path or URL}`. `{"text": ...}` is a
    text, too.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> search = pipeline("image-text-retrieval", model="owner/name", trust_remote_code=True)
    >>> search("Chest radiograph with effusion.", gallery=[Path("a.png"), Path("b.png"), "Normal chest."], top_k=2)
    [{'score': 0.61, 'index': 1, 'item': PosixPath('b.png')}, {'score': 0.4, 'index': 2, 'item': 'Normal chest.'}]
    ```
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(self, queries, gallery=None, top_k: int = 10, batch_size: int = 32) -> list:
        """
        Args:
            queries: one query, or a list of them.
            gallery: a list of images and texts, or their embeddings from `embed`, (N, D).
            top_k: how many to give.
            batch_size: images or texts encoded at a time.

        Returns:
            For each query the best of the gallery, the best first: dicts of `score` (the cosine), `index` in the
            gallery and, unless the gallery is embeddings, `item`. A list of such lists for a list of queries.

        Raises:
            ValueError: an empty gallery, or something that is neither image nor text.
        """
        if gallery is None or len(gallery) == 0:
            raise ValueError("image-text-retrieval needs a gallery to search: gallery=[images and texts].")
        many = isinstance(queries, list | tuple)
        query_embeds = self.embed(queries if many else [queries], batch_size)  # (Q, D)
        embeds = gallery if isinstance(gallery, Tensor) else self.embed(gallery, batch_size)  # (N, D)
        best = (query_embeds @ embeds.to(query_embeds).T).topk(min(top_k, len(embeds)))
        ranked = [
            [self._hit(gallery, score, index) for score, index in zip(scores, indices, strict=True)]
            for scores, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        return ranked if many else ranked[0]

    def embed(self, items: list, batch_size: int = 32) -> Tensor:
        """Images and texts to unit vectors (N, D) on the CPU, to be searched again and again."""
        images, texts = {}, {}
        for index, item in enumerate(items):
            kind, value = self._kind(item)
            (images if kind == "image" else texts)[index] = value
        embeds: dict[int, Tensor] = {}
        for name, chosen in (("images", images), ("text", texts)):
            indices = list(chosen)
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                inputs = self.preprocess({name: [chosen[index] for index in batch]})
                embeds.update(zip(batch, self.forward(inputs), strict=True))
        return torch.stack([embeds[index] for index in range(len(items))])

    def preprocess(self, inputs: dict[str, list]) -> Any:
        if "images" in inputs:
            images = [load_image(image).convert("RGB") for image in inputs["images"]]
            return self.processor(images=images, return_tensors="pt").to(self.dtype)
        # A tokenizer without a limit of its own gets the text tower's.
        limit = min(self.processor.tokenizer.model_max_length, self.model.max_text_length)
        return self.processor(
            text=inputs["text"], return_tensors="pt", padding=True, truncation=True, max_length=limit
        )

    def _forward(self, inputs) -> Tensor:
        outputs = self.model(**inputs)
        return outputs.image_embeds if outputs.text_embeds is None else outputs.text_embeds

    def postprocess(self, outputs):
        return outputs

    def _sanitize_parameters(self, **kwargs):
        return {}, {}, {}

    @staticmethod
    def _kind(item) -> tuple[str, Any]:
        if isinstance(item, dict) and len(item) == 1 and next(iter(item)) in ("image", "text"):
            kind, value = next(iter(item.items()))
        elif isinstance(item, str):
            kind, value = "text", item
        else:
            kind, value = "image", item
        value = str(value) if isinstance(value, Path) else value
        expected = (str, Image.Image) if kind == "image" else str
        if not isinstance(value, expected):
            raise ValueError(
                f"{item!r:.80} is neither image nor text: give a str (a text), a PIL image, a pathlib.Path, or "
                "{'image': path or URL} or {'text': ...}."
            )
        return kind, value

    @staticmethod
    def _hit(gallery, score: float, index: int) -> dict[str, Any]:
        hit = {"score": score, "index": index}
        return hit if isinstance(gallery, Tensor) else {**hit, "item": gallery[index]}


__all__ = ["ImageTextRetrievalPipeline"]
