"""[`GapClosedClipEmbedder`]: what sentence-transformers loads a model folder as; modules.json names it."""

from collections.abc import Sequence
from typing import Any, BinaryIO

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import normalize
from transformers import ImageProcessingMixin

from .images_gap_closed_clip import FORMATS
from .items_gap_closed_clip import parts_of, together
from .load_images_gap_closed_clip import is_url, load_image


# In a try block, because transformers fetches this file with the others and asks for all that it imports outside one.
try:
    from sentence_transformers.base.modality import is_image_url_or_path
    from sentence_transformers.base.modules import Transformer
except ImportError as error:
    raise ImportError(
        "sentence-transformers is missing, or older than 6.0: pip install -U sentence-transformers"
    ) from error


class GapClosedClipEmbedder(Transformer):
    """
    The library's `Transformer` around a `GapClosedClipModel`, for images, texts, other modalities, and lists of all.

    The library's own encodes one modality at a time. This one encodes each item of a list by its tower and puts the
    unit vectors back in the list's order. An item of several modalities is the mean of its unit vectors, normalised,
    weighted by the model's `fusion_weights` where it has some.

    An item is a text (`str`), an image (a `PIL.Image`, a `pathlib.Path`, a file's bytes, an array or tensor, or as
    everywhere in the library a `str` that is the path of an image file that is there or the URL of one), or a dict
    with `image`, `text`, or both, and further modalities of the model by their names, `{"record": {"age": 62}}`.
    Images are turned upright and made RGB as in training.

    Example:

    ```python
    >>> from sentence_transformers import SentenceTransformer

    >>> model = SentenceTransformer("owner/name", trust_remote_code=True)
    >>> model.encode(["Normal chest radiograph.", Path("a.png"), {"image": Path("a.png"), "text": "Effusion."}]).shape
    (3, 512)
    ```
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # A tokenizer without a limit of its own gets the text tower's.
        self.tokenizer.model_max_length = min(self.tokenizer.model_max_length, self.model.max_text_length)

    @classmethod
    def load_config(cls, *args, **kwargs) -> dict[str, Any]:
        """As the library's, which a folder need not have; the ways into the model are always these."""
        ways = {kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"} for kind in _KINDS}
        output = {"modality_config": ways, "module_output_name": "sentence_embedding"}
        return {**super().load_config(*args, **kwargs), **output}

    @property
    def modalities(self) -> list:
        """The kinds of items. The library calls a list of several kinds a "message", too."""
        return [*_KINDS, *self._further, _KINDS, "message"]

    @property
    def _further(self) -> dict[str, Any]:
        """The processors of the model's modalities beyond image and text."""
        known = self.model.config.modalities or {}
        return {name: each for name, each in self.processor.modality_processors.items() if name in known}

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs) -> dict[str, Any]:
        """
        Items to what `forward` takes: that of each tower, and the rows of the list that it belongs to.

        Args:
            inputs: N items.
            prompt: put before each text.
            kwargs: as in the library, e.g. `processing_kwargs`.

        Raises:
            ValueError: an item is neither image nor text nor of a further modality, or an image can't be read; its
                place is named.
        """
        if not inputs:
            return {}
        features: dict[str, Any] = {}
        found = [self._parts(item, f"inputs[{row}]") for row, item in enumerate(inputs)]
        for kind in (*_KINDS, *self._further):
            rows = [row for row, parts in enumerate(found) if kind in parts]
            if not rows:
                continue
            values = [found[row][kind] for row in rows]
            if kind in _KINDS:
                features |= super().preprocess([{kind: value} for value in values], prompt=prompt, **kwargs)
            else:
                encoded = self.processor(**{kind: values}, return_tensors="pt")
                features |= {**encoded, f"{kind}_names": list(encoded)}
            features[f"{kind}_rows"] = torch.tensor(rows)
        return {**features, "modality": "message", "num_items": len(inputs)}

    def forward(self, features: dict[str, Any], **kwargs) -> dict[str, Any]:
        """Adds `sentence_embedding`, (N, D) unit vectors, to what `preprocess` gave."""
        embeds: dict[str, Tensor] = {}
        for kind in (*_KINDS, *self._further):
            rows = features.get(f"{kind}_rows")
            if rows is None:
                continue
            if kind in _KINDS:
                found = super().forward({**features, "modality": kind}, **kwargs)["sentence_embedding"]
            else:
                inputs = {name.removeprefix(f"{kind}_"): features[name] for name in features[f"{kind}_names"]}
                found = self.model.get_features(kind, return_dict=True, **inputs).pooler_output
            placed = found.new_zeros(features["num_items"], found.shape[1])
            embeds[kind] = placed.index_add(0, rows, normalize(found, dim=-1))
        found = together(embeds, self.model.config.fusion_weights) if embeds else None
        return {**features, "sentence_embedding": found}

    def _parts(self, item: Any, location: str) -> dict[str, Any]:
        """What an item has of each modality; images upright and RGB."""
        if isinstance(item, str):
            item = {"image" if _names_an_image(item) else "text": item}
        known = {*_KINDS, *self._further}
        if isinstance(item, dict) and len(item) > 1 and not set(item) <= known:
            allowed = "image, text, or both" if len(known) == 2 else ", ".join((*_KINDS, *self._further))
            raise ValueError(f"{location} has the entries {', '.join(map(str, item))}: an item has {allowed}.")
        parts = parts_of(item, location, self._further)
        for kind, value in parts.items():
            if kind == "image" or isinstance(self._further.get(kind), ImageProcessingMixin):
                parts[kind] = load_image(value, name=location)
        return parts


# Of paths of images, as in `data.roco`, and further ones of the formats that are read.
_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".webp"),
    *(".jp2", ".j2k", ".ppm", ".pgm", ".pnm", ".dcm", ".dicom"),
)
_KINDS = ("image", "text")  # in the order in which the library sorts the two of one item


def _names_an_image(text: str) -> bool:
    """
    Whether a string is an image's URL, or the path of an image file that is there. The library goes by the end of the
    name alone, and knows neither DICOM nor .tif.

    Raises:
        FileNotFoundError: it ends like the path of an image, and there is no such file.
    """
    if is_image_url_or_path(text):
        return True
    named_image = text.lower().endswith(_ENDINGS)
    try:
        with open(text, "rb") as file:
            return named_image or file.read(132)[128:] == b"DICM" or _begins_an_image(file)
    except (OSError, ValueError):  # no such file, or no possible name of one
        if named_image and not is_url(text) and not any(letter.isspace() for letter in text):
            raise FileNotFoundError(f"There is no file {text}.") from None
        return False


def _begins_an_image(file: BinaryIO) -> bool:
    try:
        Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        return False
    except Exception:  # an image, and what is wrong with it is told when it is read
        return True
    return True


__all__ = ["GapClosedClipEmbedder"]
