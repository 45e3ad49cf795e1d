"""What a phantom may show: modalities, views, findings with their words, and the drawing of lots for one case.

Findings of one modality are listed from common to rare and drawn by Zipf's law, as in teaching files, where a few
findings fill most pages and the long tail is what one learns from.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Finding:
    """One thing to draw and the words for it.

    Attributes:
        key: name of the finding, unique inside its modality.
        family: group of findings; the pair's label is "modality / family".
        names: noun phrases with their article, from usual to rare.
        sides: letters of the sides it may have: "r", "l", "b" (both), or "" where it has none.
        zones: keys into `ZONES`; empty where the place is part of the finding.
        millimetres: smallest and largest size worth quoting in a caption; (0, 0) where nobody measures it.
        details: sentences that may follow, whether or not the picture bears them out.
        views: views it may be drawn in; empty for all of the modality.
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
    """One patient: what is wrong, where, how much of it, and things no picture shows.

    `size` and `grade` are in 0..1; `number` counts lesions; `side` is the patient's ("" where there is none).
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
        """Group of the pair, "modality / family"."""
        return f"{self.modality} / {self.finding.family}"

    @property
    def size_word(self) -> str:
        """small, moderate or large; "" where nothing is wrong."""
        if self.finding.key.startswith("normal"):
            return ""
        return ("small", "moderate", "large")[min(2, int(3 * self.size))]


def zipf_index(rng: np.random.Generator, count: int, exponent: float = 1.0) -> int:
    """Draw 0..count-1 with chances proportional to 1/(k+1)**exponent."""
    cumulative = np.cumsum(np.arange(1, count + 1, dtype=np.float64) ** -exponent)
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def draw_case(rng: np.random.Generator, modalities: tuple[Modality, ...]) -> Case:
    """Draw one case: modality, finding, place, size, number, patient."""
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
