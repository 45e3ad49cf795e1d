"""
How much a request to the endpoint may hold, and its answer: checked before anything else looks at it.

`handler.py` imports it from the model folder, where the package is not installed.
"""

import reprlib
from itertools import chain
from typing import Any

from handler_images import RequestError


MAX_DEPTH = 16  # of lists and objects in one another
MAX_VALUES = 24_000_000  # of all lists and objects of a request: 20,000 embeddings of 1,024 dimensions
MAX_CHARACTERS = 128 * 2**20  # of all texts and images of a request
MAX_ENTRIES = 2048  # of a list of images, texts or records; of each kind there may be fewer
MAX_HITS = 100_000  # of an answer: queries times top_k

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60


def check_bounds(data: dict) -> None:
    """
    Raises:
        RequestError: the request is nested too deep, or has too many values or characters for anything to look at it.
    """
    values, characters = 0, 0
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH + 1):
        values += sum(map(len, level))
        if values > MAX_VALUES:
            raise RequestError(f"The request has more than {MAX_VALUES:,} values: send several requests.", 413)
        lists = (each if isinstance(each, list) else chain(each, each.values()) for each in level)
        # Of millions of numbers no list is made.
        held = [each for each in chain.from_iterable(lists) if isinstance(each, str | bytes | bytearray | list | dict)]
        characters += sum(len(each) for each in held if not isinstance(each, list | dict))
        if characters > MAX_CHARACTERS:
            wrong = f"The request has more than {MAX_CHARACTERS:,} characters: send several requests."
            raise RequestError(wrong, 413)
        level = [each for each in held if isinstance(each, list | dict)]
        if not level:
            return
    raise RequestError(f"The request is nested too deep: lists and objects may be {MAX_DEPTH} deep in one another.")


def check_answer(queries: int, top_k: int) -> None:
    """
    Raises:
        RequestError: so many hits of so many queries are too long an answer.
    """
    if queries * top_k > MAX_HITS:
        wrong = f"{queries} queries with {top_k} hits each: an answer may have {MAX_HITS:,} hits. Lower top_k"
        raise RequestError(f"{wrong}, or send several requests.", 413)


def check_entries(values: list, field: str) -> None:
    """
    Raises:
        RequestError: a list of so many images, texts or other items that no kind of them can be within its limit.
    """
    if len(values) > MAX_ENTRIES:
        raise RequestError(
            f"{field} has {len(values)} entries: it may have {MAX_ENTRIES}. Send several requests.", 413
        )


def short(value: Any) -> str:
    """A value for a message, of which no more is written than is shown."""
    try:
        return _SHORT.repr(value)[:60]
    except ValueError:  # Python writes no whole numbers of thousands of digits
        return "a number of thousands of digits"
