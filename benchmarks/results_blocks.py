"""Tables and numbers of README and docs that are quoted from the reports in benchmarks/results/*.md.

What `blocks.py` says of their comments in short:

    <!-- results: FILE under="HEADING" table=1 rows="A | B, C" columns="HEAD, HEAD" names="OLD=NEW; OLD=NEW" -->
    <!-- results-value: FILE "A | B" HEAD -->57.9%<!-- / -->

Of a report's tables, `under` is the heading that one stands under and `table` its number in the file (or under that
heading); neither is needed where there is one alone. `under="HEADING=LABEL; HEADING=LABEL"` puts tables of the same
columns below one another, with the labels as a first column, whose head is `head`. A row goes by its first cell or
by its first cells, with | between them; of a table, what fits several rows gives them all. A column without a head
goes by its place. `names` gives columns and the rows' labels other words; `digits="COLUMN=1"` rounds a column.

A number is a cell without its standard deviation or, by further words, with it (`sd`), its ratio or difference to the
same column's in another row (`ratio="ROW"`, `difference="ROW"`), of the printed means, or rounded (`digits=0`). FILE
and a field alone give the command, machine, versions or date of the report.
"""

import re
from pathlib import Path
from typing import NamedTuple

from block_words import known, pairs, parse
from evidence_results import names_in
from measure import RESULTS, markdown_table


OPTIONS = ("under", "table", "rows", "columns", "head", "names", "digits")
VALUE_OPTIONS = ("under", "table", "sd", "ratio", "difference", "digits")
FLAGS = ("sd",)
FIELDS = {
    "command": re.compile(r"^- (`python [^\n]+`)$", re.MULTILINE),
    "machine": re.compile(r"^- `python [^\n]+`\n- ([^\n]+)$", re.MULTILINE),
    "versions": re.compile(r"^- ((?:torch|transformers) \d[^\n]+)$", re.MULTILINE),
    "date": re.compile(r"^- (\d{4}-\d\d-\d\d)$", re.MULTILINE),
}
HEADING = re.compile(r"#+ +(.+?) *#*")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
BETWEEN = " | "


class Table(NamedTuple):
    """A table of a report.

    Args:
        heading: that it stands under.
        head: names of the columns; of one without a name its place, from 1.
        rows: their cells, as they stand there.
        left: how many columns, from the first, are aligned to the left: the labels of the rows.
    """

    heading: str
    head: list[str]
    rows: list[list[str]]
    left: int

    def keys(self, row: list[str]) -> list[str]:
        """What tells a row: its first cell, its first two, and so on."""
        return [BETWEEN.join(row[: count + 1]) for count in range(len(row))]

    def matching(self, key: str) -> list[list[str]]:
        return [row for row in self.rows if key in self.keys(row)]

    def place(self, column: str) -> int:
        return self.head.index(known(column, self.head, "column"))


class Reports:
    """Reports by the names of their files, each read once."""

    def __init__(self, folder: Path = RESULTS):
        self.folder = folder
        self._texts: dict[str, str] = {}

    def text(self, name: str) -> str:
        if name not in self._texts:
            known(name, sorted(path.name for path in self.folder.glob("*.md")), "report")
            self._texts[name] = (self.folder / name).read_text(encoding="utf-8")
        return self._texts[name]

    def tables(self, name: str) -> list[Table]:
        return tables_of(self.text(name))

    def field(self, name: str, field: str) -> str:
        """The command, machine, versions or date at a report's head."""
        found = FIELDS[known(field, list(FIELDS), "field")].search(self.text(name))
        if not found:
            raise ValueError(f"{name} does not say its {field}.")
        return found[1]


def tables_of(text: str) -> list[Table]:
    """The tables of a page of Markdown, in order."""
    lines, heading, found = text.splitlines(), "", []
    for place, line in enumerate(lines):
        if match := HEADING.fullmatch(line):
            heading = match[1]
        if not line.startswith("|") or (place and lines[place - 1].startswith("|")):
            continue
        end = next((i for i in range(place, len(lines)) if not lines[i].startswith("|")), len(lines))
        head, rule, *rows = [_cells(row) for row in lines[place:end]]
        aligned = [cell.endswith(":") for cell in rule]
        left = aligned.index(True) if True in aligned else len(aligned)
        found.append(Table(heading, [name or str(i) for i, name in enumerate(head, 1)], rows, left))
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def block(words: str, reports: Reports) -> str:
    """
    The lines between the comments of a table.

    Raises:
        ValueError: there is no such report, table, row or column.
    """
    plain, options = parse(words, OPTIONS)
    if len(plain) != 1:
        raise ValueError(f"one report is expected, not {plain}.")
    labels = pairs(options.get("under", ""))
    stacked = len(labels) > 1
    tables = [_chosen(reports.tables(plain[0]), heading, options.get("table")) for heading in labels or [""]]
    columns, left = _columns(tables[0], options)
    names, digits = pairs(options.get("names", "")), _digits(options.get("digits", ""))
    _check_names(names, digits, tables, columns)
    rows = []
    for table, label in zip(tables, labels.values() or [""], strict=True):
        places = [table.place(column) for column in columns]
        for row in _rows(table, options):
            cells = [names.get(row[place], row[place]) if place < table.left else row[place] for place in places]
            cells = [
                rounded(cell, digits[column]) if column in digits else cell
                for cell, column in zip(cells, columns, strict=True)
            ]
            rows.append([label, *cells] if stacked else cells)
    head = [names.get(column, "" if column.isdigit() else column) for column in columns]
    if stacked:
        head.insert(0, options.get("head", ""))
    elif "head" in options:
        head[0] = options["head"]
    return f"\n\n{markdown_table(head, rows, left + stacked)}\n\n"


