"""METEOR with a WordNet of a few words: the wiring to NLTK, numbers by hand, and what is said where it is missing."""

import sys

import pytest

from .captions import PREDICTIONS, REFERENCES, drawn_captions


def compute(load, predictions, references) -> float:
    return load("caption_meteor").compute(predictions=predictions, references=references)["meteor"]


@pytest.mark.usefixtures("tiny_wordnet")
@pytest.mark.parametrize(
    ("caption", "references", "expected"),
    [
        # Three words in one chunk: P = R = 1, so 1 - 0.5 (1/3)^3.
        ("axial chest ct", ["Axial chest CT."], 53 / 54),
        # A single word is one chunk of one match.
        ("liver", ["liver"], 1 / 2),
        # tumor = tumour by WordNet; "in" has no partner: P = R = 3/4; chunks "tumor", "the liver": 1 - 0.5 (2/3)^3.
        ("tumor in the liver", ["tumour of the liver"], 3 / 4 * 23 / 27),
        # By the stem: nodules = nodule; P = R = 1, one chunk of two.
        ("nodules seen", ["nodule seen"], 15 / 16),
        # Two chunks of one word each.
        ("liver the", ["the liver"], 1 / 2),
        # P = 1, R = 1/3: (1/3) / (0.9 + 0.1/3) = 5/14; one chunk of one.
        ("liver", ["the liver mass"], 5 / 28),
        # The best of the references: the second, 1 - 0.5 / 8.
        ("liver mass", ["brain", "liver mass", "liver"], 15 / 16),
        # mass = lump, but not with two words in one lemma ("tumour_mass").
        ("mass", ["lump"], 1 / 2),
        ("", ["liver"], 0),
        ("brain", ["liver"], 0),
    ],
)
def test_by_hand(load, caption, references, expected):
    assert compute(load, [caption], [references]) == pytest.approx(expected, abs=1e-6)


def naive(caption: list[str], reference: list[str]) -> float:
    """Lavie and Agarwal's equations where no word comes twice, so that there is one alignment."""
    matches = [reference.index(word) if word in reference else None for word in caption]
    count = sum(match is not None for match in matches)
    if not count:
        return 0.0
    before = [None, *matches]
    chunks = sum(
        match is not None and (previous is None or match != previous + 1)
        for previous, match in zip(before, matches, strict=False)
    )
    precision, recall = count / len(caption), count / len(reference)
    mean = 10 * precision * recall / (recall + 9 * precision)
    return mean * (1 - 0.5 * (chunks / count) ** 3)


@pytest.mark.usefixtures("tiny_wordnet")
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition(load, seed):
    predictions, references = drawn_captions(rows=20, seed=seed)
    captions = [list(dict.fromkeys(caption.split())) for caption in predictions]
    texts = [[list(dict.fromkeys(text.split())) for text in row] for row in references]
    best = [max(naive(caption, text) for text in row) for caption, row in zip(captions, texts, strict=True)]
    joined = [" ".join(caption) for caption in captions], [[" ".join(text) for text in row] for row in texts]
    assert compute(load, *joined) == pytest.approx(sum(best) / len(best), abs=1e-6)


def test_says_what_is_missing_without_wordnet(load, tiny_wordnet):
    metric = load("caption_meteor")
    assert metric.missing() is None
    tiny_wordnet.forget()
    assert "python -m nltk.downloader wordnet" in metric.missing()
    with pytest.raises(LookupError, match="python -m nltk.downloader wordnet"):
        metric.compute(predictions=["a"], references=[["a"]])


def test_says_what_is_missing_in_a_damaged_wordnet(load, tiny_wordnet):
    (tiny_wordnet.folder / "index.noun").unlink()
    assert "python -m nltk.downloader wordnet" in load("caption_meteor").missing()


def test_says_what_is_missing_without_nltk(load, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "nltk"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nltk", None)
    metric = load("caption_meteor")
    assert "pip install" in metric.missing() and "nltk" in metric.missing()
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        metric.compute(predictions=["a"], references=[["a"]])


def test_with_the_whole_wordnet(load):
    """WordNet 3.0: the set's value as NLTK 3.10.4 gave it here once, and two synonyms of a whole WordNet by hand."""
    reason = load("caption_meteor").missing()
    if reason:
        pytest.skip(reason)
    assert compute(load, PREDICTIONS, REFERENCES) == pytest.approx(0.5719658564406039, abs=1e-6)
    # car = auto and doctor = physician: four matches in one chunk.
    assert compute(load, ["car near the doctor"], [["auto near the physician"]]) == pytest.approx(1 - 0.5 / 64)
