"""What a phantom may show (modalities, views, findings and the words for them), and the random choice of one case.

The findings of a modality are listed from common to rare and chosen by Zipf's law, as in teaching files, where a few
findings fill most pages and one learns from the long tail.
"""

from dataclasses import dataclass

import numpy as np


ORGANS_OF_MODALITIES = {"chest radiograph": "lung", "chest CT": "lung", "brain MR": "brain", "mammogram": "breast"}
ORGANS = {  # of families of findings elsewhere
    ("chest radiograph", "pleural space"): "pleura",
    ("chest radiograph", "heart and mediastinum"): "heart",
    ("chest CT", "pleural space"): "pleura",
    ("chest CT", "mediastinum and vessels"): "mediastinum",
    ("ultrasound", "gallbladder"): "gallbladder",
    ("ultrasound", "kidney"): "kidney",
    ("ultrasound", "liver"): "liver",
}


@dataclass(frozen=True)
class Finding:
    """Something to draw, and the words for it.

    Attributes:
        key: name of the finding, unique inside its modality.
        family: group of findings; the pair's label is "modality / family".
        names: noun phrases with their article, from usual to rare.
        sides: a letter for each side it may be on, "r", "l" or "b" (both), repeated by how common it is there; "" if
            it has no side.
        zones: keys of `words.ZONES`; empty if the place is part of the finding.
        millimetres: smallest and largest size that a caption may quote; (0, 0) for what nobody measures.
        details: sentences that may follow, whether or not the image shows what they say.
        views: the views that show it; empty if all of the modality do.
    """

    key: str
    family: str
    names: tuple[str, ...]
    sides: str = ""
    zones: tuple[str, ...] = ()
    millimetres: tuple[int, int] = (0, 0)
    details: tuple[str, ...] = ()
    views: tuple[str, ...] = ()


@dataclass(frozen=True)
class Modality:
    """A kind of examination: its views (usual to rare) and findings (common to rare)."""

    name: str
    views: tuple[str, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Case:
    """One patient: what is wrong, on which side, in which zone, how much of it, and what no image shows.

    Attributes:
        modality: name of the examination.
        finding: what is to be seen.
        views: the views that may be drawn.
        side: "right", "left" (the patient's) or "bilateral"; "" if the finding has no side.
        zone: a key of `words.ZONES`; "" if the finding has none.
        size: of the finding, from 0 to 1.
        number: how many lesions there are, where a finding has several.
        age: in years.
        sex: "female" or "male".
    """

    modality: str
    finding: Finding
    views: tuple[str, ...]
    side: str
    zone: str
    size: float
    number: int
    age: int
    sex: str

    @property
    def label(self) -> str:
        """The group that the pair belongs to: "modality / family"."""
        return f"{self.modality} / {self.finding.family}"

    @property
    def size_word(self) -> str:
        """ "small", "moderate" or "large"; "" if nothing is wrong."""
        if self.finding.key.startswith("normal"):
            return ""
        return ("small", "moderate", "large")[min(2, int(3 * self.size))]

    @property
    def millimetres(self) -> float | None:
        """The finding's size as a caption may quote it, to a tenth; None if nobody measures it."""
        smallest, largest = self.finding.millimetres
        return round(smallest + self.size * (largest - smallest), 1) if largest else None

    @property
    def organ(self) -> str:
        """Where the finding is, or, if nothing is wrong, what was looked at."""
        return ORGANS.get((self.modality, self.finding.family), ORGANS_OF_MODALITIES.get(self.modality, self.modality))

    @property
    def signs(self) -> tuple[float, ...]:
        """Signs of x for each affected side, -1 for the patient's right (at the image left); empty without a side."""
        return {"right": (-1.0,), "left": (1.0,), "bilateral": (-1.0, 1.0), "": ()}[self.side]


def zipf_index(rng: np.random.Generator, count: int, exponent: float = 1.0) -> int:
    """Draw a number k from 0 to count - 1 with a chance proportional to 1 / (k + 1)**exponent."""
    cumulative = np.cumsum(np.arange(1, count + 1, dtype=np.float64) ** -exponent)
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def sample_case(rng: np.random.Generator, modalities: tuple[Modality, ...]) -> Case:
    """Choose a case at random: modality, finding, place, size, number of lesions, patient."""
    modality = modalities[zipf_index(rng, len(modalities), 0.5)]
    finding = modality.findings[zipf_index(rng, len(modality.findings), 0.8)]
    side = {"r": "right", "l": "left", "b": "bilateral", "": ""}[_pick(rng, finding.sides)]
    return Case(
        modality=modality.name,
        finding=finding,
        views=finding.views or modality.views,
        side=side,
        zone=_pick(rng, finding.zones),
        size=float(rng.beta(1.4, 1.2)),
        number=1 + zipf_index(rng, 6, 1.2),
        age=int(np.clip(rng.normal(55, 18), 30 if modality.name == "mammogram" else 1, 94)),
        sex=("female", "male")[int(rng.random() < (0.02 if modality.name == "mammogram" else 0.52))],
    )


def _pick(rng: np.random.Generator, options: str | tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))] if options else ""
