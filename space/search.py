"""Computes what the Space shows, without Gradio: two models, a gallery of pairs, ranking, zero-shot classification."""

import base64
import hashlib
import io
import json
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers import Pipeline, pipeline


# For each model its title, the variable that names it, and the variable that pins its revision.
MODELS = (("CLIP", "CLIP_MODEL_ID", "CLIP_MODEL_REVISION"), ("Gap-closed CLIP", "MODEL_ID", "MODEL_REVISION"))
MAX_LABELS, MAX_LENGTH, MAX_PIXELS = 40, 1000, 50_000_000
# As in images_gap_closed_clip.py of the models, which is not within reach here: the longest sides, and the formats.
# Pillow runs Ghostscript for EPS, and rare decoders are where the holes are found; of JPEG 2000 a small file can be so
# written that decoding it fills the memory, and a JPEG of thousands of scans takes minutes.
MAX_ASPECT, MAX_SCANS = 50, 50
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "DIB", "GIF", "WEBP", "PPM")

Kind = Literal["image", "text"]


class SetupError(RuntimeError):
    """Something is missing that the Space's owner has to set or build; the message says what."""


class InputError(ValueError):
    """An input is wrong that the visitor can change; the message says how."""


class Hit(NamedTuple):
    """An item of the gallery: its kind, its row among the images or the captions, and its cosine with the query."""

    kind: Kind
    index: int
    score: float


@dataclass(frozen=True)
class Gallery:
    """
    The pairs that are searched, which ship with the Space as files.

    Args:
        images: files of the distinct images.
        captions: the distinct captions; those that differ only in case or white space are one.
        pairs: (N, 2), for each pair the row of its image and the row of its caption.
        about: the source and the split, as `build_gallery.py` noted them.
    """

    images: list[Path]
    captions: list[str]
    pairs: np.ndarray
    about: dict = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "Gallery":
        """
        Read `about.json`, and `captions.jsonl` with a line `{"image": file name, "caption": text}` for each pair.

        Raises:
            SetupError: the folder is missing, or it is not what `build_gallery.py` writes.
        """
        table = folder / "captions.jsonl"
        if not table.is_file():
            raise SetupError(
                f"There is no gallery to search ({table} is missing). Make one with `python space/build_gallery.py` "
                "and upload it with the Space, or name its folder in the variable GALLERY."
            )
        images: dict[str, int] = {}
        captions: dict[str, int] = {}
        texts, pairs = [], []
        try:
            # At line feeds alone: splitlines would also split at U+2028, U+0085 and others, which captions may have.
            for line in table.read_text(encoding="utf-8").rstrip("\n").split("\n"):
                row = json.loads(line)
                name, caption = Path(row["image"]).name, row["caption"]  # a bare name: nothing outside the folder
                key = caption_key(caption)
                if key not in captions:
                    texts.append(caption)
                pairs.append((images.setdefault(name, len(images)), captions.setdefault(key, len(captions))))
            about = folder / "about.json"
            notes = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SetupError(f"{table} is not what build_gallery.py writes ({error}): build it again.") from error
        files = [folder / name for name in images]
        missing = [str(file) for file in files if not file.is_file()]
        if missing or len(pairs) < 2:
            problem = f"{missing[0]} is missing" if missing else "it has fewer than two pairs"
            raise SetupError(f"The gallery {folder} is not whole ({problem}): build it again.")
        return cls(files, texts, np.array(pairs), notes)

    @property
    def drawn(self) -> bool:
        """Whether these are phantoms: drawings, not medical images."""
        return self.about.get("source") == "phantoms"

    def caption_of(self, image: int) -> str:
        """The first caption of an image."""
        return self.captions[self.pairs[self.pairs[:, 0] == image][0, 1]]

    @cached_property
    def thumbnails(self) -> list[str]:
        """The images as data URIs: small, and they show wherever the page is embedded."""
        return [
            f"data:{mimetypes.guess_type(file)[0]};base64,{base64.b64encode(file.read_bytes()).decode()}"
            for file in self.images
        ]

    @cached_property
    def _rows(self) -> dict[str, int]:
        """The row of every caption and of every image, by `caption_key` and `image_key`."""
        texts = {caption_key(caption): row for row, caption in enumerate(self.captions)}
        return texts | {image_key(open_image(file)): row for row, file in enumerate(self.images)}

    def find(self, query: str | Image.Image) -> int | None:
        """The row of the caption or image that equals the query; None if the gallery does not hold it."""
        return self._rows.get(caption_key(query) if isinstance(query, str) else image_key(query))

    def spread(self, number: int) -> list[int]:
        """The rows of this many images, spread evenly over the gallery; fewer if it has not so many."""
        return np.unique(np.linspace(0, len(self.images) - 1, number).round().astype(int)).tolist()


