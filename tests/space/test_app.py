"""The page is built from tiny models, shows what was asked, and turns wrong inputs into messages."""

import json

import pytest
from conftest import CAPTIONS
from huggingface_hub import SpaceCard

from .conftest import SPACE


def test_the_card_is_that_of_a_gradio_space():
    data = SpaceCard.load(SPACE / "README.md").data
    assert (data.sdk, data.app_file, data.license) == ("gradio", "app.py", "apache-2.0")
    assert (SPACE / data.app_file).is_file() and len(data.short_description) <= 60
    assert data.title and data.models and data.sdk_version.count(".") == 2


def test_texts_in_results_are_escaped(engines):
    from cards import results
    from search import Gallery, Hit

    evil = Gallery(engines[0].gallery.images, ["<script>alert(1)</script>"], engines[0].gallery.pairs * 0)
    hits = [Hit("text", 0, 0.9), Hit("image", 0, 0.8)]
    for kinds in (("image", "text"), ("image",), ("text",)):
        page = results("<b>", [hit for hit in hits if hit.kind in kinds], evil, kinds, 0.5)
        assert "<script>" not in page and "&lt;script&gt;" in page and "<b>" not in page.replace('<b class="', "")
    assert "1 images</b> and" in results("CLIP", hits, evil, ("image", "text"), 0.5)


@pytest.fixture
def app():
    pytest.importorskip("gradio", reason="gradio is not part of the test extra: pip install gradio")
    import app

    return app


def test_the_page_builds(app, engines):
    blocks = app.build(engines, engines[0].gallery)
    page = json.dumps(blocks.get_config_file(), default=str)
    assert all(tab in page for tab in ("Search", "Zero-shot", "The space", "About"))
    assert "Not a medical device" in page and "2602.20046" in page and engines[-1].template in page
    assert app.build(engines[:1], engines[0].gallery)  # without a CLIP to compare with
    assert "MODEL_ID is not set" in json.dumps(app.not_ready("MODEL_ID is not set").get_config_file(), default=str)


def test_handlers(app, engines, monkeypatch):
    handlers = app.Handlers(engines, engines[0].gallery)
    for wanted in app.WANTED:
        pages = handlers.search(app.BY_TEXT, "Chest CT.", None, wanted)
        assert len(pages) == 2 and all(page.startswith('<section class="model">') for page in pages)
    assert CAPTIONS[0] in handlers.search(app.BY_IMAGE, "", str(engines[0].gallery.images[1]), "captions")[0]
    assert len(handlers.figures("Chest CT.")) == len(handlers.figures()) == len(handlers.numbers()) == 2
    warnings = []
    monkeypatch.setattr(app.gr, "Warning", warnings.append)
    skipped = app.friendly(handlers.classify)(None, "chest CT, brain MR", "{}")
    assert warnings == ["Upload an image first, or pick one of the gallery."] and skipped == app.gr.skip()
