"""Tables and numbers in README and docs that come from the stored results of evidence.py.

    python benchmarks/evidence_blocks.py             # write them anew
    python benchmarks/evidence_blocks.py --check     # exit code 1, and a line for each that differs

A table stands between two comments, a number in a sentence, too:

    <!-- evidence: NAME budget=own methods="CLIP (LT), ours" rows="recall@10, margin, v_measure of medpix2" -->
    <!-- /evidence -->
    <!-- evidence: NAME part=robustness -->
    <!-- /evidence -->
    R@10 is <!-- evidence-value: NAME own ours recall@10 -->57.9%<!-- / -->.

NAME is that of benchmarks/results/evidence_NAME.json. Of a table, `budget` is shared, own or both ("shared, own"), all
there are if not given; `scope` says whose metrics, the main scope's if not given, and a row may say `METRIC of SCOPE`;
`head` is the first column's; `names="medpix2=MedPix 2.0; ours=GCC"` gives scopes and methods other words; `marks=no`
leaves out the marks of what is not separable from the baseline. `part` gives a table of the report instead:
methods as rows (`columns="METRIC, METRIC"`) and comparisons, both of one budget; captions (`columns=`, too); tuning,
association, weights, robustness.

A number is the mean over the seeds or, by further words, the mean ± standard deviation (`sd`), the ratio or difference
(percentages in points) to another method at the same budget (`ratio="CLIP (LT)"`, `difference="CLIP (LT)"`) or at
another (`at=shared`), or Holm's p of the comparison with the baseline (`p`); `digits=2` are those after the point.
Of captions it is NAME captions METHOD METRIC scope="text-only", the scope one of the kinds of captions.
NAME and a field alone, as in `NAME minutes`, give that field of the file. A number can't begin a line, which Markdown
would take for HTML. evidence_NAME.md is written and checked, too.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from evidence_caption_tables import captions_table
from evidence_report import report
from evidence_results import (
    BUDGET_WORDS,
    LEVEL,
    PERCENT,
    Column,
    Evidence,
    column_of,
    form_of,
    known_name,
    label_of,
    names_in,
    p_words,
    path_of,
    read,
)
from evidence_tables import (
    NOT_SEPARABLE,
    association_table,
    comparison_table,
    escaped,
    marked,
    methods_table,
    robustness_table,
    tuning_table,
    weight_table,
)
from measure import RESULTS

from gap_closed_clip.evaluation.tables import cell, table


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```.*?^\1```$", flags=re.DOTALL | re.MULTILINE)
BLOCK = re.compile(
    r"(?P<start><!-- evidence: (?P<words>[^>]+?) -->)(?P<text>.*?)(?P<end><!-- /evidence -->)", re.DOTALL
)
VALUE = re.compile(r"(?P<start><!-- evidence-value: (?P<words>[^>]+?) -->)(?P<text>[^<]*)(?P<end><!-- / -->)")
START, END = re.compile(r"<!-- evidence(-value)?: "), re.compile(r"<!-- /(evidence)? -->")
# Of a line, a list's item or a quote.
BEGINNING = re.compile(r"^[ \t]*([-+*>][ \t]+|\d+[.)][ \t]+)*\Z", flags=re.MULTILINE)
OPTIONS = {
    "evidence": ("budget", "scope", "methods", "rows", "head", "names", "marks", "part", "columns"),
    "evidence-value": ("scope", "sd", "ratio", "difference", "at", "p", "digits"),
}
FIELDS = ("date", "minutes", "machine", "versions", "command", "title", "baseline")
PARTS_OF_A_BUDGET = ("methods", "comparisons")
PARTS: dict[str, Callable[[Evidence], str]] = {
    "tuning": tuning_table,
    "association": association_table,
    "weights": weight_table,
    "robustness": robustness_table,
}


class Files:
    """Results by name, each read once."""

    def __init__(self, folder: Path = RESULTS):
        self.folder = folder
        self._found: dict[str, Evidence] = {}

    def __getitem__(self, name: str) -> Evidence:
        if name not in self._found:
            self._found[name] = Evidence(read(path_of(name, self.folder)))
        return self._found[name]


def written(text: str, files: Files) -> str:
    """
    A page with its blocks and numbers written anew; code between fences stays as it is.

    Raises:
        ValueError: a block has no end, or names what is not there: results, budget, scope, method or metric.
    """
    return "".join(new for _, _, new in _pieces(text, files))


def differing(text: str, files: Files) -> list[str]:
    """The blocks and numbers, by their comments' words, that are not what the results give."""
    return [words for words, old, new in _pieces(text, files) if words and old != new]