class Engine:
    """
    A model, and the gallery embedded in its space.

    Args:
        title: the model's name for visitors.
        pipe: the `image-text-retrieval` pipeline that comes with the model.
        gallery: what is searched; it is embedded once, here.
    """

    def __init__(self, title: str, pipe: Pipeline, gallery: Gallery):
        self.title, self.pipe, self.gallery = title, pipe, gallery
        self.image_embeds = self.embed([open_image(file) for file in gallery.images])  # (I, D)
        self.text_embeds = self.embed(gallery.captions)  # (T, D)

    @property
    def template(self) -> str:
        """The text that a label is put into, as the model's configuration says."""
        return getattr(self.pipe.model.config, "hypothesis_template", "{}")

    def embed(self, items: list) -> np.ndarray:
        """The unit vectors of texts, images or items of other modalities, (N, D) float64."""
        return self.pipe.embed(items).double().numpy()

    def records(self) -> dict[str, Any]:
        """The processors of the records that the model takes, by the names of their modalities."""
        further = getattr(self.pipe.processor, "modality_processors", {})
        return {name: each for name, each in further.items() if hasattr(each, "column_names")}

    def search(self, query: str | Image.Image | dict, kinds: tuple[Kind, ...] = ("image", "text")) -> list[Hit]:
        """
        Rank all items of these kinds by their cosine with the query, the best first.

        The query itself is left out if the gallery holds it; of a query of several modalities its image is.
        """
        kind_of_query: Kind = "text" if isinstance(query, str) else "image"
        known = query.get("image") if isinstance(query, dict) else query
        row_of_query = None if known is None else self.gallery.find(known)
        (vector,) = self.embed([query])
        embeds = {"image": self.image_embeds, "text": self.text_embeds}
        cosines = {kind: (embeds[kind] @ vector).tolist() for kind in kinds}
        hits = [Hit(kind, row, cosine) for kind in kinds for row, cosine in enumerate(cosines[kind])]
        return sorted((hit for hit in hits if hit[:2] != (kind_of_query, row_of_query)), key=lambda hit: -hit.score)

    def mixing(self, top: int) -> float:
        """The share of the first `top` hits that are of the other kind, averaged over all items as queries."""
        embeds = np.concatenate([self.image_embeds, self.text_embeds])
        kinds = np.repeat([0, 1], [len(self.image_embeds), len(self.text_embeds)])
        cosines = embeds @ embeds.T
        np.fill_diagonal(cosines, -np.inf)
        best = np.argsort(-cosines, axis=1, kind="stable")[:, : min(top, len(embeds) - 1)]
        return float((kinds[best] != kinds[:, None]).mean())

    def classify(self, image: Image.Image, labels: list[str], template: str) -> dict[str, float]:
        """The softmax over the labels of the model's logits, with each label put into the template."""
        texts = [template.replace("{}", label) for label in labels]
        inputs = {**self.pipe.preprocess({"images": [image]}), **self.pipe.preprocess({"text": texts})}
        with torch.inference_mode():
            inputs = {name: value.to(self.pipe.model.device) for name, value in inputs.items()}
            logits = self.pipe.model(**inputs).logits_per_image[0]  # (labels,)
        return dict(zip(labels, logits.double().softmax(-1).tolist(), strict=True))


def caption_key(caption: str) -> str:
    """The form in which captions are compared, without regard to case and white space, as in training."""
    return " ".join(caption.split()).casefold()


def image_key(image: Image.Image) -> str:
    """A text that is equal for images with equal pixels only."""
    return f"{image.size} {hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()}"


def load_engines(variables: Mapping[str, str], gallery: Gallery) -> list[Engine]:
    """
    Load the models that the Space's variables name, plain CLIP first, and embed the gallery with each.

    Raises:
        SetupError: MODEL_ID is not set, or a model cannot be loaded.
    """
    if not variables.get("MODEL_ID"):
        raise SetupError(
            "Which model? Set the variable MODEL_ID to the Hub id (or folder) of a gap-closed-clip model, and "
            "CLIP_MODEL_ID to a plain CLIP of the same towers to compare it with."
        )
    named = [(title, variable, revision) for title, variable, revision in MODELS if variables.get(variable)]
    return [
        Engine(title, load_pipeline(variables[variable], variables.get(revision) or None, variable), gallery)
        for title, variable, revision in named
    ]


