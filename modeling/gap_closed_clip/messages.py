"""Two phrases that error messages about data share."""

import difflib
from collections.abc import Sequence
from typing import Any


def suggest(name: str, known: Sequence[str], what: str) -> str:
    """ "Did you mean 'captions'? The columns are: captions, image." Many are listed only where none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near and len(known) > 10:
        return f"Did you mean '{near[0]}'?"
    listed = f"The {what} are: {', '.join(known)}." if known else f"There are no {what}."
    return f"Did you mean '{near[0]}'? {listed}" if near else listed


def shorten(values: Sequence[Any]) -> str:
    """The first five values, and dots if there are more."""
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
