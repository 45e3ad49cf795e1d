"""Outcomes of a pytest run, counted by test class, and the Markdown report of them."""

import platform
import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import date

import pytest
import timm
import torch
import transformers


RANK = ("passed", "skipped", "failed")

# What a skip's own words leave open.
REMARKS = {
    "does not support SDPA": "the test is for models of one tower; `test_sdpa_can_dispatch_composite_models` passes",
    "no `base_model_class`": "for causal language models; rotary embeddings are the timm tower's own",
    "Model does not have position embeddings": "`resize_position_embeddings` is not there, as in CLIP; a timm tower "
    "takes other sizes with `dynamic_img_size`",
    "Only PrefixChange conversions": "timm's, for weights of the Hub without it",
    "does not support grouped_mm": "no experts to group",
    "test is slow": "and requires an accelerator",
}


@dataclass
class Suite:
    """A test class: what it runs on, and whose counterpart it is."""

    name: str
    title: str
    reference: str | None = None


@dataclass
class Outcome:
    """
    How a test ended, and why where it did not pass. `name` leaves out which case of its parameters it is. A test is
    counted by the worst of its parts (`subTest`), among which a skip is worse than a pass.
    """

    name: str
    result: str = "passed"
    reason: str = ""


@dataclass
class Recorder:
    """A pytest plugin that keeps the outcome of every test and the docstrings of those adapted here."""

    outcomes: dict[str, dict[str, Outcome]] = field(default_factory=lambda: defaultdict(dict))
    names: dict[str, str] = field(default_factory=dict)
    adapted: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        for item in items:
            # A case of parameters is named by its test and more; what a decorator put in a test's place, anyhow.
            plain = item.function.__name__
            self.names[item.name] = plain if item.name.startswith(plain) else item.name
            text = " ".join((item.function.__doc__ or "").split())
            if text.startswith("Adapted: "):
                self.adapted[item.name] = text.removeprefix("Adapted: ")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        _, suite, test = report.nodeid.split("::")
        outcome = self.outcomes[suite].setdefault(test, Outcome(self.names[test]))
        self.seconds[suite] += report.duration
        if RANK.index(report.outcome) > RANK.index(outcome.result):
            outcome.result, outcome.reason = report.outcome, _reason(report)

    def count(self, suite: str, result: str) -> int:
        """How many tests of the class ended so."""
        return sum(outcome.result == result for outcome in self.outcomes[suite].values())


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        text = report.longrepr[2].removeprefix("Skipped: ")
    else:
        text = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
    return " ".join(text.split())


def counts_table(recorder: Recorder, suites: list[Suite]) -> str:
    """One line a test class; the counts of those that ran."""
    lines = ["| tests of | tests | passed | skipped | failed |", "| --- | ---: | ---: | ---: | ---: |"]
    for suite in suites:
        if suite.name in recorder.outcomes:
            counts = [recorder.count(suite.name, result) for result in RANK]
            lines.append(f"| {suite.title} | {sum(counts)} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def tests_by_reason(outcomes: dict[str, Outcome], result: str) -> dict[str, list[str]]:
    """Names of the tests that ended so, by reason; the cases of one test become `name (number of cases)`."""
    cases = defaultdict(lambda: defaultdict(int))
    for outcome in outcomes.values():
        if outcome.result == result:
            cases[outcome.reason][outcome.name] += 1
    return {
        reason: [f"`{test}`" + (f" ({n})" if n > 1 else "") for test, n in sorted(tests.items())]
        for reason, tests in cases.items()
    }


def _reasons_table(recorder: Recorder, suite: Suite, result: str) -> str:
    outcomes = recorder.outcomes[suite.name]
    reference = recorder.outcomes.get(suite.reference, {})
    lines = ["| reason | tests | of them also in the reference |", "| --- | --- | ---: |"]
    for reason, tests in sorted(tests_by_reason(outcomes, result).items()):
        names = [name for name, outcome in outcomes.items() if (outcome.result, outcome.reason) == (result, reason)]
        also = sum(name in reference and reference[name].result == result for name in names)
        remark = next((f"; {remark}" for words, remark in REMARKS.items() if words in reason), "")
        shared = f"{also} of {len(names)}" if reference else ""
        lines.append(f"| {reason.replace('|', '/')}{remark} | {', '.join(tests)} | {shared} |")
    return "\n".join(lines)


def markdown(recorder: Recorder, suites: list[Suite], stubbed: list[str]) -> str:
    """The report: versions, counts, every skip and failure with its reason, and what was adapted or stubbed."""
    parts = [
        "# transformers' common tests",
        f"- `{shlex.join(['python', 'tests/conformance/run.py', *sys.argv[1:]])}`\n"
        f"- {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}\n"
        f"- transformers {transformers.__version__}, torch {torch.__version__}, timm {timm.__version__}, Python "
        f"{platform.python_version()}\n"
        f"- {date.today()}",
        counts_table(recorder, suites),
    ]
    shown = {}
    for suite in suites:
        for result in ("failed", "skipped"):
            if not recorder.count(suite.name, result) or (result == "skipped" and not suite.reference):
                continue
            table = _reasons_table(recorder, suite, result)
            same = shown.setdefault(table, suite.title)
            parts += [f"## {suite.title}: {result}", table if same == suite.title else f"As {same}."]
    if recorder.adapted:
        lines = [f"- `{test}`: {text}" for test, text in sorted(recorder.adapted.items())]
        reason = "The output of a dual encoder has no hidden states and attentions of its own: they are its towers'."
        parts += ["## Adapted", reason, "\n".join(lines)]
    names = ", ".join(f"`{name}`" for name in stubbed)
    not_run = "Because of them the tests of exporting do not run."
    if any(name.endswith("generation.test_utils") for name in stubbed):
        not_run = (
            "Because of them the tests of exporting and of generation (`GenerationTesterMixin`) do not run. This "
            "package has tests of generation of its own, `tests/model/test_caption_generation_gap_closed_clip.py`."
        )
    parts += [
        "## Not run",
        f"The check puts stubs in the place of what the source distribution or this machine lacks: {names}. {not_run} "
        "`PipelineTesterMixin` needs the Hub's tiny models, and a list of them that the distribution lacks.",
    ]
    return "\n\n".join(parts) + "\n"
