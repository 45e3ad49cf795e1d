"""
Serves a model folder on Hugging Face Inference Endpoints, as the folder's `handler.py`, without the package.

A request is `{"inputs": ..., "parameters": {...}}`. `parameters.task` names the task; it may be left out, since the
other fields tell it, except for a lone base64 string without labels.

- zero-shot-image-classification: inputs an image, `{"image": image}` or a list of images; parameters
  `candidate_labels`, `hypothesis_template` (default: the model's own). Gives `[{"label", "score"}]`, the best first; a
  list of those for a list of images.
- embeddings: inputs `{"images": [image], "texts": [text]}` or one of the two. Gives unit vectors,
  `{"image_embeds": [[...]], "text_embeds": [[...]]}`.
- image-text-retrieval: inputs `{"query": item, "gallery": [item]}`, where an item is a text, `{"text": text}` or
  `{"image": image}`, or a gallery of embeddings from before, [[...]]; parameter `top_k` (default 10). Gives
  `[{"index", "score"}]`, score the cosine, the best first; a list of those for a list of queries.
- image-text-to-text (or image-to-text, caption), where the model writes captions: inputs an image, a list of images,
  `{"image": image}` or `{"image": image, "text": prompt}`; parameters `prompt` (what the captions begin with),
  `max_new_tokens` and `num_beams`, these two also in `generation_parameters`. Gives `[{"generated_text"}]`, one for
  each image. With such a model it is the task of a lone base64 string and of an image with one `text`; a lone
  `{"image": image}` is embedded, unless the task or one of these parameters is given.

An image is base64 of a file, with or without `data:...;base64,` before it (in Python also bytes or a PIL image). With
the environment variable GAP_CLOSED_CLIP_ALLOW_URLS=1 it may be a URL; a path is never opened. 16-bit gray is scaled
to its own range and transparency laid on black, as in training.

A bad request gets `{"error": what is wrong, "status": 400}`, or 403, 413 (too large) or 500 (with the number under
which the log has the traceback). Hugging Face's own toolkit answers HTTP 400 with `{"error": ...}` to every failure;
these numbers are for other callers.
"""

import logging
import os
import sys
import threading
import uuid
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

# Hugging Face's inference toolkit puts the model folder on sys.path before it loads this file.
from handler_images import URL_SWITCH, RequestError, is_url, kind_of, read_image
from handler_requests import check_names, check_text, generation_options, prompt_of, short, whole_number


logger = logging.getLogger(__name__)

BATCH_SIZE = 16  # images or texts in one forward pass
MAX_IMAGES = 64  # of a request
MAX_URLS = 8  # of a request
MAX_TEXTS = 512  # of a request
MAX_LABELS = 256
MAX_CAPTIONED = 16  # images of a request for captions, which take a pass a token
MAX_GALLERY_EMBEDDINGS = 20_000
PARAMETERS = {
    "zero-shot-image-classification": ("candidate_labels", "hypothesis_template"),
    "embeddings": (),
    "image-text-retrieval": ("top_k",),
    "image-text-to-text": ("prompt", "max_new_tokens", "num_beams", "generation_parameters"),
}
CAPTIONS = "image-text-to-text"
OTHER_NAMES = dict.fromkeys(("image-to-text", "image-captioning", "caption", "captions"), CAPTIONS)


class Item(NamedTuple):
    kind: str  # "image" or "text"
    value: Any
    where: str  # its place in the request, for messages