def load_pipeline(name: str, revision: str | None, variable: str) -> Pipeline:
    """
    Load the `image-text-retrieval` pipeline that is saved beside a model's weights.

    `trust_remote_code=True` runs the Python files of the repository `name`. It is right here because the Space's
    owner, and nobody else, names it, in a variable that visitors cannot set. Whoever may push there may change what
    runs: pin a commit in MODEL_REVISION and CLIP_MODEL_REVISION for models that are not your own.
    """
    try:
        pipe = pipeline("image-text-retrieval", model=name, revision=revision, trust_remote_code=True)
        pipe.model.eval()
    except Exception as error:  # remote code, the network and broken files raise a dozen different types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        at = f" at revision '{revision}'" if revision else ""
        raise SetupError(f"The model '{name}'{at} that {variable} names cannot be loaded: {reason}") from error
    return pipe


def open_image(path: str | Path | None) -> Image.Image:
    """
    Open an image as upright 8-bit RGB: more bits are scaled over the image's own range, transparency is put on black.

    Raises:
        InputError: there is no image, or it is damaged, of another format than `FORMATS`, too large or too long.
    """
    if path is None:
        raise InputError("Upload an image first, or pick one of the gallery.")
    try:
        # The bytes and not the name, by which Pillow 13 scrambles a raw TIFF that lies on its side.
        data = Path(path).read_bytes()
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise InputError(f"This image is too long ({image.width} x {image.height}): cut out what matters.")
        if image.width * image.height > MAX_PIXELS:
            raise InputError(f"This image is too large ({image.width} x {image.height}): use a smaller one.")
        if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
            raise InputError("This JPEG has too many scans: save it anew.")
        image.load()
        zero_is_white = getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # I, I;16, F
            values = np.asarray(image, dtype=np.float64)
            image = Image.fromarray(scale_to_8_bit(np.nanmax(values) - values if zero_is_white else values))
        elif "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        return image.convert("RGB")
    except FileNotFoundError as error:
        raise InputError("This upload is no longer kept: upload the image again.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("This file cannot be read as an image: use an undamaged PNG or JPEG.") from error


def scale_to_8_bit(values: np.ndarray) -> np.ndarray:
    """Floats to uint8 over the image's own range, as `scale_to_8_bit` in images_gap_closed_clip.py of the models."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return np.zeros(values.shape, np.uint8)
    low, high = np.percentile(finite, (0.1, 99.9))
    if high <= low:
        low, high = finite.min(), finite.max()
    if high <= low:
        low, high = 0.0, max(high, 1.0)
    share = np.nan_to_num((values - low) / (high - low), nan=0.0, posinf=1.0, neginf=0.0)
    return (np.clip(share, 0, 1) * 255 + 0.5).astype(np.uint8)


def check_query(text: str | None) -> str:
    """
    Take the white space around a typed query away.

    Raises:
        InputError: the query is empty or far too long.
    """
    text = (text or "").strip()
    if not text:
        raise InputError("Type what to search for, for example: chest radiograph with pleural effusion.")
    if len(text) > MAX_LENGTH:
        raise InputError(f"This text has {len(text)} characters: use at most {MAX_LENGTH}.")
    return text


def parse_labels(text: str | None) -> list[str]:
    """
    Read labels that are separated by commas or new lines, each of them once.

    Raises:
        InputError: there are fewer than two or too many, or one is far too long.
    """
    labels: dict[str, str] = {}
    for label in (text or "").replace("\n", ",").split(","):
        if label.strip():
            labels.setdefault(" ".join(label.split()).casefold(), " ".join(label.split()))
    if len(labels) < 2:
        raise InputError("Type at least two different labels, separated by commas: one alone always gets 100%.")
    if len(labels) > MAX_LABELS:
        raise InputError(f"These are {len(labels)} labels: use at most {MAX_LABELS}.")
    if any(len(label) > MAX_LENGTH for label in labels):
        raise InputError(f"A label has more than {MAX_LENGTH} characters: use shorter ones.")
    return list(labels.values())


def check_template(text: str | None) -> str:
    """
    Take the white space around a template away.

    Raises:
        InputError: it does not hold `{}` once, or it is far too long.
    """
    text = (text or "").strip()
    if text.count("{}") != 1 or len(text) > MAX_LENGTH:
        raise InputError("The template is a short text with {} in it once, where the label goes: Medical image of {}.")
    return text