def value(words: str, reports: Reports) -> str:
    """
    The text between the comments of a number.

    Raises:
        ValueError: there is no such report, table, row or column, or there are several such rows.
    """
    plain, options = parse(words, VALUE_OPTIONS, FLAGS)
    if len(plain) == 2:
        return reports.field(*plain)
    if len(plain) != 3:
        raise ValueError("FILE ROW COLUMN or FILE FIELD are expected, names with spaces in double quotes.")
    table = _chosen(reports.tables(plain[0]), options.get("under", ""), options.get("table"))
    cell = _cell(table, *plain[1:])
    for name in ("ratio", "difference"):
        if name in options:
            return _compared(cell, _cell(table, options[name], plain[2]), name, options.get("digits"))
    if "sd" not in options:
        cell = cell.partition(" ± ")[0]
    return rounded(cell, int(options["digits"])) if "digits" in options else cell


def _chosen(tables: list[Table], heading: str, number: str | None) -> Table:
    """The table under a heading, or with a number, or the only one."""
    if heading:
        headings = list(dict.fromkeys(table.heading for table in tables))
        known(heading, headings, "table under the heading")
        tables = [table for table in tables if table.heading == heading]
    if number is None and len(tables) == 1:
        return tables[0]
    if number is None:
        raise ValueError(f"there are {len(tables)} tables; say which one: table=1 to table={len(tables)}.")
    if not number.isdigit() or not 1 <= int(number) <= len(tables):
        raise ValueError(f"there is no table {number}; there are {len(tables)}.")
    return tables[int(number) - 1]


def _columns(table: Table, options: dict[str, str]) -> tuple[list[str], int]:
    """The columns that are asked for, and how many of them, from the first, are labels."""
    columns = names_in(options["columns"], table.head, "column", known) if "columns" in options else table.head
    labels = [table.place(column) < table.left for column in columns]
    return columns, labels.index(False) if False in labels else len(labels)


def _rows(table: Table, options: dict[str, str]) -> list[list[str]]:
    if "rows" not in options:
        return table.rows
    keys = list(dict.fromkeys(key for row in table.rows for key in table.keys(row)))
    return [row for key in names_in(options["rows"], keys, "row", known) for row in table.matching(key)]


def _check_names(names: dict[str, str], digits: dict[str, int], tables: list[Table], columns: list[str]) -> None:
    """Fails where other words or digits are asked for of what is not there."""
    for column in digits:
        known(column, columns, "column")
    cells = [cell for table in tables for row in table.rows for cell in row[: table.left]]
    for name in names:
        known(name, list(dict.fromkeys([*columns, *cells])), "column or label")


def _digits(text: str) -> dict[str, int]:
    return {column: int(count) for column, count in pairs(text).items()}


def rounded(cell: str, digits: int) -> str:
    """A cell with so many digits after the point in each of its numbers, and commas between thousands."""
    return NUMBER.sub(lambda match: f"{_number(match[0]):,.{digits}f}", cell)


def _cell(table: Table, key: str, column: str) -> str:
    """The cell of the one row that a key tells."""
    rows = table.matching(key)
    if not rows:
        known(key, list(dict.fromkeys(found for row in table.rows for found in table.keys(row))), "row")
    if len(rows) > 1:
        raise ValueError(f"{len(rows)} rows begin with {key!r}; say more of their cells, with | between them.")
    return rows[0][table.place(column)].strip("*")


def _compared(cell: str, other: str, how: str, digits: str | None) -> str:
    """The ratio or difference of the first numbers of two cells, as they are printed there."""
    pair = [NUMBER.search(text) for text in (cell, other)]
    if None in pair:
        raise ValueError(f"{cell!r} and {other!r} can't be compared: one of them has no number.")
    first, second = (_number(match[0]) for match in pair)
    if how == "ratio":
        return f"{first / second:,.{digits or 2}f}"
    decimals = max(len(match[0].partition(".")[2]) for match in pair)
    return f"{first - second:,.{decimals if digits is None else digits}f}"


def _number(text: str) -> float:
    return float(text.replace(",", ""))
