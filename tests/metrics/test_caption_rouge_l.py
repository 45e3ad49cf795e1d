"""ROUGE-L against a search through all subsequences, numbers by hand, and the published code's."""

import itertools

import pytest

from .captions import PREDICTIONS, REFERENCES, drawn_captions


PUBLISHED = 0.5185115056997068  # pycocoevalcap 1.2, Rouge().compute_score on drawn_captions()


def longest(x: list[str], y: list[str]) -> int:
    """The longest common subsequence, by trying those of the shorter one from the longest on."""
    if len(x) > len(y):
        x, y = y, x
    for size in range(len(x), 0, -1):
        for words in itertools.combinations(x, size):
            rest = iter(y)
            if all(word in rest for word in words):
                return size
    return 0


def naive(predictions, references) -> float:
    scores = []
    for caption, texts in zip(predictions, references, strict=True):
        words = caption.split()
        pairs = [(longest(words, text.split()), len(text.split())) for text in texts]
        precision = max(common for common, _ in pairs) / max(1, len(words))
        recall = max(common / size for common, size in pairs)
        # The weighted harmonic mean: recall weighs 1.44 times as much as precision.
        scores.append(2.44 / (1 / precision + 1.44 / recall) if precision else 0.0)
    return sum(scores) / len(scores)


def compute(load, predictions, references) -> float:
    return load("caption_rouge_l").compute(predictions=predictions, references=references)["rouge_l"]


@pytest.mark.parametrize("row", range(len(PREDICTIONS)))
def test_each_caption_equals_the_definition(load, row):
    rows = [PREDICTIONS[row]], [REFERENCES[row]]
    assert compute(load, *rows) == pytest.approx(naive(*rows), abs=1e-6)


def test_the_set_equals_the_definition(load):
    assert compute(load, PREDICTIONS, REFERENCES) == pytest.approx(naive(PREDICTIONS, REFERENCES), abs=1e-6)


def test_drawn_captions_equal_the_definition_and_the_published_code(load):
    rows = drawn_captions()
    result = compute(load, *rows)
    assert result == pytest.approx(naive(*rows), abs=1e-6)
    assert result == pytest.approx(PUBLISHED, abs=1e-6)


@pytest.mark.parametrize(
    ("caption", "references", "expected"),
    [
        ("liver mass", ["liver mass"], 1),
        ("ct liver", ["liver ct"], 0.5),  # in the other order one word is left: P = R = 1/2
        # P = 2/2 with the first; R = 2/4 with it, and 1/1 with the second: both best, of different references.
        ("left lung", ["the left lower lung", "lung"], 1),
        # P = 2/4, R = 2/2: 2.44 * 0.5 / (1 + 1.44 * 0.5) = 1.22 / 1.72
        ("a mass in liver", ["mass liver"], 1.22 / 1.72),
        # P = 1/1, R = 1/4: 2.44 * 0.25 / (0.25 + 1.44) = 0.61 / 1.69
        ("liver", ["mass in the liver"], 0.61 / 1.69),
        ("Liver, mass!", ["“liver” mass."], 1),
    ],
)
def test_by_hand(load, caption, references, expected):
    assert compute(load, [caption], [references]) == pytest.approx(expected, abs=1e-6)
