"""The comments of generated blocks in README and docs: their words and options."""

import shlex
from collections.abc import Collection, Sequence

from gap_closed_clip.messages import did_you_mean


def parse(words: str, options: Sequence[str], flags: Collection[str] = ()) -> tuple[list[str], dict[str, str]]:
    """
    The words of a comment, and its options.

    Args:
        options: names of what may be given as NAME=VALUE.
        flags: those of them that may stand alone.

    Raises:
        ValueError: there is no such option.
    """
    plain, found = [], {}
    for word in shlex.split(words):
        name, sign, value = word.partition("=")
        if name in options and (sign or name in flags):
            found[name] = value
        elif sign:
            raise ValueError(f"there is no option {name}; there are {', '.join(options)}.")
        else:
            plain.append(word)
    return plain, found


def pairs(text: str) -> dict[str, str]:
    """What `NAME=WORDS; NAME=WORDS` says of each name."""
    entries = [entry.partition("=") for entry in text.split(";") if entry.strip()]
    return {name.strip(): value.strip() for name, _, value in entries}


def known(name: str, names: Sequence[str], what: str) -> str:
    """
    The name, if it is one of the names.

    Raises:
        ValueError: it is not; the message has the one that was probably meant, or all of them.
    """
    if name not in names:
        raise ValueError(f"there is no {what} {name!r}{did_you_mean(name, names)}")
    return name
