"""CIDEr-D against dense tf-idf vectors, numbers by hand, and the published code's."""

import math

import numpy as np
import pytest

from .captions import PREDICTIONS, REFERENCES, drawn_captions


PUBLISHED = 1.628959326335667  # pycocoevalcap 1.2, Cider().compute_score on drawn_captions()


def counts(text: str, vocabulary: dict[str, int], order: int) -> np.ndarray:
    words = text.split()
    vector = np.zeros(len(vocabulary))
    for start in range(len(words) - order + 1):
        vector[vocabulary[" ".join(words[start : start + order])]] += 1
    return vector


def naive(predictions, references) -> float:
    """The paper's equations, one order after the other, over the whole vocabulary of the order."""
    images, scores = len(predictions), np.zeros(len(predictions))
    texts = [[caption, *others] for caption, others in zip(predictions, references, strict=True)]
    for order in range(1, 5):
        ngrams = set()
        for words in (text.split() for row in texts for text in row):
            ngrams |= {" ".join(words[start : start + order]) for start in range(len(words) - order + 1)}
        vocabulary = {ngram: column for column, ngram in enumerate(sorted(ngrams))}
        tables = [np.array([counts(text, vocabulary, order) for text in row]) for row in texts]  # (1 + R_i, V)
        frequency = sum((table[1:] > 0).any(axis=0).astype(float) for table in tables)
        idf = math.log(images) - np.log(np.maximum(frequency, 1))
        for image, table in enumerate(tables):
            weights = table * idf
            lengths = [len(text.split()) for text in texts[image]]
            for row in range(1, len(weights)):
                norm = np.linalg.norm(weights[0]) * np.linalg.norm(weights[row])
                cosine = np.minimum(weights[0], weights[row]) @ weights[row] / norm if norm else 0.0
                penalty = math.exp(-((lengths[0] - lengths[row]) ** 2) / 72)
                scores[image] += 10 / 4 * penalty * cosine / (len(weights) - 1)
    return float(scores.mean())


def compute(load, predictions, references) -> float:
    return load("caption_cider").compute(predictions=predictions, references=references)["cider_d"]


def test_the_set_equals_the_definition(load):
    assert compute(load, PREDICTIONS, REFERENCES) == pytest.approx(naive(PREDICTIONS, REFERENCES), abs=1e-6)


@pytest.mark.parametrize("row", range(len(PREDICTIONS)))
def test_each_caption_equals_the_definition(load, row):
    """Each beside the references of all, the other captions empty."""
    captions = [caption if number == row else "" for number, caption in enumerate(PREDICTIONS)]
    result = compute(load, captions, REFERENCES)
    assert result == pytest.approx(naive(captions, REFERENCES), abs=1e-6)
    assert (result > 0.01) == (row not in (4, 6))  # nothing alike; empty


def test_drawn_captions_equal_the_definition_and_the_published_code(load):
    rows = drawn_captions()
    result = compute(load, *rows)
    assert result == pytest.approx(naive(*rows), abs=1e-6)
    assert result == pytest.approx(PUBLISHED, abs=1e-6)


FOUR = "axial ct chest nodule"


@pytest.mark.parametrize(
    ("captions", "references", "expected"),
    [
        # Equal, four words, nothing shared between the images: a cosine of 1 in each order. The other scores 0.
        ([FOUR, ""], [[FOUR], ["brain mr"]], 10 / 2),
        # Three words make two pairs and one triple; all idf equal (log 2). Order 1: 3 / (sqrt(3) sqrt(4)), order
        # 2: 2 / (sqrt(2) sqrt(3)), order 3: 1 / (1 sqrt(2)), order 4: 0; one word less: exp(-1 / 72).
        (
            ["axial ct chest", ""],
            [[FOUR], ["brain mr"]],
            10 / 2 / 4 * math.exp(-1 / 72) * (math.sqrt(3) / 2 + math.sqrt(2 / 3) + math.sqrt(1 / 2)),
        ),
        # Two references: the mean, not the best.
        ([FOUR, ""], [[FOUR, "liver"], ["brain mr"]], 10 / 2 / 2),
        # "ct" is in the references of both images: idf 0. "ct" alone scores nothing, "axial ct" like "axial" in order
        # 1 (cosine 1) and by its pair in order 2.
        (["ct", "axial ct"], [["brain ct"], ["axial ct"]], 10 / 2 * 2 / 4),
        # Repeating a word: (3 w) against w. Cut to w: w w / (3 w w) = 1/3 in order 1; two words more.
        (["mass mass mass", ""], [["mass"], ["brain mr"]], 10 / 2 / 4 * math.exp(-4 / 72) / 3),
        # One image: log 1 = 0.
        ([FOUR], [[FOUR]], 0),
    ],
)
def test_by_hand(load, captions, references, expected):
    assert compute(load, captions, references) == pytest.approx(expected, abs=1e-6)