class EndpointHandler:
    """Answers requests; may be called from several threads."""

    def __init__(self, path: str = ""):
        # Deploying a repository is consent to its code: this file is part of it and runs already.
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        writes = AutoModelForImageTextToText.__name__ in config.auto_map
        auto = AutoModelForImageTextToText if writes else AutoModel
        loaded = auto.from_pretrained(path, trust_remote_code=True).eval()
        loaded.to("cuda" if torch.cuda.is_available() else "cpu")
        self.captioner = loaded if writes else None
        self.model = loaded.gap_closed_clip if writes else loaded
        self.tasks = [task for task in PARAMETERS if writes or task != CAPTIONS]
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        self.allow_urls = os.environ.get(URL_SWITCH) == "1"
        # A tokenizer can't be set to another padding while it runs in another thread; and forward passes side by side
        # need twice the memory and are no faster.
        self._lock = threading.Lock()

    def __call__(self, data: dict[str, Any]) -> list | dict[str, Any]:
        try:
            return self._answer(data)
        except RequestError as error:
            failure = error
        except Exception:
            number = uuid.uuid4().hex[:8]
            logger.exception("Internal error %s", number)
            failure = RequestError(f"Internal error {number}: the endpoint's log has it under this number.", 500)
        if "huggingface_inference_toolkit" in sys.modules:
            # It answers HTTP 200 to whatever is returned, and to whatever is raised HTTP 400 with {"error": message}.
            raise failure
        return {"error": str(failure), "status": failure.status}

    def _answer(self, data: Any) -> list | dict[str, Any]:
        if not isinstance(data, dict):
            form = '{"inputs": ..., "parameters": ...}'
            raise RequestError(f"The request is {kind_of(data)}: send an object, {form}.")
        check_names(data, ("inputs", "parameters", "options"), "the request")  # options: older Hub clients send them
        inputs, parameters = data.get("inputs"), data.get("parameters") or {}
        if inputs is None or (isinstance(inputs, list | dict | str | bytes) and not inputs):
            raise RequestError('The request has no inputs: send {"inputs": ..., "parameters": ...}.')
        if not isinstance(parameters, dict):
            raise RequestError(f"parameters is {kind_of(parameters)}: send an object.")
        check_names(parameters, ("task", *sum(PARAMETERS.values(), ())), "parameters")
        task = _task(inputs, parameters, self.tasks)
        check_names(parameters, ("task", *PARAMETERS[task]), f"parameters of {task}")
        if task == "embeddings":
            return self._embeddings(inputs)
        answers = {CAPTIONS: self._captions, "image-text-retrieval": self._retrieve}
        return answers.get(task, self._classify)(inputs, parameters)

    def _classify(self, inputs: Any, parameters: dict) -> list:
        labels, template = _labels(parameters), _template(parameters, self.model.config.hypothesis_template)
        images, many = _images(inputs)
        prompts = [
            Item("text", template.replace("{}", label), f"candidate_labels[{i}]") for i, label in enumerate(labels)
        ]
        embeds = self.embed([*images, *prompts])
        scale = self.model.logit_scale.detach().float().cpu().exp().clamp(max=self.model.config.max_logit_scale)
        logits = scale * embeds[: len(images)] @ embeds[len(images) :].T  # (images, labels)
        ranked = [
            sorted(
                ({"label": label, "score": score} for label, score in zip(labels, scores, strict=True)),
                key=lambda entry: -entry["score"],
            )
            for scores in logits.softmax(-1).tolist()
        ]
        return ranked if many else ranked[0]

    def _embeddings(self, inputs: Any) -> dict[str, list[list[float]]]:
        images, texts = [], []
        if isinstance(inputs, dict):
            check_names(inputs, ("image", "images", "text", "texts"), "inputs of embeddings")
            images, texts = _listed(inputs, "image")[0], _listed(inputs, "text")[0]
        else:
            images = _images(inputs)[0]
        embeds = self.embed([*images, *texts]).tolist()
        found = {"image_embeds": embeds[: len(images)], "text_embeds": embeds[len(images) :]}
        return {name: rows for name, rows in found.items() if rows}

    def _retrieve(self, inputs: Any, parameters: dict) -> list:
        if not isinstance(inputs, dict) or not {"query", "gallery"} <= inputs.keys():
            raise RequestError('image-text-retrieval takes inputs {"query": ..., "gallery": [...]}.')
        check_names(inputs, ("query", "gallery"), "inputs of image-text-retrieval")
        top_k = 10 if parameters.get("top_k") is None else parameters["top_k"]
        whole_number(top_k, "top_k")
        queries, many = _as_list(inputs["query"], "inputs.query")
        gallery = inputs["gallery"]
        if not isinstance(gallery, list) or not gallery:
            raise RequestError("inputs.gallery is a list of texts and images, or of embeddings, and not empty.")
        items = [_item(query, f"inputs.query[{i}]" if many else "inputs.query") for i, query in enumerate(queries)]
        if isinstance(gallery[0], list):
            gallery_embeds, query_embeds = _vectors(gallery, self.model.config.projection_dim), self.embed(items)
        else:
            items += [_item(entry, f"inputs.gallery[{i}]") for i, entry in enumerate(gallery)]
            embeds = self.embed(items)
            query_embeds, gallery_embeds = embeds[: len(queries)], embeds[len(queries) :]
        best = (query_embeds @ gallery_embeds.T).topk(min(top_k, len(gallery_embeds)))
        ranked = [
            [{"index": index, "score": score} for index, score in zip(indices, scores, strict=True)]
            for indices, scores in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return ranked if many else ranked[0]

    def _captions(self, inputs: Any, parameters: dict) -> list[dict[str, str]]:
        if self.captioner is None:
            raise RequestError(
                f"This model has no decoder, it writes no captions. Its tasks: {', '.join(self.tasks)}."
            )
        options, prompt = generation_options(parameters), prompt_of(inputs, parameters)
        if isinstance(inputs, dict):
            check_names(inputs, ("image", "images", "text"), f"inputs of {CAPTIONS}")
            inputs = {name: value for name, value in inputs.items() if name != "text"}
        if not (images := _images(inputs)[0]):
            raise RequestError('inputs has no image to write a caption for: send {"image": image}.')
        _check_number(images, "image", MAX_CAPTIONED)
        tokens = self._prompt(prompt, options)
        pixels = [self._pixels(item) for item in images]
        with self._lock, torch.inference_mode():
            pixel_values = torch.cat(pixels).to(self.model.device, self.model.dtype)
            written = self.captioner.generate(pixel_values, **tokens, **options)
            captions = self.processor.batch_decode(written, skip_special_tokens=True)
        return [{"generated_text": caption} for caption in captions]

    def _prompt(self, prompt: str | None, options: dict[str, int]) -> dict[str, Tensor]:
        """What `generate` takes of it, (1, L)."""
        with self._lock:
            inputs = self.processor(text=[prompt or ""], return_tensors="pt", verbose=False).to(self.model.device)
        # Without the token that closes a text.
        length, limit = inputs["input_ids"].shape[1] - 1, self.captioner.max_caption_length
        if length >= limit:
            wrong = f"What the caption begins with is {length} tokens long, the decoder takes {limit}: shorten it."
            raise RequestError(wrong, 413)
        if options.get("max_new_tokens", 1) > limit - length:
            wrong = f"Of {limit} tokens that the decoder takes, what the caption begins with is {length}"
            raise RequestError(f"{wrong}: max_new_tokens may be {limit - length}.", 413)
        return dict(inputs)

    def embed(self, items: list[Item]) -> Tensor:
        """
        Images and texts, in any order, to unit vectors (N, D) on the CPU.

        Raises:
            RequestError: an item that can't be read, or too many of them.
        """
        images, texts = ([item for item in items if item.kind == kind] for kind in ("image", "text"))
        _check_number(images, "image", MAX_IMAGES)
        _check_number(texts, "text", MAX_TEXTS)
        texts = [check_text(item.value, item.where) for item in texts]
        # One after the other, so that only one picture of full size is in memory.
        pixels = [self._pixels(item) for item in images]
        rows = {"image": iter(self._encode(pixels, "image")), "text": iter(self._encode(texts, "text"))}
        return torch.stack([next(rows[item.kind]) for item in items])

    def _encode(self, values: list, kind: str) -> list[Tensor]:
        # A tokenizer without a limit of its own gets the text tower's.
        limit = min(self.processor.tokenizer.model_max_length, self.model.max_text_length)
        rows = []
        for start in range(0, len(values), BATCH_SIZE):
            batch = values[start : start + BATCH_SIZE]
            with self._lock, torch.inference_mode():
                if kind == "image":
                    pixel_values = torch.cat(batch).to(self.model.device, self.model.dtype)
                    rows += self.model(pixel_values=pixel_values).image_embeds.float().cpu()
                else:
                    inputs = self.processor(
                        text=batch, return_tensors="pt", padding=True, truncation=True, max_length=limit
                    )
                    rows += self.model(**inputs.to(self.model.device)).text_embeds.float().cpu()
        return rows

    def _pixels(self, item: Item) -> Tensor:
        """What the image tower takes of an image, (1, 3, height, width)."""
        picture = read_image(item.value, item.where, self.allow_urls)
        return self.processor(images=[picture], return_tensors="pt")["pixel_values"]


def _task(inputs: Any, parameters: dict, tasks: list[str]) -> str:
    """What is asked for, of a model with these tasks; captions also where it writes none, which is said there."""
    task = parameters.get("task")
    if task is not None:
        task = OTHER_NAMES.get(task, task) if isinstance(task, str) else task
        if not isinstance(task, str) or task not in PARAMETERS:
            raise RequestError(f"Unknown task {short(task)}: use {', '.join(tasks)}.")
        return task
    if isinstance(inputs, dict) and {"query", "gallery"} & inputs.keys():
        return "image-text-retrieval"
    if set(PARAMETERS["zero-shot-image-classification"]) & parameters.keys():
        return "zero-shot-image-classification"
    asks = not isinstance(inputs, dict) or ("text" in inputs and bool({"image", "images"} & inputs.keys()))
    if set(PARAMETERS[CAPTIONS]) & parameters.keys() or (CAPTIONS in tasks and asks):
        return CAPTIONS
    if isinstance(inputs, str | list):
        raise RequestError(f"What is asked for? Give candidate_labels, or set parameters.task: {', '.join(tasks)}.")
    return "embeddings"


def _check_number(items: list[Item], kind: str, limit: int) -> None:
    urls = [item for item in items if kind == "image" and is_url(item.value)]
    for name, several, most in ((f"{kind}s", items, limit), ("URLs", urls, MAX_URLS)):
        if len(several) > most:
            raise RequestError(f"{len(several)} {name}: a request may have {most}. Send several requests.", 413)


def _labels(parameters: dict) -> list[str]:
    labels = parameters.get("candidate_labels")
    if isinstance(labels, str):
        # All that the query string beside an image body can carry.
        labels = [label.strip() for label in labels.split(",")]
    if not isinstance(labels, list) or not labels:
        raise RequestError("candidate_labels is a list of labels, and not empty.")
    if len(labels) > MAX_LABELS:
        raise RequestError(f"{len(labels)} candidate_labels: a request may have {MAX_LABELS}.", 413)
    return [check_text(label, f"candidate_labels[{i}]") for i, label in enumerate(labels)]


def _template(parameters: dict, default: str) -> str:
    template = parameters.get("hypothesis_template")
    template = default if template is None else check_text(template, "hypothesis_template")
    # No other braces: str.format would read them, and {:>999999999} fills the memory.
    if template.count("{}") != 1 or {"{", "}"} & set(template.replace("{}", "")):
        raise RequestError("hypothesis_template holds {} once, where the label goes, and no other braces.")
    return template


def _images(inputs: Any) -> tuple[list[Item], bool]:
    """The images of inputs, and whether they came as a list."""
    if isinstance(inputs, dict):
        check_names(inputs, ("image", "images"), "inputs")
        return _listed(inputs, "image")
    values, many = _as_list(inputs, "inputs")
    return [Item("image", value, f"inputs[{i}]" if many else "inputs") for i, value in enumerate(values)], many


def _listed(inputs: dict, kind: str) -> tuple[list[Item], bool]:
    """What inputs has under `kind` or its plural, each one or a list; and whether it was a list."""
    names = [name for name in (kind, f"{kind}s") if name in inputs]
    if len(names) > 1:
        raise RequestError(f"inputs has both {kind} and {kind}s: send one of them.")
    if not names:
        return [], False
    where = f"inputs.{names[0]}"
    values, many = _as_list(inputs[names[0]], where)
    return [Item(kind, value, f"{where}[{i}]" if many else where) for i, value in enumerate(values)], many


def _as_list(value: Any, where: str) -> tuple[list, bool]:
    if not isinstance(value, list):
        return [value], False
    if not value:
        raise RequestError(f"{where} is an empty list.")
    return value, True


def _item(value: Any, where: str) -> Item:
    """A query or an entry of a gallery. A string is a text, as in the image-text-retrieval pipeline."""
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in ("image", "text"):
        kind, value = next(iter(value.items()))
        return Item(kind, value, f"{where}.{kind}")
    if isinstance(value, str):
        return Item("text", value, where)
    if isinstance(value, bytes | Image.Image):
        return Item("image", value, where)
    raise RequestError(f'{where} is {kind_of(value)}: send a text, {{"text": text}} or {{"image": base64}}.')


def _vectors(rows: list, dim: int) -> Tensor:
    """Embeddings from a request, (N, dim), made unit vectors once more: JSON may have rounded them."""
    if len(rows) > MAX_GALLERY_EMBEDDINGS:
        raise RequestError(f"{len(rows)} embeddings: a gallery may have {MAX_GALLERY_EMBEDDINGS}.", 413)
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != dim:
            have = f"has {len(row)} numbers" if isinstance(row, list) else f"is {kind_of(row)}"
            raise RequestError(f"inputs.gallery[{i}] {have}: this model's embeddings have {dim}.")
    try:
        vectors = torch.tensor(rows, dtype=torch.float64)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        raise RequestError("inputs.gallery holds something that is not a number.") from None
    if vectors.ndim != 2:
        raise RequestError("inputs.gallery is nested too deep: embeddings are a list of lists of numbers.")
    norms = vectors.norm(dim=-1, keepdim=True)
    bad = (~norms.isfinite() | (norms == 0)).flatten().nonzero()
    if len(bad):
        raise RequestError(f"inputs.gallery[{bad[0].item()}] has no direction: it is all zeros, or NaN or infinite.")
    return (vectors / norms).float()
