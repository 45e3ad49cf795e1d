"""What the Space computes, without Gradio: two models, a gallery of pairs, ranking, zero-shot classification."""

import base64
import hashlib
import json
import mimetypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import Pipeline, pipeline


# title, the variable that names the model, the variable that pins its revision
MODELS = (("CLIP", "CLIP_MODEL_ID", "CLIP_MODEL_REVISION"), ("Gap-closed CLIP", "MODEL_ID", "MODEL_REVISION"))
MAX_LABELS, MAX_LENGTH, MAX_PIXELS = 40, 1000, 50_000_000

Kind = Literal["image", "text"]


class SetupError(RuntimeError):
    """Something the Space's owner has to set or build; the message says what."""


class InputError(ValueError):
    """Something the visitor can change; the message says what."""


class Hit(NamedTuple):
    """One item of the gallery: its kind, its row in the images or in the captions, its cosine with the query."""

    kind: Kind
    index: int
    score: float


@dataclass(frozen=True)
class Gallery:
    """
    Pairs that ship with the Space as files.

    Args:
        images: files of the distinct images.
        captions: the distinct captions; those that differ in case or white space only are one.
        pairs: (N, 2) row of the image and row of the caption of each pair.
        about: what `build_gallery.py` noted: source, split.
    """

    images: list[Path]
    captions: list[str]
    pairs: np.ndarray
    about: dict = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "Gallery":
        """
        Reads `captions.jsonl`, a line `{"image": file name, "caption": text}` for each pair, and `about.json`.

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
            for line in table.read_text(encoding="utf-8").splitlines():
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
        """Rows of captions and of pixels."""
        texts = {caption_key(caption): row for row, caption in enumerate(self.captions)}
        return texts | {image_key(open_image(file)): row for row, file in enumerate(self.images)}

    def find(self, query: str | Image.Image) -> int | None:
        """The row of this very text in the captions, or of this very image in the images."""
        return self._rows.get(caption_key(query) if isinstance(query, str) else image_key(query))

    def spread(self, number: int) -> list[int]:
        """Rows of so many images, evenly over the gallery."""
        return np.unique(np.linspace(0, len(self.images) - 1, number).round().astype(int)).tolist()


class Engine:
    """
    A model and the gallery in its space.

    Args:
        title: what visitors read.
        pipe: the model's own `image-text-retrieval` pipeline.
        gallery: embedded here, once.
    """

    def __init__(self, title: str, pipe: Pipeline, gallery: Gallery):
        self.title, self.pipe, self.gallery = title, pipe, gallery
        self.image_embeds = self.embed([open_image(file) for file in gallery.images])  # (I, D)
        self.text_embeds = self.embed(gallery.captions)  # (T, D)

    @property
    def template(self) -> str:
        """What the model's configuration puts a label into."""
        return getattr(self.pipe.model.config, "hypothesis_template", "{}")

    def embed(self, items: list[str] | list[Image.Image]) -> np.ndarray:
        """Unit vectors, (N, D) float64."""
        return self.pipe.embed(items).double().numpy()

    def search(self, query: str | Image.Image, kinds: tuple[Kind, ...] = ("image", "text")) -> list[Hit]:
        """
        The whole gallery of these kinds in the order of the cosine with the query, the best first.

        The query itself is left out where the gallery holds it.
        """
        own: Kind = "text" if isinstance(query, str) else "image"
        itself = self.gallery.find(query)
        (vector,) = self.embed([query])
        embeds = {"image": self.image_embeds, "text": self.text_embeds}
        cosines = {kind: (embeds[kind] @ vector).tolist() for kind in kinds}
        hits = [Hit(kind, row, cosine) for kind in kinds for row, cosine in enumerate(cosines[kind])]
        return sorted((hit for hit in hits if hit[:2] != (own, itself)), key=lambda hit: -hit.score)

    def mixing(self, top: int) -> float:
        """How much of the first `top` is of the other kind, on average over the whole gallery's items as queries."""
        embeds = np.concatenate([self.image_embeds, self.text_embeds])
        kinds = np.repeat([0, 1], [len(self.image_embeds), len(self.text_embeds)])
        cosines = embeds @ embeds.T
        np.fill_diagonal(cosines, -np.inf)
        best = np.argsort(-cosines, axis=1, kind="stable")[:, : min(top, len(embeds) - 1)]
        return float((kinds[best] != kinds[:, None]).mean())

    def classify(self, image: Image.Image, labels: list[str], template: str) -> dict[str, float]:
        """The softmax of the model's logits over the labels, each put into the template."""
        texts = [template.replace("{}", label) for label in labels]
        inputs = {**self.pipe.preprocess({"images": [image]}), **self.pipe.preprocess({"text": texts})}
        with torch.inference_mode():
            inputs = {name: value.to(self.pipe.model.device) for name, value in inputs.items()}
            logits = self.pipe.model(**inputs).logits_per_image[0]  # (labels,)
        return dict(zip(labels, logits.double().softmax(-1).tolist(), strict=True))


def caption_key(caption: str) -> str:
    """The caption without regard to case and white space, as in training."""
    return " ".join(caption.split()).casefold()


def image_key(picture: Image.Image) -> str:
    """Tells images apart by their pixels."""
    return f"{picture.size} {hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest()}"


def load_engines(variables: Mapping[str, str], gallery: Gallery) -> list[Engine]:
    """
    The models that the Space's variables name, plain CLIP first.

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
    The `image-text-retrieval` pipeline that is saved beside the weights.

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
    An 8-bit RGB picture, upright: more than 8 bits scaled over the image's own range, transparency put on black.

    Raises:
        InputError: no image, a damaged one, or one too large.
    """
    if path is None:
        raise InputError("Upload an image first, or pick one of the gallery.")
    try:
        picture = Image.open(path)
        if picture.width * picture.height > MAX_PIXELS:
            raise InputError(f"This image is too large ({picture.width} x {picture.height}): use a smaller one.")
        picture = ImageOps.exif_transpose(picture)
        if picture.mode[0] in "IF":  # I, I;16, F
            values = np.asarray(picture, dtype=np.float64)
            low, high = np.percentile(values, (0.1, 99.9))
            share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
            picture = Image.fromarray((share * 255).round().astype(np.uint8))
        elif "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
        return picture.convert("RGB")
    except FileNotFoundError as error:
        raise InputError("This upload is no longer kept: upload the image again.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("This file cannot be read as an image: use an undamaged PNG or JPEG.") from error


def check_query(text: str | None) -> str:
    """
    The typed query without white space around it.

    Raises:
        InputError: it is empty or far too long.
    """
    text = (text or "").strip()
    if not text:
        raise InputError("Type what to search for, for example: chest radiograph with pleural effusion.")
    if len(text) > MAX_LENGTH:
        raise InputError(f"This text has {len(text)} characters: use at most {MAX_LENGTH}.")
    return text


def parse_labels(text: str | None) -> list[str]:
    """
    Labels separated by commas or new lines, without repetitions.

    Raises:
        InputError: fewer than two, or too many.
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
    The template, which holds `{}` once.

    Raises:
        InputError: it does not.
    """
    text = (text or "").strip()
    if text.count("{}") != 1 or len(text) > MAX_LENGTH:
        raise InputError("The template is a short text with {} in it once, where the label goes: Radiology image: {}.")
    return text
