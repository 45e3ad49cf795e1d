"""Tables and numbers that are quoted from the reports of benchmarks: they are what the reports say."""

import pytest
from blocks import Files, main, written

from .evidence_example import cells


REPORT = """# Speed

- `python benchmarks/speed.py --large`
- A CPU, 1 of 2 cores
- torch 2.14.1, timm 1.0.31
- 2026-11-25

- A remark, with torch 1.0 in it.

## First, in words

| model        |       |    N | R@10, mean ↑ |   peak MB |
| ------------ | ----- | ---: | -----------: | --------: |
| ours, heads  | plain |   32 | 57.9% ± 1.2% |     97.12 |
| ours, heads  | cache |   32 | 58.4% ± 0.9% | 1.721e+04 |
| CLIP, heads  | plain | 1024 | **56.5%**    |      1329 |

## Second

| metric | image - text |
| ------ | -----------: |
| margin |        0.478 |
| rank   |            - |

## Third

| metric | image - text |
| ------ | -----------: |
| margin |        0.298 |
| rank   |          7.0 |
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "speed.md").write_text(REPORT)
    return tmp_path


def block(words: str) -> str:
    return f"<!-- results: {words} -->\n<!-- /results -->"


def value(words: str) -> str:
    return f"It is <!-- results-value: {words} --><!-- / -->."


def lines_of(folder, words: str) -> list[str]:
    text = written(block(words), Files(folder))
    assert written(text, Files(folder)) == text
    return text.split("\n\n")[1].splitlines()


def test_a_whole_table(folder):
    assert lines_of(folder, "speed.md table=2") == [
        "| metric | image - text |",
        "| ------ | -----------: |",
        "| margin |        0.478 |",
        "| rank   |            - |",
    ]
    assert lines_of(folder, "speed.md under=Second table=1") == lines_of(folder, "speed.md table=2")


def test_rows_and_columns_with_other_words(folder):
    words = 'speed.md table=1 columns="model, 2, R@10, mean ↑, peak MB" digits="peak MB=0" '
    words += 'rows="CLIP, heads, ours, heads | cache" names="2=way; ours, heads=GCC; R@10, mean ↑=R@10; cache=kept"'
    assert lines_of(folder, words) == [
        "| model       | way   |         R@10 | peak MB |",
        "| ----------- | ----- | -----------: | ------: |",
        "| CLIP, heads | plain |    **56.5%** |   1,329 |",
        "| GCC         | kept  | 58.4% ± 0.9% |  17,210 |",
    ]
    both = cells("\n".join(lines_of(folder, 'speed.md table=1 rows="ours, heads" columns="model, 2"')))
    assert both == [["model", ""], ["ours, heads", "plain"], ["ours, heads", "cache"]]


def test_tables_below_one_another(folder):
    assert lines_of(folder, 'speed.md under="Third=CLIP; Second=ours" head=space rows=margin') == [
        "| space | metric | image - text |",
        "| ----- | ------ | -----------: |",
        "| CLIP  | margin |        0.298 |",
        "| ours  | margin |        0.478 |",
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ('speed.md "ours, heads | cache" "R@10, mean ↑" table=1', "58.4%"),
        ('speed.md "ours, heads | cache" "R@10, mean ↑" table=1 sd', "58.4% ± 0.9%"),
        ('speed.md "ours, heads | plain" "R@10, mean ↑" table=1 sd digits=0', "58% ± 1%"),
        ('speed.md "CLIP, heads" "R@10, mean ↑" table=1', "56.5%"),
        ('speed.md "ours, heads | plain" "R@10, mean ↑" table=1 difference="CLIP, heads"', "1.4"),
        ('speed.md "ours, heads | cache" "peak MB" table=1 ratio="CLIP, heads"', "12.95"),
        ('speed.md "ours, heads | cache" "peak MB" table=1 ratio="CLIP, heads" digits=0', "13"),
        ('speed.md "ours, heads | cache" "peak MB" table=1 digits=0', "17,210"),
        ('speed.md margin "image - text" under=Third', "0.298"),
        ("speed.md command", "`python benchmarks/speed.py --large`"),
        ("speed.md machine", "A CPU, 1 of 2 cores"),
        ("speed.md versions", "torch 2.14.1, timm 1.0.31"),
        ("speed.md date", "2026-11-25"),
    ],
)
def test_numbers(folder, words, expected):
    assert written(value(words), Files(folder)) == f"It is <!-- results-value: {words} -->{expected}<!-- / -->."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (block("sped.md"), "there is no report 'sped.md': did you mean 'speed.md'?"),
        (block("speed.md other.md"), "one report is expected, not ['speed.md', 'other.md']."),
        (block("speed.md"), "there are 3 tables; say which one: table=1 to table=3."),
        (block("speed.md table=4"), "there is no table 4; there are 3."),
        (block("speed.md table=first"), "there is no table first; there are 3."),
        (block('speed.md under="Thrid"'), "there is no table under the heading 'Thrid': did you mean 'Third'?"),
        (block("speed.md table=2 rows=margins"), "there is no row 'margins': did you mean 'margin'?"),
        (block("speed.md table=2 columns=text"), "there is no column 'text': did you mean 'image - text'?"),
        (block("speed.md table=2 names=margn=m"), "there is no column or label 'margn': did you mean 'margin'?"),
        (block("speed.md table=2 digits=rank=1"), "there is no column 'rank'; known are image - text, metric."),
        (block("speed.md table=2 row=margin"), "there is no option row; there are under, table, rows, "),
        (value("speed.md margin text table=2"), "there is no column 'text': did you mean 'image - text'?"),
        (value('speed.md "ours, heads" "peak MB" table=1'), "2 rows begin with 'ours, heads'; say more of their"),
        (value('speed.md rank "image - text" ratio=margin under=Second'), "one of them has no number"),
        (value("speed.md margin"), "there is no field 'margin'"),
        (value("speed.md"), "FILE ROW COLUMN or FILE FIELD are expected"),
        ("- <!-- results-value: speed.md date -->x<!-- / -->", "a number can't begin a line"),
        ("<!-- results: speed.md table=2 -->\n", "one of the two comments is missing"),
        ("<!-- results: speed.md table=2 -->\n<!-- /evidence -->", "one of the two comments is missing"),
    ],
)
def test_what_is_not_there_is_a_line(folder, capsys, text, message):
    page = folder / "page"
    page.write_text(text)
    assert main([], [page], folder) == 1
    error = capsys.readouterr().err
    assert error.startswith("blocks.py: page: ") and error.count("\n") == 1 and message in error
    assert page.read_text() == text


def test_numbers_may_follow_one_another(folder):
    number = "<!-- results-value: speed.md date -->2026-11-25<!-- / -->"
    text = f"From {number} {number}, and\n* on {number}\n"
    assert written(text, Files(folder)) == text


def test_a_report_that_lacks_its_head_is_named(folder, capsys):
    (folder / "short.md").write_text("# Short\n\n466 a second.\n")
    page = folder / "page"
    page.write_text(value("short.md date"))
    assert main([], [page], folder) == 1
    assert "short.md does not say its date." in capsys.readouterr().err


def test_a_changed_report_is_found_and_the_page_mended(folder, capsys):
    page = folder / "page"
    number = value('speed.md margin "image - text" under=Third')
    page.write_text(number + "\n" + block("speed.md table=3") + "\n")
    assert main([], [page], folder) == 0 and main(["--check"], [page], folder) == 0
    (folder / "speed.md").write_text(REPORT.replace("0.298", "0.299"))
    assert main(["--check"], [page], folder) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith('blocks.py: page: results-value: speed.md margin "image - text" under=Third is not what')
    assert second.startswith("blocks.py: page: results: speed.md table=3 is not what")
    assert main([], [page], folder) == 0 and page.read_text().count("0.299") == 2
