"""Versions that are named outside pyproject.toml are those of pyproject.toml."""

import re

import pytest

from gap_closed_clip.hub import requirements

from .conftest import ROOT


(LISTED,) = re.findall(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), flags=re.DOTALL | re.M)
DEPENDENCIES = re.findall(r'^    "(.+)",$', LISTED, flags=re.M)

(SEARCH,) = re.findall(r"^search = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), flags=re.M)


@pytest.mark.parametrize("requirement", sorted({*requirements.ENDPOINT, *requirements.ADAPTER}))
def test_of_a_published_model(requirement):
    assert requirement in DEPENDENCIES


def test_of_search():
    assert f'"{requirements.SEARCH}"' in SEARCH


def test_of_the_space():
    lines = (ROOT / "space" / "requirements.txt").read_text().splitlines()
    named = {line for line in lines if not line.startswith("#")}
    assert len(named) > 5 and named <= set(DEPENDENCIES)
