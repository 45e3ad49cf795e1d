"""How a script of the comparisons ends, and which pairs stay together."""

from types import SimpleNamespace

import compare_finetuning
import compare_modalities
import compare_release
import evidence
import pytest
from comparison import cases, digest_of_pairs, run_script
from datasets import Dataset
from evidence_runs import Runs

from gap_closed_clip.data import DataArguments
from gap_closed_clip.evaluation.pair_embeddings import columns_of


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 0, ""),
        (ValueError("data.source is wrong"), 1, "evidence.py: data.source is wrong\n"),
        (FileNotFoundError("no such file"), 1, "evidence.py: no such file\n"),
        (ImportError("needs peft"), 1, "evidence.py: needs peft\n"),
        (
            KeyboardInterrupt(),
            130,
            "evidence.py: interrupted. The same command goes on where it was.\n",
        ),
    ],
)
def test_errors_are_a_line_and_an_exit_code(monkeypatch, capsys, error, code, message):
    def script():
        if error is not None:
            raise error

    monkeypatch.setattr("sys.argv", ["benchmarks/evidence.py", "configs/demo.yaml"])
    assert run_script(script) == code
    assert capsys.readouterr().err.lstrip("\n") == message


def test_mistakes_of_the_program_keep_their_traceback():
    def script():
        raise TypeError("a mistake")

    with pytest.raises(TypeError, match="a mistake"):
        run_script(script)


def test_a_config_that_is_not_there_is_a_line(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["evidence.py", "nowhere.yaml"])
    assert run_script(evidence.main) == 1
    assert capsys.readouterr().err.startswith("evidence.py: There is no plan nowhere.yaml")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (compare_finetuning.compare, ["outputs/demo"]),
        (compare_modalities.compare, ["configs/demo.yaml", "configs/records.yaml"]),
        (compare_release.main, []),
    ],
)
def test_a_seed_that_is_named_twice_is_not_two_trainings(script, words, monkeypatch, capsys, tmp_path):
    """It counted twice, with a standard deviation that is too small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["compare.py", *words, "--seeds", "3", "3"])
    assert run_script(script) == 1
    assert "compare.py: the command line: seeds is [3, 3]; name each once" in capsys.readouterr().err


def test_modalities_are_compared_of_a_configuration(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare_modalities.py", "data.source=pairs.csv"])
    assert run_script(compare_modalities.compare) == 1
    assert "No configuration is named: give its file" in capsys.readouterr().err


def rows_of(ids, **columns):
    return Dataset.from_dict({"image_id": ids, "caption": ["CT scan."] * len(ids), **columns})


def test_cases_and_blocks_of_numbers_stay_together():
    ids = ["m/images/MPX1_synpic7.jpg", "m/images/MPX1_synpic950.jpg", "v/synpic101.jpg", "v/synpic199.jpg"]
    ids = [*ids, "v/synpic200.jpg", "r/a.jpg"]
    groups = cases(rows_of(ids, case_id=["MPX1", "MPX1", None, None, None, None]), DataArguments())
    assert groups[0] == groups[1] and groups[2] == groups[3]
    assert len(set(groups)) == 4
    without = cases(rows_of(["a", "b", "a"]), DataArguments())
    assert without[0] == without[2] != without[1]


def test_cases_are_those_of_the_fold_column_of_each_source():
    ids = ["synpic1", "synpic250", "synpic2", "synpic3", "synpic4", "", ""]
    patients = ["P1", " P1", "P2", " ", None, None, None]
    groups = cases(rows_of(ids, patient=patients), DataArguments(fold_column="patient"))
    assert groups == ["case P1", "case P1", "case P2", "image synpic3", "image synpic4", *["caption CT scan."] * 2]

    own = [{"name": "a", "source": "a.csv", "fold_column": "patient"}, {"name": "b", "source": "b.csv"}]
    several = {"source": ["a", "a", "b", "b"], "patient": [1, 1, 1, 1], "case_id": [None, None, "C", None]}
    found = cases(rows_of(["i", "j", "k", "l"], **several), DataArguments(source=own))
    assert found == ["case 1", "case 1", "case C", "image l"]


def test_a_digest_of_pairs_is_of_their_images_files_too(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    images = [{"path": str(tmp_path / name), "bytes": None} for name in ("a.png", "b.png", "a.png")]
    images += [{"path": None, "bytes": b"inside"}, None]  # with a record, a pair may lack its image
    pairs = Dataset.from_list(
        [{"image": image, "image_id": f"{row}", "caption": "one"} for row, image in enumerate(images)]
    )
    before = digest_of_pairs(pairs)
    assert digest_of_pairs(pairs) == before
    (tmp_path / "b.png").write_bytes(b"another")
    assert digest_of_pairs(pairs) != before
    (tmp_path / "b.png").write_bytes(b"b.png")
    assert digest_of_pairs(pairs) == before != digest_of_pairs(pairs, pairs)


@pytest.mark.parametrize(
    ("pairs", "groups", "expected"),
    [
        (12, 12, ["That is few: below 20 cases"]),
        (8, 3, ["R@10 is 100% for every method, as no more than 8 images or captions are held out", "That is few"]),
        (30, 30, []),
        (30, 20, ["2 of the held-out captions are captions of training pairs, too"]),
    ],
)
def test_what_makes_held_out_pairs_tell_little_is_said(pairs, groups, expected):
    captions = [f"caption {row}" for row in range(pairs)]
    known = captions[:2] if groups == 20 else ["another"]
    rows = {"image_id": [f"{row}.png" for row in range(len(known))], "caption": known}
    runs = SimpleNamespace(
        columns=columns_of([{"image_id": f"{row}.png", "caption": text} for row, text in enumerate(captions)]),
        groups=[str(row % groups) for row in range(pairs)],
        train_pairs=Dataset.from_dict(rows),
    )
    found = Runs._warnings(runs)
    assert len(found) == len(expected)
    assert all(words in sentence for words, sentence in zip(expected, found, strict=True))