def _pieces(text: str, files: Files) -> Iterator[tuple[str, str, str]]:
    """A page in pieces: (the words of a block or number or "", the piece as it is, the piece written anew)."""
    fences = [match.span() for match in FENCE.finditer(text)]
    found = [("evidence", match) for match in BLOCK.finditer(text)]
    found += [("evidence-value", match) for match in VALUE.finditer(text)]
    place = 0
    for kind, match in sorted(found, key=lambda entry: entry[1].start()):
        if any(start <= match.start() < end for start, end in fences):
            continue
        before = text[place : match.start()]
        _check_ends(before)
        _check_ends(match["text"])
        yield "", before, before
        words = f"{kind}: {match['words']}"
        if kind == "evidence-value" and BEGINNING.search(before):
            raise ValueError(
                f"{words}: a number can't begin a line, which Markdown would take for HTML; put a word before."
            )
        try:
            inner = _block(match["words"], files) if kind == "evidence" else _value(match["words"], files)
        except (ValueError, OSError) as error:
            raise ValueError(f"{words}: {error}") from error
        yield words, match[0], f"{match['start']}{inner}{match['end']}"
        place = match.end()
    _check_ends(text[place:])
    yield "", text[place:], text[place:]


def _check_ends(text: str) -> None:
    """Fails where a block begins or ends alone."""
    text = FENCE.sub("", text)
    alone = START.search(text) or END.search(text)
    if alone:
        line = text[alone.start() :].partition("\n")[0][:80]
        raise ValueError(
            f"{line}: a block is <!-- evidence: ... --> ... <!-- /evidence -->, a number "
            "<!-- evidence-value: ... -->...<!-- / -->; one of the two comments is missing."
        )


def _parse(words: str, kind: str) -> tuple[list[str], dict[str, str]]:
    """The words of a comment, and its options; a word without a value is an option that is on."""
    plain, options = [], {}
    for word in shlex.split(words):
        name, sign, value = word.partition("=")
        if name in OPTIONS[kind] and (sign or name in ("sd", "p")):
            options[name] = value
        elif sign:
            raise ValueError(f"there is no option {name}; there are {', '.join(OPTIONS[kind])}.")
        else:
            plain.append(word)
    return plain, options


def _block(words: str, files: Files) -> str:
    """The lines between the comments of a table."""
    plain, options = _parse(words, "evidence")
    if len(plain) != 1:
        raise ValueError(f"one name of results is expected, not {plain}.")
    evidence = files[plain[0]]
    budgets = names_in(options["budget"], evidence.budgets, "budget") if "budget" in options else evidence.budgets
    scope = known_name(options.get("scope", evidence.main_scope), evidence.scopes, "scope")
    if "part" in options:
        part = known_name(options["part"], [*PARTS_OF_A_BUDGET, *PARTS, "captions"], "part")
        if part in PARTS_OF_A_BUDGET and len(budgets) > 1:
            raise ValueError(f"{part} are of one budget; say budget=own or budget=shared.")
        if part == "methods":
            names = [name.strip() for name in options.get("columns", "").split(",")]
            columns = [_column(evidence, name, scope) for name in names]
            found = methods_table(
                evidence, budgets[0], scope, columns, chance=any(column.chance for column in columns)
            )
        elif part == "captions":
            found = captions_table(evidence, options.get("columns", ""))
        elif part == "comparisons":
            found = comparison_table(evidence, budgets[0], scope)
        else:
            found = PARTS[part](evidence)
        if not found:
            raise ValueError(f"the results have no {part}.")
        return f"\n\n{found}\n\n"
    if "rows" not in options:
        raise ValueError('rows="METRIC, METRIC of SCOPE" or part=... is missing.')
    return f"\n\n{_table(evidence, budgets, scope, options)}\n\n"


def _table(evidence: Evidence, budgets: Sequence[str], scope: str, options: dict[str, str]) -> str:
    """Metrics as rows and methods as columns; of several budgets each method at each."""
    names = dict(entry.strip().split("=", 1) for entry in options.get("names", "").split(";") if "=" in entry)
    methods = list(evidence.results["methods"])
    if "methods" in options:
        methods = names_in(options["methods"], methods, "method")
    columns = [(method, budget) for budget in budgets for method in methods if method in evidence.methods(budget)]
    heads = [
        names.get(method, method) + (f", {budget} budget" if len(budgets) > 1 else "") for method, budget in columns
    ]
    rows = [[options.get("head", names.get(scope, scope)), *heads]]
    for text in options["rows"].split(","):
        metric, of, own = text.strip().partition(" of ")
        where = known_name(own, evidence.scopes, "scope") if of else scope
        column = _column(evidence, metric, where)
        label = label_of(metric) if not of else _label_of_scope(metric, names.get(where, where))
        cells = [_cell(evidence, entry, where, column, options.get("marks") != "no") for entry in columns]
        rows.append([label, *cells])
    found = table([[escaped(text) for text in row] for row in rows])
    if any(text.endswith(f" {NOT_SEPARABLE}") for row in rows[1:] for text in row[1:]):
        found += f"\n\n*{NOT_SEPARABLE}: not separable from {names.get(evidence.baseline, evidence.baseline)} "
        found += f"(Holm's p of {LEVEL} or more).*"
    return found


