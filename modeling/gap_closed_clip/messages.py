"""What error messages share: the name that was probably meant, and lists that stay short."""

import difflib
from collections.abc import Collection, Sequence
from typing import Any


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that is most like `name`; None where none is like it."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return near[0] if near else None


def did_you_mean(name: str, known: Collection[str], otherwise: str | None = None) -> str:
    """
    The end of a message about an unknown name: `: did you mean 'rank'?`, or else what is known.

    Args:
        otherwise: instead of the list of all known names, where none is like it.
    """
    near = nearest(name, known)
    if near is not None:
        return f": did you mean {near!r}?"
    return f"; known are {', '.join(sorted(known))}." if otherwise is None else otherwise


def suggest(name: str, known: Sequence[str], what: str) -> str:
    """A sentence of its own: "Did you mean 'captions'? The columns are: captions, image." A long list is left out."""
    near = nearest(name, known)
    if near is not None and len(known) > 10:
        return f"Did you mean '{near}'?"
    listed = f"The {what} are: {', '.join(known)}." if known else f"There are no {what}."
    return listed if near is None else f"Did you mean '{near}'? {listed}"


def shorten(values: Sequence[Any]) -> str:
    """The first five values, and dots if there are more; of an overlong one both ends."""
    return ", ".join(map(cut, values[:5])) + (", ..." if len(values) > 5 else "")


def cut(value: Any) -> str:
    """A value as text: of more than 300 letters the first and the last."""
    text = str(value)
    return text if len(text) <= 300 else f"{text[:148]}...{text[-148:]}"
