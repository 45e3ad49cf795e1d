"""How a script of the comparisons ends."""

import compare_objectives
import pytest
from comparison import run_script


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 0, ""),
        (ValueError("data.source is wrong"), 1, "compare_objectives.py: data.source is wrong\n"),
        (FileNotFoundError("no such file"), 1, "compare_objectives.py: no such file\n"),
        (ImportError("needs peft"), 1, "compare_objectives.py: needs peft\n"),
        (
            KeyboardInterrupt(),
            130,
            "compare_objectives.py: interrupted. The same command goes on where it was.\n",
        ),
    ],
)
def test_errors_are_a_line_and_an_exit_code(monkeypatch, capsys, error, code, message):
    def script():
        if error is not None:
            raise error

    monkeypatch.setattr("sys.argv", ["benchmarks/compare_objectives.py", "configs/demo.yaml"])
    assert run_script(script) == code
    assert capsys.readouterr().err.lstrip("\n") == message


def test_mistakes_of_the_program_keep_their_traceback():
    def script():
        raise TypeError("a mistake")

    with pytest.raises(TypeError, match="a mistake"):
        run_script(script)


def test_a_config_that_is_not_there_is_a_line(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["compare_objectives.py", "nowhere.yaml"])
    assert run_script(compare_objectives.compare) == 1
    assert capsys.readouterr().err.startswith("compare_objectives.py: There is no config file nowhere.yaml.")
