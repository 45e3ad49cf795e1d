"""Generated tables and numbers in README and docs: they are what the stored results give."""

import json

import blocks
import pytest
from blocks import Files, main, written
from evidence_results import names_in

from .evidence_example import cells, example, with_captions


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "evidence_small.json").write_text(json.dumps(example()))
    return tmp_path


def block(words: str) -> str:
    return f"<!-- evidence: {words} -->\n<!-- /evidence -->"


def value(words: str) -> str:
    return f"It is <!-- evidence-value: {words} --><!-- / -->."


def test_the_repository_shows_what_its_stored_results_give(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_a_table(folder):
    words = 'small budget=own methods="CLIP (LT), ours, CLIP, centered" rows="recall@10, margin" head="small, really"'
    text = written(f"Before.\n\n{block(words)}\n\nAfter.", Files(folder))
    assert text.startswith(f"Before.\n\n<!-- evidence: {words} -->\n\n|") and text.endswith("-->\n\nAfter.")
    _, _, table, legend, _ = text.removesuffix("\n\nAfter.").split("\n\n")
    assert cells(table) == [
        ["small, really", "CLIP (LT)", "ours", "CLIP, centered"],
        ["R@10, mean of both directions ↑", "51.0% ± 1.4%", "58.0% ± 2.8%", "50.0% ± 0.0% ≈"],
        ["margin (true - random) ↑", "0.320 ± 0.028", "0.480 ± 0.000", "0.300 ± 0.000"],
    ]
    assert legend == "*≈: not separable from CLIP (LT) (Holm's p of 0.05 or more).*"
    assert written(text, Files(folder)) == text


def test_a_table_of_both_budgets_with_other_words(folder):
    words = 'small budget="shared, own" methods="ours, CLIP, centered" marks=no names="mean of the sources=sources"'
    text = written(block(f'{words} rows="recall@10 of mean of the sources, median_rank"'), Files(folder))
    assert cells(text.split("\n\n")[1]) == [
        ["sources", "ours, shared budget", "ours, own budget", "CLIP, centered, own budget"],
        ["R@10, mean of both directions, sources ↑", "50.0%", "58.0% ± 2.8%", "50.0% ± 0.0%"],
        ["median rank, mean of both directions ↓", "8.0", "6.0 ± 0.0", "7.0 ± 0.0"],
    ]
    assert "≈" not in text


def test_a_part_of_the_report(folder):
    text = written(block("small part=robustness"), Files(folder))
    assert cells(text.split("\n\n")[1])[1] == ["CLIP (LT)", "50.0%", "40.0%", "-10.0 points"]
    text = written(block('small part=methods budget=own columns="recall@10, margin"'), Files(folder))
    assert cells(text.split("\n\n")[1])[1] == ["CLIP (LT)", "51.0% ± 1.4%", "0.320 ± 0.028"]


def test_captions(folder):
    (folder / "evidence_written.json").write_text(json.dumps(with_captions()))
    text = written(block('written part=captions columns="cider_d, rouge_l"'), Files(folder))
    assert cells(text.split("\n\n")[1]) == [
        ["encoder", "captions", "CIDEr-D ↑", "ROUGE-L ↑"],
        ["CLIP (LT)", "nearest caption", "0.310 ± 0.014", "21.0% ± 1.4%"],
        ["CLIP (LT)", "text-only", "0.520 ± 0.028", "24.0% ± 0.0%"],
        ["ours", "nearest caption", "0.310 ± 0.000 ≈", "22.0% ± 2.8%"],
        ["ours", "text-only", "0.620 ± 0.028", "30.0% ± 0.0%"],
    ]
    words = 'written captions ours cider_d scope="text-only"'
    for more, expected in (("", "0.620"), (' difference="CLIP (LT)"', "0.100"), (" p", "0.004")):
        assert f"-->{expected}<!-- / -->" in written(value(words + more), Files(folder))
    for words, message in [
        ("written captions ours cider_d", "no scope ''; there are nearest caption; text-only."),
        ('written captions SigLIP cider_d scope="text-only"', "no method at each method's own budget, 'SigLIP'"),
        ('small captions ours cider_d scope="text-only"', "no budget 'captions'"),
    ]:
        with pytest.raises(ValueError, match=message):
            written(value(words), Files(folder))
    with pytest.raises(ValueError, match="no metric of captions 'cider'; there are rouge_l; cider_d."):
        written(block("written part=captions columns=cider"), Files(folder))
    with pytest.raises(ValueError, match="the results have no captions"):
        written(block("small part=captions"), Files(folder))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("small own ours recall@10", "58.0%"),
        ("small own ours recall@10 sd", "58.0% ± 2.8%"),
        ("small own ours recall@10 digits=0", "58%"),
        ('small own ours margin ratio="CLIP (LT)"', "1.50"),
        ('small own ours recall@10 difference="CLIP (LT)"', "7.0"),
        ('small own "CLIP, centered" margin difference="CLIP (LT)"', "-0.020"),
        ('small own ours recall@10 difference="CLIP (LT)" at=shared', "16.0"),
        ("small own ours recall@10 p", "below 0.001"),
        ("small own ours margin p", "0.030"),
        ('small own "CLIP (LT)" median_rank', "7.5"),
        ("small minutes", "2"),
        ("small date", "2026-11-26"),
    ],
)
def test_numbers(folder, words, expected):
    assert written(value(words), Files(folder)) == f"It is <!-- evidence-value: {words} -->{expected}<!-- / -->."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (block("small budget=mine rows=margin"), "no budget 'mine'; there are shared; own."),
        (block("small scope=mars rows=margin"), "no scope 'mars'; there are mean of the sources."),
        (
            block('small methods="ours, theirs" rows=margin'),
            "no method 'theirs'; there are CLIP (LT); CLIP, centered; ",
        ),
        (block("small rows=marge"), "no metric in mean of the sources, 'marge'; there are chance_recall@10; "),
        (block('small rows="margin of mars"'), "no scope 'mars'"),
        (block("small row=margin"), "no option row; there are budget, scope, "),
        (block("small"), "rows="),
        (block("small part=whole"), "no part 'whole'; there are methods; comparisons; tuning; "),
        (block("small part=comparisons budget=shared"), "the results have no comparisons."),
        (block("small part=comparisons"), "comparisons are of one budget; say budget=own or budget=shared."),
        (block("large rows=margin"), "evidence_large.json; `python benchmarks/evidence.py` writes one."),
        (value("small own theirs margin"), "no method at each method's own budget, 'theirs'"),
        (value("small ours margin"), "NAME BUDGET METHOD METRIC are expected"),
        (value("small mood"), "no field 'mood'"),
        (value("small shared ours margin p"), "ours was not compared with CLIP (LT) in margin."),
        ("- <!-- evidence-value: small minutes -->2<!-- / -->", "a number can't begin a line"),
        ("A <!-- evidence-value: small minutes -->2", "one of the two comments is missing"),
        ("<!-- evidence: small rows=margin -->\n" + block("small rows=margin"), "one of the two comments is missing"),
        (block("small rows=margin") + "<!-- /evidence -->", "one of the two comments is missing"),
    ],
)
def test_what_is_not_there_is_a_line(folder, capsys, text, message):
    page = folder / "page.md"
    page.write_text(text)
    assert main([], [page], folder) == 1
    error = capsys.readouterr().err
    assert error.startswith("blocks.py: page.md: ") and error.count("\n") == 1 and message in error
    assert page.read_text() == text


