"""
Conformance: transformers' own common tests, on this package's models, configuration and processor.

    python tests/conformance/run.py                      # pip fetches transformers' source distribution, once
    python tests/conformance/run.py --reference --output benchmarks/results/conformance.md

The tests are those of the installed version of transformers. With `--reference` its own CLIPModel, CLIPProcessor and
BlipForConditionalGeneration go through them beside ours. The exit status is 1 where a test of ours fails, or fewer of
ours pass than of the reference.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import pytest
import sdist_tests
from conformance_report import Recorder, Suite, counts_table, markdown, tests_by_reason


HERE = Path(__file__).resolve().parent
FILES = ("conformance_models.py", "conformance_captioners.py", "conformance_processors.py")

SUITES = [
    Suite("GapClosedClipModelTest", "`GapClosedClipModel`, its configuration", "CLIPModelTest"),
    Suite("GapClosedClipOtherOptionsTest", "the same, other options", "CLIPModelTest"),
    Suite("GapClosedClipOfClipTowersTest", "the same, of CLIP's own towers", "CLIPModelTest"),
    Suite("GapClosedClipOfDinov2AndModernBertTest", "the same, of DINOv2 and ModernBERT", "CLIPModelTest"),
    Suite("GapClosedClipOfFourModalitiesTest", "the same, with a record and spectrograms", "CLIPModelTest"),
    Suite("CLIPModelTest", "`CLIPModel` (reference)"),
    Suite(
        "GapClosedClipCaptionerTest",
        "`GapClosedClipForConditionalGeneration`, patches and embedding",
        "BlipCaptionerTest",
    ),
    Suite("GapClosedClipEmbeddingCaptionerTest", "the same, of the embedding alone", "BlipCaptionerTest"),
    Suite("BlipCaptionerTest", "`BlipForConditionalGeneration` (reference)"),
    Suite("GapClosedClipProcessorTest", "`GapClosedClipProcessor`", "CLIPProcessorTest"),
    Suite("CLIPProcessorTest", "`CLIPProcessor` (reference)"),
]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help="transformers-<version>.tar.gz, instead of fetching it with pip")
    parser.add_argument("--cache", type=Path, default=sdist_tests.default_cache(), help="where pip puts it")
    parser.add_argument("--reference", action="store_true", help="run transformers' own models and processor as well")
    parser.add_argument("-k", dest="keyword", default="", help="only the tests that match, as pytest's -k")
    parser.add_argument("--output", type=Path, help="write counts, skips and their reasons to this Markdown file")
    return parser.parse_args(argv)


def run_tests(keyword: str, reference: bool) -> Recorder:
    """
    Runs the test classes in this process.

    Raises:
        ValueError: no test matches `keyword`.
        RuntimeError: pytest could not do its work (an import that fails, say).
    """
    recorder = Recorder()
    wanted = " or ".join(suite.name for suite in SUITES if reference or suite.reference)
    options = ["-q", "--no-header", "--show-capture=no", "--tb=short", "-p", "no:cacheprovider", "--disable-warnings"]
    options += ["-o", "addopts="]  # the marks of transformers' tests are not registered here
    files = [str(HERE / name) for name in FILES]
    status = pytest.main([*files, *options, "-k", f"({wanted}) and ({keyword})" if keyword else wanted], [recorder])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise ValueError(f"No test matches -k {keyword!r}.")
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {status!r}: see its output above.")
    return recorder


def shortfalls(recorder: Recorder, compare: bool) -> list[str]:
    """What speaks against conformance, in words; nothing where all is well."""
    found = []
    for suite in (suite for suite in SUITES if suite.reference):
        for reason, tests in tests_by_reason(recorder.outcomes[suite.name], "failed").items():
            found.append(f"{suite.name}: {', '.join(tests)} failed: {reason}")
        passed, needed = (recorder.count(name, "passed") for name in (suite.name, suite.reference))
        if compare and passed < needed:
            found.append(f"{suite.name}: {passed} pass, of {suite.reference} {needed}")
    return found


def run(args: argparse.Namespace) -> int:
    """The exit status."""
    sdist = args.sdist or sdist_tests.fetch(args.cache)
    with tempfile.TemporaryDirectory() as folder:
        stubbed = sdist_tests.make_importable(sdist_tests.unpack(sdist, Path(folder)))
        recorder = run_tests(args.keyword, args.reference)
    print("\n" + counts_table(recorder, SUITES))
    skips = {}
    for suite in (suite for suite in SUITES if suite.reference):
        skips |= tests_by_reason(recorder.outcomes[suite.name], "skipped")
    print("\nSkipped of ours:\n" + "\n".join(f"- {reason}: {', '.join(tests)}" for reason, tests in skips.items()))
    print("\n" + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in recorder.seconds.items()))
    if args.output:
        args.output.write_text(markdown(recorder, SUITES, stubbed))
    found = shortfalls(recorder, compare=args.reference and not args.keyword)
    print("\n" + "\n".join(found))
    return 1 if found else 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parse_args(argv))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
