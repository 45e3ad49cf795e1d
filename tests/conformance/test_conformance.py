"""The conformance check, where its source distribution is at hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


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
