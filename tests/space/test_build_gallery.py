"""A gallery from phantoms and from one's own folder; it tells of no path and overwrites nothing else."""

import json

import pytest
from conftest import CAPTIONS
from PIL import Image

from .conftest import SPACE


build_gallery = pytest.importorskip("build_gallery", reason=f"{SPACE} is missing")


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["build_gallery.py", *words, "--output", str(tmp_path / "gallery")])
        return build_gallery.main()

    return run


def test_phantoms(run, tmp_path, capsys):
    from search import Gallery

    assert run("data.phantom_test_pairs=12", "--pairs", "8", "--size", "64") == 0
    gallery = Gallery.load(tmp_path / "gallery")
    assert len(gallery.pairs) == 8 and gallery.drawn
    assert all(min(Image.open(file).size) == 64 and Image.open(file).mode == "L" for file in gallery.images)
    assert "WARNING" not in capsys.readouterr().err
    assert run("data.phantom_test_pairs=12", "--pairs", "4") == 0  # replaces the older one
    assert len(Gallery.load(tmp_path / "gallery").pairs) == 4


def test_own_folder_warns(run, tmp_path, capsys):
    from search import Gallery

    source = tmp_path / "own"
    source.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (90 * number, 0, 0)).save(source / f"{number}.jpg")
    rows = [{"image": f"{number}.jpg", "caption": CAPTIONS[number]} for number in (0, 1, 2)]
    (source / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert run(f"data.source={source}", "--size", "20") == 0
    gallery = Gallery.load(tmp_path / "gallery")
    assert len(gallery.images) == 3 and not gallery.drawn
    assert Image.open(gallery.images[1]).size == (27, 20)
    assert "publishes these images" in capsys.readouterr().err
    assert all(str(tmp_path) not in file.read_text() for file in (tmp_path / "gallery").glob("*.json*"))


def test_an_older_gallery_stays_where_an_image_can_not_be_read(run, tmp_path, capsys):
    from search import Gallery

    assert run("data.phantom_test_pairs=4", "--pairs", "4") == 0
    source = tmp_path / "own"
    source.mkdir()
    Image.new("RGB", (40, 30)).save(source / "0.png")
    (source / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    rows = [{"image": f"{number}.png", "caption": CAPTIONS[number]} for number in (0, 1)]
    (source / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert run(f"data.source={source}") == 1 and "1.png" in capsys.readouterr().err
    assert Gallery.load(tmp_path / "gallery").drawn
    (tmp_path / "gallery" / "captions.jsonl").unlink()  # the last file, of a command that was killed before
    assert run("data.phantom_test_pairs=4", "--pairs", "3") == 0
    assert len(Gallery.load(tmp_path / "gallery").pairs) == 3


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_captions_with_characters_that_some_take_for_line_ends(run, tmp_path, ensure_ascii):
    """A JSON line ends at a line feed alone; captions from PDFs and word processors have the others."""
    from search import Gallery

    characters = ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\n", "\r\n")
    captions = [f"Finding {number}.{character}No effusion." for number, character in enumerate(characters)]
    source = tmp_path / "own"
    source.mkdir()
    for number in range(len(captions)):
        Image.new("RGB", (40, 30), (20 * number, 0, 0)).save(source / f"{number}.png")
    rows = [{"image": f"{number}.png", "caption": caption} for number, caption in enumerate(captions)]
    lines = "\n".join(json.dumps(row, ensure_ascii=ensure_ascii) for row in rows)
    (source / "test.jsonl").write_text(lines, encoding="utf-8")
    assert run(f"data.source={source}") == 0
    gallery = Gallery.load(tmp_path / "gallery")
    assert gallery.captions == captions and gallery.pairs.tolist() == [[row, row] for row in range(len(captions))]


def test_what_is_refused(run, tmp_path, capsys):
    assert run("--pairs", "1") == 1 and "at least 2" in capsys.readouterr().err
    assert run("data.sauce=x") == 1 and "data.source" not in capsys.readouterr().out
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "thesis.txt").write_text("mine")
    assert run("data.phantom_test_pairs=4") == 1 and "not a gallery" in capsys.readouterr().err
    assert (tmp_path / "gallery" / "thesis.txt").is_file()
