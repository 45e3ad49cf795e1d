"""Makes values safe where a page shows them: in Markdown's text and tables, in code, and in a page's metadata.

A name, a licence or a word of a record is somebody else's. Of an ordinary one nothing is changed.
"""

import re
import unicodedata
from typing import Any


# What begins HTML, links, images, code, emphasis, cells and formulas, or escapes.
_MARKUP = re.compile(r"([\\`*\[\]<>|~$])")


def one_line(value: Any) -> str:
    """A value without line breaks, control characters, and those that turn the direction of writing: for metadata."""
    characters = (" " if each.isspace() else each for each in str(value))
    kept = (each for each in characters if unicodedata.category(each) not in ("Cc", "Cf", "Cs", "Zl", "Zp"))
    return " ".join("".join(kept).split())


def as_text(value: Any) -> str:
    """A value in a paragraph, a heading or a table's cell of Markdown, where it is text and nothing else."""
    return _MARKUP.sub(r"\\\1", one_line(value))


def as_code(value: Any) -> str:
    """A value between backticks, in a paragraph. Code has no escapes: a backtick becomes another quotation mark."""
    return one_line(value).replace("`", "'") or " "


def as_code_in_cell(value: Any) -> str:
    """A value between backticks in a table's cell, which a bar would end."""
    return as_code(value).replace("|", "/").replace("<", "‹")


def as_string(value: Any) -> str:
    """A value between the double quotes of a string in Python."""
    return one_line(value).replace("\\", "\\\\").replace('"', '\\"')


def fence_of(text: str) -> str:
    """The fence of a block of code: of more backticks than any that the text has in a row, three or more."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(3, longest + 1)


def safe_names(evaluation: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results and the sources of an evaluation, with names of models, sources, modalities and fields as text."""

    def safe(results: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        return {
            as_text(model): {_safe_metric(metric): value for metric, value in metrics.items()}
            for model, metrics in results.items()
        }

    return safe(evaluation["results"]), {as_text(name): safe(found) for name, found in evaluation["sources"].items()}


def _safe_metric(name: str) -> str:
    """A metric's name; brackets around the field of a record are the report's own."""
    if found := re.fullmatch(r"([^\[]*)\[(.*)\]([^\]]*)", name, flags=re.DOTALL):
        begin, field, end = map(as_text, found.groups())
        return f"{begin}[{field}]{end}"
    return as_text(name)


__all__ = ["as_code", "as_code_in_cell", "as_string", "as_text", "fence_of", "one_line", "safe_names"]
