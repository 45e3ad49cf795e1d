"""ROUGE-L of captions as in COCO's evaluation, several references an image."""

import evaluate
import numpy as np

from ._caption_tokens import (
    ARGUMENTS,
    COCO_CITATION,
    RAISES,
    TOKENISATION,
    caption_info,
    tokenize,
    tokenize_references,
)


_DESCRIPTION = f"""\
ROUGE-L of generated captions as in COCO's evaluation (pycocoevalcap), 0..1: the mean over the images of

    F = (1 + b^2) P R / (R + b^2 P),    b = 1.2,

where a longest common subsequence (LCS) with a reference gives a precision LCS / words of the caption and a recall
LCS / words of the reference; P is the best precision and R the best recall over the references, not necessarily of the
same one. 0 where no word is in common. Other ROUGE-L figures (rouge_score's: b = 1, the best reference, stems) are
another measure. Own code, because no light library computes this one.

{TOKENISATION}"""

_CITATION = """\
@inproceedings{lin2004rouge,
  title     = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author    = {Lin, Chin-Yew},
  booktitle = {Text Summarization Branches Out},
  year      = {2004}
}
"""

_INPUTS_DESCRIPTION = f"""
Args:
{ARGUMENTS}

Returns:
    dict of one float: rouge_l, 0..1.

Raises:
    {RAISES}
"""
_INPUTS_DESCRIPTION += """
Examples:
    LCS "axial ct the chest", 4 of the 5 words of the caption, and "ct chest", both words of the second reference:
    P = 0.8, R = 1.

    >>> import evaluate
    >>> metric = evaluate.load("caption_rouge_l.py")
    >>> references = [["Axial CT through the upper chest.", "CT chest"]]
    >>> result = metric.compute(predictions=["axial ct of the chest"], references=references)
    >>> {name: round(value, 4) for name, value in result.items()}
    {'rouge_l': 0.9071}
"""

_BETA_SQUARED = 1.2**2


def _lcs(x: list[str], y: list[str]) -> int:
    """Length of the longest common subsequence, in O(len(x) * len(y)) time and O(len(y)) memory."""
    previous = [0] * (len(y) + 1)
    for word in x:
        current = [0]
        for column, other in enumerate(y):
            current.append(previous[column] + 1 if word == other else max(previous[column + 1], current[column]))
        previous = current
    return previous[-1]


def _rouge_l(caption: list[str], references: list[list[str]]) -> float:
    """F of the best precision and the best recall; 0 without a common word."""
    common = [_lcs(caption, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(caption)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True))
    return (1 + _BETA_SQUARED) * precision * recall / (recall + _BETA_SQUARED * precision)


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class CaptionRougeL(evaluate.Metric):
    def _info(self):
        urls = ["https://aclanthology.org/W04-1013", "https://arxiv.org/abs/1504.00325"]
        return caption_info(_DESCRIPTION, _CITATION + COCO_CITATION, _INPUTS_DESCRIPTION, urls)

    def _compute(self, predictions, references):
        rows = zip(map(tokenize, predictions), tokenize_references(references), strict=True)
        return {"rouge_l": float(np.mean([_rouge_l(caption, texts) for caption, texts in rows]))}
