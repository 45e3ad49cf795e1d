"""The conformance check, where its source distribution is at hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import run
import transformers


def test_conforms():
    sdist = os.environ.get("TRANSFORMERS_SDIST")
    if not sdist:
        pytest.skip(
            "TRANSFORMERS_SDIST does not name a transformers-<version>.tar.gz; tests/conformance/run.py fetches it"
        )
    # In a process of its own: the common tests change settings of the libraries.
    command = [sys.executable, str(Path(__file__).with_name("run.py")), "--sdist", sdist, "--reference"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wrong_command_is_one_line(monkeypatch, tmp_path, capsys):
    missing, damaged = tmp_path / "nope.tar.gz", tmp_path / f"transformers-{transformers.__version__}.tar.gz"
    damaged.write_bytes(b"half")
    for path, message in ((missing, f"There is no file {missing}."), (damaged, f"{damaged} is damaged")):
        assert run.main(["--sdist", str(path)]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"run.py: {message}") and err.count("\n") == 1
    monkeypatch.setattr(run.sdist_tests, "unpack", lambda *args: tmp_path)
    monkeypatch.setattr(run.sdist_tests, "make_importable", lambda *args: [])
    monkeypatch.setattr(run.pytest, "main", lambda *args: pytest.ExitCode.NO_TESTS_COLLECTED)
    assert run.main(["--sdist", str(missing), "-k", "nosuchtest"]) == 1
    assert capsys.readouterr().err == "run.py: No test matches -k 'nosuchtest'.\n"
