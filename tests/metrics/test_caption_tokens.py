"""The tokens that the caption metrics share, against those of the Penn Treebank tokeniser of COCO's evaluation."""

import re

import pytest

from gap_closed_clip.metrics._caption_tokens import tokenize, tokenize_references


# What pycocoevalcap 1.2's PTBTokenizer (Stanford CoreNLP 3.4.1) made of these, "(" and the like for its "-lrb-".
AS_PENN_TREEBANK = {
    "T2-weighted axial image (FLAIR), 3.5 cm mass.": "t2-weighted axial image ( flair ) 3.5 cm mass",
    "Don't can't patient's patients' it's": "do n't ca n't patient 's patients it 's",
    "1,000 mm, 50% of $5;": "1,000 mm 50 % of $ 5",
    "and/or left/right C5/C6 C5-C6 L4-5 3-4 cm 10/12/2020": "and/or left/right c5/c6 c5-c6 l4-5 3-4 cm 10/12/2020",
    "“quoted” text – dash — long... end… x": "quoted text dash long end x",
    "A 45-year-old man, H&E, 12:30, <3 >4 =x ~2 ± 3 °C µm": "a 45-year-old man h&e 12:30 < 3 > 4 = x ~ 2 ± 3 ° c µm",
    "non-contrast 1.5T 3T #1 [a] {b} a_b *star* 5cm": "non-contrast 1.5 t 3t # 1 [ a ] { b } a_b * star * 5cm",
    "Röntgenaufnahme des Schädels अंग naïve": "röntgenaufnahme des schädels अंग naïve",
    "well- done -start a--b 'single' `x` \"dbl\"": "well done start a b single x dbl",
    "0.5-cm 1.5-T 3-D 18F-FDG Tc-99m T2*": "0.5-cm 1.5-t 3-d 18f-fdg tc-99m t2 *",
    "a . b , c": "a b c",
    "10^3 a+b a=b T1+C": "10 ^ 3 a + b a = b t1 + c",
}
# Where the description says that the Java differs: (text, ours, the Java's).
ELSEWHERE = [
    ("e.g. U.S. vs. Dr. Smith", "e.g u.s vs dr smith", "e.g. u.s. vs. dr. smith"),
    ("+5 HU", "+ 5 hu", "+5 hu"),
    ("cannot", "cannot", "can not"),
    ("3 o'clock", "3 o clock", "3 o'clock"),
    ("胸部X线", "胸 部 x 线", "胸部x线"),
]


@pytest.mark.parametrize("text", AS_PENN_TREEBANK)
def test_tokens_of_the_penn_treebank(text):
    assert tokenize(text) == AS_PENN_TREEBANK[text].split()


@pytest.mark.parametrize(("text", "ours", "java"), ELSEWHERE)
def test_documented_differences(text, ours, java):
    assert tokenize(text) == ours.split() != java.split()


@pytest.mark.parametrize("text", ["", "  \n", "?! ... -- ' \" “ ” – — …"])
def test_punctuation_alone_is_nothing(text):
    assert tokenize(text) == []


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("胸部CT增强扫描，见3.5cm结节。", "胸 部 ct 增 强 扫 描 见 3.5 cm 结 节"),
        ("T2加权：C5/C6椎间盘突出（L4-5）", "t2 加 权 c5/c6 椎 间 盘 突 出 l4-5"),
        ("右上肺に結節あり、1,000例", "右 上 肺 に 結 節 あり 1,000 例"),
        ("흉부 CT 胸部", "흉부 ct 胸 部"),
    ],
)
def test_chinese_characters_are_words_with_and_without_spaces(text, tokens):
    """A BERT writes spaces around each of them."""
    assert tokenize(text) == tokens.split() == tokenize(re.sub(r"([\u3400-\u9fff，。：、])", r" \1 ", text))


def test_composed_and_decomposed_letters_are_one_word():
    assert tokenize("Scha\u0308del") == tokenize("Sch\u00e4del") == ["schädel"]
    assert tokenize("patient’s") == ["patient", "'s"]


def test_references_without_a_word_are_left_out():
    assert tokenize_references([["A b.", "", "..."], ["c"]]) == [[["a", "b"]], [["c"]]]
