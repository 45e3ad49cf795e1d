"""BLEU against its definition with lists, against numbers by hand, and against the published code's."""

import math

import pytest
from sacrebleu.metrics import BLEU

from .captions import PREDICTIONS, REFERENCES, drawn_captions


# pycocoevalcap 1.2, Bleu(4).compute_score on drawn_captions(), whose tokens lie between spaces already.
PUBLISHED = {
    "coco_bleu_1": 0.6800894854570916,
    "coco_bleu_2": 0.5772431658513678,
    "coco_bleu_3": 0.5279353308854253,
    "coco_bleu_4": 0.49295480834227146,
}


def statistics(predictions, references, order: int) -> tuple[int, int]:
    """(matches, n-grams) of the order, looking each n-gram up among the lists."""
    matches = total = 0
    for caption, texts in zip(predictions, references, strict=True):
        lists = []
        for words in (caption.split(), *(text.split() for text in texts)):
            lists.append([" ".join(words[i : i + order]) for i in range(len(words) - order + 1)])
        total += len(lists[0])
        for ngram in set(lists[0]):
            matches += min(lists[0].count(ngram), max(others.count(ngram) for others in lists[1:]))
    return matches, total


def brevity(predictions, references) -> float:
    length = closest = 0
    for caption, texts in zip(predictions, references, strict=True):
        words = len(caption.split())
        distances = {len(text.split()): abs(len(text.split()) - words) for text in texts}
        length += words
        closest += min(size for size, distance in distances.items() if distance == min(distances.values()))
    return 1.0 if length > closest else math.exp(1 - closest / length) if length else 0.0


def as_13a(text: str) -> str:
    """The one token of these captions that sacreBLEU's tokeniser splits: a hyphen after a digit."""
    return text.replace("2-", "2 - ")


def naive(predictions, references) -> dict[str, float]:
    """Both kinds, from Papineni's equations and each one's smoothing."""
    coco, sacre = [], []
    others = [as_13a(caption) for caption in predictions], [[as_13a(text) for text in row] for row in references]
    for order in range(1, 5):
        matches, total = statistics(predictions, references, order)
        coco.append((matches + 1e-15) / (total + 1e-9))
        matches, total = statistics(*others, order)
        unmatched = sum(statistics(*others, shorter)[0] == 0 for shorter in range(1, order + 1))
        sacre.append((matches or 0.5**unmatched) / total if total else 0.0)
    if not statistics(predictions, references, 1)[0]:
        coco = sacre = [0.0] * 4
    penalties = brevity(predictions, references), brevity(*others)
    return {
        f"{name}_{order}": penalty * math.prod(precisions[:order]) ** (1 / order)
        for name, precisions, penalty in zip(("coco_bleu", "sacrebleu"), (coco, sacre), penalties, strict=True)
        for order in range(1, 5)
    }


def compute(load, predictions, references):
    return load("caption_bleu").compute(predictions=predictions, references=references)


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
    assert {name: result[name] for name in PUBLISHED} == pytest.approx(PUBLISHED, abs=1e-6)


def test_by_hand(load):
    """Papineni's clipping, two references, and a brevity penalty.

    "the the the the the mass": "the" counts twice ("a the the" has it twice), "mass" once: 3 of 6 words. Pairs: "the
    the" is there once, of 4; "the mass" once: 2 of 5. Second caption: 2 of 2 words, 1 of 1 pair. Lengths: 6 + 2 = 8
    words; closest references 3 and 6 words, so 9: penalty exp(1 - 9 / 8).
    """
    predictions = ["the the the the the mass", "left lung"]
    references = [["a the the", "the mass"], ["nodule in the left lung base"]]
    result = compute(load, predictions, references)
    penalty = math.exp(1 - 9 / 8)
    expected = {1: penalty * 5 / 8, 2: penalty * math.sqrt(5 / 8 * 3 / 6)}
    for order, value in expected.items():
        assert result[f"coco_bleu_{order}"] == pytest.approx(value, abs=1e-6)
        assert result[f"sacrebleu_{order}"] == pytest.approx(value, abs=1e-6)


def test_the_shorter_of_two_equally_close_references_counts(load):
    result = compute(load, ["a b c"], [["a b c d", "a b"]])  # 2, not 4 words: no penalty
    assert result["coco_bleu_1"] == pytest.approx(1)
    assert result["sacrebleu_1"] == pytest.approx(1)


def test_case_and_punctuation_count_in_sacrebleu_only(load):
    result = compute(load, ["Axial CT of the chest."], [["axial ct of the chest"]])
    assert result["coco_bleu_4"] == pytest.approx(1)
    # 13a: Axial CT of the chest . -> 3 of 6 words
    assert result["sacrebleu_1"] == pytest.approx(3 / 6)


def test_tokens_of_sacrebleu_are_13a(load):
    result = compute(load, ["mass, 3.5 cm (liver)"], [["mass , 3.5 cm ( liver )"]])
    assert result["sacrebleu_4"] == pytest.approx(1)


def test_sacrebleu_of_chinese_is_that_of_its_own_tokens_for_it(load):
    predictions = ["胸部CT见3cm结节。", "腹 部 ct 平 扫 ， 未 见 异 常 。", "chest CT"]
    references = [
        ["胸部CT增强扫描见5cm结节。", "肺结节。"],
        ["腹部CT平扫，未见异常。", "腹部。"],
        ["axial chest CT", "CT"],
    ]
    result = load("caption_bleu").compute(predictions=predictions, references=references, lowercase=True)
    expected = BLEU(lowercase=True, tokenize="zh").corpus_score(predictions, list(zip(*references, strict=True)))
    assert result["sacrebleu_4"] == pytest.approx(expected.score / 100) and result["sacrebleu_4"] > 0.3
