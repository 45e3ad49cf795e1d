"""
What a request to the endpoint asks for, checked: its task, names, texts, images, numbers and embeddings.

`handler.py` imports it from the model folder, where the package is not installed.
"""

import re
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from handler_bounds import check_bounds, check_entries, short
from handler_images import RequestError, kind_of


MAX_TEXT_LENGTH = 10_000  # characters; what the text tower can't take of them is cut off
MAX_LABELS = 256
MAX_GALLERY_EMBEDDINGS = 20_000
MAX_NEW_TOKENS = 256  # of a caption
MAX_BEAMS = 8

CAPTIONS = "image-text-to-text"
PARAMETERS = {
    "zero-shot-image-classification": ("candidate_labels", "hypothesis_template"),
    "embeddings": (),
    "image-text-retrieval": ("top_k",),
    CAPTIONS: ("prompt", "max_new_tokens", "num_beams", "generation_parameters"),
}
OTHER_NAMES = dict.fromkeys(("image-to-text", "image-captioning", "caption", "captions"), CAPTIONS)
# Where Hugging Face's own clients put the parameters of a generation.
GENERATION = "generation_parameters"


SEVERAL = "several"


class Item(NamedTuple):
    """An image, a text or another modality of a request; or several of them together."""

    kind: str  # "image", "text", a further modality; or SEVERAL
    value: Any  # of SEVERAL a list of items
    field: str  # that holds it, for messages, e.g. "inputs.gallery[3]"


def parse(data: Any, tasks: list[str]) -> tuple[str, Any, dict]:
    """
    Task, inputs and parameters of a request. The task may be one that this model does not have: captions.

    Args:
        tasks: those of the model.

    Raises:
        RequestError: there are no inputs, a name or task that is not known, or too much of anything.
    """
    if not isinstance(data, dict):
        form = '{"inputs": ..., "parameters": ...}'
        raise RequestError(f"The request is {kind_of(data)}: send an object, {form}.")
    check_bounds(data)
    check_names(data, ("inputs", "parameters", "options"), "the request")  # options: older Hub clients send them
    inputs, parameters = data.get("inputs"), data.get("parameters") or {}
    if inputs is None or (isinstance(inputs, list | dict | str | bytes) and not inputs):
        raise RequestError('The request has no inputs: send {"inputs": ..., "parameters": ...}.')
    if not isinstance(parameters, dict):
        raise RequestError(f"parameters is {kind_of(parameters)}: send an object.")
    check_names(parameters, ("task", *sum(PARAMETERS.values(), ())), "parameters")
    task = _task(inputs, parameters, tasks)
    check_names(parameters, ("task", *PARAMETERS[task]), f"parameters of {task}")
    return task, inputs, parameters


def _task(inputs: Any, parameters: dict, tasks: list[str]) -> str:
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
    # An image by itself, or with one text for the caption to begin with.
    image_first = not isinstance(inputs, dict) or ("text" in inputs and bool({"image", "images"} & inputs.keys()))
    if set(PARAMETERS[CAPTIONS]) & parameters.keys() or (CAPTIONS in tasks and image_first):
        return CAPTIONS
    if isinstance(inputs, str | list):
        raise RequestError(f"What is asked for? Give candidate_labels, or set parameters.task: {', '.join(tasks)}.")
    return "embeddings"


def check_names(given: dict, allowed: tuple[str, ...], location: str) -> None:
    """
    Raises:
        RequestError: a name that is not allowed; all that are.
    """
    for name in given:
        if name not in allowed:
            raise RequestError(f"Unknown name {short(name)} in {location}: allowed are {', '.join(allowed)}.")


def check_number(items: list[Item], limit: int) -> None:
    """
    Raises:
        RequestError: more items, all of one kind, than a request may have.
    """
    if len(items) > limit:
        wrong = f"{len(items)} {items[0].kind}s: a request may have {limit}. Send several requests."
        raise RequestError(wrong, 413)


def check_text(value: Any, field: str) -> str:
    """
    Raises:
        RequestError: it is no text, empty, too long, an image, or no Unicode.
    """
    if not isinstance(value, str):
        raise RequestError(f"{field} is {kind_of(value)}: send a text.")
    if not value.strip():
        raise RequestError(f"{field} is an empty text.")
    if value[:11].lower() == "data:image/":
        raise RequestError(f'{field} is an image where a text is expected: an image goes into {{"image": ...}}.')
    if len(value) > MAX_TEXT_LENGTH:
        hint = ' It looks like base64: an image goes into {"image": ...}.' if _looks_like_base64(value) else ""
        raise RequestError(f"{field} has {len(value)} characters: a text may have {MAX_TEXT_LENGTH}.{hint}", 413)
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise RequestError(f"{field} is not valid Unicode: it has half of a surrogate pair.")
    return value


