"""Tokens put together again: as people write, not with a space beside every mark."""

import pytest
import torch

from gap_closed_clip import GapClosedClipProcessor
from gap_closed_clip.model.processing_gap_closed_clip import join_words
from gap_closed_clip.training.encoder import train_tokenizer


TEXTS = ["right-sided (arrow)", "c/d"]


@pytest.fixture
def processor(tiny_processor):
    """Its tokenizer knows the texts' marks."""
    return GapClosedClipProcessor(tiny_processor.image_processor, train_tokenizer(TEXTS, 100))


@pytest.mark.parametrize(
    ("apart", "text"),
    [
        ("a 63 - year - old man", "a 63-year-old man"),
        ("t2 - weighted mr at c5 / c6, h & e stain", "t2-weighted mr at c5/c6, h&e stain"),
        ("a mass of 2. 5 x 1, 000 mm. 3 slices", "a mass of 2.5 x 1,000 mm. 3 slices"),
        ("a nodule ( white arrow ) ; see [ 3 ]", "a nodule (white arrow); see [3]"),
        ("findings : 30 % at 3 o ' clock", "findings: 30% at 3 o'clock"),
        ("chest radiograph. no fracture, no effusion.", "chest radiograph. no fracture, no effusion."),
        ("", ""),
    ],
)
def test_marks_are_written_as_people_do(apart, text):
    assert join_words(apart) == text
    assert join_words(text) == text


def test_decode_of_one_text_and_of_several(processor):
    tokens = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"]
    assert processor.decode(tokens[0], skip_special_tokens=True) == TEXTS[0]
    for decode in (processor.decode, processor.batch_decode, processor.post_process_image_text_to_text):
        assert decode(tokens, skip_special_tokens=True) == TEXTS
        assert decode(tokens.tolist(), skip_special_tokens=True) == TEXTS
    plain = processor.decode(tokens[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert plain == "right - sided ( arrow )"
    assert processor.decode(tokens[1]).startswith("[CLS] c/d [SEP]")


def test_a_reloaded_processor_decodes_alike(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    tokens = torch.tensor(processor.tokenizer(TEXTS[0])["input_ids"])
    reloaded = GapClosedClipProcessor.from_pretrained(tmp_path)
    assert reloaded.decode(tokens, skip_special_tokens=True) == TEXTS[0]
