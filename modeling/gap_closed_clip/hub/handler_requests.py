"""
The names, texts and numbers of a request to the endpoint, checked.

`handler.py` imports it from the model folder, where the package is not installed.
"""

import difflib
import re
from typing import Any

from handler_images import RequestError, kind_of


MAX_TEXT_LENGTH = 10_000  # characters; what the text tower can't take of them is cut off
MAX_NEW_TOKENS = 256  # of a caption
MAX_BEAMS = 8
# Where Hugging Face's own clients put the parameters of a generation.
GENERATION = "generation_parameters"


def check_names(given: dict, allowed: tuple[str, ...], where: str) -> None:
    """
    Raises:
        RequestError: a name that is not allowed; the closest that is.
    """
    for name in given:
        if name not in allowed:
            close = difflib.get_close_matches(str(name)[:60], allowed, 1)
            remedy = f"did you mean {close[0]!r}?" if close else f"allowed are {', '.join(allowed)}."
            raise RequestError(f"Unknown name {short(name)} in {where}: {remedy}")


def check_text(value: Any, where: str) -> str:
    """
    Raises:
        RequestError: it is no text, empty, too long, an image, or no Unicode.
    """
    if not isinstance(value, str):
        raise RequestError(f"{where} is {kind_of(value)}: send a text.")
    if not value.strip():
        raise RequestError(f"{where} is an empty text.")
    if value[:11].lower() == "data:image/":
        raise RequestError(f'{where} is an image where a text is expected: an image goes into {{"image": ...}}.')
    if len(value) > MAX_TEXT_LENGTH:
        hint = ' It looks like base64: an image goes into {"image": ...}.' if _looks_like_base64(value) else ""
        raise RequestError(f"{where} has {len(value)} characters: a text may have {MAX_TEXT_LENGTH}.{hint}", 413)
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise RequestError(f"{where} is not valid Unicode: it has half of a surrogate pair.")
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
    places = {"inputs.text": inputs.get("text") if isinstance(inputs, dict) else None}
    places["prompt"] = parameters.get("prompt")
    found = {where: value for where, value in places.items() if value is not None and value != ""}
    if len(found) > 1:
        raise RequestError("What captions begin with is in inputs.text and in parameters.prompt: send one of them.")
    return next((check_text(value, where) for where, value in found.items()), None)


def short(value: Any) -> str:
    """A value for a message."""
    return f"{value!r:.60}"


def _looks_like_base64(value: str) -> bool:
    """No text has a word as long as a line of base64, of capitals, small letters and digits alone."""
    words = value[:2000].split()
    start = "".join(words)
    kinds = ("[A-Z]", "[a-z]", "[0-9]", r"^[A-Za-z0-9+/]+=*$")
    return len(words[0]) >= 60 and all(re.search(kind, start) for kind in kinds)