def _label_of_scope(metric: str, scope: str) -> str:
    """The metric's label with the scope before the arrow: V-measure, medpix2 ↑."""
    label = label_of(metric)
    words = label.removesuffix(" ↑").removesuffix(" ↓")
    return f"{words}, {scope}{label[len(words) :]}"


def _cell(evidence: Evidence, of: tuple[str, str], scope: str, column: Column, marks: bool) -> str:
    method, budget = of
    text = cell(evidence.values(method, budget, scope, column), column.form)
    separable = evidence.separable(method, budget, scope, column)
    return marked(text, separable) if marks and separable is False else text


def _column(evidence: Evidence, metric: str, scope: str) -> Column:
    column = column_of(metric)
    if not evidence.present([column], scope):
        found = {name for run in evidence.runs for name in run["metrics"].get(scope, {})}
        known_name(metric, sorted(found), f"metric in {scope},")
    return column


# Numbers.


def _value(words: str, files: Files) -> str:
    """The text between the comments of a number."""
    plain, options = _parse(words, "evidence-value")
    if len(plain) == 2:
        found = files[plain[0]].results.get(known_name(plain[1], FIELDS, "field"))
        return f"{found:.0f}" if isinstance(found, float) else str(found)
    if len(plain) != 4:
        raise ValueError("NAME BUDGET METHOD METRIC are expected, names with spaces in double quotes.")
    evidence = files[plain[0]]
    if plain[1] == "captions" and evidence.captions is not None:
        evidence = evidence.captions
        options.setdefault("scope", "")  # has to be said
        plain[1] = evidence.budgets[0]
    budget = known_name(plain[1], evidence.budgets, "budget")
    method = known_name(plain[2], evidence.methods(budget), f"method at {BUDGET_WORDS[budget]},")
    scope = known_name(options.get("scope", evidence.main_scope), evidence.scopes, "scope")
    column = _column(evidence, plain[3], scope)
    if "p" in options:
        found = evidence.comparison(method, budget, scope, plain[3])
        if found is None:
            raise ValueError(f"{method} was not compared with {evidence.baseline} in {plain[3]}.")
        return p_words(found["p_holm"]).replace("<", "below")
    return _number(evidence, (method, budget, scope), column, options)


def _number(evidence: Evidence, of: tuple[str, str, str], column: Column, options: dict[str, str]) -> str:
    """A mean, a mean ± standard deviation, or a ratio or difference of means."""
    method, budget, scope = of
    form = form_of(column.name)
    if "digits" in options:
        form = re.sub(r"\.\d", f".{int(options['digits'])}", form)
    mean = evidence.mean(method, budget, scope, column)
    if "sd" in options:
        return cell(evidence.values(method, budget, scope, column), form)
    for name in ("ratio", "difference"):
        if name not in options:
            continue
        at = known_name(options.get("at", budget), evidence.budgets, "budget")
        other = known_name(options[name], evidence.methods(at), f"method at {BUDGET_WORDS[at]},")
        usual = evidence.mean(other, at, scope, column)
        if name == "ratio":
            return f"{mean / usual:.{options.get('digits', 2)}f}"
        if column.form == PERCENT:
            return f"{100 * (mean - usual):.{options.get('digits', 1)}f}"
        return form.format(mean - usual)
    return form.format(mean)


# The command.


def main(arguments: Sequence[str] | None = None, pages: Sequence[Path] = PAGES, folder: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something differs")
    check = parser.parse_args(arguments).check
    files, faults, place = Files(folder), [], ""
    try:
        for path in sorted(folder.glob("evidence_*.json")):
            place = path.name
            page = report(files[path.stem.removeprefix("evidence_")].results)
            faults += _settle(path.with_suffix(".md"), page, [path.stem], check)
        for page_path in pages:
            place = page_path.name
            text = page_path.read_text(encoding="utf-8")
            faults += _settle(page_path, written(text, files), differing(text, files), check)
    except (ValueError, OSError) as error:
        print(f"evidence_blocks.py: {place}: {error}", file=sys.stderr)
        return 1
    for fault in faults:
        print(f"evidence_blocks.py: {fault}; `python benchmarks/evidence_blocks.py` writes it anew.", file=sys.stderr)
    return 1 if faults else 0


def _settle(page: Path, text: str, parts: Sequence[str], check: bool) -> list[str]:
    """Write a page or, of a check, say which of its parts are not what the results give."""
    if page.is_file() and page.read_text(encoding="utf-8") == text:
        return []
    if not check:
        page.write_text(text, encoding="utf-8")
        return []
    return [f"{page.name}: {part} is not what the stored results give" for part in parts]


if __name__ == "__main__":
    sys.exit(main())
