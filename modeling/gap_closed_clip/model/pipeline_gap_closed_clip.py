"""The `image-text-retrieval` pipeline: images, texts and other modalities against a gallery of any of them."""

import os
from collections.abc import Sequence, Set
from numbers import Integral
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ImageProcessingMixin, Pipeline

from .items_gap_closed_clip import parts_of, together
from .load_images_gap_closed_clip import load_image
from .modality_processing_gap_closed_clip import check_fit


ITEM_TYPES = (str, bytes, bytearray, os.PathLike, Image.Image, dict)  # of one item, or of an attempt at one


class ImageTextRetrievalPipeline(Pipeline):
    """
    Ranks a gallery of images, texts, or both by their cosine with a query, an image or a text; or of whatever else the
    model embeds.

    A gallery of both kinds needs a space without a modality gap: with one, every text is closer to any text than to
    any image.

    A `str` is a text. An image is a `PIL.Image`, a `pathlib.Path`, the bytes of a file, an array or tensor (H, W),
    (3, H, W) or (H, W, 3), or `{"image": path, URL or any of these}`; an array or tensor of four axes is a list of
    images. `{"text": ...}` is a text, too. Images are turned upright and made RGB
    as in training: DICOM goes through its own window (which needs pydicom), 16-bit gray and float are scaled to their
    own range, and what is transparent becomes black.

    A further modality of the model goes by its name, `{"record": {"age": 62, "sex": "female"}}`. Several together are
    one item, `{"image": path, "record": {...}}`: the sum of their embeddings, weighted by the model's
    `config.fusion_weights` where it has some.

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

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        check_fit(self.model.config.modalities, getattr(self.processor, "modality_processors", {}))

    def __call__(self, queries, gallery=None, top_k: int = 10, batch_size: int = 32) -> list:
        """
        Args:
            queries: one query, or a list or a batch of them.
            gallery: a list of images and texts, a column of a data set, or another iterable that has an order; or
                their embeddings from `embed`, a tensor or an array (N, D), of any length.
            top_k: the number of items to return for each query.
            batch_size: images or texts encoded at a time.

        Returns:
            For each query the best of the gallery, the best first, those of equal scores in the gallery's order: dicts
            of `score` (the cosine), `index` in the gallery and, unless the gallery is embeddings, `item`. A list of
            such lists for a list of queries.

        Raises:
            ValueError: no queries or no gallery, a query that is an empty text, something that is neither image nor
                text, a file that is not there or can't be read, embeddings that are not this model's, or a number
                that is none; a model whose weights are not finite.
        """
        _check_number("top_k", top_k)
        _check_number("batch_size", batch_size)
        self._check_unembedded(queries)
        is_batch, is_embedded = not _is_one(queries), _is_numbers(gallery) and gallery.ndim != 4
        queries = _as_list(queries, "queries") if is_batch else [queries]
        if gallery is not None:
            gallery = self._gallery_embeddings(gallery) if is_embedded else _as_list(gallery, "gallery")
        if gallery is None or len(gallery) == 0:
            raise ValueError("image-text-retrieval needs a gallery to search: gallery=[images and texts].")
        query_embeds = self._embed(queries, "queries", batch_size)  # (Q, D)
        embeds = gallery if is_embedded else self._embed(gallery, "gallery", batch_size)  # (N, D)
        # The cosines are divided and not the embeddings, which may be many, and searched again by the next call.
        cosines = query_embeds @ embeds.T / _norms(embeds)  # (Q, N)
        ranked = [[self._hit(gallery, *hit) for hit in _best(scores, min(top_k, len(embeds)))] for scores in cosines]
        return ranked if is_batch else ranked[0]

    def embed(self, items: list, batch_size: int = 32) -> Tensor:
        """
        Items to float32 unit vectors (N, D) on the CPU: a gallery that is searched more than once.

        Raises:
            ValueError: as for a gallery of items.
        """
        _check_number("batch_size", batch_size)
        return self._embed(_as_list(items, "items"), "items", batch_size)

    def preprocess(self, inputs: dict[str, list]) -> Any:
        if "images" in inputs:
            return self.processor(images=inputs["images"], return_tensors="pt").to(self.dtype)
        if "text" not in inputs:
            return self.processor(**inputs, return_tensors="pt").to(self.dtype)
        # A tokenizer without a limit of its own gets the text tower's.
        limit = min(self.processor.tokenizer.model_max_length, self.model.max_text_length)
        return self.processor(
            text=inputs["text"], return_tensors="pt", padding=True, truncation=True, max_length=limit
        )

    def _forward(self, inputs) -> Tensor:
        return next(iter(self.model(**inputs).embeds.values()))

    def postprocess(self, outputs):
        return outputs

    def _sanitize_parameters(self, **kwargs):
        return {}, {}, {}

    def _embed(self, items: Sequence, name: str, batch_size: int) -> Tensor:
        """`embed`; `name` is what error messages call the items."""
        if len(items) == 0:
            raise ValueError(f"{name} is empty: give images and texts.")
        # All items of a list are checked before the first is encoded. In a data set's column that would decode every
        # image twice.
        if isinstance(items, list | tuple):
            for index, item in enumerate(items):
                self._parts(item, name, index)
        embeds: list[dict[str, Tensor]] = [{} for _ in range(len(items))]
        waiting: dict[str, dict[int, Any]] = {kind: {} for kind in self.model.config.modality_names}
        for index, item in enumerate(items):
            for kind, value in self._parts(item, name, index).items():
                waiting[kind][index] = self._opened(kind, value, f"{name}[{index}]")
                if len(waiting[kind]) == batch_size:
                    self._encode(kind, waiting[kind], embeds)
                    waiting[kind] = {}
        for kind, values in waiting.items():
            if values:
                self._encode(kind, values, embeds)
        return torch.stack([self._together(parts) for parts in embeds])

    def _parts(self, item: Any, name: str, index: int) -> dict[str, Any]:
        """`parts_of` an item; an empty text is no query, as to the endpoint and the Space."""
        parts = parts_of(item, f"{name}[{index}]", self._further)
        if name == "queries" and not parts.get("text", "text").strip():
            raise ValueError(f"queries[{index}] is an empty text. Say what to search for.")
        return parts

    @property
    def _further(self) -> dict[str, Any]:
        """The processors of the model's modalities beyond image and text."""
        known = self.model.config.modalities or {}
        return {name: each for name, each in self.processor.modality_processors.items() if name in known}

    def _opened(self, kind: str, value: Any, location: str) -> Any:
        is_image = kind == "image" or isinstance(self._further.get(kind), ImageProcessingMixin)
        return load_image(value, name=location) if is_image else value

    def _encode(self, kind: str, values: dict[int, Any], embeds: list[dict[str, Tensor]]) -> None:
        """Puts the unit vectors (D,) of one modality's values into the rows of `embeds`."""
        found = self.forward(self.preprocess({"images" if kind == "image" else kind: list(values.values())}))
        if not found.isfinite().all():
            raise ValueError(
                f"The model's embedding of {'an' if kind == 'image' else 'a'} {kind} is NaN or infinite: its weights "
                f"are not finite, or overflow in {self.dtype}. Load sound weights, or dtype=torch.float32."
            )
        for index, vector in zip(values, found, strict=True):
            embeds[index][kind] = vector

    def _together(self, parts: dict[str, Tensor]) -> Tensor:
        """The unit vector (D,) of an item's."""
        if len(parts) == 1:
            return next(iter(parts.values()))
        rows = {kind: vector.unsqueeze(0) for kind, vector in parts.items()}
        return together(rows, self.model.config.fusion_weights)[0]

    def _gallery_embeddings(self, gallery: Tensor | np.ndarray) -> Tensor:
        """A gallery that is embeddings, which need not be unit vectors, as (N, D) float32 on the CPU."""
        if isinstance(gallery, np.ndarray):  # np.require copies only what torch would not take, or warn of
            gallery = torch.from_numpy(np.require(gallery, np.float32, ["C", "W"]))
        dim = self.model.config.projection_dim
        if gallery.ndim != 2 or gallery.shape[1] != dim:
            raise ValueError(
                f"gallery has the shape {tuple(gallery.shape)}: embeddings of this model are (N, {dim}). One image "
                "goes into a list, [image]."
            )
        return gallery.detach().to("cpu", torch.float32)

    def _check_unembedded(self, queries: Any) -> None:
        """Refuses queries (N, D) that are what `embed` gives, which would be taken for a gray image."""
        if not _is_numbers(queries) or queries.ndim != 2 or queries.shape[1] != self.model.config.projection_dim:
            return
        lengths = torch.as_tensor(queries).detach().to("cpu", torch.float32).norm(dim=-1)
        if torch.allclose(lengths, torch.ones_like(lengths), atol=1e-2):
            raise ValueError("queries are embeddings: give the images and texts; the gallery alone may be embedded.")

    @staticmethod
    def _hit(gallery, score: float, index: int) -> dict[str, Any]:
        hit = {"score": score, "index": index}
        return hit if isinstance(gallery, Tensor) else {**hit, "item": gallery[index]}


