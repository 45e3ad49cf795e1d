"""METEOR of captions as NLTK computes it, several references an image; needs NLTK and its WordNet on this machine."""

import evaluate
import numpy as np

from ._caption_tokens import ARGUMENTS, RAISES, TOKENISATION, caption_info, tokenize, tokenize_references


_DESCRIPTION = f"""\
METEOR of generated captions through `nltk.translate.meteor_score`, 0..1: the mean over the images of the best score
over the references. Words are matched as they are, then by Porter stem, then by WordNet synonym (of the stem, so NLTK
finds none for a word that the stemmer changes, as in large, larg); with precision P, recall R and `chunks` runs of
matches in the same order, alpha = 0.9, beta = 3, gamma = 0.5 (NLTK's defaults):

    P R / (alpha P + (1 - alpha) R) * (1 - gamma (chunks / matches)^beta)

**It is not the METEOR 1.5 of COCO's evaluation** (a Java program with other parameters, function words and
paraphrases): do not set it beside published captioning figures. Even a caption of n words that equals its reference
gets 1 - 0.5 / n^3, so a one-word caption at most 0.5.

Nothing is ever downloaded here. Ask `metric.missing()` beforehand: None where NLTK and WordNet are installed,
otherwise a sentence that says what to install and how.

{TOKENISATION}"""

_CITATION = """\
@inproceedings{lavie2007meteor,
  title     = {{METEOR}: An Automatic Metric for {MT} Evaluation with High Levels of Correlation with Human Judgments},
  author    = {Lavie, Alon and Agarwal, Abhaya},
  booktitle = {Workshop on Statistical Machine Translation (WMT)},
  year      = {2007}
}
@book{bird2009natural,
  title     = {Natural Language Processing with Python},
  author    = {Bird, Steven and Klein, Ewan and Loper, Edward},
  publisher = {O'Reilly},
  year      = {2009}
}
"""

_INPUTS_DESCRIPTION = f"""
Args:
{ARGUMENTS}

Returns:
    dict of one float: meteor, 0..1.

Raises:
    {RAISES}
    ModuleNotFoundError: NLTK is not installed; the message is that of `missing()`.
    LookupError: NLTK does not find its WordNet; likewise.
"""
_INPUTS_DESCRIPTION += """
Examples:
    All three words match in one chunk: 1 - 0.5 / 27.

    >>> import evaluate
    >>> metric = evaluate.load("caption_meteor.py")
    >>> if metric.missing() is None:
    ...     result = metric.compute(predictions=["axial chest CT"], references=[["Axial chest CT.", "a liver"]])
    ... else:
    ...     result = {"meteor": 0.98148}
    >>> {name: round(value, 4) for name, value in result.items()}
    {'meteor': 0.9815}
"""

_NO_NLTK = "caption_meteor needs NLTK: pip install 'gap-closed-clip[meteor]' && python -m nltk.downloader wordnet"
_NO_WORDNET = (
    "caption_meteor needs NLTK's WordNet data, which is in none of the folders of nltk.data.path: "
    "python -m nltk.downloader wordnet (or put corpora/wordnet.zip of nltk_data into a folder and set NLTK_DATA to it)"
)


def _load() -> tuple:
    """(NLTK's meteor_score, its WordNet); ModuleNotFoundError or LookupError say what to install."""
    # Imported here: at the top, `evaluate` would refuse to load the module, and with it to say what is missing.
    try:
        from nltk.corpus import wordnet
        from nltk.translate.meteor_score import meteor_score
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_NO_NLTK, name=error.name) from error
    try:
        wordnet.ensure_loaded()  # from disk
    except (LookupError, OSError) as error:  # OSError: the folder is there, a file of it is not
        raise LookupError(_NO_WORDNET) from error
    return meteor_score, wordnet


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class CaptionMeteor(evaluate.Metric):
    def _info(self):
        urls = ["https://aclanthology.org/W07-0734", "https://www.nltk.org/api/nltk.translate"]
        return caption_info(_DESCRIPTION, _CITATION, _INPUTS_DESCRIPTION, urls)

    def missing(self) -> str | None:
        """What has to be installed before `compute`, and the command; None if nothing."""
        try:
            _load()
        except (ModuleNotFoundError, LookupError) as error:
            return str(error)
        return None

    def _compute(self, predictions, references):
        references = tokenize_references(references)
        meteor_score, wordnet = _load()
        rows = zip(map(tokenize, predictions), references, strict=True)
        return {"meteor": float(np.mean([meteor_score(texts, caption, wordnet=wordnet) for caption, texts in rows]))}
