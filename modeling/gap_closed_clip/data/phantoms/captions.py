"""Writes the captions of the phantoms, in words as in open-access case reports but taken from none.

A caption may name the examination, the finding, its place and size, and the patient; each has many wordings, and each
may be left out. It may also tell what no image shows (history, histology, follow-up). The wordings are listed from
common to rare and chosen by Zipf's law.
"""

import re

import numpy as np

from .cases import Case, zipf_index
from .words import ASIDES, DIFFUSE_GRADE, EXAMINATION, FIGURES, LESION_GRADE, SHOWS, SYMPTOM, VIEW, WHEN, ZONES


def write_caption(case: Case, view: str, rng: np.random.Generator) -> str:
    """Write a caption for a case; `view` is that of its first image. It is never empty."""
    finding = _finding(case, rng)
    examination = _examination(case, view, rng)
    style = rng.random()
    if style < 0.07:
        parts = [_patient(case, rng) + _maybe(rng, 0.7, " " + _choose(rng, WHEN))]  # tells nothing that can be seen
    elif style < 0.12:
        parts = [examination + _maybe(rng, 0.5, " " + _choose(rng, WHEN))]
    elif style < 0.32:
        parts = [finding]
    elif style < 0.42:
        seen = _choose(rng, ("is seen", "is noted", "is visible", "was found", "can be appreciated", "was diagnosed"))
        parts = [finding + " " + seen + _maybe(rng, 0.4, " on " + examination)]
    elif style < 0.62:
        shows = _choose(rng, SHOWS)
        parts = [_patient(case, rng), f"{examination} {shows} {finding}"]
    elif style < 0.70:
        parts = [f"{finding} in {_patient(case, rng)}"]
    elif style < 0.78:
        parts = [f"{examination} {_choose(rng, WHEN)}", finding]
    else:
        patient = _maybe(rng, 0.2, f" of {_patient(case, rng)}")
        when = _maybe(rng, 0.15, " " + _choose(rng, WHEN))
        parts = [f"{examination}{patient}{when} {_choose(rng, SHOWS)} {finding}"]
    for chance, sentences in ((0.5, case.finding.details), (0.35, ASIDES), (0.15, ASIDES)):
        if sentences and rng.random() < chance:
            parts.append(_choose(rng, sentences, 0.6))
    return _join(parts, rng)


def _finding(case: Case, rng: np.random.Generator) -> str:
    """A noun phrase for the finding; grade, side, zone, size and the figure's mark may each be left out."""
    words = _choose(rng, case.finding.names, 0.3)
    if not case.size_word:
        return words + _maybe(rng, 0.3, f" on the {case.side} side" if case.side else "")
    article, noun = words.split(" ", 1) if words.startswith(("a ", "an ")) else ("", words)
    before, behind = _place(case, rng)
    grade = ""
    if article and case.finding.family != "other" and rng.random() < 0.35:
        grade = _choose(rng, (LESION_GRADE if case.finding.millimetres[1] else DIFFUSE_GRADE)[case.size_word]) + " "
    smallest, largest = case.finding.millimetres
    measure = ""
    if largest and rng.random() < 0.35:
        measure = _measure(smallest + case.size * (largest - smallest), rng)
    noun = grade + before + noun
    if measure and article and rng.random() < 0.5:
        noun = f"{measure} {noun}"
    elif measure:
        behind += " measuring " + measure
    if article:
        article = "an " if re.match(r"[aeiou]|8|1[18](?!\d)", noun.lower()) else "a "
    return _maybe(rng, 0.8, article) + noun + behind + _maybe(rng, 0.25, " " + _choose(rng, FIGURES))


def _place(case: Case, rng: np.random.Generator) -> tuple[str, str]:
    """Words for side and zone, those before the noun and those behind it; either may be empty."""
    side = case.side if rng.random() < 0.85 else ""
    if case.zone and rng.random() < 0.6 and side != "bilateral":
        return "", " in the " + (side + " " + _choose(rng, ZONES[case.zone])).strip()
    if not side:
        return "", ""
    if rng.random() < 0.6:
        return side + ("-sided " if side != "bilateral" and rng.random() < 0.3 else " "), ""
    return "", " on both sides" if side == "bilateral" else f" on the {side}"


def _measure(millimetres: float, rng: np.random.Generator) -> str:
    """A size in words, in one or two dimensions."""
    other = millimetres * rng.uniform(0.65, 1.0)
    style = rng.random()
    if style < 0.4:
        return f"{millimetres / 10:.1f} cm"
    if style < 0.7:
        return f"{millimetres:.0f} mm"
    return f"{millimetres / 10:.1f} × {other / 10:.1f} cm" if style < 0.9 else f"{millimetres:.0f}x{other:.0f} mm"


def _examination(case: Case, view: str, rng: np.random.Generator) -> str:
    """A noun phrase for the examination, often with its view."""
    name = _choose(rng, EXAMINATION[case.modality], 0.5)
    if rng.random() < 0.65:
        words = _choose(rng, VIEW[view], 0.7)
        name = f"{name}, {words} view" if rng.random() < 0.15 else f"{words} {name}"
    if case.modality == "mammogram" and case.side in ("right", "left") and rng.random() < 0.4:
        name = f"{case.side} {name}" if rng.random() < 0.5 else f"{name} of the {case.side} breast"
    return _maybe(rng, 0.08, _choose(rng, ("preoperative ", "follow-up ", "initial ", "repeat "))) + name


def _patient(case: Case, rng: np.random.Generator) -> str:
    """A noun phrase for the patient: "a 54-year-old man with cough", or less than that."""
    age = case.age
    if age < 16:
        noun = _choose(rng, ("child", "boy" if case.sex == "male" else "girl", "infant" if age < 3 else "patient"))
    else:
        noun = _choose(rng, ("man", "male", "gentleman") if case.sex == "male" else ("woman", "female", "lady"), 0.8)
    if rng.random() < 0.25:
        noun = "patient"
    an = "an" if age in (8, 11, 18) or 80 <= age < 90 else "a"
    aged = f"{an} {age}-year-old {noun}" if rng.random() < 0.8 else f"a {noun} aged {age}"
    aged = aged if rng.random() < 0.85 else f"a {noun}"
    symptoms = SYMPTOM["chest" if case.modality.startswith("chest") else case.modality]
    return aged + _maybe(rng, 0.7, " with " + _choose(rng, symptoms, 0.6))


def _join(parts: list[str], rng: np.random.Generator) -> str:
    """Join parts to sentences that begin with a capital and, usually, end with a full stop."""
    first, *others = (part[0].upper() + part[1:] for part in parts)
    glue = ": " if others and rng.random() < 0.12 else ". "
    text = glue.join([first, ". ".join(others)]) if others else first
    return text if rng.random() < 0.25 else text + "."


def _choose(rng: np.random.Generator, options: tuple[str, ...], exponent: float = 1.0) -> str:
    """One of the options, by Zipf's law."""
    return options[zipf_index(rng, len(options), exponent)]


def _maybe(rng: np.random.Generator, chance: float, words: str) -> str:
    """The words with this chance, else ""."""
    return words if rng.random() < chance else ""
