"""BLEU-1 to 4 of captions, several references an image: COCO's evaluation's and sacreBLEU's, named apart."""

import itertools
import math
from collections import Counter

import evaluate
from sacrebleu.metrics import BLEU

from ._caption_tokens import (
    ARGUMENTS,
    COCO_CITATION,
    ORDERS,
    RAISES,
    TOKENISATION,
    caption_info,
    ngrams,
    tokenize,
    tokenize_references,
    with_chinese_characters_apart,
)


_DESCRIPTION = f"""\
BLEU of generated captions over the whole set (sums of counts, not a mean over captions), 0..1, several references an
image and not the same number for each. Two kinds that differ in tokens and smoothing, not to be compared:

- `coco_bleu_1` to `coco_bleu_4`: as in COCO's evaluation (pycocoevalcap): its tokens (below), the closest reference
  length, 1e-15 added to the matches and 1e-9 to the n-grams of each order. Exactly 0 where not a single word matches
  (the published code gives less than 1e-7).
- `sacrebleu_1` to `sacrebleu_4`: the library sacrebleu's corpus BLEU, divided by 100; `sacrebleu_4` is what is called
  "sacreBLEU". Signature `nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp`: case and punctuation count.
  Chinese characters are tokens of their own, as with `tok:zh`.

BLEU-n is the geometric mean of the precisions of 1- to n-grams, times the brevity penalty.

{TOKENISATION}"""

_CITATION = """\
@inproceedings{papineni2002bleu,
  title     = {{BLEU}: a Method for Automatic Evaluation of Machine Translation},
  author    = {Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
  booktitle = {Annual Meeting of the Association for Computational Linguistics (ACL)},
  year      = {2002}
}
@inproceedings{post2018call,
  title     = {A Call for Clarity in Reporting {BLEU} Scores},
  author    = {Post, Matt},
  booktitle = {Conference on Machine Translation (WMT)},
  year      = {2018}
}
"""

_INPUTS_DESCRIPTION = f"""
Args:
{ARGUMENTS}
    lowercase (`bool`, defaults to False): sacreBLEU without regard to case (case:lc), as is fair to a decoder that
        writes lower case alone; COCO's never regards it.

Returns:
    dict of floats, 0..1: coco_bleu_1, coco_bleu_2, coco_bleu_3, coco_bleu_4, sacrebleu_1, sacrebleu_2, sacrebleu_3,
    sacrebleu_4.

Raises:
    {RAISES}
"""
_INPUTS_DESCRIPTION += """
Examples:
    Four of the five words are in one of the references, and three of the four pairs of words.

    >>> import evaluate
    >>> metric = evaluate.load("caption_bleu.py")
    >>> result = metric.compute(
    ...     predictions=["axial ct of the chest"],
    ...     references=[["Axial CT of the abdomen.", "CT of the abdomen"]],
    ... )
    >>> {name: round(value, 4) for name, value in result.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'coco_bleu_1': 0.8, 'coco_bleu_2': 0.7746, 'coco_bleu_3': 0.7368, 'coco_bleu_4': 0.6687,
     'sacrebleu_1': 0.4, 'sacrebleu_2': 0.3162, 'sacrebleu_3': 0.2554, 'sacrebleu_4': 0.2136}
"""

_SMALL, _TINY = 1e-9, 1e-15  # pycocoevalcap's: beside the number of n-grams, beside that of the matches


def _coco_bleu(captions: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """BLEU-1 to 4 of tokens as pycocoevalcap's BleuScorer gives them with option="closest"."""
    length = reference_length = 0
    matches, totals = [0] * ORDERS, [0] * ORDERS
    for caption, texts in zip(captions, references, strict=True):
        length += len(caption)
        # The closest length, the shorter of two that are equally close.
        reference_length += min((abs(len(text) - len(caption)), len(text)) for text in texts)[1]
        counts = [ngrams(text) for text in texts]
        for order, found in enumerate(ngrams(caption)):
            allowed: Counter[tuple[str, ...]] = Counter()
            for of_text in counts:
                allowed |= of_text[order]  # the most often that a reference has it
            matches[order] += (found & allowed).total()
            totals[order] += found.total()
    if not matches[0]:
        return [0.0] * ORDERS
    brevity = min(0.0, 1 - (reference_length + _SMALL) / (length + _TINY))
    logs = [math.log((match + _TINY) / (total + _SMALL)) for match, total in zip(matches, totals, strict=True)]
    return [math.exp(brevity + sum(logs[:order]) / order) for order in range(1, ORDERS + 1)]


def _sacrebleu(captions: list[str], references: list[list[str]], lowercase: bool) -> list[float]:
    """sacreBLEU of 1- to n-grams, n = 1..4, from one count; 0..1."""
    streams = list(itertools.zip_longest(*references))  # sacrebleu: None is a reference that this row does not have
    bleu = BLEU(force=True, lowercase=lowercase)  # force: no warning of captions that end with " ."
    counts = bleu.corpus_score(captions, streams)
    return [
        BLEU.compute_bleu(
            counts.counts[:order],
            counts.totals[:order],
            counts.sys_len,
            counts.ref_len,
            smooth_method="exp",
            max_ngram_order=order,
        ).score
        / 100
        for order in range(1, ORDERS + 1)
    ]


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class CaptionBleu(evaluate.Metric):
    def _info(self):
        urls = ["https://aclanthology.org/P02-1040", "https://arxiv.org/abs/1504.00325"]
        return caption_info(_DESCRIPTION, _CITATION + COCO_CITATION, _INPUTS_DESCRIPTION, urls)

    def _compute(self, predictions, references, lowercase=False):
        coco = _coco_bleu([tokenize(text) for text in predictions], tokenize_references(references))
        with_words = [[text for text in texts if tokenize(text)] for texts in references]
        apart = with_chinese_characters_apart
        own = [[apart(text) for text in texts] for texts in with_words]
        sacre = _sacrebleu([apart(text) for text in predictions], own, lowercase)
        result = {f"coco_bleu_{order}": value for order, value in enumerate(coco, 1)}
        return result | {f"sacrebleu_{order}": value for order, value in enumerate(sacre, 1)}
