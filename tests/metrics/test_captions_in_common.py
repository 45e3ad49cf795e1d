"""What holds for every caption metric: references, empty captions, other alphabets, errors that name the row."""

import math
import warnings

import pytest

from .captions import PREDICTIONS, REFERENCES


NAMES = ("caption_bleu", "caption_rouge_l", "caption_cider", "caption_meteor")
pytestmark = [pytest.mark.parametrize("name", NAMES), pytest.mark.usefixtures("tiny_wordnet")]


def compute(load, name, predictions, references):
    """The values; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # files that `evaluate` leaves to the garbage collector
        return load(name).compute(predictions=predictions, references=references)


@pytest.mark.parametrize("caption", ["", " ", "...", "ultrasound", "kidney stones seen"])
def test_without_a_common_word_all_is_zero(load, name, caption):
    result = compute(load, name, [caption, caption], [["axial ct of the chest"], ["a", "brain mr"]])
    assert set(result.values()) == {0.0}


@pytest.mark.parametrize("row", range(len(PREDICTIONS)))
def test_one_image_is_defined(load, name, row):
    result = compute(load, name, [PREDICTIONS[row]], [REFERENCES[row]])
    assert all(math.isfinite(value) and 0 <= value <= 1 + 1e-9 for value in result.values())


def test_references_count_in_any_order(load, name):
    turned = [texts[::-1] for texts in REFERENCES]
    result = compute(load, name, PREDICTIONS, REFERENCES)
    assert compute(load, name, PREDICTIONS, turned) == pytest.approx(result, abs=1e-12)
    first = compute(load, name, PREDICTIONS, [texts[:1] for texts in REFERENCES])
    assert all(abs(first[key] - value) > 1e-3 for key, value in result.items())  # the others count at all


def test_a_reference_without_a_word_is_left_out(load, name):
    with_empty = [[*texts, "", " - "] for texts in REFERENCES]
    assert compute(load, name, PREDICTIONS, with_empty) == compute(load, name, PREDICTIONS, REFERENCES)


def test_other_alphabets(load, name):
    """The second caption has no letter of its references, the third words without spaces."""
    predictions = ["Röntgenbild des Schädels", "рентген", "胸部 X线"]
    references = [["Röntgenbild des Schädels"], ["胸部"], ["胸部 CT", "头部"]]
    result = compute(load, name, predictions, references)
    ascii_twins = ["rontgenbild des schadels", "rentgen", "xiong bu x xian"]
    same = compute(load, name, ascii_twins, [[ascii_twins[0]], ["xiong bu"], ["xiong bu ct", "tou bu"]])
    keys = [key for key in result if not key.startswith("sacrebleu")]  # whose 13a tokens are made for English
    assert all(result[key] == pytest.approx(same[key]) and result[key] > 0 for key in keys if "bleu" not in key)
    assert result[keys[0]] > 0.3


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([["a"], []], "references: row 1: it has no reference; leave rows without a caption out"),
        ([["", "..."], ["a"]], "references: row 0: its references hold no word"),
    ],
)
def test_a_row_without_a_reference_is_named(load, name, references, message):
    with pytest.raises(ValueError, match=message):
        compute(load, name, ["a", "b"], references)


def test_no_row(load, name):
    with pytest.raises(ValueError, match="there are no captions"):
        compute(load, name, [], [])


def test_a_reference_instead_of_a_list_of_them(load, name):
    with pytest.raises(ValueError):
        compute(load, name, ["a"], ["a b"])


def test_batches_add_up(load, name):
    metric = load(name)
    for start in (0, 4):
        rows = slice(start, start + 4 if start == 0 else None)
        metric.add_batch(predictions=PREDICTIONS[rows], references=REFERENCES[rows])
    assert metric.compute() == compute(load, name, PREDICTIONS, REFERENCES)
