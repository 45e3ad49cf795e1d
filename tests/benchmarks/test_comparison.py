"""How a script of the comparisons ends."""

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