def whole_number(value: Any, name: str, largest: int | None = None) -> int:
    """
    Raises:
        RequestError: it is none, below 1, or above `largest`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"{name} is {short(value)}: send a whole number, 1 or more.")
    if largest is not None and value > largest:
        raise RequestError(f"{name} is {short(value)}: it may be {largest}.", 413)
    return value


def labels_of(parameters: dict) -> list[str]:
    """
    `candidate_labels`, a list, or a text with commas: all that the query string beside an image body can carry.

    Raises:
        RequestError: there are none, too many, or one that is no text.
    """
    labels = parameters.get("candidate_labels")
    number = labels.count(",") + 1 if isinstance(labels, str) else len(labels) if isinstance(labels, list) else 0
    if not number or not labels:
        raise RequestError("candidate_labels is a list of labels, and not empty.")
    if number > MAX_LABELS:
        raise RequestError(f"{number} candidate_labels: a request may have {MAX_LABELS}.", 413)
    if isinstance(labels, str):
        labels = [label.strip() for label in labels.split(",")]
    return [check_text(label, f"candidate_labels[{i}]") for i, label in enumerate(labels)]


def template_of(parameters: dict, default: str) -> str:
    """
    `hypothesis_template`, or the default where the request has none.

    Raises:
        RequestError: it has no place for the label, several, or other braces.
    """
    template = parameters.get("hypothesis_template")
    template = default if template is None else check_text(template, "hypothesis_template")
    # No other braces: str.format would read them, and {:>999999999} fills the memory.
    if template.count("{}") != 1 or {"{", "}"} & set(template.replace("{}", "")):
        raise RequestError("hypothesis_template holds {} once, where the label goes, and no other braces.")
    return template


def images_of(inputs: Any) -> tuple[list[Item], bool]:
    """
    The images of inputs, and whether they came as a list.

    Raises:
        RequestError: an empty list, or inputs with another name than `image` or `images`.
    """
    if isinstance(inputs, dict):
        check_names(inputs, ("image", "images"), "inputs")
        return listed(inputs, "image")
    values, many = as_list(inputs, "inputs")
    return [Item("image", value, f"inputs[{i}]" if many else "inputs") for i, value in enumerate(values)], many


def listed(inputs: dict, kind: str, is_list: bool = False) -> tuple[list[Item], bool]:
    """
    What inputs has under `kind` or its plural, each of them one value or a list; and whether it was a list.

    Args:
        is_list: one value is a list itself; several are under the plural.

    Raises:
        RequestError: an empty list, or both names.
    """
    names = [name for name in (kind, f"{kind}s") if name in inputs]
    if len(names) > 1:
        raise RequestError(f"inputs has both {kind} and {kind}s: send one of them.")
    if not names:
        return [], False
    field = f"inputs.{names[0]}"
    value = inputs[names[0]]
    values, many = ([value], False) if is_list and names[0] == kind else as_list(value, field)
    return [Item(kind, value, f"{field}[{i}]" if many else field) for i, value in enumerate(values)], many


def as_list(value: Any, field: str) -> tuple[list, bool]:
    """
    The values of a list, or the one value as a list; and whether it was a list.

    Raises:
        RequestError: an empty list, or one that is too long.
    """
    if not isinstance(value, list):
        return [value], False
    if not value:
        raise RequestError(f"{field} is an empty list.")
    check_entries(value, field)
    return value, True


def item_of(value: Any, field: str, names: tuple[str, ...] = ("image", "text")) -> Item:
    """
    A query or an entry of a gallery. A string is a text, as in the image-text-retrieval pipeline.

    Args:
        names: of the model's modalities.

    Raises:
        RequestError: it is neither a text nor an image nor an object of modalities.
    """
    if isinstance(value, dict) and value and set(value) <= set(names):
        parts = [Item(kind, part, f"{field}.{kind}") for kind, part in value.items()]
        return parts[0] if len(parts) == 1 else Item(SEVERAL, parts, field)
    if isinstance(value, str):
        return Item("text", value, field)
    if isinstance(value, bytes | Image.Image):
        return Item("image", value, field)
    further = "".join(f', {{"{name}": ...}}' for name in names[2:])
    raise RequestError(f'{field} is {kind_of(value)}: send a text, {{"text": text}}{further} or {{"image": base64}}.')


def vectors_of(rows: list, dim: int) -> Tensor:
    """
    A gallery of embeddings, (N, dim), made unit vectors once more: JSON may have rounded them.

    Raises:
        RequestError: too many, of another size, not numbers, or without a direction.
    """
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


def generation_options(parameters: dict) -> dict[str, int]:
    """
    `max_new_tokens` and `num_beams`, those of them that a request for captions gives.

    Raises:
        RequestError: a number that is none or too large; one that is given twice.
    """
    inner = parameters.get(GENERATION) or {}
    if not isinstance(inner, dict):
        raise RequestError(f"{GENERATION} is {kind_of(inner)}: send an object.")
    limits = {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": MAX_BEAMS}
    check_names(inner, tuple(limits), GENERATION)
    if twice := [name for name in limits if name in inner and name in parameters]:
        raise RequestError(f"{twice[0]} is in parameters and in {GENERATION}: send one of them.")
    given = {name: value for name, value in (parameters | inner).items() if name in limits and value is not None}
    return {name: whole_number(value, name, limits[name]) for name, value in given.items()}


def prompt_of(inputs: Any, parameters: dict) -> str | None:
    """
    What the captions are to begin with, `inputs.text` or `parameters.prompt`; None for nothing.

    Raises:
        RequestError: both, or no text.
    """
    fields = {"inputs.text": inputs.get("text") if isinstance(inputs, dict) else None}
    fields["prompt"] = parameters.get("prompt")
    given = {field: value for field, value in fields.items() if value is not None and value != ""}
    if len(given) > 1:
        raise RequestError("What captions begin with is in inputs.text and in parameters.prompt: send one of them.")
    return next((check_text(value, field) for field, value in given.items()), None)


def _looks_like_base64(value: str) -> bool:
    """No text has a word as long as a line of base64, of capitals, small letters and digits alone."""
    words = value[:2000].split()
    start = "".join(words)
    kinds = ("[A-Z]", "[a-z]", "[0-9]", r"^[A-Za-z0-9+/]+=*$")
    return bool(words) and len(words[0]) >= 60 and all(re.search(kind, start) for kind in kinds)
