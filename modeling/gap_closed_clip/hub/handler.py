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
  `[{"index", "score"}]`, score the cosine, the best first, those of equal scores in the gallery's order; a list of
  those for a list of queries.
- image-text-to-text (or image-to-text, caption), where the model writes captions: inputs an image, a list of images,
  `{"image": image}` or `{"image": image, "text": prompt}`; parameters `prompt` (what the captions begin with),
  `max_new_tokens` and `num_beams`, these two also in `generation_parameters`. Gives `[{"generated_text"}]`, one for
  each image. With such a model it is the task of a lone base64 string and of an image with one `text`; a lone
  `{"image": image}` is embedded, unless the task or one of these parameters is given.

A model of further modalities takes them by their names: inputs `{"record": {"age": 62, "sex": "female"}}` or
`{"records": [{...}]}`, beside images and texts or alone, which gives `record_embeds`; an item `{"record": {...}}`. An
array is a nested list, `{"audio": [[...]]}`, several are `{"audios": [...]}`. An item of several modalities,
`{"image": image, "record": {...}}`, is the weighted sum of their embeddings (`fusion_weights` of the model's config).

An image is base64 of a file, with or without `data:...;base64,` before it (in Python also bytes or a PIL image). URLs
are not fetched, and paths are not opened. 16-bit gray is scaled to its own range and transparency laid on black, as in
training.

A bad request gets `{"error": what is wrong, "status": 400}`, or 413 (too large) or 500 (with the number under which
the log has the traceback). Hugging Face's own toolkit answers HTTP 400 with `{"error": ...}` to every failure;
these numbers are for other callers.
"""

import importlib
import logging
import sys
import threading
import uuid
from typing import Any

import torch
from handler_modalities import MAX_ARRAYS, MAX_RECORDS, is_array, is_image, is_record, read_sample
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

# Hugging Face's inference toolkit puts the model folder on sys.path before it loads this file.
from handler_bounds import check_answer, check_entries
from handler_images import PixelBudget, RequestError, read_image
from handler_requests import (
    CAPTIONS,
    PARAMETERS,
    SEVERAL,
    Item,
    as_list,
    check_names,
    check_number,
    check_text,
    generation_options,
    images_of,
    item_of,
    labels_of,
    listed,
    parse,
    prompt_of,
    template_of,
    vectors_of,
    whole_number,
)


logger = logging.getLogger(__name__)

BATCH_SIZE = 16  # images or texts in one forward pass
MAX_IMAGES = 64  # of a request
MAX_TEXTS = 512  # of a request
MAX_CAPTIONED = 16  # images of a request for captions, which take a pass a token


class EndpointHandler:
    """
    Answers requests; may be called from several threads.

    Args:
        path: the model folder.
    """

    def __init__(self, path: str = ""):
        # Deploying a repository is consent to its code: this file is part of it and runs already.
        config = AutoConfig.from_pretrained(path, trust_remote_code=True)
        has_decoder = AutoModelForImageTextToText.__name__ in config.auto_map
        auto = AutoModelForImageTextToText if has_decoder else AutoModel
        loaded = auto.from_pretrained(path, trust_remote_code=True).eval()
        loaded.to("cuda" if torch.cuda.is_available() else "cpu")
        self.captioner = loaded if has_decoder else None
        self.model = loaded.gap_closed_clip if has_decoder else loaded
        self.tasks = [task for task in PARAMETERS if has_decoder or task != CAPTIONS]
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        self.names = tuple(self.model.config.modality_names)
        self.further = {name: self.processor.modality_processors[name] for name in self.names[2:]}
        package = type(self.model).__module__.rpartition(".")[0]  # of the code beside the weights
        self._together = importlib.import_module(".items_gap_closed_clip", package).together
        # A tokenizer can't be set to another padding while it runs in another thread; and forward passes side by side
        # need twice the memory and are no faster.
        self._lock = threading.Lock()

    def __call__(self, data: dict[str, Any]) -> list | dict[str, Any]:
        """
        The answer to a request, ready for JSON; or what is wrong with it, `{"error": message, "status": number}`.

        Raises:
            RequestError: what is wrong, where Hugging Face's inference toolkit makes the answer of it.
        """
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
        task, inputs, parameters = parse(data, self.tasks)
        if task == "embeddings":
            return self._embeddings(inputs)
        answers = {CAPTIONS: self._captions, "image-text-retrieval": self._retrieve}
        return answers.get(task, self._classify)(inputs, parameters)

    def _classify(self, inputs: Any, parameters: dict) -> list:
        labels, template = labels_of(parameters), template_of(parameters, self.model.config.hypothesis_template)
        images, many = images_of(inputs)
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
        if isinstance(inputs, dict):
            check_names(
                inputs, tuple(key for name in self.names for key in (name, f"{name}s")), "inputs of embeddings"
            )
            arrays = [name for name in self.further if is_array(self.further[name])]
            items = [item for name in self.names for item in listed(inputs, name, name in arrays)[0]]
        else:
            items = images_of(inputs)[0]
        rows: dict[str, list] = {}
        for item, vector in zip(items, self.embed(items).tolist(), strict=True):
            rows.setdefault(f"{item.kind}_embeds", []).append(vector)
        return rows

    def _retrieve(self, inputs: Any, parameters: dict) -> list:
        if not isinstance(inputs, dict) or not {"query", "gallery"} <= inputs.keys():
            raise RequestError('image-text-retrieval takes inputs {"query": ..., "gallery": [...]}.')
        check_names(inputs, ("query", "gallery"), "inputs of image-text-retrieval")
        top_k = 10 if parameters.get("top_k") is None else parameters["top_k"]
        whole_number(top_k, "top_k")
        queries, many = as_list(inputs["query"], "inputs.query")
        gallery = inputs["gallery"]
        if not isinstance(gallery, list) or not gallery:
            raise RequestError("inputs.gallery is a list of texts and images, or of embeddings, and not empty.")
        fields = [f"inputs.query[{i}]" if many else "inputs.query" for i in range(len(queries))]
        items = [item_of(query, field, self.names) for query, field in zip(queries, fields, strict=True)]
        if isinstance(gallery[0], list):
            gallery_embeds, query_embeds = vectors_of(gallery, self.model.config.projection_dim), self.embed(items)
        else:
            check_entries(gallery, "inputs.gallery")
            items += [item_of(entry, f"inputs.gallery[{i}]", self.names) for i, entry in enumerate(gallery)]
            embeds = self.embed(items)
            query_embeds, gallery_embeds = embeds[: len(queries)], embeds[len(queries) :]
        check_answer(len(query_embeds), top_k := min(top_k, len(gallery_embeds)))
        ranked = [_best(scores, top_k) for scores in query_embeds @ gallery_embeds.T]
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
        if not (images := images_of(inputs)[0]):
            raise RequestError('inputs has no image to write a caption for: send {"image": image}.')
        check_number(images, MAX_CAPTIONED)
        tokens = self._prompt(prompt, options)
        budget = PixelBudget()
        pixels = [self._pixels(item, budget) for item in images]
        with self._lock, torch.inference_mode():
            pixel_values = torch.cat(pixels).to(self.model.device, self.model.dtype)
            written = self.captioner.generate(pixel_values, **tokens, **options)
            captions = self.processor.batch_decode(written, skip_special_tokens=True)
        return [{"generated_text": caption} for caption in captions]

    def _prompt(self, prompt: str | None, options: dict[str, int]) -> dict[str, Tensor]:
        """The inputs of `generate` that hold the prompt, (1, L); an error where it leaves too few tokens."""
        with self._lock:
            inputs = self.processor(text=[prompt or ""], return_tensors="pt", verbose=False).to(self.model.device)
        # Without the token that closes a text.
        assert self.captioner is not None  # the task is not offered without one
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
        Items in any order to unit vectors (N, D) on the CPU.

        Raises:
            RequestError: an item that can't be read, or too many of them.
        """
        vectors = iter(self._vectors([part for item in items for part in _parts(item)]))
        rows: list[Tensor] = []
        for item in items:
            own: dict[str, Tensor] = {part.kind: next(vectors) for part in _parts(item)}
            if len(own) == 1:
                rows += own.values()
            else:
                own = {kind: vector.unsqueeze(0) for kind, vector in own.items()}
                rows.append(self._together(own, self.model.config.fusion_weights)[0])
        return torch.stack(rows)

    def _vectors(self, items: list[Item]) -> list[Tensor]:
        """A unit vector (D,) of each item, each of one modality."""
        sorted_items = {name: [item for item in items if item.kind == name] for name in self.names}
        for name, own in sorted_items.items():
            check_number(own, self._limit(name))
        texts = [check_text(item.value, item.field) for item in sorted_items.pop("text")]
        budget = PixelBudget()
        # One after the other, so that only one image of full size is in memory.
        pixels = [self._pixels(item, budget) for item in sorted_items.pop("image")]
        rows = {"image": iter(self._encode(pixels, "image")), "text": iter(self._encode(texts, "text"))}
        for name, own in sorted_items.items():
            rows[name] = iter(self._encode_further(name, own, budget))
        return [next(rows[item.kind]) for item in items]

    def _limit(self, name: str) -> int:
        """How many of a modality a request may have."""
        if name == "text":
            return MAX_TEXTS
        if name == "image" or is_image(self.further[name]):
            return MAX_IMAGES
        return MAX_RECORDS if is_record(self.further[name]) else MAX_ARRAYS

    def _encode_further(self, name: str, items: list[Item], budget: PixelBudget) -> list[Tensor]:
        """Unit vectors (D,) of a further modality's items, those of one shape in batches."""
        inputs = []
        for item in items:
            value = read_sample(self.further[name], item.value, item.field, budget)
            inputs.append(dict(self.processor(**{name: [value]}, return_tensors="pt")))
        rows: list[Tensor] = []
        while len(rows) < len(inputs):
            batch = inputs[len(rows) : len(rows) + BATCH_SIZE]
            shapes = [{key: tensor.shape for key, tensor in each.items()} for each in batch]
            alike = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), len(batch))  # sounds differ
            joined = {key: torch.cat([each[key] for each in batch[:alike]]) for key in batch[0]}
            joined = {key: x.to(self.model.dtype) if x.is_floating_point() else x for key, x in joined.items()}
            with self._lock, torch.inference_mode():
                joined = {key: tensor.to(self.model.device) for key, tensor in joined.items()}
                rows += self.model(**joined).embeds[name].float().cpu()
        return rows

    def _encode(self, values: list, kind: str) -> list[Tensor]:
        """Unit vectors (D,) of pixels (1, 3, height, width), or of texts, a batch at a time."""
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

    def _pixels(self, item: Item, budget: PixelBudget) -> Tensor:
        """The image tower's input for an image, (1, 3, height, width)."""
        image = read_image(item.value, item.field, budget)
        return self.processor(images=[image], return_tensors="pt")["pixel_values"]


def _best(scores: Tensor, number: int) -> list[dict[str, Any]]:
    """The hits of one query's scores (N,), the best first, those of equal scores in the gallery's order."""
    found = scores.sort(descending=True, stable=True)  # topk leaves it open which of equal scores it takes
    indices, values = (each[:number].tolist() for each in (found.indices, found.values))
    return [{"index": index, "score": score} for index, score in zip(indices, values, strict=True)]


def _parts(item: Item) -> list[Item]:
    """The items of one modality that an item is made of."""
    return item.value if item.kind == SEVERAL else [item]
