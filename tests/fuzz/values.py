"""Values that nobody meant, and files that were damaged on the way."""

import json
import math
from typing import Any

from hypothesis import strategies as st


# What a field may be given by mistake. The large numbers are beyond any machine, so none is a long day's work.
JUNK: list[Any] = [
    *(None, True, False, "", " ", "x", "ü\u0000\u2028", "é" * 3000, "{}", "1e-3", "no"),
    *(-1, 0, 10**9, -(10**9), 10**30, 0.5, -0.5, 1e308, math.nan, math.inf, -math.inf),
    *([], {}, [None], [[]], [0, "x"], {"x": None}, {"": 1}, [{"x": [1]}], [math.nan, math.nan]),
]
junk = st.sampled_from(JUNK)


def same(value: Any) -> str:
    """What tells values apart that are equal to Python, as 1 and true."""
    return repr(value)


@st.composite
def mutated(draw: st.DrawFn, value: Any, depth: int = 4) -> tuple[str, Any]:
    """`value`, a mapping, with one field of it, however deep inside, replaced by junk or left out; and its path."""
    key = draw(st.sampled_from(sorted(value, key=str)))
    inner = value[key]
    if isinstance(inner, dict) and inner and depth and draw(st.integers(0, 3)):
        path, inner = draw(mutated(inner, depth - 1))
        return f"{key}.{path}", {**value, key: inner}
    if draw(st.integers(0, 11)) == 0:
        return str(key), {name: each for name, each in value.items() if name != key}
    return str(key), {**value, key: draw(junk)}


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes of a file, cut off, overwritten in places, in another encoding, or something else altogether."""
    how = draw(st.sampled_from(["cut", "bytes", "zeros", "latin-1", "utf-16", "bom", "empty", "other", "deep"]))
    place = draw(st.integers(0, max(len(data) - 1, 0)))
    text = data.decode("utf-8", errors="replace")
    return {
        "cut": data[:place],
        "bytes": data[:place] + draw(st.binary(min_size=1, max_size=8)) + data[place + 8 :],
        "zeros": data[:place] + bytes(len(data) - place),
        "latin-1": (text[:place] + "é" + text[place:]).encode("latin-1", errors="replace"),
        "utf-16": text.encode("utf-16"),
        "bom": b"\xef\xbb\xbf" + data,
        "empty": b"",
        "other": draw(st.sampled_from([b"null", b"[]", b"3", b'"x"', b"{}", b"\x89PNG\r\n", b"<html></html>"])),
        "deep": b"[" * 100_000,
    }[how]


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()
