"""The fields of records: can they be read off a caption by the space, and does the caption say them word for word?"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import balanced_accuracy_score

from ..data import normalize_caption
from ..data.modality_ids import is_record
from ..metrics._clusters import few_rows_a_label
from ..metrics._embeddings import TIE
from ..model.record_values_gap_closed_clip import FieldError, as_date, as_number, is_missing, plain
from .pair_embeddings import PairEmbeddings, record_modalities
from .post_hoc import unit


DAYS_OF_A_YEAR = 365.2425
MOST_WORDS = 0.5  # share of distinct values from which on words are free text or an identifier
# Numbers with their decimals, and runs of letters and digits.
WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+")
ARTICLE = re.compile(r"(?:^|[.!?]\s)\s*A(?=\s)")  # that begins a sentence
SHORT = re.compile(r"[^\W\d_]{1,2}")  # most are other words, too, in small letters


def predict_record_fields(
    embeddings: PairEmbeddings, name: str, ks: Sequence[int] = (1, 10), block_size: int = 256
) -> dict[str, float]:
    """
    Every field of a record from the caption, by the records nearest to it: does the space know what it was told?

    A caption takes the value of the k samples whose record is nearest to it by cosine and has the field: of words the
    most frequent one (of equally frequent ones that with the larger sum of cosines), of numbers and dates the median.
    Records as near as the k-th count too. Samples that share an image or a caption with it, directly or through
    others,
    are left out: its own record would be retrieval. So no training set is needed; the samples are both question and
    answer. The baseline, the most frequent word or the median, is of all samples, the one that is asked for among
    them, which favours the baseline.

    Args:
        embeddings: of samples with captions and records.
        name: the modality that is a record.
        ks: how many neighbours vote.
        block_size: captions at once.

    Returns:
        Of words `text_to_NAME[FIELD]_accuracy@k`, `..._balanced_accuracy@k` (mean over the words of the share that is
        found), `..._majority_accuracy` and `..._chance_balanced_accuracy`; of numbers `..._mae@k` and `..._median_mae`
        (mean absolute error, in the field's unit; of dates in years). Fields with one value only, and words most of
        which occur once, are left out.
    """
    both = embeddings.having("text", name)
    records: list[dict[str, Any]] = [row or {} for row in record_modalities(both).get(name, [])]
    result: dict[str, float] = {}
    for field in dict.fromkeys(field for row in records for field in row):
        values = [row.get(field) for row in records]
        rows = np.flatnonzero([not is_missing(value) for value in values])
        truth = _numbers([values[row] for row in rows])
        words = None
        if truth is None:
            words, truth = np.unique([_word(values[row]) for row in rows], return_inverse=True)
        if len(set(truth)) < 2 or (words is not None and len(words) > MOST_WORDS * len(rows)):
            continue
        found = _nearest_values(both.select(rows), name, truth, words is not None, ks, block_size)
        scores = _errors(truth, found) if words is None else _accuracies(truth, found)
        result |= {f"text_to_{name}[{field}]_{metric}": value for metric, value in scores.items()}
    return result


def field_told_in_captions(
    pairs: Iterable[Mapping[str, Any]], fields: Sequence[str] | None = None
) -> dict[str, float]:
    """
    How often a caption tells the value of a record's field word for word: {field: share of those pairs that have
    both}.

    Case does not count, and words are whole: "male" is not in "female", 45 is in "a 45-year-old", 4 is not in "4.5
    mm". A value of one or two letters is found only as it is written and only if it has no small letter: ward "A" is
    not the article in "a nodule", and sex "m" is never found. Of a date the day counts. What is told in other words
    ("woman" for female) is not seen, and a word that means something else ("M" of a stage for the sex) is: the share
    is an estimate.

    Args:
        pairs: rows with a `caption`, and the fields themselves or records (mappings of fields) in any other column.
        fields: names; default: those of all records.
    """
    told: dict[str, int] = dict.fromkeys(fields or (), 0)
    number: dict[str, int] = dict(told)
    for row in pairs:
        caption = row.get("caption")
        values = dict(row) if fields is not None else {}
        for value in row.values():
            values |= value if is_record(value) else {}
        if not caption:
            continue
        words, written = _words(caption), WORD.findall(ARTICLE.sub(" ", unicodedata.normalize("NFC", caption)))
        for field in values if fields is None else fields:
            if not is_missing(values.get(field)):
                number[field] = number.get(field, 0) + 1
                told[field] = told.get(field, 0) + _is_told(values[field], words, written)
    return {field: told[field] / number[field] for field in told if number[field]}


def told_in_captions(embeddings: PairEmbeddings) -> dict[str, float]:
    """`field_told_in_captions` of embedded pairs as flat metrics, `caption_tells_NAME[FIELD]`."""
    result: dict[str, float] = {}
    for name, records in record_modalities(embeddings).items():
        rows = [{"caption": caption, name: row} for caption, row in zip(embeddings.captions, records, strict=True)]
        found = field_told_in_captions(rows)
        result |= {f"caption_tells_{name}[{field}]": share for field, share in found.items()}
    return result


def _is_told(value: Any, words: Sequence[str], written: Sequence[str]) -> bool:
    """Whether a value's words come in a row among those of a caption; a short value has to be `written` as it is."""
    value = unicodedata.normalize("NFC", _as_captions_have_it(value)).strip()
    if SHORT.fullmatch(value):
        return value == value.upper() and value in written  # letters of a script without small ones, too
    return f" {' '.join(_words(value))} " in f" {' '.join(words)} "


