"""No table of measured figures in README and pages is typed in by hand: `python benchmarks/blocks.py` writes them."""

import re

import pytest
from markdown_pages import FENCE, PAGES, ROOT, name_of


CARD = ROOT / "modeling" / "gap_closed_clip" / "hub" / "card_template.md"
GENERATED = re.compile(r"<!-- (evidence|results): [^>]+ -->.*?<!-- /\1 -->", flags=re.DOTALL)
TABLE = re.compile(r"^ *\|.+\n *\|[ :|-]+\|\n(?: *\|.+\n?)+", flags=re.MULTILINE)
NUMBER = r"[<>+-]? ?\d[\d,]*\.?\d*(e[+-]?\d+)?|\.\d+"
UNIT = r"(%|/s|[kMG]i?B| ?(ms|min|[hs]|[kMG]i?B|points|minutes|hours|seconds|times)|x)?"
# 57.9% ± 1.2%, 0.61, 0.68, 15.2 GB, 241/s, 1,294 / 447
MEASURED = re.compile(rf"({NUMBER}){UNIT}(( ± | / |, )({NUMBER}){UNIT})*( ≈)?")
NOTHING = ("", "-", "–")


def typed_tables(text: str) -> list[str]:
    """The heads of tables outside of generated blocks of which a column, not the first, holds figures and no words."""
    return [
        table.strip().splitlines()[0]
        for table in TABLE.findall(GENERATED.sub("", FENCE.sub("", text)))
        if any(_is_measured(column) for column in _columns(table)[1:])
    ]


def _columns(table: str) -> list[list[str]]:
    rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in table.strip().splitlines()[2:]]
    return [[row[i].strip().strip("*") for row in rows] for i in range(len(rows[0]))]


def _is_measured(cells: list[str]) -> bool:
    told = [cell for cell in cells if cell not in NOTHING]
    return bool(told) and all(MEASURED.fullmatch(cell) for cell in told)


def page_of(*cells: str) -> str:
    return "\n".join(["Before.", "", "| a | b |", "| --- | ---: |", *(f"| row | {cell} |" for cell in cells), ""])


@pytest.mark.parametrize(
    "cells",
    [
        ("57.9% ± 1.2%", "**58.0%** "),
        ("0.478", ""),
        ("1,294 / 447", "1,078 / 147"),
        ("15.2 GB, 241/s", "0.58 GB"),
        ("40.0 / .42 / .13", "-"),
        ("3e-8", "< 0.001"),
        ("158",),
    ],
)
def test_figures_are_found(cells):
    page = page_of(*cells)
    assert typed_tables(page) == ["| a | b |"]
    assert typed_tables(f"<!-- results: x.md table=1 -->\n\n{page}\n<!-- /results -->\n") == []
    assert typed_tables(f"```\n{page}```\n") == []


@pytest.mark.parametrize(
    "cells", [("1.0.21", "0.18"), ("refused", "167"), ("`0.5`", "`1`"), ("", "-"), ("1", "1 of 2")]
)
def test_settings_and_messages_are_none(cells):
    assert typed_tables(page_of(*cells)) == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "space" / "README.md", CARD], ids=name_of)
def test_no_table_of_figures_is_typed_by_hand(page):
    typed = typed_tables(page.read_text(encoding="utf-8"))
    assert not typed, f"{name_of(page)}: {typed}: quote a stored report, see benchmarks/blocks.py."


def test_the_card_states_no_figure_of_its_own():
    text = re.sub(
        r"\{%.*?%\}|\{\{.*?\}\}|\{#.*?#\}", "", FENCE.sub("", CARD.read_text(encoding="utf-8")), flags=re.DOTALL
    )
    text = re.sub(r"\[[^\]]+\]\(https:[^)]+\)|Apache-2\.0|arXiv[: ]\d{4}\.\d{5}", "", text)
    assert re.findall(r"\d+\.\d+|\d+ ?%", text) == ["74.6", "70.3"]  # the sibling paper's, on MSCOCO
