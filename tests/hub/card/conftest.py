"""A trained and evaluated folder to render cards into."""

import functools
from pathlib import Path

import jinja2
import pytest

from gap_closed_clip.evaluation import write_metrics

from .rendering import METRICS


@pytest.fixture(autouse=True)
def strict_template(monkeypatch):
    """Jinja renders a misspelt name as nothing; here it raises."""
    monkeypatch.setattr(jinja2, "Template", functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined))


@pytest.fixture
def folder(tiny_model, tiny_processor, tmp_path, monkeypatch) -> Path:
    """outputs/demo, trained on phantoms and evaluated; the working directory is where training ran."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "demo"
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    write_metrics(folder / "metrics.json", {"demo": METRICS}, {"phantom_size": 64}, "test")
    for name in ("projection.png", "cosines.png"):
        (folder / name).touch()
    return folder
