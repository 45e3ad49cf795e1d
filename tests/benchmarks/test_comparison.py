"""How a script of the comparisons ends, and which pairs stay together."""

import evidence
import pytest
from comparison import cases, digest_of_pairs, run_script
from datasets import Dataset


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


def test_cases_and_blocks_of_numbers_stay_together():
    ids = ["m/images/MPX1_synpic7.jpg", "m/images/MPX1_synpic950.jpg", "v/synpic101.jpg", "v/synpic199.jpg"]
    columns = {"image_id": [*ids, "v/synpic200.jpg", "r/a.jpg"], "case_id": ["MPX1", "MPX1", None, None, None, None]}
    groups = cases(Dataset.from_dict(columns))
    assert groups[0] == groups[1] and groups[2] == groups[3]
    assert len(set(groups)) == 4
    without = cases(Dataset.from_dict({"image_id": ["a", "b", "a"]}))
    assert without[0] == without[2] != without[1]


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