def test_a_check_names_what_differs_and_the_command_mends_it(folder, capsys):
    page = folder / "page.md"
    fenced = "```\n" + block("nothing at=all") + "\n```"
    page.write_text(f"{value('small minutes')}\n{block('small part=weights')}\n{fenced}\n")
    assert main([], [page], folder) == 0 and main(["--check"], [page], folder) == 0
    assert fenced in page.read_text()
    page.write_text(page.read_text().replace("-->2<!--", "-->3<!--").replace("0.45", "0.46"))
    assert main(["--check"], [page], folder) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("blocks.py: page.md: evidence-value: small minutes is not what")
    assert second.startswith("blocks.py: page.md: evidence: small part=weights is not what")
    assert main([], [page], folder) == 0 and "0.45" in page.read_text()
    (folder / "evidence_small.md").write_text("old\n")
    assert main(["--check"], [page], folder) == 1
    assert "evidence_small.md: evidence_small is not what the stored results give" in capsys.readouterr().err


def test_names_may_hold_commas():
    names = ["CLIP", "CLIP, centered", "ours"]
    assert names_in("CLIP, CLIP, centered, ours", names, "method") == ["CLIP", "CLIP, centered", "ours"]
    with pytest.raises(ValueError, match="no method 'CLIPPY'"):
        names_in("CLIP, CLIPPY", names, "method")
    assert blocks.PAGES[0].name == "README.md"