def _as_captions_have_it(value: Any) -> str:
    """A date without a time of day, which tables give to dates; a whole number without decimals."""
    try:
        date = as_date(plain(value))
    except FieldError:  # a time of day, a length of time
        date = None
    if date is not None:
        return date.isoformat()[:10]
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return str(value)


def _words(text: str) -> list[str]:
    return WORD.findall(normalize_caption(unicodedata.normalize("NFC", text)))


def _word(value: Any) -> str:
    return normalize_caption(str(value))


def _numbers(values: Sequence[Any]) -> np.ndarray | None:
    """Numbers, texts that write them, and dates (in years) as float64, by the rules by which a schema is learned; None
    where a value is a word."""
    found = []
    for value in values:
        try:
            value = plain(value)
        except FieldError:  # of a field that is in the data alone: a time of day, a length of time
            return None
        number, date = as_number(value), as_date(value)
        if number is None and date is not None:
            number = date.toordinal() / DAYS_OF_A_YEAR
        if number is None:
            return None
        found.append(number)
    return np.array(found)


def _nearest_values(
    samples: PairEmbeddings, name: str, truth: np.ndarray, are_words: bool, ks: Sequence[int], block_size: int
) -> dict[int, np.ndarray]:
    """{k: (N,) predictions, nan where there is no record of another family}."""
    captions, records, families = unit(samples.text_embeds), unit(samples.embeds(name)), samples.families()
    membership = np.eye(int(truth.max()) + 1)[truth] if are_words else None  # (N, words)
    found: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    for start in range(0, len(captions), block_size):
        block = slice(start, start + block_size)
        scores = captions[block] @ records.T  # (block, N)
        scores[families[block, None] == families[None, :]] = -np.inf
        for k in ks:
            place = min(k, scores.shape[1])
            kth = np.partition(scores, -place, axis=1)[:, -place, None]
            near = (scores >= kth - TIE) & np.isfinite(scores)
            if membership is None:
                votes = [np.median(truth[row]) if row.any() else np.nan for row in near]
                found[k].append(np.array(votes))
                continue
            cosines = np.where(near, scores, 0.0) / (4 * np.maximum(near.sum(axis=1, keepdims=True), 1))
            votes = np.round((near + cosines) @ membership, 9).argmax(axis=1).astype(float)
            found[k].append(np.where(near.any(axis=1), votes, np.nan))
    return {k: np.concatenate(parts) for k, parts in found.items()}


def _errors(truth: np.ndarray, found: Mapping[int, np.ndarray]) -> dict[str, float]:
    result = {f"mae@{k}": _mean(np.abs(values - truth), values) for k, values in found.items()}
    return result | {"median_mae": float(np.mean(np.abs(truth - np.median(truth))))}


def _accuracies(truth: np.ndarray, found: Mapping[int, np.ndarray]) -> dict[str, float]:
    result = {f"accuracy@{k}": _mean(values == truth, values) for k, values in found.items()}
    for k, values in found.items():
        known = ~np.isnan(values)
        with few_rows_a_label():
            balanced = balanced_accuracy_score(truth[known], values[known]) if known.any() else np.nan
        result[f"balanced_accuracy@{k}"] = float(balanced)
    result["majority_accuracy"] = float(np.bincount(truth).max() / len(truth))
    return result | {"chance_balanced_accuracy": 1 / len(set(truth))}


def _mean(scores: np.ndarray, values: np.ndarray) -> float:
    """Over those samples that there is a prediction for."""
    known = ~np.isnan(values)
    return float(scores[known].mean()) if known.any() else float("nan")


__all__ = ["field_told_in_captions", "predict_record_fields", "told_in_captions"]