def _check_number(name: str, value) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r:.80}: give a whole number, 1 or more.")


def _is_numbers(items: Any) -> bool:
    """Whether items are an array of numbers. An array of strings or objects is a list of items."""
    return isinstance(items, Tensor) or (isinstance(items, np.ndarray) and items.dtype.kind in "biuf")


def _is_one(items: Any) -> bool:
    """Whether this is one item and no list of them: of arrays, only one of four axes is several images."""
    return isinstance(items, ITEM_TYPES) or (_is_numbers(items) and items.ndim != 4)


def _as_list(items, name: str) -> Sequence:
    """What has an order and a length: a list, a data set's column as it is, and a list of what a generator gives."""
    if _is_numbers(items) and items.ndim != 4:
        raise ValueError(f"{name} is one array of the shape {tuple(items.shape)}: give a list, [image].")
    if _is_one(items):
        raise ValueError(f"{name} is one item, {items!r:.80}: give a list, [item].")
    if isinstance(items, Set):
        raise ValueError(f"{name} is a set, which has no order to give the index in: give a list.")
    if isinstance(items, Sequence):
        return items
    try:
        return list(items)
    except TypeError:
        raise ValueError(f"{name} is {items!r:.80}: give a list of images and texts.") from None


def _best(scores: Tensor, number: int) -> list[tuple[float, int]]:
    """The highest of some scores (N,) and their indices, the highest first; of equal ones those of lower indices."""
    lowest = scores.topk(number).values[-1]  # topk itself leaves it open which of equal scores it takes
    indices = (scores >= lowest).nonzero().squeeze(1)
    found, order = scores[indices].sort(descending=True, stable=True)
    return list(zip(found[:number].tolist(), indices[order[:number]].tolist(), strict=True))


def _norms(embeds: Tensor) -> Tensor:
    """The lengths (N,) of a gallery's embeddings (N, D)."""
    norms = embeds.norm(dim=-1)
    bad = (~norms.isfinite() | (norms == 0)).nonzero()
    if len(bad):
        raise ValueError(f"gallery[{bad[0].item()}] has no direction: it is all zeros, or NaN or infinite.")
    return norms


__all__ = ["ImageTextRetrievalPipeline"]
