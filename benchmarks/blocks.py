"""Tables and numbers in README and docs that come from stored results, so that they are never older than these.

    python benchmarks/blocks.py             # write them anew
    python benchmarks/blocks.py --check     # exit code 1, and a line for each that differs

A table stands between two comments, a number in a sentence, too. They come from the results of evidence.py:

    <!-- evidence: NAME budget=own methods="CLIP (LT), ours" rows="recall@10, margin, v_measure of medpix2" -->
    <!-- /evidence -->
    <!-- evidence: NAME part=robustness -->
    <!-- /evidence -->
    R@10 is <!-- evidence-value: NAME own ours recall@10 -->57.9%<!-- / -->.

or are quoted from the report of another script, benchmarks/results/FILE.md:

    <!-- results: FILE.md rows="ours, image tower, ours, heads alone" columns="mean of the sources, R@10" -->
    <!-- /results -->
    <!-- results: FILE.md under="HEADING" table=2 digits="peak MB=0" names="peak MB=memory, MB; full=everything" -->
    <!-- /results -->
    <!-- results: FILE.md under="HEADING=ours; OTHER HEADING=CLIP" head="model" rows="image, text" -->
    <!-- /results -->
    R@10 is <!-- results-value: FILE.md "ours, image tower" R@10 -->57.9%<!-- / -->.
    It was measured on <!-- results-value: FILE.md date -->2026-11-26<!-- / -->.

evidence_blocks.py and results_blocks.py say which options there are. A number can't begin a line, which Markdown would
take for HTML. The reports of evidence.py, evidence_NAME.md, are written and checked, too.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import evidence_blocks
import results_blocks
from evidence_blocks import EvidenceFiles
from evidence_report import report
from measure import RESULTS
from results_blocks import Reports


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```.*?^\1```$", flags=re.DOTALL | re.MULTILINE)
BLOCK = re.compile(
    r"(?P<start><!-- (?P<kind>evidence|results): (?P<words>[^>]+?) -->)(?P<text>.*?)(?P<end><!-- /(?P=kind) -->)",
    re.DOTALL,
)
VALUE = re.compile(
    r"(?P<start><!-- (?P<kind>(evidence|results)-value): (?P<words>[^>]+?) -->)(?P<text>[^<]*)(?P<end><!-- / -->)"
)
START, END = re.compile(r"<!-- (evidence|results)(-value)?: "), re.compile(r"<!-- /(evidence|results)? -->")
# Of a line, a list's item or a quote.
BEGINNING = re.compile(r"[ \t]*([-+*>][ \t]+|\d+[.)][ \t]+)*")


class Files:
    """What the blocks come from: results of evidence.py, and reports of the other scripts.

    Args:
        folder: of both.
    """

    def __init__(self, folder: Path = RESULTS):
        self.evidence, self.reports = EvidenceFiles(folder), Reports(folder)

    def inner(self, kind: str, words: str) -> str:
        """What stands between the comments of a block or number, by its kind and words."""
        writers: dict[str, Callable[[], str]] = {
            "evidence": lambda: evidence_blocks.block(words, self.evidence),
            "evidence-value": lambda: evidence_blocks.value(words, self.evidence),
            "results": lambda: results_blocks.block(words, self.reports),
            "results-value": lambda: results_blocks.value(words, self.reports),
        }
        return writers[kind]()


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
    found = [*BLOCK.finditer(text), *VALUE.finditer(text)]
    place = 0
    for match in sorted(found, key=re.Match.start):
        if any(start <= match.start() < end for start, end in fences):
            continue
        before = text[place : match.start()]
        _check_ends(before)
        _check_ends(match["text"])
        yield "", before, before
        words = f"{match['kind']}: {match['words']}"
        if match["kind"].endswith("-value") and BEGINNING.fullmatch(text[: match.start()].rpartition("\n")[2]):
            raise ValueError(
                f"{words}: a number can't begin a line, which Markdown would take for HTML; put a word before."
            )
        try:
            inner = files.inner(match["kind"], match["words"])
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
            "<!-- evidence-value: ... -->...<!-- / -->, or both with results; one of the two comments is missing."
        )


def main(arguments: Sequence[str] | None = None, pages: Sequence[Path] = PAGES, folder: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something differs")
    check = parser.parse_args(arguments).check
    files, faults, place = Files(folder), [], ""
    try:
        for path in sorted(folder.glob("evidence_*.json")):
            place = path.name
            page = report(files.evidence[path.stem.removeprefix("evidence_")].results)
            faults += _settle(path.with_suffix(".md"), page, [path.stem], check)
        for page_path in pages:
            place = page_path.name
            text = page_path.read_text(encoding="utf-8")
            faults += _settle(page_path, written(text, files), differing(text, files), check)
    except (ValueError, OSError) as error:
        print(f"blocks.py: {place}: {error}", file=sys.stderr)
        return 1
    for fault in faults:
        print(f"blocks.py: {fault}; `python benchmarks/blocks.py` writes it anew.", file=sys.stderr)
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
