"""Tables and numbers of README and docs that come from the stored results of evidence.py.

What `blocks.py` says of their comments in short:

    <!-- evidence: NAME budget=own methods="CLIP (LT), ours" rows="recall@10, margin, v_measure of medpix2" -->
    <!-- evidence: NAME part=robustness -->
    <!-- evidence-value: NAME own ours recall@10 -->57.9%<!-- / -->

NAME is that of benchmarks/results/evidence_NAME.json. Of a table, `budget` is shared, own or both ("shared, own"), or
given where models were there; all there are if it is not said; `scope` says whose metrics, the main scope's if it is
not said, and a row may say `METRIC of SCOPE`;
`head` is the first column's; `names="medpix2=MedPix 2.0; ours=GCC"` gives scopes and methods other words; `marks=no`
leaves out the marks of what is not separable from the baseline. `part` gives a table of the report instead:
methods as rows (`columns="METRIC, METRIC"`) and comparisons, both of one budget; captions (`columns=`, too); tuning,
association, weights, robustness.

A number is the mean over the seeds or, by further words, the mean ± standard deviation (`sd`), the ratio or difference
(percentages in points) to another method at the same budget (`ratio="CLIP (LT)"`, `difference="CLIP (LT)"`) or at
another (`at=shared`), or Holm's p of the comparison with the baseline (`p`); `digits=2` are those after the point.
Of captions it is NAME captions METHOD METRIC scope="text-only", the scope one of the kinds of captions.
NAME and a field alone, as in `NAME minutes`, give that field of the file.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from block_words import pairs, parse
from evidence_caption_tables import captions_table
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


OPTIONS = ("budget", "scope", "methods", "rows", "head", "names", "marks", "part", "columns")
VALUE_OPTIONS = ("scope", "sd", "ratio", "difference", "at", "p", "digits")
FLAGS = ("sd", "p")
FIELDS = ("date", "minutes", "machine", "versions", "command", "title", "baseline")
PARTS_OF_A_BUDGET = ("methods", "comparisons")
PARTS: dict[str, Callable[[Evidence], str]] = {
    "tuning": tuning_table,
    "association": association_table,
    "weights": weight_table,
    "robustness": robustness_table,
}


class EvidenceFiles:
    """Results by name, each read once."""

    def __init__(self, folder: Path = RESULTS):
        self.folder = folder
        self._found: dict[str, Evidence] = {}

    def __getitem__(self, name: str) -> Evidence:
        if name not in self._found:
            self._found[name] = Evidence(read(path_of(name, self.folder)))
        return self._found[name]


def block(words: str, files: EvidenceFiles) -> str:
    """The lines between the comments of a table."""
    plain, options = parse(words, OPTIONS)
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
    names = pairs(options.get("names", ""))
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


def value(words: str, files: EvidenceFiles) -> str:
    """The text between the comments of a number."""
    plain, options = parse(words, VALUE_OPTIONS, FLAGS)
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
